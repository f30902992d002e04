"""A digest that identifies the weights of a network, wherever they are loaded from."""

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor, nn

PREFIX = "model."  # name of timm's network in a backbone, which exports leave out


def digest_of_network(backbone: nn.Module) -> str:
    """Return the SHA-256 of a network's weights, as 64 hexadecimal digits.

    A run, its export and a file of the same weights have the same digest.
    """
    return digest_of_tensors(backbone.state_dict())


def digest_of_tensors(tensors: Mapping[str, Tensor]) -> str:
    """Return the digest of the network that has these weights, such as those of an export's file.

    Names, types, shapes and values count. The order of the tensors does not.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(
        ((name.removeprefix(PREFIX), tensor) for name, tensor in tensors.items()),
        key=lambda item: item[0],
    ):
        values = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {values.dtype} {tuple(values.shape)}\n".encode())
        digest.update(values.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
