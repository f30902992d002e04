"""The process from which the ranks and the loader workers of the tests are forked."""

import multiprocessing
from multiprocessing import forkserver

# It imports these once, so that a rank takes under a second instead of 20.
PRELOADED = ["torch", "torch._dynamo", "ssl_pretrain.train", "pytest", "warm"]


def start() -> None:
    """Start the process. The loader of a test would start one without the modules of a rank."""
    multiprocessing.set_forkserver_preload(PRELOADED)
    forkserver.ensure_running()


def stop() -> None:
    """End the process, so that the next one has the present environment and signals."""
    forkserver._forkserver._stop()
