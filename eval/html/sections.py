"""Sections of a report page that need only a run's files, so they also work during training."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from markupsafe import Markup
from PIL import Image

from ssl_pretrain import schema
from ssl_pretrain.data.config import DataConfig
from ssl_pretrain.eval import results
from ssl_pretrain.eval.html import charts, page
from ssl_pretrain.monitoring import metric_names, records, shown_bands
from ssl_pretrain.schema.image_sizes import ImageSize, height_and_width

Record = dict[str, Any]
TITLES = {
    "knn": "k-NN",
    "knn_grid": "k-NN, every k and temperature",
    "knn_train": "k-NN of held-out training images",
    "knn_train_grid": "k-NN of held-out training images, every k and temperature",
    "linear": "Linear",
    "linear_grid": "Linear, every setting tried",
    "attentive": "Attentive probe",
    "attentive_grid": "Attentive probe, every setting tried",
    "semi": "Few labels, whole network",
    "spectrum": "Spectrum",
    "retrieval": "Retrieval",
    "robustness": "Robustness",
    "detection": "Detection",
}
AXIS_KEYS = {*metric_names.AXES, "time"}  # keys of a record that have no curve
NUM_SPECTRA = 4  # curves in one chart, from the first spectrum to the last
NUM_NEIGHBOR_PICTURES = 4
VIEW_GAP = 2  # pixels between the views in views.png
MIN_VIEW_SIDE = 64  # pixels on the page of the longer side of a view
MAX_PIXELATED_SIZE = 64  # views up to this size are enlarged without smoothing


@dataclass(frozen=True)
class View:
    """A training view on the page."""

    src: str  # data URL of its <img>
    width: int  # on the page, in pixels
    description: str  # the random choices that produced it


def evaluation_title(name: str) -> str:
    """Return the title of a result on a page."""
    base, feature = results.split_name(name)
    return TITLES.get(base, base) + (f", {feature}" if feature else "")


def run_variables(run_path: Path, metrics: list[Record], view_size: ImageSize) -> dict[str, Any]:
    """Return the template variables that every page about a single run needs."""
    return {
        "shown_bands": describe_training_bands(run_path),
        "alerts": read_alerts(run_path),
        "training": draw_training_figures(run_path, metrics),
        "evaluations_over_steps": draw_evaluation_figures(run_path),
        "views": cut_view_rows(run_path, view_size),
        "pixelated": max(height_and_width(view_size)) <= MAX_PIXELATED_SIZE,
        "neighbors_over_time": read_neighbor_figures(run_path),
    }


def read_metrics(run_path: Path, name: str = "metrics.jsonl") -> list[Record]:
    """Read a file of records in the run's folder, one record per step, sorted by step."""
    return records.read(run_path / name)


def metric_points(metrics: list[Record], key: str) -> list[tuple[float, float]]:
    """Return (epoch, value) for each finite value of `key`, with shares in percent."""
    factor = 100 if metric_names.metric_info(key).is_percentage else 1
    return [
        (record["epoch"], factor * record[key])
        for record in metrics
        if isinstance(record.get(key), int | float) and math.isfinite(record[key])
    ]


def recorded_keys(metrics: list[Record], group: str) -> list[str]:
    """Return the recorded keys of a group in the order of `metric_names.METRICS`, then by name."""
    recorded = {key for record in metrics for key in record} - AXIS_KEYS
    known = [key for key in metric_names.METRICS if key in recorded]
    keys = [*known, *sorted(recorded.difference(known))]
    return [key for key in keys if metric_names.metric_info(key).group == group]


def metric_caption(key: str) -> str:
    """Return the caption of a metric's chart: its title, its unit and its description."""
    metric = metric_names.metric_info(key)
    title = metric.title[0].upper() + metric.title[1:] + (", %" if metric.is_percentage else "")
    return f"{title}: {metric.description}" if metric.description else title


def series_legend(names: Sequence[str]) -> tuple[tuple[str, str], ...]:
    """Return the name and the color of each series, as `charts.line_chart` draws them."""
    return tuple((name, charts.color(i, max(2, len(names)))) for i, name in enumerate(names))


def read_alerts(run_path: Path) -> list[Record]:
    """Read the alerts raised during the run."""
    paths = metric_names.existing_paths(run_path, "alerts.jsonl")
    return [json.loads(line) for path in paths for line in path.read_text().splitlines()]


def draw_training_figures(
    run_path: Path, metrics: list[Record]
) -> list[tuple[str, list[page.Figure]]]:
    """Draw the curves of each group, with the spectra and spreads of the embeddings over time."""
    groups = []
    for group in metric_names.GROUPS:
        figures = []
        for key in recorded_keys(metrics, group):
            title = metric_names.metric_info(key).title
            chart = charts.line_chart(
                {"": metric_points(metrics, key)}, title, has_markers=key == "knn"
            )
            figures.append(page.Figure(chart, metric_caption(key)))
        if group == metric_names.COLLAPSE:
            figures += _draw_embedding_figures(read_metrics(run_path, "plots.jsonl"))
        if figures:
            groups.append((group, figures))
    return groups


def _evenly_spaced(items: Sequence[Any], max_items: int) -> list[Any]:
    """Return at most `max_items` of the items, including the first and the last."""
    indices = np.linspace(0, len(items) - 1, min(max_items, len(items))).round().astype(int)
    return [items[index] for index in indices]


def _draw_embedding_figures(plots: list[Record]) -> list[page.Figure]:
    """Draw the spectrum and the spread of the embeddings at evenly spaced steps."""
    spectra, spreads = {}, {}
    for entry in _evenly_spaced(plots, NUM_SPECTRA):
        name = f"step {entry['step']:,}"
        spectra[name] = list(zip(entry["spectrum_index"], entry["spectrum"]))
        deviations = entry["deviations"]
        spreads[name] = list(zip(np.linspace(0, 100, len(deviations)), deviations))
    if not spectra:
        return []
    legend = series_legend(list(spectra))
    spectrum = charts.line_chart(spectra, "variance", "eigenvalue", has_log_axes=True)
    spread = charts.line_chart(spreads, "spread", "percent of the dimensions")
    return [
        page.Figure(spectrum, "Covariance spectrum of the embeddings", legend),
        page.Figure(spread, "Spread of each dimension, in ascending order", legend),
    ]


def evaluation_variables(result: Record) -> Record:
    """Return the template variables of one evaluation: its table and its protocol."""
    columns, selected = results.column_names(result), results.selected_hyperparameters(result)
    return {
        "title": evaluation_title(result["name"]),
        "measure": result.get("measure", results.ACCURACY),
        "columns": columns,
        "rows": [
            {
                "features": row["features"],
                "css_class": _row_css_class(row["features"]),
                "cells": [results.format_number(row, name) for name in columns],
            }
            for row in result["rows"]
        ],
        "protocol": [
            *result["protocol"].items(),
            *((f"chosen for {features}", setting) for features, setting in selected.items()),
        ],
    }


def _row_css_class(features: str) -> str:
    """Return the CSS class of a row of a result table."""
    if features.startswith("random, "):
        return "variant"
    return "ours" if features == "pretrained" else ""


def draw_evaluation_figures(run_path: Path) -> list[page.Figure]:
    """Plot evaluation results of the pretrained features over steps, if several steps have them."""
    figures = []
    for name, steps in results.load_by_step(run_path).items():
        series: dict[str, list[tuple[float, float]]] = {}
        for step, result in steps.items():
            for row in result["rows"]:
                if row["features"] == "pretrained":
                    for column, value in row["metrics"].items():
                        series.setdefault(column, []).append((step, value))
        if len(steps) > 1:
            title = evaluation_title(name)
            measure = steps[max(steps)].get("measure", results.ACCURACY)
            chart = charts.line_chart(series, title, "step", has_markers=True)
            legend = series_legend(list(series))
            figures.append(page.Figure(chart, f"{title}, {measure} of each checkpoint", legend))
    return figures


def describe_training_bands(run_path: Path) -> str:
    """Describe the channels that the pictures of the training show, from RUN/config.yaml.

    Return an empty string for plain gray and RGB.
    """
    path = run_path / "config.yaml"
    settings = (yaml.safe_load(path.read_text()) if path.is_file() else None) or {}
    num_channels = schema.value_at(settings, "data.channels") or DataConfig().channels
    return shown_bands.describe(schema.value_at(settings, "log.bands") or [], num_channels)


def cut_view_rows(run_path: Path, view_size: ImageSize) -> list[list[View]]:
    """Cut the trainer's grid of views into rows, one per image. Return no rows if there is no grid.

    Args:
        run_path: Folder of the run.
        view_size: Size of the tiles of the grid, from `recipe.enclosing_size`.
    """
    path, descriptions_path = run_path / "views.png", run_path / "views.json"
    if not path.is_file():
        return []
    grid, (height, width) = Image.open(path).convert("RGB"), height_and_width(view_size)
    if (grid.width - VIEW_GAP) % (width + VIEW_GAP) or (grid.height - VIEW_GAP) % (
        height + VIEW_GAP
    ):
        return [[View(page.image_data_url(grid), grid.width, "training views")]]
    has_descriptions = descriptions_path.is_file()
    descriptions = json.loads(descriptions_path.read_text()) if has_descriptions else []
    lefts = range(VIEW_GAP, grid.width, width + VIEW_GAP)
    width_on_page = round(width * max(1.0, MIN_VIEW_SIDE / max(height, width)))
    rows = []
    for row, top in enumerate(range(VIEW_GAP, grid.height, height + VIEW_GAP)):
        texts = descriptions[row] if row < len(descriptions) else []
        if len(texts) != len(lefts):
            texts = ["view"] * len(lefts)
        crops = [grid.crop((left, top, left + width, top + height)) for left in lefts]
        rows.append(
            [
                View(page.image_data_url(crop), width_on_page, text)
                for crop, text in zip(crops, texts)
            ]
        )
    return rows


def read_neighbor_figures(run_path: Path) -> list[page.Figure]:
    """Return pictures of some queries and their nearest training images at several steps."""
    folders = metric_names.existing_paths(run_path, "neighbors")
    paths = [path for folder in folders for path in sorted(folder.glob("step_*.png"))]
    figures = []
    for path in _evenly_spaced(paths, NUM_NEIGHBOR_PICTURES):
        src = page.image_data_url(Image.open(path).convert("RGB"))
        image = Markup('<img class="picture" alt="{}" src="{}">').format(path.stem, src)
        figures.append(page.Figure(image, f"Step {int(path.stem.removeprefix('step_')):,}"))
    return figures


def format_duration(seconds: float) -> str:
    """Format a duration as "3 h 05 min", "4 min 07 s" or "12 s"."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
