"""Sections of a report page that need only a run's files, so they also work during training."""

from pathlib import Path
from typing import Any

from ssl_pretrain.eval import results
from ssl_pretrain.eval.html import charts, page, run_files, training_figures, training_pictures
from ssl_pretrain.eval.html.run_files import Record

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
# Evaluations in the order of a page. The others follow by name.
ORDER = ("knn", "linear", "attentive", "finetune", "semi")


def evaluation_title(name: str) -> str:
    """Return the title of a result on a page."""
    base, feature = results.split_name(name)
    return TITLES.get(base, base) + (f", {feature}" if feature else "")


def run_variables(run_path: Path, metrics: list[Record]) -> dict[str, Any]:
    """Return the template variables that every page about a single run needs."""
    views = training_pictures.read_views_config(run_path)
    return {
        "shown_bands": training_pictures.describe_training_bands(run_path),
        "alerts": run_files.read_alerts(run_path),
        "training": training_figures.draw_groups(run_path, metrics),
        "evaluations_over_steps": draw_evaluation_figures(run_path),
        "views": training_pictures.cut_view_rows(run_path, views),
        "pixelated": training_pictures.is_pixelated(views),
        "neighbors_over_time": training_pictures.read_neighbor_figures(run_path),
    }


def order_of_evaluation(name: str) -> tuple[int, str]:
    """Return a key that sorts results: the main evaluations first, each before its grid."""
    base = results.split_name(name)[0].removesuffix(results.GRID_SUFFIX)
    position = next((i for i, start in enumerate(ORDER) if base.startswith(start)), len(ORDER))
    return position, name


def evaluation_variables(evaluations: list[Record]) -> list[Record]:
    """Return the template variables of the evaluations, each with its grid of settings if any."""
    by_name = {result["name"]: result for result in evaluations}
    variables = []
    for name in sorted(by_name, key=order_of_evaluation):
        if name.endswith(results.GRID_SUFFIX) and name.removesuffix(results.GRID_SUFFIX) in by_name:
            continue
        grid = by_name.get(f"{name}{results.GRID_SUFFIX}")
        variables.append(
            _result_variables(by_name[name]) | {"grid": _result_variables(grid) if grid else None}
        )
    return variables


def _result_variables(result: Record) -> Record:
    """Return the template variables of one result: its table and its protocol."""
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
        if len(steps) > 1 and not name.endswith(results.GRID_SUFFIX):
            title = evaluation_title(name)
            measure = steps[max(steps)].get("measure", results.ACCURACY)
            figures.append(
                page.Figure(
                    charts.line_chart(series, title, "step", has_markers=True),
                    f"{title} of each checkpoint",
                    training_figures.series_legend(list(series)),
                    note=page.capitalize(measure),
                    file_name=f"{run_path.resolve().name}_{name}_by_step",
                )
            )
    return figures


def format_duration(seconds: float) -> str:
    """Format a duration as "3 h 05 min", "4 min 07 s" or "12 s"."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
