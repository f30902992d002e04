"""Retrieve captions by images and images by captions.

Every test image ranks the captions of all test images by cosine similarity, and every caption ranks
all images. recall@k is the share of queries with a correct item among the first k, and MRR is the
mean of 1 / rank of the first correct item. An image may have several captions, of which the nearest
one counts. Images that share a caption word for word are correct answers for each other's captions.
The result is printed and saved to RUN/eval/captions.json.

    python -m ssl_pretrain.eval.captions runs/clip_composites
    # a test set in other shards
    python -m ssl_pretrain.eval.captions runs/clip data.val=/data/coco/val-{00000..00004}.tar
"""

import time
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ssl_pretrain.data.image_source import Source
from ssl_pretrain.data.images import UnreadableImage
from ssl_pretrain.eval import command_line, pair_retrieval, results
from ssl_pretrain.eval.frozen import towers
from ssl_pretrain.eval.frozen.evaluation_split import (
    EvaluationSplit,
    UnlabeledError,
    open_split,
)
from ssl_pretrain.eval.runs import Run
from ssl_pretrain.schema import POSITIVE_INT

OPTIONS: dict[str, dict[str, Any]] = {
    "--captions-per-image": {
        "type": POSITIVE_INT,
        "default": 5,
        "metavar": "N",
        "help": "captions of each image that are used, at most (default: 5, as in COCO)",
    },
}


def main(arguments: list[str]) -> None:
    """Run the command-line interface."""
    command_line.evaluate_and_print(
        command_line.build_parser("ssl_pretrain.eval.captions", __doc__, OPTIONS),
        arguments,
        lambda run, options: evaluate(run, options.captions_per_image),
    )


def evaluate(run: Run, captions_per_image: int = 5) -> dict[str, Any]:
    """Measure recall in both directions in percent and save it to RUN/eval/captions.json.

    Args:
        run: Run to evaluate.
        captions_per_image: Largest number of captions per image.

    Returns:
        The content of the result file.

    Raises:
        ValueError: If the method has no text tower, or the images have no captions.
    """
    start = time.monotonic()
    towers.check_method(run, "the retrieval of captions")
    source = open_split(run, "val")
    indices, captions, image_of_text = _collect_captions(source, captions_per_image)
    groups = pair_retrieval.group_items(captions, image_of_text)
    split, rows = EvaluationSplit(run, source, indices), []
    for name in ("random, as built", "pretrained"):
        run_towers = towers.build_towers(run, is_pretrained=name == "pretrained")
        images, texts = run_towers.embed_images(split), run_towers.embed_texts(captions)
        rows.append(results.Row(name, *_score(images, texts, image_of_text, groups)))
        results.print_progress(rows[-1].summary())
    num_missing = len(source) - len(indices)
    missing = f"; {num_missing:,} images have no readable caption" if num_missing else ""
    protocol = {
        "network": f"{run.network} of {run.checkpoint_path.name}, {run.config.backbone.name};"
        f" text tower {run.config.text_encoder.name}",
        "precision": run.describe_precision(),
        "pairs": f"{len(indices):,} test images and {len(captions):,} captions, at most"
        f" {captions_per_image} per image{missing}",
        "ranking": "cosine similarity; ties count against the query; images that share a caption"
        f" word for word count as one ({len(set(groups.tolist())):,} are different)",
        "deviation": "standard error over the queries",
    }
    seconds = time.monotonic() - start
    return results.save(run.path, "captions", protocol, rows, run.provenance(), seconds, "%")


def _collect_captions(
    source: Source, captions_per_image: int
) -> tuple[np.ndarray, list[str], Tensor]:
    """Return the indices of images with captions, all captions, and the image of each.

    Raises:
        UnlabeledError: If no image has a caption.
    """
    if not source.num_texts:
        raise UnlabeledError(
            f"data.val: {source.full_path} has no captions; give shards with .txt or .json, or a "
            "table with data.caption_column"
        )
    indices: list[int] = []
    captions: list[str] = []
    image_of_text: list[int] = []
    for index in range(len(source)):
        try:
            (alternatives,) = source.texts(index)
        except UnreadableImage:
            continue
        if alternatives:
            own = alternatives[:captions_per_image]
            image_of_text += [len(indices)] * len(own)
            captions += own
            indices.append(index)
    if not indices:
        raise UnlabeledError(
            f"data.val: no image of {source.full_path} has a caption; check the data"
        )
    return np.array(indices), captions, torch.tensor(image_of_text)


def _score(
    images: Tensor, texts: Tensor, image_of_text: Tensor, image_groups: Tensor
) -> tuple[dict[str, float], dict[str, float]]:
    """Return the scores and the standard errors of both directions, by column."""
    values: dict[str, float] = {}
    errors: dict[str, float] = {}
    directions = pair_retrieval.score_both_directions(
        images,
        texts,
        image_of_text.to(images.device),
        image_groups=image_groups.to(images.device),
    )
    for direction, scores in zip(("image to text", "text to image"), directions, strict=True):
        values |= {f"{direction}, {name}": value for name, value in scores.values.items()}
        errors |= {f"{direction}, {name}": e for name, e in scores.standard_errors.items()}
    return values, errors


if __name__ == "__main__":
    command_line.execute(main, "ssl_pretrain.eval.captions")
