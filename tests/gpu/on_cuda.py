"""Fixtures of the GPU tests: the device, a skip without CUDA, and an error if the host waits."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import pytest
import torch

NEEDS_CUDA = pytest.mark.skipif(
    not torch.cuda.is_available(),
    reason="needs a CUDA device; run python tests/gpu/run.py on a machine that has one",
)


@pytest.fixture
def cuda() -> torch.device:
    return torch.device("cuda")


@pytest.fixture
def forbid_synchronization() -> Callable[[], AbstractContextManager[None]]:
    """Return a context manager that makes operations raise if they wait for the device."""

    @contextmanager
    def raise_on_synchronization() -> Iterator[None]:
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")

    return raise_on_synchronization
