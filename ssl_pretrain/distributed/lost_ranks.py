"""Explain collectives that fail because another rank ended."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist

from ssl_pretrain.distributed import process_group
from ssl_pretrain.distributed.rendezvous import RendezvousError
from ssl_pretrain.system.exit_status import LostError
from ssl_pretrain.system.watchdog import rank_and_host, watchdog

# What gloo, NCCL and the store say about a rank that ended or is silent.
_LOST = re.compile(
    r"connection (was )?(closed|reset|refused)|timed? ?out|timeout|broken pipe"
    r"|remote process exited|failed to recv|recvvalue failed|sendbytes failed|connect.*failed"
    r"|no route to host",
    re.IGNORECASE | re.DOTALL,
)
_BACKENDS = re.compile(r"gloo|nccl|tcpstore|store->|socket|\[c10d", re.IGNORECASE)


class LostRankError(LostError):
    """Another rank ended or did not answer. The message names this rank and its activity."""


@contextmanager
def explain_lost_ranks() -> Iterator[None]:
    """Turn the many errors of a collective that another rank left into one message.

    Raises:
        LostRankError: Another rank ended, or did not answer within `parallel.timeout_seconds`.
    """
    try:
        yield
    except RendezvousError:
        raise
    except RuntimeError as error:
        if process_group.world_size() == 1 or not _is_lost_rank(error):
            raise
        reason = str(error).strip().splitlines()[0]
        raise LostRankError(
            f"{rank_and_host()}: another rank ended or did not answer within "
            f"{process_group.timeout_seconds():g} s (parallel.timeout_seconds) while "
            f"{watchdog.activity}: {reason}; look for the first error among the outputs of all "
            "ranks, fix it, and start all ranks again. The run resumes from its newest checkpoint"
        ) from error


def _is_lost_rank(error: RuntimeError) -> bool:
    is_network_error = isinstance(error, dist.DistNetworkError | dist.DistStoreError)
    names_backend = _BACKENDS.search(str(error)) is not None
    return (is_network_error or names_backend) and _LOST.search(str(error)) is not None
