"""One HTML page that compares several runs: their configurations, numbers and curves."""

import argparse
from pathlib import Path
from typing import Any

import yaml

from ssl_pretrain.eval import command_line, results
from ssl_pretrain.eval.html import charts, page, sections
from ssl_pretrain.eval.html.page import Figure
from ssl_pretrain.eval.html.sections import Record
from ssl_pretrain.monitoring import metric_names
from ssl_pretrain.system import durable_files

HELP = """Write one self-contained page that compares runs.

It shows the configuration keys that differ, the last numbers and the evaluations side by side, the
curves of all runs in shared charts, and the alerts of each run.

    python -m ssl_pretrain.eval.compare runs/simclr_digits runs/second --output compare.html"""
NAMING_KEYS = ("output", "log.name", "log.tags")  # keys that name a run, and so always differ


def main(arguments: list[str]) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        "python -m ssl_pretrain.eval.compare",
        description=HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    option = parser.add_argument
    option("runs", nargs="+", metavar="RUN", type=Path, help="folders of two or more runs")
    option("--output", type=Path, help="the page (default: compare.html beside the first run)")
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
    by_name = dict(zip(_short_names(runs), runs))
    names = list(by_name)
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
        training=_curves(metrics),
        alerts=[(name, sections.alerts(run)) for name, run in by_name.items()],
    )
    path = output or runs[0].parent / "compare.html"
    durable_files.replace(path, text)
    return path


def _short_names(runs: list[Path]) -> list[str]:
    """Return the names of the folders, or their whole paths where two names are the same."""
    names = [run.resolve().name for run in runs]
    return names if len(set(names)) == len(names) else [str(run) for run in runs]


def differences(runs: dict[str, Path]) -> dict[str, list[str]]:
    """Return the configuration keys whose values differ, with the value of each run.

    The value is `-` for a run whose configuration lacks the key.
    """
    configs = [_flatten(yaml.safe_load((run / "config.yaml").read_text())) for run in runs.values()]
    keys = dict.fromkeys(key for values in configs for key in values if key not in NAMING_KEYS)
    values = {key: [str(config.get(key, "-")) for config in configs] for key in keys}
    return {key: row for key, row in values.items() if len(set(row)) > 1}


def _flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict) or not tree:
        return {prefix.removesuffix("."): tree}
    leaves: dict[str, Any] = {}
    for name, branch in tree.items():
        leaves |= _flatten(branch, f"{prefix}{name}.")
    return leaves


def _recorded_keys(metrics: dict[str, list[Record]], group: str) -> list[str]:
    """Return the keys of a group that any run recorded."""
    keys = [key for records in metrics.values() for key in sections.recorded_keys(records, group)]
    return list(dict.fromkeys(keys))


def _last_values(metrics: dict[str, list[Record]]) -> list[list[str]]:
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
    newest = []  # per run: the newest result of each kind of evaluation
    for run in runs.values():
        newest.append({kind: s[max(s)] for kind, s in results.by_step(run).items()})
    columns = {
        (kind, column): None
        for results_of_run in newest
        for kind, result in results_of_run.items()
        for column in results.columns(result)
    }
    return [
        [
            f"{sections.TITLES.get(kind, kind)}, {column}",
            *(_pretrained(results_of_run.get(kind), column) for results_of_run in newest),
        ]
        for kind, column in sorted(columns, key=lambda key: key[0])
    ]


def _pretrained(result: Record | None, column: str) -> str:
    if result is None:
        return "-"
    for row in result["rows"]:
        if row["features"] == "pretrained":
            return f"{results.number(row, column)} (step {result['step']:,})"
    return "-"


def _curves(metrics: dict[str, list[Record]]) -> list[tuple[str, list[Figure]]]:
    groups = []
    for group in metric_names.GROUPS:
        figures = []
        for key in _recorded_keys(metrics, group):
            series = {name: sections.curve(records, key) for name, records in metrics.items()}
            chart = charts.line_chart(series, key, marked=key == "knn")
            figures.append(Figure(chart, sections.caption(key)))
        if figures:
            groups.append((group, figures))
    return groups


if __name__ == "__main__":
    command_line.execute(main, "ssl_pretrain.eval.compare")
