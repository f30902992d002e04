"""Checks of the arguments of the losses. A message names the loss, the argument and its value."""

from collections.abc import Iterable

from torch import Tensor
from torch.nn import functional as F

from ssl_pretrain.distributed import process_group
from ssl_pretrain.losses.similarity import upcast


def check_embeddings(loss: str, **embeddings: Tensor) -> None:
    """Raise ValueError unless all embeddings have one shape, (local_batch, dim)."""
    shapes = [tuple(z.shape) for z in embeddings.values()]
    if len(set(shapes)) > 1 or len(shapes[0]) != 2:
        raise ValueError(
            f"{loss}: {_join(embeddings)} must share one (local_batch, dim) shape, "
            f"got {_join(shapes)}"
        )


def check_positive(loss: str, **values: float) -> None:
    """Raise ValueError unless all values are positive."""
    for name, value in values.items():
        if not value > 0:
            raise ValueError(f"{loss}: {name} must be > 0, got {value}")


def check_not_negative(loss: str, **values: float) -> None:
    """Raise ValueError if a value is negative."""
    for name, value in values.items():
        if not value >= 0:
            raise ValueError(f"{loss}: {name} must be >= 0, got {value}")


def check_two_images(loss: str, z: Tensor, missing: str = "negative") -> None:
    """Raise ValueError unless the global batch has at least two images.

    Args:
        loss: Name of the loss.
        z: Embeddings of this rank, one row per image.
        missing: Quantity that a single image does not have, for the message.
    """
    num_images = len(z) * process_group.world_size()
    if num_images < 2:
        raise ValueError(
            f"{loss}: needs at least 2 images in the global batch, got {num_images}, "
            f"which has no {missing}"
        )


def check_one_per_image(loss: str, num_images: int, **values: Tensor) -> None:
    """Raise ValueError unless each tensor has one number per image of this rank."""
    for name, value in values.items():
        if value.shape != (num_images,):
            raise ValueError(
                f"{loss}: {name} must be ({num_images},), one per image, got {tuple(value.shape)}"
            )


def check_labels(loss: str, labels: Tensor, num_images: int) -> None:
    """Raise ValueError unless there is one integer label per image of this rank."""
    check_one_per_image(loss, num_images, labels=labels)
    if labels.is_floating_point() or labels.is_complex():
        raise ValueError(f"{loss}: labels must be integers, got {labels.dtype}")


def check_queue(loss: str, queue: Tensor, dim: int) -> None:
    """Raise ValueError unless the rows of the queue are as wide as the embeddings."""
    if queue.ndim != 2 or queue.shape[1] != dim:
        raise ValueError(f"{loss}: the queue must be (queue_size, {dim}), got {tuple(queue.shape)}")


def unit_embeddings(loss: str, temperature: float, **embeddings: Tensor) -> list[Tensor]:
    """Check embeddings and a temperature, and normalize the embeddings.

    Args:
        loss: Name of the loss.
        temperature: Temperature, which must be positive.
        embeddings: Embeddings by the name of the argument, each of shape (local_batch, dim).

    Returns:
        The embeddings with unit length, in float32 or wider.

    Raises:
        ValueError: If the shapes differ or are not 2-D, or the temperature is not positive.
    """
    check_embeddings(loss, **embeddings)
    check_positive(loss, temperature=temperature)
    return [F.normalize(upcast(z), dim=1) for z in embeddings.values()]


def _join(items: Iterable[object]) -> str:
    """Join items as in "a, b and c"."""
    *first, last = map(str, items)
    return f"{', '.join(first)} and {last}" if first else last
