"""Several runs on one HTML page: what differs between their configs first, then their numbers and curves side by side."""

from __future__ import annotations

import argparse
from html import escape
from pathlib import Path
from typing import Any

import yaml

from ssl_pretrain.eval import command_line, results
from ssl_pretrain.eval.html import charts, page, sections
from ssl_pretrain.monitoring import metric_names
from ssl_pretrain.system import durable_files

HELP = """Writes one page that compares runs, with nothing fetched: the keys of their configs that differ, their last numbers and
their evaluations side by side, their curves in common frames, and what their monitors rang for.

    python -m ssl_pretrain.eval.compare runs/simclr_digits runs/second --output compare.html"""
SAME = ("output", "log.name", "log.tags")  # names of a run, not a difference between runs


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        "python -m ssl_pretrain.eval.compare",
        description=HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "runs", nargs="+", metavar="RUN", type=Path, help="folders of runs, two or more"
    )
    parser.add_argument(
        "--output", type=Path, help="of the page (default: compare.html beside the first run)"
    )
    options = parser.parse_args(arguments)
    print(f"comparison: {write(options.runs, options.output)}")


def write(runs: list[Path], output: Path | None = None) -> Path:
    """Makes the page and returns its path.

    Raises:
        ValueError: fewer than two runs, or a folder that is none.
    """
    if len(runs) < 2:
        raise ValueError(
            f"{', '.join(map(str, runs))}: a comparison needs two runs or more; eval.report shows one"
        )
    for run in runs:
        if not (run / "config.yaml").is_file():
            raise ValueError(
                f"{run}: there is no config.yaml, so this is not a run's folder; give the `output` of a run's config"
            )
    names = _names(runs)
    records = {name: sections.read_metrics(run) for name, run in zip(names, runs)}
    parts = [
        f"<header><h1>{escape(' and '.join(names) if len(names) < 4 else f'{len(names)} runs')}</h1>{_legend(names)}</header>",
        page.section("Config", _configs(dict(zip(names, runs)))),
        page.section("Numbers", _numbers(records), _evaluations(dict(zip(names, runs)))),
        page.section("Training", *_curves(records)),
        *(sections.alerts(run, f"Alerts of {name}") for name, run in zip(names, runs)),
    ]
    path = output or runs[0].parent / "compare.html"
    durable_files.replace(path, page.page("comparison", parts))
    return path


def _names(runs: list[Path]) -> list[str]:
    """Their folders' names, with the parents' where two are the same."""
    short = [run.resolve().name for run in runs]
    return short if len(set(short)) == len(short) else [str(run) for run in runs]


def _legend(names: list[str]) -> str:
    return page.legend(
        [(name, charts.colour(number, max(2, len(names)))) for number, name in enumerate(names)]
    )


def differences(runs: dict[str, Path]) -> dict[str, list[str]]:
    """Each key of the configs whose value is not the same in all runs: its value in each, `-` where there is no such key."""
    configs = [_flat(yaml.safe_load((run / "config.yaml").read_text())) for run in runs.values()]
    keys = list(dict.fromkeys(key for values in configs for key in values))
    shown = {
        key: [str(values.get(key, "-")) for values in configs] for key in keys if key not in SAME
    }
    return {key: values for key, values in shown.items() if len(set(values)) > 1}


def _flat(values: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(values, dict) or not values:
        return {prefix.removesuffix("."): values}
    return {
        key: value
        for name, inner in values.items()
        for key, value in _flat(inner, f"{prefix}{name}.").items()
    }


def _configs(runs: dict[str, Path]) -> str:
    found = differences(runs)
    if not found:
        return page.paragraph("The configs are the same.")
    return page.table(["key", *runs], [[key, *values] for key, values in found.items()])


def _numbers(records: dict[str, list[dict[str, Any]]]) -> str:
    """The last value of every curve, as metrics.jsonl has it, and the best k-NN."""
    lines = [["steps", *(f"{found[-1]['step']:,}" if found else "-" for found in records.values())]]
    if any("knn" in record for found in records.values() for record in found):
        best = [
            max((value for _, value in sections.scaled(found, "knn")), default=None)
            for found in records.values()
        ]
        lines.append(
            ["best k-NN accuracy, %", *("-" if value is None else f"{value:.2f}" for value in best)]
        )
    for group in metric_names.GROUPS:
        for key in dict.fromkeys(
            key for found in records.values() for key in sections.keys_of(found, group)
        ):
            last = [
                points[-1][1] if (points := sections.scaled(found, key)) else None
                for found in records.values()
            ]
            title = metric_names.curve(key).title + (
                ", %" if metric_names.curve(key).percent else ""
            )
            lines.append(
                [f"{group}: {title}", *("-" if value is None else f"{value:.6g}" for value in last)]
            )
    return page.table(["last value of", *records], lines)


def _evaluations(runs: dict[str, Path]) -> str:
    """Accuracy of the pretrained features, of the newest checkpoint that each evaluation judged."""
    newest = {
        name: {kind: steps[max(steps)] for kind, steps in results.by_step(run).items()}
        for name, run in runs.items()
    }
    lines = []
    for kind in dict.fromkeys(kind for found in newest.values() for kind in found):
        columns = dict.fromkeys(
            column
            for found in newest.values()
            if kind in found
            for column in results.columns(found[kind])
        )
        for column in columns:
            cells = []
            for found in newest.values():
                rows = (
                    [row for row in found[kind]["rows"] if row["features"] == "pretrained"]
                    if kind in found
                    else []
                )
                cells.append(
                    f"{results.number(rows[0], column)} (step {found[kind]['step']:,})"
                    if rows
                    else "-"
                )
            lines.append([f"{page.TITLES.get(kind, kind)}, {column}", *cells])
    return page.table(["accuracy of the pretrained features, %", *runs], lines) if lines else ""


def _curves(records: dict[str, list[dict[str, Any]]]) -> list[str]:
    parts = [_legend(list(records))]
    for group in metric_names.GROUPS:
        keys = dict.fromkeys(
            key for found in records.values() for key in sections.keys_of(found, group)
        )
        figures = [
            page.figure(
                charts.lines(
                    [(name, sections.scaled(found, key)) for name, found in records.items()],
                    key,
                    marked=key == "knn",
                ),
                sections.caption(key),
            )
            for key in keys
        ]
        if figures:
            parts.append(f'<h3>{group}</h3><div class="two">{"".join(figures)}</div>')
    return parts


if __name__ == "__main__":
    command_line.execute(main, "ssl_pretrain.eval.compare")
