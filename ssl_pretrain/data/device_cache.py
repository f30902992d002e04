"""Keep all images on the device and crop them there, for small data sets such as CIFAR-10.

After start-up, no pixels are copied from the host to the device.
"""

from collections.abc import Iterable, Iterator

import numpy as np
import torch
from torch import Tensor

from ssl_pretrain.data.chunks import Chunk, ChunkRequest
from ssl_pretrain.data.draw_ahead import draw_ahead
from ssl_pretrain.data.image_source import Source
from ssl_pretrain.data.images import UnreadableImage
from ssl_pretrain.data.order import BatchPlan
from ssl_pretrain.data.replacement import Replacement, find_spare
from ssl_pretrain.data.text_maker import TextMaker
from ssl_pretrain.views import crops
from ssl_pretrain.views.batch import upload
from ssl_pretrain.views.recipe import Crop
from ssl_pretrain.views.tokenizers import TokenArrays


class DeviceCache:
    """Copy of a source's images on the device, which makes chunks of crops from them.

    All images share one tensor and are padded to the largest height and width. Crops lie inside
    their image, so they never contain padding.
    """

    def __init__(
        self,
        source: Source,
        view_crops: list[Crop],
        plan: BatchPlan,
        device: torch.device,
        text_maker: TextMaker | None = None,
    ):
        """Read all images and upload them. Texts are read for each chunk.

        Raises:
            ValueError: If the images do not fit into half of the device's free memory.
        """
        self._view_crops, self._plan, self._device = view_crops, plan, device
        self._source, self._text_maker = source, text_maker or TextMaker(source)
        self._pixels, self._sizes, self._unreadable = _upload_images(source, device)

    def make_chunks(self, requests: Iterable[ChunkRequest]) -> Iterator[Chunk]:
        """Yield one chunk per request."""
        for _, (image_indices, replacements, boxes_by_view, tokens) in draw_ahead(
            self._draw, requests, self._device
        ):
            device_indices = upload(torch.from_numpy(image_indices), self._device)
            images = self._pixels.index_select(0, device_indices)
            views = [
                crops.apply_to_batch(images, boxes, crop)
                for boxes, crop in zip(boxes_by_view, self._view_crops)
            ]
            yield Chunk(
                pixels=torch.cat([view.flatten() for view in views]),
                shapes=[view.shape[1:] for view in views],
                labels=self._source.labels[image_indices],
                replacements=replacements,
                tokens=tokens,
            )

    def _draw(
        self, request: ChunkRequest
    ) -> tuple[np.ndarray, list[Replacement], list[np.ndarray], tuple[TokenArrays, ...]]:
        """Return the indices of a chunk's images, the replacements, the boxes and the texts."""
        image_indices, replacements = self._choose_readable(request)
        sizes = self._sizes[image_indices]
        boxes_by_view = [
            crops.draw_boxes(crop, self._plan.seed, request.epoch, request.indices, view, sizes)
            for view, crop in enumerate(self._view_crops)
        ]
        tokens = self._text_maker.make(image_indices, request.epoch, request.indices)
        return image_indices, replacements, boxes_by_view, tokens

    def _choose_readable(self, request: ChunkRequest) -> tuple[np.ndarray, list[Replacement]]:
        """Return the image indices of a chunk's rows, int64 (n,), and the replacements."""
        image_indices = request.indices.astype(np.int64)
        replacements = []
        for row, index in enumerate(request.indices.tolist()):
            if reason := self._find_problem(index):
                spare = find_spare(
                    self._plan,
                    request.step,
                    request.first_row + row,
                    lambda candidate: not self._find_problem(candidate),
                )
                replacements.append(Replacement.create(self._source, index, reason, spare))
                image_indices[row] = replacements[-1].spare_index
        return image_indices, replacements

    def _find_problem(self, index: int) -> str:
        """Return why an image or its text is missing, or an empty string."""
        return self._unreadable.get(index) or self._text_maker.read_ahead(index)

    def close(self) -> None:
        """Free the memory of the images."""
        self._pixels = self._pixels.new_empty(0)


def _upload_images(
    source: Source, device: torch.device
) -> tuple[Tensor, np.ndarray, dict[int, str]]:
    """Upload all images.

    Returns:
        The pixels, uint8 (n, C, height, width). The sizes, int64 (n, 2). The reason for each
        unreadable image, by index.
    """
    usable_bytes, channels = _usable_bytes(device), source.num_channels
    sizes = np.empty((len(source), 2), np.int64)
    unreadable, images = {}, []
    for index in range(len(source)):
        try:
            image = torch.from_numpy(source.read(index)).permute(2, 0, 1)
        except UnreadableImage as error:
            source.check_present()
            unreadable[index], image = str(error), torch.zeros(channels, 1, 1, dtype=torch.uint8)
        sizes[index] = image.shape[1:]
        images.append(image)
        num_bytes = len(source) * channels * int(sizes[: index + 1].max(axis=0).prod())
        if num_bytes > usable_bytes:
            raise ValueError(
                f"data.cache: device: the {len(source):,} images of {source.full_path} need at "
                f"least {num_bytes / 2**30:.1f} GiB, but half of the free memory of {device} is "
                f"{usable_bytes / 2**30:.1f} GiB; set data.cache=none"
            )
    shape = (len(source), channels, *sizes.max(axis=0).tolist())
    pixels = torch.zeros(shape, dtype=torch.uint8)
    for index, image in enumerate(images):
        pixels[index, :, : image.shape[1], : image.shape[2]] = image
    return pixels.to(device), sizes, unreadable


def _usable_bytes(device: torch.device) -> float:
    """Return half of a CUDA device's free memory. Other devices have no limit."""
    return torch.cuda.mem_get_info(device)[0] / 2 if device.type == "cuda" else float("inf")
