"""Fixtures for the tests of this folder: skip without CUDA, the device, and an error where the host waits for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import pytest
import torch

NEEDS_CUDA = pytest.mark.skipif(
    not torch.cuda.is_available(),
    reason="needs a CUDA device; python tests/gpu/run.py runs all of these on a machine that has one",
)


@pytest.fixture
def cuda() -> torch.device:
    return torch.device("cuda")


@pytest.fixture
def never_waited_for() -> Callable[[], AbstractContextManager[None]]:
    """Return a context manager in which an operation that makes the host wait for the device raises RuntimeError."""

    @contextmanager
    def strict() -> Iterator[None]:
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")

    return strict
