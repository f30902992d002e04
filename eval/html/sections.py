"""The parts of the report that are made of the run's files alone, so that they can be made while the run goes on."""

from __future__ import annotations

import json
import math
from html import escape
from pathlib import Path
from typing import Any

from ssl_pretrain.eval import results
from ssl_pretrain.eval.html import charts, page
from ssl_pretrain.monitoring import metric_names, records

AXES = {*metric_names.AXES, "time"}
SHOWN_SPECTRA = 4  # from the first to the last
SHOWN_NEIGHBOURS = 4


def read_metrics(run: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    """Read the records of one of the run's files, one per step, in order."""
    return records.read(run / name)


def curve(records: list[dict[str, Any]], key: str) -> list[tuple[float, float]]:
    """(epoch, value) wherever `key` was recorded and is finite."""
    return [
        (record["epoch"], record[key])
        for record in records
        if isinstance(record.get(key), int | float) and math.isfinite(record[key])
    ]


def keys_of(records: list[dict[str, Any]], group: str) -> list[str]:
    """The keys of a group that were recorded, those that have a name for people first and in their order."""
    recorded = {key for record in records for key in record} - AXES
    known = [key for key in metric_names.CURVES if key in recorded]
    return [
        key
        for key in [*known, *sorted(recorded - set(known))]
        if metric_names.curve(key).group == group
    ]


def scaled(records: list[dict[str, Any]], key: str) -> list[tuple[float, float]]:
    factor = 100 if metric_names.curve(key).percent else 1
    return [(epoch, factor * value) for epoch, value in curve(records, key)]


def caption(key: str) -> str:
    found = metric_names.curve(key)
    title = found.title[0].upper() + found.title[1:] + (", %" if found.percent else "")
    return f"{title}: {found.description}" if found.description else title


def alerts(run: Path, title: str = "Alerts") -> str:
    """Return a section with the alerts raised during the run, or an empty text without any."""
    lines = [
        line
        for path in metric_names.existing_paths(run, "alerts.jsonl")
        for line in path.read_text().splitlines()
    ]
    shown = [
        f'<p class="alert"><b>{escape(alert["title"])}</b><br>{escape(alert["text"])}</p>'
        for alert in map(json.loads, lines)
    ]
    return page.section(title, *shown) if shown else ""


def training(run: Path, records: list[dict[str, Any]]) -> str:
    """The curves by group, and the spectrum and spread of the embeddings as they changed."""
    parts = []
    for group in metric_names.GROUPS:
        figures = [
            page.figure(
                charts.line(
                    scaled(records, key), metric_names.curve(key).title, marked=key == "knn"
                ),
                caption(key),
            )
            for key in keys_of(records, group)
        ]
        figures += (
            _spectra(read_metrics(run, "plots.jsonl")) if group == metric_names.COLLAPSE else []
        )
        if figures:
            parts.append(f'<h3>{group}</h3><div class="two">{"".join(figures)}</div>')
    return page.section("Training", *(parts or [page.paragraph("No record yet.")]))


def _spectra(plots: list[dict[str, Any]]) -> list[str]:
    if not plots:
        return []
    chosen = sorted(
        {round(i * (len(plots) - 1) / max(1, SHOWN_SPECTRA - 1)) for i in range(SHOWN_SPECTRA)}
    )
    shown = [plots[number] for number in chosen]
    names = [f"step {entry['step']:,}" for entry in shown]
    spectra = [
        (name, list(zip(entry["spectrum_index"], entry["spectrum"])))
        for name, entry in zip(names, shown)
    ]
    spreads = [
        (
            name,
            [
                (100 * i / max(1, len(entry["deviations"]) - 1), value)
                for i, value in enumerate(entry["deviations"])
            ],
        )
        for name, entry in zip(names, shown)
    ]
    legend = page.legend(
        [(name, charts.colour(number, max(2, len(names)))) for number, name in enumerate(names)]
    )
    return [
        page.figure(
            charts.lines(spectra, "variance", "eigenvalue", logarithmic=True) + legend,
            "Covariance spectrum of the embeddings",
        ),
        page.figure(
            charts.lines(spreads, "spread", "percent of the dimensions") + legend,
            "Spread of each dimension, from the flattest",
        ),
    ]


def evaluations_over_steps(run: Path) -> str:
    """The pretrained features' numbers against the step, where several checkpoints were judged; else empty."""
    figures = []
    for name, steps in results.by_step(run).items():
        if len(steps) < 2:
            continue
        ours = {
            step: row["metrics"]
            for step, found in steps.items()
            for row in found["rows"]
            if row["features"] == "pretrained"
        }
        columns = list(dict.fromkeys(column for metrics in ours.values() for column in metrics))
        series = [
            (
                column,
                [(step, metrics[column]) for step, metrics in ours.items() if column in metrics],
            )
            for column in columns
        ]
        legend = page.legend(
            [
                (column, charts.colour(number, max(2, len(series))))
                for number, column in enumerate(columns)
            ]
        )
        title, measure = (
            page.TITLES.get(name, name),
            steps[max(steps)].get("measure", "accuracy, %"),
        )
        figures.append(
            page.figure(
                charts.lines(series, title, "step", marked=True) + legend,
                f"{title}, {measure} of each checkpoint",
            )
        )
    return f'<div class="two">{"".join(figures)}</div>' if figures else ""


def views(run: Path, view_size: int) -> str:
    path = run / "views.png"
    if not path.is_file():
        return page.section("Views", page.paragraph("The trainer left no views.png."))
    described = run / "views.json"
    drawn = json.loads(described.read_text()) if described.is_file() else None
    about = "What the network is trained on: the views of an image side by side, as they enter it."
    about += " Point at one to read what was drawn for it." if drawn else ""
    return page.section("Views", page.paragraph(about), page.views(path, view_size, drawn))


def neighbours_over_steps(run: Path) -> str:
    """The same queries' nearest training images at some steps of the run; empty where none were kept."""
    folders = metric_names.existing_paths(run, "neighbors")
    found = [path for folder in folders for path in sorted(folder.glob("step_*.png"))]
    if not found:
        return ""
    chosen = sorted(
        {
            round(i * (len(found) - 1) / max(1, SHOWN_NEIGHBOURS - 1))
            for i in range(SHOWN_NEIGHBOURS)
        }
    )
    figures = [
        page.figure(
            page.picture_file(found[number], found[number].stem),
            f"Step {int(found[number].stem.removeprefix('step_')):,}",
        )
        for number in chosen
    ]
    about = "The same held-out training images, left, and those nearest to them by features as the training went on; green: of its class."
    return page.section(
        "Neighbours over time", page.paragraph(about), f'<div class="two">{"".join(figures)}</div>'
    )


def duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return (
        f"{hours} h {minutes:02d} min"
        if hours
        else f"{minutes} min {rest:02d} s"
        if minutes
        else f"{rest} s"
    )
