"""Sections of a report that show images: nearest neighbors, and maps of pixels and features."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from ssl_pretrain.eval.frozen import features
from ssl_pretrain.eval.frozen.evaluation_split import EvaluationSplit
from ssl_pretrain.eval.html import colors, image_maps, nearest_images, page
from ssl_pretrain.eval.runs import Run
from ssl_pretrain.monitoring import shown_bands

MAX_LEGEND_CLASSES = 20  # largest number of classes in the legend of the map


def neighbor_variables(
    queries: list[nearest_images.Query], bank: EvaluationSplit, image_kind: str
) -> dict[str, Any]:
    """Return the template variables of the table of queries and their neighbors."""
    description = (
        f"Nearest neighbors of {len(queries)} {image_kind} among {len(bank):,} training images, by"
        " cosine similarity. The training mean is subtracted from the pixels."
    )
    config = bank.run.config
    if bands := shown_bands.describe(config.log.bands, config.data.channels):
        description += f" The pictures show {bands}."
    if any(query.shift for query in queries):
        description += " The queries are shifted by 1 or 2 original pixels before the search."
    if any(query.label >= 0 for query in queries):
        description += " Neighbors of the query's class are underlined in green, others in red."
    names = [*bank.classes, ""]  # the label -1 of unlabeled images selects the empty name

    def neighbor_cells(
        query: nearest_images.Query, neighbors: list[nearest_images.LabeledImage]
    ) -> tuple[list[dict[str, str]], str]:
        """Return the neighbors' cells and how many of them have the query's class, as text."""
        marks = ["right" if label == query.label else "wrong" for _, label in neighbors]
        score = f"{marks.count('right')}/{len(marks)}"
        if query.label < 0:
            marks, score = [""] * len(marks), ""
        return [
            _cell(image, names[label], mark) for (image, label), mark in zip(neighbors, marks)
        ], score

    rows = []
    for query in queries:
        pixel_neighbors, pixel_score = neighbor_cells(query, query.pixel_neighbors)
        feature_neighbors, feature_score = neighbor_cells(query, query.feature_neighbors)
        shift = query.shift and f"moved {query.shift}"
        rows.append(
            {
                "query": _cell(query.image, names[query.label], ""),
                "label": " · ".join(filter(None, [names[query.label], shift])),
                "pixel_neighbors": pixel_neighbors,
                "pixel_score": pixel_score,
                "feature_neighbors": feature_neighbors,
                "feature_score": feature_score,
            }
        )
    return {"description": description, "rows": rows}


def _cell(pixels: np.ndarray, label: str, mark: str) -> dict[str, str]:
    return {"src": page.pixels_data_url(pixels), "label": label, "mark": mark}


def map_variables(run: Run, split: EvaluationSplit, image_kind: str) -> dict[str, Any]:
    """Return the template variables of the maps of pixels and features in two dimensions.

    Labeled images are dots in the color of their class. Images without labels are thumbnails.
    """
    has_labels = bool((split.labels >= 0).any())
    split = split.random_subset(
        image_maps.MAX_DOTS if has_labels else image_maps.MAX_THUMBNAILS, sort=True
    )
    backbone_features, label_tensor = features.extract(run.backbone, split)
    pixels, _ = features.raw_pixels(split)
    labels, num_classes = label_tensor.cpu().numpy(), len(split.classes)
    names = _image_names(split)
    figures = []
    for caption, vectors in (
        ("Features", backbone_features),
        ("Raw pixels, centered", pixels - pixels.mean(dim=0)),
    ):
        positions = nearest_images.project_by_tsne(vectors)
        image = (
            image_maps.draw_dots(positions, labels, num_classes, names)
            if has_labels
            else image_maps.draw_thumbnails(positions, names)
        )
        figures.append(page.Figure(image, caption))
    views = torch.cat([images for images, _ in split.batches()])
    side = image_maps.SMALL_THUMBNAIL_SIDE if has_labels else image_maps.THUMBNAIL_SIDE
    return {
        "description": _describe_map(split, image_kind, has_labels),
        "figures": figures,
        "legend": _class_legend(split.classes) if has_labels else [],
        "has_labels": has_labels,
        "sprite": image_maps.build_sprite(
            shown_bands.to_rgb(views, run.config.log.bands).numpy(), side
        ),
    }


def _describe_map(split: EvaluationSplit, image_kind: str, has_labels: bool) -> str:
    perplexity = nearest_images.tsne_perplexity(len(split))
    appearance = (
        "one color per class"
        if has_labels
        else "each in the free cell nearest to its place, so that none covers another"
    )
    return (
        f"{len(split):,} {image_kind}, {appearance}. Similar images are close to each other:"
        " t-SNE of vectors scaled to length 1 (scikit-learn,"
        f" perplexity {perplexity:.3g}, initialized by PCA, fixed seed)."
    )


def _class_legend(classes: list[str]) -> list[tuple[str, str]]:
    legend = [
        (name, colors.color(i, len(classes))) for i, name in enumerate(classes[:MAX_LEGEND_CLASSES])
    ]
    if len(classes) > MAX_LEGEND_CLASSES:
        legend.append((f"and {len(classes) - MAX_LEGEND_CLASSES} more", "transparent"))
    return legend


def _image_names(split: EvaluationSplit) -> list[str]:
    """Return the class of each image, or the name of its file if it has no label."""
    return [
        split.classes[label] if label >= 0 else Path(split.source.name(int(index))).name
        for label, index in zip(split.labels, split.indices)
    ]
