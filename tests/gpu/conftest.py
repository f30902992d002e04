"""What needs CUDA: collected everywhere, skipped with a reason where there is none."""

from pathlib import Path

import pytest
import torch

REASON = "needs a CUDA device; python tests/gpu/run.py runs all of these on a machine that has one"


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if Path(item.fspath).parent == Path(__file__).parent:
            item.add_marker(pytest.mark.skip(reason=REASON))


@pytest.fixture
def cuda():
    return torch.device("cuda")


@pytest.fixture
def never_waited_for():
    """Inside, a host that waits for the device is an error."""
    from contextlib import contextmanager

    @contextmanager
    def strict():
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")

    return strict
