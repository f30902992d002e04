"""Write one self-contained page that compares runs.

It shows the configuration keys that differ, the last numbers and the evaluations side by side, the
curves of all runs in shared charts, and the alerts of each run.

    python -m ssl_pretrain.eval.compare runs/simclr_digits runs/second --output compare.html
"""

import argparse
from pathlib import Path
from typing import Any

import yaml

from ssl_pretrain import schema
from ssl_pretrain.eval import command_line, results
from ssl_pretrain.eval.html import charts, page, sections
from ssl_pretrain.monitoring import metric_names
from ssl_pretrain.system import durable_files

NAMING_KEYS = ("output", "log.name", "log.tags")  # keys that name a run and therefore differ


def main(arguments: list[str]) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        "python -m ssl_pretrain.eval.compare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "runs", nargs="+", metavar="RUN", type=Path, help="folders of two or more runs"
    )
    parser.add_argument(
        "--output", type=Path, help="the page (default: compare.html beside the first run)"
    )
    options = parser.parse_args(arguments)
    print(f"comparison: {write(options.runs, options.output)}")


def write(runs: list[Path], output: Path | None = None) -> Path:
    """Write the page and return its path.

    Raises:
        ValueError: If there are fewer than two runs, or a folder does not hold a run.
    """
    if len(runs) < 2:
        raise ValueError(
            f"{', '.join(map(str, runs))}: a comparison needs two or more runs; "
            "ssl_pretrain.eval.report shows one"
        )
    for run in runs:
        if not (run / "config.yaml").is_file():
            raise ValueError(
                f"{run}: there is no config.yaml, so this is not the folder of a run; "
                "give the `output` of a run's config"
            )
    names = [run.resolve().name for run in runs]
    if len(set(names)) < len(names):
        names = [str(run) for run in runs]
    by_name = dict(zip(names, runs))
    metrics = {name: sections.read_metrics(run) for name, run in by_name.items()}
    text = page.render(
        "compare.html.jinja",
        title="comparison",
        heading=" and ".join(names) if len(names) < 4 else f"{len(names)} runs",
        names=names,
        legend=sections.series_legend(names),
        differences=[[key, *values] for key, values in differences(by_name).items()],
        numbers=_last_values(metrics),
        evaluations=_evaluations(by_name),
        training=_charts(metrics),
        alerts=[(name, sections.alerts(run)) for name, run in by_name.items()],
    )
    path = output or runs[0].parent / "compare.html"
    durable_files.replace(path, text)
    return path


def differences(runs: dict[str, Path]) -> dict[str, list[str]]:
    """Return the configuration keys whose values differ, with the value of each run.

    The value is `-` for a run whose configuration lacks the key.
    """
    configs = [
        schema.flatten(yaml.safe_load((run / "config.yaml").read_text())) for run in runs.values()
    ]
    keys = dict.fromkeys(key for config in configs for key in config if key not in NAMING_KEYS)
    values = {key: [str(config.get(key, "-")) for config in configs] for key in keys}
    return {key: row for key, row in values.items() if len(set(row)) > 1}


def _recorded_keys(metrics: dict[str, list[sections.Record]], group: str) -> list[str]:
    """Return the keys of a group that any run recorded."""
    keys = [key for records in metrics.values() for key in sections.recorded_keys(records, group)]
    return list(dict.fromkeys(keys))


def _last_values(metrics: dict[str, list[sections.Record]]) -> list[list[str]]:
    """Return a table of the last value of every curve, and of the best k-NN accuracy."""
    rows = [["steps", *(f"{r[-1]['step']:,}" if r else "-" for r in metrics.values())]]
    knn = [sections.curve(records, "knn") for records in metrics.values()]
    if any(knn):
        best = [f"{max(y for _, y in points):.2f}" if points else "-" for points in knn]
        rows.append(["best k-NN accuracy, %", *best])
    for group in metric_names.GROUPS:
        for key in _recorded_keys(metrics, group):
            curves = [sections.curve(records, key) for records in metrics.values()]
            name = metric_names.curve(key)
            title = f"{group}: {name.title}{', %' if name.percent else ''}"
            rows.append([title, *(f"{points[-1][1]:.6g}" if points else "-" for points in curves)])
    return rows


def _evaluations(runs: dict[str, Path]) -> list[list[str]]:
    """Return a table of the pretrained features' accuracy at the newest evaluated checkpoint."""
    newest = [
        {kind: steps[max(steps)] for kind, steps in results.by_step(run).items()}
        for run in runs.values()
    ]
    columns = dict.fromkeys(
        (kind, column)
        for evaluations in newest
        for kind, result in evaluations.items()
        for column in results.column_names(result)
    )
    return [
        [
            f"{sections.TITLES.get(kind, kind)}, {column}",
            *(_pretrained(evaluations.get(kind, {}), column) for evaluations in newest),
        ]
        for kind, column in sorted(columns, key=lambda key: key[0])
    ]


def _pretrained(result: dict[str, Any], column: str) -> str:
    """Format one number of the pretrained features and its step."""
    for row in result.get("rows", []):
        if row["features"] == "pretrained":
            return f"{results.format_number(row, column)} (step {result['step']:,})"
    return "-"


def _charts(metrics: dict[str, list[sections.Record]]) -> list[tuple[str, list[page.Figure]]]:
    """Return the charts of each group of metrics that any run recorded."""

    def figure(key: str) -> page.Figure:
        series = {name: sections.curve(records, key) for name, records in metrics.items()}
        chart = charts.line_chart(series, key, marked=key == "knn")
        return page.Figure(chart, sections.caption(key))

    keys = {group: _recorded_keys(metrics, group) for group in metric_names.GROUPS}
    return [(group, list(map(figure, keys[group]))) for group in keys if keys[group]]


if __name__ == "__main__":
    command_line.execute(main, "ssl_pretrain.eval.compare")
