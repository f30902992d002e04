"""Keep all images on the device and crop them there, for data sets that fit, such as CIFAR-10.

After the start, no pixels are copied from the host to the device.
"""

from collections.abc import Iterable, Iterator

import numpy as np
import torch
from torch import Tensor

from ssl_pretrain.data.chunks import Chunk, ChunkRequest
from ssl_pretrain.data.image_source import Source
from ssl_pretrain.data.images import UnreadableImage
from ssl_pretrain.data.order import Plan
from ssl_pretrain.data.replacement import Replacement, find_spare
from ssl_pretrain.views import crops
from ssl_pretrain.views.batch import upload
from ssl_pretrain.views.recipe import Crop


class DeviceCache:
    """The images of a source on the device, and the chunks of crops that are made from them.

    Images of all sizes share one tensor that is as high and as wide as the largest of them. Crops
    lie inside their image, so the padding is never seen.
    """

    def __init__(self, source: Source, view_crops: list[Crop], plan: Plan, device: torch.device):
        """Read all images and upload them.

        Raises:
            ValueError: If they do not fit into half of the device's free memory.
        """
        self._view_crops, self._plan, self._device = view_crops, plan, device
        self._source = source
        self._pixels, self._sizes, self._unreadable = _upload_images(source, device)

    def take(self, requests: Iterable[ChunkRequest]) -> Iterator[Chunk]:
        """Yield the chunks of requests."""
        for request in requests:
            numbers, replacements = self._choose_readable(request)
            rows = upload(torch.from_numpy(numbers), self._device)
            images, sizes = self._pixels.index_select(0, rows), self._sizes[numbers]
            views = []
            for view, crop in enumerate(self._view_crops):
                boxes = crops.draw_boxes(
                    crop, self._plan.seed, request.epoch, request.indices, view, sizes
                )
                views.append(crops.apply_to_batch(images, boxes, crop))
            yield Chunk(
                pixels=torch.cat([view.flatten() for view in views]),
                shapes=[view.shape[1:] for view in views],
                labels=self._source.labels[numbers],
                replacements=replacements,
            )

    def _choose_readable(self, request: ChunkRequest) -> tuple[np.ndarray, list[Replacement]]:
        """Return the images for the rows of a chunk, int64 (n,), and the replacements."""
        numbers = request.indices.astype(np.int64)
        replacements = []
        for row, index in enumerate(request.indices.tolist()):
            if reason := self._unreadable.get(index):
                slot = request.first_row + row
                spare = find_spare(
                    self._plan, request.step, slot, lambda number: number not in self._unreadable
                )
                replacements.append(Replacement.create(self._source, index, reason, spare))
                numbers[row] = replacements[-1].number
        return numbers, replacements

    def close(self) -> None:
        """Free the images' memory."""
        self._pixels = self._pixels.new_empty(0)


def _upload_images(
    source: Source, device: torch.device
) -> tuple[Tensor, np.ndarray, dict[int, str]]:
    """Upload all images.

    Returns:
        Pixels, uint8 (n, 3, height, width); sizes, int64 (n, 2); why images are unreadable, by
        number.
    """
    free_bytes = _usable_bytes(device)
    sizes = np.empty((len(source), 2), np.int64)
    unreadable, images = {}, []
    for index in range(len(source)):
        try:
            image = torch.from_numpy(source.read(index)).permute(2, 0, 1)
        except UnreadableImage as error:
            source.check_present()
            unreadable[index], image = str(error), torch.zeros(3, 1, 1, dtype=torch.uint8)
        sizes[index] = image.shape[1:]
        images.append(image)
        num_bytes = len(source) * 3 * int(sizes[: index + 1].max(axis=0).prod())
        if num_bytes > free_bytes:
            raise ValueError(
                f"data.cache: device: the {len(source):,} images of {source.where} need at least "
                f"{num_bytes / 2**30:.1f} GiB, and half of what is free on {device} is "
                f"{free_bytes / 2**30:.1f} GiB; set data.cache=none"
            )
    pixels = torch.zeros(len(source), 3, *sizes.max(axis=0).tolist(), dtype=torch.uint8)
    for index, image in enumerate(images):
        pixels[index, :, : image.shape[1], : image.shape[2]] = image
    return pixels.to(device), sizes, unreadable


def _usable_bytes(device: torch.device) -> float:
    return torch.cuda.mem_get_info(device)[0] / 2 if device.type == "cuda" else float("inf")
