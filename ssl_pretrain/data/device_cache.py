"""All images of a data set on the device, cropped there: for data sets that fit, such as CIFAR-10. No pixel passes the host again."""

from collections.abc import Iterable, Iterator

import numpy as np
import torch
from torch import Tensor

from ssl_pretrain.data import replacement
from ssl_pretrain.data.image_source import Source
from ssl_pretrain.data.images import UnreadableImage
from ssl_pretrain.data.order import Plan
from ssl_pretrain.data.workers import Chunk, Job, irreplaceable
from ssl_pretrain.views import crops
from ssl_pretrain.views.recipe import Crop
from ssl_pretrain.views.upload import upload


class Cache:
    """The images of a source on the device, and the chunks of jobs made from them. `close` gives their memory back.

    Images of any size share one block as large as the largest of them; boxes never leave an image, so the rest is not seen.

    Raises:
        ValueError: they do not fit into half of the device's free memory.
    """

    def __init__(self, source: Source, each: list[Crop], plan: Plan, device: torch.device):
        self._each, self._plan, self._device, self._source = each, plan, device, source
        self._pixels, self._sizes, self._unreadable = _uploaded(source, device)

    def take(self, jobs: Iterable[Job]) -> Iterator[Chunk]:
        for job in jobs:
            numbers, replaced = self._readable(job)
            images = self._pixels.index_select(0, upload(torch.from_numpy(numbers), self._device))
            views = []
            for number, crop in enumerate(self._each):
                boxes = crops.boxes(
                    crop, self._plan.seed, job.epoch, job.indices, number, self._sizes[numbers]
                )
                views.append(crops.apply_to_batch(images, boxes, crop))
            flat = torch.cat([view.flatten() for view in views])
            yield Chunk(
                flat, [view.shape[1:] for view in views], self._source.labels[numbers], replaced
            )

    def _readable(self, job: Job) -> tuple[np.ndarray, list[tuple[str, str]]]:
        """The images whose pixels fill the rows of a job, int64 (n,), and (file, what happened) of each replaced one."""
        numbers, replaced = job.indices.astype(np.int64), []
        for row, index in enumerate(job.indices.tolist()):
            if index in self._unreadable:
                reason = self._unreadable[index]
                taken = replacement.spare(
                    self._plan,
                    job.step,
                    job.first_row + row,
                    lambda number: number not in self._unreadable,
                )
                if taken is None:
                    raise ValueError(irreplaceable(reason, self._source.where, len(self._source)))
                numbers[row] = taken
                replaced.append(
                    (
                        self._source.name(index),
                        f"{reason}; {self._source.name(taken)} takes its place",
                    )
                )
        return numbers, replaced

    def close(self) -> None:
        self._pixels = self._pixels.new_empty(0)


def _uploaded(source: Source, device: torch.device) -> tuple[Tensor, np.ndarray, dict[int, str]]:
    """Pixels uint8 (n, 3, height, width) on the device, sizes int64 (n, 2), and why an image is unreadable, by number."""
    sizes, unreadable, images = np.empty((len(source), 2), np.int64), {}, []
    room, used = _room(device), 0
    for index in range(len(source)):
        try:
            image = torch.from_numpy(source.read(index)).permute(2, 0, 1)
        except UnreadableImage as error:
            source.check_present()
            unreadable[index], image = str(error), torch.zeros(3, 1, 1, dtype=torch.uint8)
        sizes[index] = image.shape[1:]
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
    return pixels.to(device), sizes, unreadable


def _room(device: torch.device) -> float:
    return torch.cuda.mem_get_info(device)[0] / 2 if device.type == "cuda" else float("inf")
