"""All images of a data set on the device, cropped there: for data sets that fit, such as CIFAR-10. No pixel passes the host again."""

from collections.abc import Iterable, Iterator

import numpy as np
import torch
from torch import Tensor

from ssl_pretrain.data.sources import Source
from ssl_pretrain.data.workers import Chunk, Chunks, Job
from ssl_pretrain.views import crops
from ssl_pretrain.views.recipe import Crop
from ssl_pretrain.views.upload import upload


class Cache:
    """The images of a source on the device, and the chunks of jobs made from them. `close` gives their memory back.

    Images of any size share one block as large as the largest of them; boxes never leave an image, so the rest is not seen.

    Raises:
        ValueError: they do not fit into half of the device's free memory.
    """

    def __init__(self, source: Source, each: list[Crop], seed: int, device: torch.device):
        self._each, self._seed, self._device = each, seed, device
        self._pixels, self._sizes, self._labels, self._replaced = _uploaded(source, device)

    def take(self, jobs: Iterable[Job]) -> Iterator[Chunk]:
        for epoch, indices in jobs:
            rows = upload(torch.from_numpy(indices.astype(np.int64)), self._device)
            images = self._pixels.index_select(0, rows)
            views = []
            for number, crop in enumerate(self._each):
                boxes = crops.boxes(crop, self._seed, epoch, indices, number, self._sizes[indices])
                views.append(crops.apply_to_batch(images, boxes, crop))
            replaced = [self._replaced[index] for index in indices.tolist() if index in self._replaced]
            flat = torch.cat([view.flatten() for view in views])
            yield Chunk(flat, [view.shape[1:] for view in views], self._labels[indices], replaced)

    def close(self) -> None:
        self._pixels = self._pixels.new_empty(0)


def _uploaded(source: Source, device: torch.device) -> tuple[Tensor, np.ndarray, np.ndarray, dict[int, tuple[str, str]]]:
    """Pixels uint8 (n, 3, height, width) on the device, int64 (n, 2) sizes, labels, and what was replaced, by number."""
    read = Chunks(source, lambda image, _epoch, _index: [image])
    sizes, labels, replaced, images = np.empty((len(source), 2), np.int64), np.empty(len(source), np.int64), {}, []
    room, used = _room(device), 0
    for index in range(len(source)):
        chunk = read[(0, np.array([index]))]
        image = chunk.views()[0][0]
        sizes[index], labels[index] = image.shape[1:], chunk.labels[0]
        if chunk.replaced:
            replaced[index] = chunk.replaced[0]
        images.append(image)
        used = len(source) * 3 * int(sizes[: index + 1, 0].max()) * int(sizes[: index + 1, 1].max())
        if used > room:
            raise ValueError(
                f"data.cache: device: the {len(source):,} images of {source.where} need at least {used / 2**30:.1f} GiB, "
                f"and half of what is free on {device} is {room / 2**30:.1f} GiB; set data.cache=none"
            )
    pixels = torch.zeros(len(source), 3, *sizes.max(axis=0).tolist(), dtype=torch.uint8)
    for index, image in enumerate(images):
        pixels[index, :, : image.shape[1], : image.shape[2]] = image
    return pixels.to(device), sizes, labels, replaced


def _room(device: torch.device) -> float:
    return torch.cuda.mem_get_info(device)[0] / 2 if device.type == "cuda" else float("inf")
