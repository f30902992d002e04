"""Demo of `make demo`: pretrain on real digits, evaluate, and print what the network has learned.

It needs no download and no account.
"""

import sys
import time
from pathlib import Path

if not __package__:  # run as a file from a clone
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ssl_pretrain.launch import local

CONFIG = "configs/simclr_digits.yaml"
RUN = "runs/demo"


def main() -> int:
    """Run the demo and return its exit status."""
    with local.launching():
        return _main()


def _main() -> int:
    print(
        f"Pretraining with {CONFIG} into {RUN}: SimCLR on 1,297 real 8 x 8 digits, without their "
        "labels. This takes a few minutes.",
        flush=True,
    )
    start = time.monotonic()
    status = local.run([sys.executable, "-m", "ssl_pretrain.train", CONFIG, f"output={RUN}"])
    if status:
        return status
    training = f"training={time.monotonic() - start:.0f}"  # seconds
    return local.run([sys.executable, "-m", "ssl_pretrain.eval.demo_summary", RUN, training])


if __name__ == "__main__":
    sys.exit(main())
