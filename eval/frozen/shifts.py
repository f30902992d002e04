"""Evaluation views moved by a few pixels, which tests invariance to translation."""

from torch import Tensor
from torch.nn import functional as F

from ssl_pretrain.data.images import UnreadableImage
from ssl_pretrain.eval.frozen.evaluation_split import EvaluationSplit

SMALL = 32  # pixels; images with a shorter side are shifted by default

Offset = tuple[int, int]  # pixels to the right and down


def shift(images: Tensor, dx: int, dy: int) -> Tensor:
    """Move images (n, channels, height, width) dx pixels right and dy down, filling with black."""
    if not dx and not dy:
        return images
    height, width = images.shape[-2:]
    padded = F.pad(images, (max(dx, 0), max(-dx, 0), max(dy, 0), max(-dy, 0)))
    return padded[..., max(-dy, 0) :, max(-dx, 0) :][..., :height, :width]


def directions(split: EvaluationSplit, distance: int) -> list[Offset]:
    """Return the moves right, left, down and up by `distance` pixels of the original image.

    The offsets are in pixels of the evaluation view, whose crop scales the shorter side of the
    original to image_size / crop_ratio.
    """
    run = split.run
    scale = run.image_size / run.config.evaluation.crop_ratio / _shorter_side(split)
    moved = round(distance * scale)
    return [(moved, 0), (-moved, 0), (0, moved), (0, -moved)]


def default_distances(split: EvaluationSplit) -> list[int]:
    """Return the distances, in original pixels, that small images are shifted by."""
    return [1, 2] if _shorter_side(split) < SMALL else []


def describe(split: EvaluationSplit, distances: list[int]) -> str:
    """Describe the shifts for the protocol."""
    moved = ", ".join(
        f"{distance} original = {directions(split, distance)[0][0]} evaluation pixels"
        for distance in distances
    )
    return (
        f"queries only, right, left, down and up ({4 * len(split)} queries per distance), black"
        f" fill: {moved}"
    )


def _shorter_side(split: EvaluationSplit) -> int:
    """Return the shorter side, in pixels, of the first readable image."""
    for index in split.indices.tolist():
        try:
            return min(split.source.read(index).shape[:2])
        except UnreadableImage:
            split.source.check_present()
    raise ValueError(
        f"data.root: none of the {len(split):,} images of {split.source.where} can be read"
    )
