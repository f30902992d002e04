"""Write one self-contained page that compares runs.

The page lists the configuration keys that differ, the last metrics and the evaluations of every
run side by side. It also draws the curves of all runs in shared charts and lists each run's alerts.

    python -m ssl_pretrain.eval.compare runs/simclr_digits runs/second --output compare.html
"""

from pathlib import Path
from typing import Any

import yaml

from ssl_pretrain import schema
from ssl_pretrain.eval import command_line, results
from ssl_pretrain.eval.html import charts, page, sections
from ssl_pretrain.monitoring import metric_names
from ssl_pretrain.schema.argument_parser import ArgumentParser
from ssl_pretrain.system import durable_files, program

NAMING_KEYS = ("output", "log.name", "log.tags")  # keys that only name a run and are not compared


def main(arguments: list[str]) -> None:
    """Run the command-line interface."""
    parser = ArgumentParser(
        program.usage_name("python -m ssl_pretrain.eval.compare"),
        description=__doc__,
    )
    parser.add_argument(
        "runs", nargs="+", metavar="RUN", type=Path, help="folders of two or more runs"
    )
    parser.add_argument(
        "--output", type=Path, help="page to write (default: compare.html next to the first run)"
    )
    options = parser.parse_args(arguments)
    print(f"comparison: {write(options.runs, options.output)}")


def write(runs: list[Path], output: Path | None = None) -> Path:
    """Write the comparison page and return its path.

    Raises:
        ValueError: If there are fewer than two runs, or one of the folders contains no run.
    """
    if len(runs) < 2:
        raise ValueError(
            f"{', '.join(map(str, runs))}: a comparison needs two or more runs; "
            "use ssl_pretrain.eval.report for a single run"
        )
    for run in runs:
        if not (run / "config.yaml").is_file():
            raise ValueError(
                f"{run}: there is no config.yaml, so this is not a run folder; "
                "give the `output` of a run's config"
            )
    names = [run.resolve().name for run in runs]
    if len(set(names)) < len(names):
        names = [str(run) for run in runs]
    runs_by_name = dict(zip(names, runs))
    metrics = {name: sections.read_metrics(run) for name, run in runs_by_name.items()}
    text = page.render(
        "compare.html.jinja",
        title="comparison",
        heading=" and ".join(names) if len(names) < 4 else f"{len(names)} runs",
        names=names,
        legend=sections.series_legend(names),
        differences=[[key, *values] for key, values in config_differences(runs_by_name).items()],
        numbers=_last_values(metrics),
        evaluations=_evaluations(runs_by_name),
        training=_draw_charts(metrics),
        alerts=[(name, sections.read_alerts(run)) for name, run in runs_by_name.items()],
    )
    path = output or runs[0].parent / "compare.html"
    durable_files.replace(path, text)
    return path


def config_differences(runs: dict[str, Path]) -> dict[str, list[str]]:
    """Return the configuration keys whose values differ, with one value per run.

    The value is "-" for a run whose configuration lacks the key.
    """
    flat_configs = [
        schema.flatten(yaml.safe_load((run / "config.yaml").read_text())) for run in runs.values()
    ]
    keys = dict.fromkeys(key for config in flat_configs for key in config if key not in NAMING_KEYS)
    values = {key: [str(config.get(key, "-")) for config in flat_configs] for key in keys}
    return {key: row for key, row in values.items() if len(set(row)) > 1}


def _recorded_keys(metrics: dict[str, list[sections.Record]], group: str) -> list[str]:
    """Return the metrics of a group that at least one run recorded."""
    keys = [key for records in metrics.values() for key in sections.recorded_keys(records, group)]
    return list(dict.fromkeys(keys))


def _last_values(metrics: dict[str, list[sections.Record]]) -> list[list[str]]:
    """Return a table of the steps, the best k-NN accuracy and the last value of every curve."""
    steps = [f"{records[-1]['step']:,}" if records else "-" for records in metrics.values()]
    rows = [["steps", *steps]]
    knn_curves = [sections.metric_points(records, "knn") for records in metrics.values()]
    if any(knn_curves):
        best = [f"{max(y for _, y in points):.2f}" if points else "-" for points in knn_curves]
        rows.append(["best k-NN accuracy, %", *best])
    for group in metric_names.GROUPS:
        for key in _recorded_keys(metrics, group):
            curves = [sections.metric_points(records, key) for records in metrics.values()]
            metric = metric_names.metric_info(key)
            title = f"{group}: {metric.title}{', %' if metric.is_percentage else ''}"
            rows.append([title, *(f"{points[-1][1]:.6g}" if points else "-" for points in curves)])
    return rows


def _evaluations(runs: dict[str, Path]) -> list[list[str]]:
    """Return a table of the pretrained features' results, each at its newest checkpoint."""
    newest_results = [
        {name: steps[max(steps)] for name, steps in results.load_by_step(run).items()}
        for run in runs.values()
    ]
    columns = dict.fromkeys(
        (name, column)
        for evaluations in newest_results
        for name, result in evaluations.items()
        for column in results.column_names(result)
    )
    return [
        [
            f"{sections.evaluation_title(name)}, {column}",
            *(
                _format_pretrained(evaluations.get(name, {}), column)
                for evaluations in newest_results
            ),
        ]
        for name, column in sorted(columns, key=lambda key: key[0])
    ]


def _format_pretrained(result: dict[str, Any], column: str) -> str:
    """Format one result of the pretrained features with its step, or "-" if there is none."""
    for row in result.get("rows", []):
        if row["features"] == "pretrained":
            return f"{results.format_number(row, column)} (step {result['step']:,})"
    return "-"


def _draw_charts(metrics: dict[str, list[sections.Record]]) -> list[tuple[str, list[page.Figure]]]:
    """Return the charts of each group of metrics, without the groups that no run recorded."""

    def draw_figure(key: str) -> page.Figure:
        series = {name: sections.metric_points(records, key) for name, records in metrics.items()}
        chart = charts.line_chart(series, key, has_markers=key == "knn")
        return page.Figure(chart, sections.metric_caption(key))

    keys = {group: _recorded_keys(metrics, group) for group in metric_names.GROUPS}
    return [(group, list(map(draw_figure, keys[group]))) for group in keys if keys[group]]


if __name__ == "__main__":
    command_line.execute(main, "ssl_pretrain.eval.compare")
