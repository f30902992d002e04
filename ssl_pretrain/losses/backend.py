"""Choice between plain tiles and Triton kernels for sums over pairs of embeddings."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from importlib.util import find_spec
from types import ModuleType
from typing import TypeVar

from torch import Tensor

T = TypeVar("T")


@dataclass(frozen=True)
class Backend:
    """Settings for computing sums over pairs of embeddings.

    Attributes:
        tile_rows: Anchors per tile.
        tile_columns: Candidates per tile.
        fused: True to use the Triton kernels instead of tiles for embeddings that they support.
    """

    tile_rows: int
    tile_columns: int
    fused: bool = False

    def with_small_plain_tiles(self) -> "Backend":
        """Return a backend for losses that take a few temporary tiles and have no kernels.

        The tiles of GPUs are quartered.
        """
        return Backend(min(4096, self.tile_rows), min(4096, self.tile_columns))

    def run_fused(self, anchors: Tensor, compute: Callable[[ModuleType], T]) -> T | None:
        """Return `compute(kernels)`, or None if the kernels do not support these embeddings.

        The kernels need Triton and at most 32 bits. If a kernel does not fit a device, a warning is
        printed and the device uses plain tiles from then on.
        """
        if not self.fused or find_spec("triton") is None:
            return None
        from ssl_pretrain.losses import tiles_triton

        if not tiles_triton.supports(anchors):
            return None
        try:
            return compute(tiles_triton)
        except tiles_triton.OutOfResources as error:
            tiles_triton.disable_kernels(anchors.device, error)
            return None


# The tiles of the CPU fit into its cache. Devices that are not listed use them, too.
BACKENDS = {"cpu": Backend(512, 1024), "cuda": Backend(8192, 8192, fused=True)}
_override: ContextVar[Backend | None] = ContextVar("backend", default=None)


def backend_for(anchors: Tensor) -> Backend:
    """Return the backend set by `use_backend`, or else the one for the device of the anchors."""
    return _override.get() or BACKENDS.get(anchors.device.type, BACKENDS["cpu"])


@contextmanager
def use_backend(backend: Backend) -> Iterator[None]:
    """Use a backend for all sums inside the context, on any device."""
    token = _override.set(backend)
    try:
        yield
    finally:
        _override.reset(token)
