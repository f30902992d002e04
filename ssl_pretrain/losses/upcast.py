"""The precision in which losses are computed."""

import torch
from torch import Tensor


def upcast(z: Tensor) -> Tensor:
    """Return `z` in float32, or unchanged if it is float64.

    Under autocast embeddings are bfloat16, which is too coarse for similarities and exponentials.
    """
    return z if z.dtype == torch.float64 else z.float()
