"""Write one self-contained page that compares runs.

The page begins with the results: runs by metrics, with the mean and deviation of runs that differ
only by seed, beside raw pixels and a random network. It draws the curves of all runs in shared
charts, lists each run's alerts, and names the configuration keys that differ.

    python -m ssl_pretrain.eval.compare runs/simclr_digits runs/second --output compare.html
"""

import math
from collections.abc import Sequence
from pathlib import Path

from ssl_pretrain.eval import command_line, table_text
from ssl_pretrain.eval.html import (
    axes,
    headline,
    page,
    run_files,
    run_groups,
    table_downloads,
    training_figures,
)
from ssl_pretrain.eval.html.colors import color
from ssl_pretrain.eval.html.run_groups import NAMING_KEYS, ComparedRun, RunGroup
from ssl_pretrain.eval.table_text import MeasureTable, TableRow
from ssl_pretrain.monitoring import metric_names
from ssl_pretrain.schema.argument_parser import ArgumentParser
from ssl_pretrain.system import durable_files, program

MAX_OTHERS = 4  # runs of the headline besides the best


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


def write(paths: list[Path], output: Path | None = None) -> Path:
    """Write the comparison page and return its path.

    Raises:
        ValueError: If there are fewer than two runs, or one of the folders contains no run.
    """
    paths = list({path.resolve(): path for path in paths}.values())
    if len(paths) < 2:
        raise ValueError(
            f"{', '.join(map(str, paths))}: a comparison needs two or more runs; "
            "use ssl_pretrain.eval.report for a single run"
        )
    for path in paths:
        if not (path / "config.yaml").is_file():
            raise ValueError(
                f"{path}: there is no config.yaml, so this is not a run folder; "
                "give the `output` of a run's config"
            )
    names = [path.resolve().name for path in paths]
    if len(set(names)) < len(names):
        names = [str(path) for path in paths]
    runs = [run_groups.read_run(name, path) for name, path in zip(names, paths)]
    groups = run_groups.group_by_seed(runs)
    colors = _run_colors(runs, groups)
    legend = [(group.name, color(i, max(2, len(groups)))) for i, group in enumerate(groups)]
    main_columns = run_groups.result_columns(runs, main_only=True)
    all_columns = run_groups.result_columns(runs, main_only=False)
    differences = config_differences(runs)
    alerts = [(run.name, run_files.read_alerts(run.path)) for run in runs]
    text = page.render(
        "compare.html.jinja",
        title="comparison",
        heading=" and ".join(names) if len(names) < 4 else f"{len(names)} runs",
        headline=describe_best(groups, main_columns),
        legend=legend,
        has_seeds=len(groups) < len(runs),
        results=_measure_variables(run_groups.results_table(groups, main_columns), "results"),
        steps=_describe_steps(groups),
        all_results=_measure_variables(run_groups.results_table(groups, all_columns), "all_results")
        if len(all_columns) > len(main_columns)
        else None,
        last_values=_text_variables(["last value", *names], last_values(runs), "last_values"),
        training=training_figures.draw_run_groups(
            {run.name: run.metrics for run in runs}, "comparison", colors
        ),
        alerts=alerts,
        has_alerts=any(items for _, items in alerts),
        differences=_text_variables(
            ["key", *names], [[key, *values] for key, values in differences.items()], "differences"
        ),
    )
    path = output or paths[0].parent / "compare.html"
    durable_files.replace(path, text)
    return path


def config_differences(runs: Sequence[ComparedRun]) -> dict[str, list[str]]:
    """Return the configuration keys whose values differ, with one value per run.

    The value is "-" for a run whose configuration lacks the key.
    """
    keys = dict.fromkeys(key for run in runs for key in run.config if key not in NAMING_KEYS)
    values = {key: [_format_setting(run.config.get(key, "-")) for run in runs] for key in keys}
    return {key: row for key, row in values.items() if len(set(row)) > 1}


def _format_setting(value: object) -> str:
    """Format the value of a key, with at most six significant digits per number."""
    if isinstance(value, list):
        return f"[{', '.join(map(_format_setting, value))}]"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def last_values(runs: Sequence[ComparedRun]) -> list[list[str]]:
    """Return rows of the steps, the best k-NN accuracy and the last value of every curve."""
    rows = [["steps", *(f"{run.num_steps:,}" if run.metrics else "-" for run in runs)]]
    knn_curves = [run_files.metric_points(run.metrics, "knn") for run in runs]
    if any(knn_curves):
        best = [f"{max(y for _, y in points):.1f}" if points else "-" for points in knn_curves]
        rows.append(["best k-NN accuracy, %", *best])
    for group in metric_names.GROUPS:
        keys = [key for run in runs for key in run_files.recorded_keys(run.metrics, group)]
        for key in dict.fromkeys(keys):
            curves = [run_files.metric_points(run.metrics, key) for run in runs]
            info = metric_names.metric_info(key)
            title = f"{group}: {info.title}{', %' if info.is_percentage else ''}"
            rows.append(
                [title, *(axes.format_value(curve[-1][1]) if curve else "-" for curve in curves)]
            )
    return rows


def _run_colors(runs: Sequence[ComparedRun], groups: Sequence[RunGroup]) -> list[str]:
    """Return the color of each run. Runs that differ only by seed share one."""
    index_by_name = {run.name: i for i, group in enumerate(groups) for run in group.runs}
    return [color(index_by_name[run.name], max(2, len(groups))) for run in runs]


def describe_best(groups: Sequence[RunGroup], columns: Sequence[run_groups.Column]) -> str:
    """Return a sentence about the first column of the results, or "" if there are no results."""
    if not columns:
        return ""
    table = run_groups.results_table(groups, columns[:1])
    numbers = {row.title: (table_text.mean(row.cells[0]), row) for row in table.rows}
    ranked = sorted(
        (row for value, row in numbers.values() if math.isfinite(value) and not row.is_reference),
        key=lambda row: -numbers[row.title][0],
    )
    if not ranked:
        return ""
    best, *others = ranked

    def describe(row: TableRow) -> str:
        seeds = f" over {row.num_seeds()} seeds" if row.num_seeds() > 1 else ""
        return f"{table.cell_text(row, 0)} %{seeds}"

    comparisons = [
        headline.compare(numbers[best.title][0], value, _with_article(row.title))
        for value, row in numbers.values()
        if row.is_reference and math.isfinite(value)
    ]
    lead = f"{table.columns[0].title}: {best.title} reaches {describe(best)}"
    sentence = f"{lead}, {headline.join(comparisons)}" if comparisons else lead
    if not others:
        return f"{sentence}."
    rest = [f"{row.title} {describe(row)}" for row in others[:MAX_OTHERS]]
    rest += [f"{len(others) - MAX_OTHERS} more"] if len(others) > MAX_OTHERS else []
    return f"{sentence}. Then {', '.join(rest)}."


def _with_article(baseline: str) -> str:
    return f"the {baseline}" if baseline.startswith("random network") else baseline


def _measure_variables(table: MeasureTable, file_name: str) -> dict[str, object]:
    """Return the template variables of a table of results with its downloads."""
    rows = [
        {
            "css_class": "baseline" if row.is_reference else "",
            "cells": [
                (row.title, False),
                (str(row.num_seeds()), False),
                *(
                    (table.cell_text(row, index), table.is_best(row, index))
                    for index in range(len(table.columns))
                ),
            ],
        }
        for row in table.rows
    ]
    return {
        "header": [table.corner, table.counted, *(column.title for column in table.columns)],
        "rows": rows,
        "downloads": table_downloads.measure_downloads(table, file_name),
    }


def _text_variables(header: list[str], rows: list[list[str]], file_name: str) -> dict[str, object]:
    """Return the template variables of a table of text with its downloads."""
    return {
        "header": header,
        "rows": [{"css_class": "", "cells": [(text, False) for text in row]} for row in rows],
        "downloads": table_downloads.text_downloads(header, rows, file_name),
    }


def _describe_steps(groups: Sequence[RunGroup]) -> str:
    """Return a sentence about the length of the runs, or "" if none has records."""
    if not any(run.num_steps for group in groups for run in group.runs):
        return ""
    steps = {group.name: sorted({run.num_steps for run in group.runs}) for group in groups}
    lengths = {tuple(numbers) for numbers in steps.values()}
    if len(lengths) == 1 and len(next(iter(lengths))) == 1:
        return f"Every run has {next(iter(lengths))[0]:,} steps."
    texts = [
        f"{name} {' to '.join(f'{number:,}' for number in dict.fromkeys((all_[0], all_[-1])))}"
        for name, all_ in steps.items()
    ]
    return f"Steps: {', '.join(texts)}."


if __name__ == "__main__":
    command_line.execute(main, "ssl_pretrain.eval.compare")
