"""Copy tensors from the host to a device without waiting."""

import torch
from torch import Tensor


def upload(tensor: Tensor, device: torch.device | str) -> Tensor:
    """Return the tensor on a device.

    A copy to a GPU goes through pinned memory, which torch keeps until the copy is done. A copy
    from other memory would block the host.
    """
    device = torch.device(device)
    if device.type != "cuda" or tensor.is_cuda:
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
