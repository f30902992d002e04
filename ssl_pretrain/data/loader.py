"""Yield the same batches for any number of workers and ranks, and from any first step.

A reader reads each image once and cuts all of its crops as uint8. Threads of compiled code do this
if the images are in a .beton file and FFCV is installed. Otherwise worker processes do it. Both use
the same order, random numbers and resizing, so they produce the same views from the same bytes.
Color is applied to whole batches on their device. There is no random state, so a resumed run only
needs the step.
"""

import itertools
import sys
import weakref
from collections.abc import Iterator
from typing import Self

import numpy as np
import torch
from torch import Tensor

from ssl_pretrain.data import readers
from ssl_pretrain.data.beton.beton_source import Beton
from ssl_pretrain.data.chunks import Chunk, ChunkRequest
from ssl_pretrain.data.draw_ahead import draw_ahead
from ssl_pretrain.data.images import UnreadableImage
from ssl_pretrain.data.order import BatchPlan, check_batch_divides
from ssl_pretrain.data.readers import Reader
from ssl_pretrain.data.replacement import ReplacementLimit
from ssl_pretrain.data.source_report import check_images, layout_lines
from ssl_pretrain.data.sources import DataConfig, open_source
from ssl_pretrain.data.text_maker import TextMaker
from ssl_pretrain.distributed import collectives, process_group
from ssl_pretrain.views import color, crops, masks, recipe
from ssl_pretrain.views.batch import Batch, MaskSet, TextSet, upload
from ssl_pretrain.views.color_parameters import ColorParameters, describe_view, draw_colors
from ssl_pretrain.views.recipe import ViewsConfig
from ssl_pretrain.views.text_recipe import TextConfig

# Files of fewer images are soon read, so that the hint to write a .beton would only distract.
MIN_IMAGES_OF_LOADER_HINT = 100_000


class Loader:
    """The training batches of one rank. Close it, or use it in a `with` statement.

    Attributes:
        reader: Reads the images and cuts their crops.
        source: Source of the images.
        steps_per_epoch: Whole global batches per epoch.
        num_images_read: Number of images in the batches so far.
        reading_seconds: Time that workers spent on these batches, summed over their chunks.
    """

    def __init__(
        self,
        reader: Reader,
        *,
        view_dtype: torch.dtype = torch.float32,
        max_replaced: float = DataConfig.max_replaced,
    ):
        """Make batches from the chunks of a reader.

        Args:
            reader: Reads the images and cuts their crops. The loader closes it.
            view_dtype: Type of the views on a GPU.
            max_replaced: Share of the images that may be unreadable, as in `data.max_replaced`.
        """
        self.reader, self.source = reader, reader.source
        self.steps_per_epoch = reader.plan.steps_per_epoch
        self.num_images_read, self.reading_seconds = 0, 0.0
        self._view_dtype = view_dtype
        self._replacements = ReplacementLimit(reader.source, len(reader.source), max_replaced)
        on_gpu = reader.device.type == "cuda"
        self._stream = torch.cuda.Stream(reader.device) if on_gpu else None
        # This also ends the workers of a loader that is garbage-collected or still open at exit.
        weakref.finalize(self, reader.pool.close)

    @property
    def num_replaced(self) -> int:
        """Number of unreadable images replaced so far in this rank's batches."""
        return self._replacements.num_replaced

    def iterate_from(self, step: int) -> Iterator[Batch]:
        """Return an endless iterator over the batches, starting with the batch of `step`.

        The workers start immediately. A new call ends the iterator of the previous one. Errors are
        raised when the next batch is requested.

        Raises:
            RuntimeError: If an image could not be turned into views, or a worker was killed.
            ValueError: If more images are unreadable than `data.max_replaced` allows, or no image
                is left to replace one.
            FileNotFoundError: If the source's folder or file no longer exists.
        """
        requests = _request_chunks(self.reader.plan, self.reader.chunk_size, step)
        return self._batches(step, self.reader.pool.make_chunks(requests))

    def close(self) -> None:
        """End the workers and the iterators of `iterate_from`. Further calls do nothing."""
        self.reader.pool.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()

    def indices(self, step: int) -> np.ndarray:
        """Return the indices of this rank's images in a step, int64 (local_batch,)."""
        return self.reader.plan.indices(step)

    def describe_views(self, step: int, num_images: int) -> list[list[str]]:
        """Describe the views of this rank's first images in a step, one list per image.

        The description of a view's masks follows that of the view.
        """
        plan, view_crops = self.reader.plan, recipe.crop_per_view(self.reader.views)
        indices, epoch = self.indices(step)[:num_images], plan.epoch(step)
        colors, mask_sets = self._draw_colors(step, indices), self._draw_masks(step, indices)
        rows = []
        for row, index in enumerate(indices.tolist()):
            try:
                size = self.source.read(index).shape[:2]
            except UnreadableImage:
                size = None
            texts = []
            for view, crop in enumerate(view_crops):
                if size is None:
                    texts.append("another image instead of an unreadable one")
                else:
                    box = crops.draw_box(crop, plan.seed, epoch, index, view, *size)
                    texts.append(describe_view(crop, box, colors[view], row))
                texts += masks.describe(mask_sets, view, row, crop)
            rows.append(texts)
        return rows

    def count_replaced(self, step: int, every_steps: int, last_step: int) -> dict[str, int]:
        """Count the replaced images of all ranks, and raise an error if there are too many.

        This is a collective on the CPU.

        Args:
            step: Number of completed steps, the same on every rank.
            every_steps: Number of steps between records.
            last_step: Last step of the run, which is recorded too.

        Returns:
            `replaced_images` since the last record if this step is recorded, else an empty dict.

        Raises:
            ValueError: If more images were replaced in this epoch than `data.max_replaced` allows.
        """
        is_recorded = step % every_steps == 0 or step == last_step
        if not is_recorded and step % self.steps_per_epoch:
            return {}
        num_replaced = self._replacements.count_over_ranks(is_reported=is_recorded)
        return {"replaced_images": num_replaced} if is_recorded else {}

    def _batches(self, first_step: int, chunks: Iterator[Chunk]) -> Iterator[Batch]:
        device = self.reader.device
        steps = draw_ahead(self._draw, itertools.count(first_step), device)
        for step, (indices, colors, mask_sets) in steps:
            if step == first_step or step % self.steps_per_epoch == 0:
                self._replacements.begin_pass()
            num_chunks = -(-len(indices) // self.reader.chunk_size)
            device_chunks = [self._upload(chunk) for chunk in itertools.islice(chunks, num_chunks)]
            if not device_chunks:
                return
            pixels = [
                torch.cat(blocks) if len(blocks) > 1 else blocks[0]
                for blocks in zip(*(chunk.views() for chunk in device_chunks))
            ]
            views = self._apply_colors(pixels, colors)
            labels = torch.from_numpy(np.concatenate([chunk.labels for chunk in device_chunks]))
            index_tensor = torch.from_numpy(indices.copy())
            yield Batch(
                views,
                upload(labels, device),
                upload(index_tensor, device),
                tuple(mask_set.upload(device) for mask_set in mask_sets),
                tuple(texts.upload(device) for texts in _join_texts(device_chunks)),
            )

    def _upload(self, chunk: Chunk) -> Chunk:
        """Count a chunk, raise its error if it has one, and copy it to the device."""
        self.num_images_read += len(chunk.labels)
        self.reading_seconds += chunk.seconds
        self._replacements.add(chunk.replacements)
        if chunk.error is not None:
            raise chunk.error
        if self._stream is None or chunk.pixels.is_cuda:
            return chunk.to(self.reader.device)
        # A separate stream copies while the GPU still computes the previous step.
        current = torch.cuda.current_stream(self.reader.device)
        with torch.cuda.stream(self._stream):
            chunk = chunk.to(self.reader.device)
        current.wait_stream(self._stream)
        chunk.pixels.record_stream(current)
        return chunk

    def _draw(self, step: int) -> tuple[np.ndarray, list[ColorParameters], tuple[MaskSet, ...]]:
        """Return the indices, the color parameters and the masks of a step's batch."""
        indices = self.indices(step)
        return indices, self._draw_colors(step, indices), self._draw_masks(step, indices)

    def _apply_colors(self, pixels: list[Tensor], colors: list[ColorParameters]) -> list[Tensor]:
        config = self.reader.views
        views: list[Tensor] = []
        for crop in config.crops.values():
            group = slice(len(views), len(views) + crop.count)
            views += color.apply_to_group(
                pixels[group], colors[group], crop, config.mean, config.std, self._view_dtype
            )
        return views

    def _draw_colors(self, step: int, indices: np.ndarray) -> list[ColorParameters]:
        """Draw the color parameters of each view of these images in a step."""
        plan, view_crops = self.reader.plan, recipe.crop_per_view(self.reader.views)
        return [
            draw_colors(crop, plan.seed, plan.epoch(step), indices, view)
            for view, crop in enumerate(view_crops)
        ]

    def _draw_masks(self, step: int, indices: np.ndarray) -> tuple[MaskSet, ...]:
        """Draw the masks of this rank's first images in a step."""
        plan = self.reader.plan
        return masks.draw(
            self.reader.views,
            masks.Position(
                seed=plan.seed,
                epoch=plan.epoch(step),
                step=step,
                indices=indices,
                first_slot=plan.rank * plan.local_batch_size,
                global_batch_size=plan.global_batch_size,
            ),
        )


def build(
    data: DataConfig,
    views: ViewsConfig,
    *,
    seed: int,
    global_batch_size: int,
    device: torch.device | str,
    view_dtype: torch.dtype = torch.float32,
    text: TextConfig | None = None,
) -> Loader:
    """Build the loader of this rank. One rank per machine lists the files first.

    Args:
        data: The images and how they are read. At most one worker per core is started.
        views: The recipe of the views. Without crops, images are not read.
        seed: Seed of the image order and of every random choice about a view.
        global_batch_size: Images per step, over all ranks.
        device: Device of the batches.
        view_dtype: Type of the views on a GPU.
        text: How texts are chosen and tokenized. None for batches without texts.

    Raises:
        ValueError: If a key of `data` or `views` is invalid, there are fewer images than in a
            batch, or the batch does not divide evenly over the ranks.
    """
    rank, world_size = process_group.rank(), process_group.world_size()
    check_batch_divides(global_batch_size, world_size)
    lines: list[str] = []
    if process_group.local_rank() == 0:
        source = open_source(data, "train")
        check_images(source)
        lines = layout_lines(data, source)  # opens the validation images, and lists them first
    collectives.barrier()
    if process_group.local_rank() != 0:
        source = open_source(data, "train")
    if text is None:
        source = source.without_texts()
    kind, reason = readers.ReaderKind.PROCESSES, ""
    if views.crops:
        kind, reason = readers.choose_reader_kind(data, source)
    is_folder = kind is readers.ReaderKind.PROCESSES and not isinstance(source, Beton)
    if reason and (not is_folder or len(source) >= MIN_IMAGES_OF_LOADER_HINT):
        lines.append(f"data.loader: {kind}: {reason}")
    process_group.print_once(*lines, file=sys.stderr)
    window_size = data.quasi_random_window if data.order == "quasi_random" else 0
    plan = BatchPlan(seed, len(source), global_batch_size, rank, world_size, window_size)
    num_workers = min(data.num_workers, process_group.cores_per_rank())
    if num_workers and (reason := source.explain_no_workers()):
        process_group.print_once(
            f"data.num_workers: 0 instead of {data.num_workers}, because worker processes cannot "
            f"read {source.full_path}: {reason}",
            file=sys.stderr,
        )
        num_workers = 0
    reader = readers.build_reader(
        source,
        views,
        plan,
        kind,
        num_workers=num_workers,
        device=device,
        text_maker=TextMaker(source, text, seed),
    )
    if reader.note:
        process_group.print_once(reader.note, file=sys.stderr)
    return Loader(reader, view_dtype=view_dtype, max_replaced=data.max_replaced)


def _join_texts(chunks: list[Chunk]) -> list[TextSet]:
    """Return the texts of all chunks' items, one set per text of an item."""
    return [
        TextSet(
            torch.from_numpy(np.concatenate([tokens.ids for tokens in sets])).long(),
            torch.from_numpy(np.concatenate([tokens.valid for tokens in sets])),
        )
        for sets in zip(*(chunk.tokens for chunk in chunks))
    ]


def _request_chunks(plan: BatchPlan, chunk_size: int, first_step: int) -> Iterator[ChunkRequest]:
    """Yield the requests for the chunks of all batches, endlessly, beginning with `first_step`.

    If this were a method, its iterator would keep the loader from being garbage-collected.
    """
    for step in itertools.count(first_step):
        indices = plan.indices(step)
        for start in range(0, len(indices), chunk_size):
            yield ChunkRequest(plan.epoch(step), indices[start : start + chunk_size], step, start)
