"""Format the results of evaluations for a terminal: one with its files, or several in one table."""

from pathlib import Path
from typing import Any

from ssl_pretrain.eval import results
from ssl_pretrain.system import program

EVALUATION_TITLES = {
    "knn": "k-NN",
    "semi": "few labels",
    "finetune_simclr": "fine-tuning",
    "finetune_deit": "fine-tuning, DeiT",
    "text_pairs": "pairs of texts",
}
# Number of columns that a summary shows of these evaluations. It shows every column of the others.
NUM_SUMMARY_COLUMNS = {"retrieval": 2, "robustness": 1, "segmentation": 1}
FEATURES_BY_COLUMN = {  # `features` of a result's rows by column of a summary, preferred ones first
    "raw pixels": ("raw pixels",),
    "random backbone": (
        *(results.BETTER_RANDOM, "trained from random weights"),
        "random, as built",  # the only one of networks with texts
    ),
    "pretrained": ("pretrained",),
}


def format_briefly(result: dict[str, Any], run_path: Path) -> str:
    """Return the table of a result, its duration, and the paths of its protocol and its file."""
    path = run_path / "eval" / f"{result['name']}.json"
    return "\n".join(
        [
            results.format_narrow_table(*results.table_cells(result)),
            "",
            f"protocol: {path.with_suffix('.txt')}",
            f"{result['seconds']:.0f} s; saved to {path}",
        ]
    )


def summary_table(evaluations: list[dict[str, Any]]) -> str:
    """Compare raw pixels, the random backbone and the pretrained one in one table.

    Args:
        evaluations: Results of evaluations. Those without percentages are left out.

    Returns:
        A table with one row per evaluation and column, or "" if there is nothing to compare.
    """
    rows = []
    for result in evaluations:
        is_percentage = result.get("measure", results.ACCURACY).endswith("%")
        if not is_percentage or result["name"].endswith("_grid"):
            continue
        base, feature = results.split_name(result["name"])
        title = EVALUATION_TITLES.get(base, base.replace("_", ", "))
        title += f", {feature}" if feature else ""
        columns = results.column_names(result)
        kind = base.partition("_")[0]  # each protocol of segmentation has a result of its own
        for column in columns[: NUM_SUMMARY_COLUMNS.get(kind)]:
            is_whole_name = len(columns) == 1 and column in ("clean", "all labels", "all")
            name = title if is_whole_name else f"{title}, {column}"
            rows.append([name, *_format_numbers(result, column)])
    if not rows:
        return ""
    return results.format_narrow_table(["accuracy, %", *FEATURES_BY_COLUMN], rows)


def _format_numbers(result: dict[str, Any], column: str) -> list[str]:
    """Format one column of a result for the columns of a summary, with "-" for a missing value."""
    numbers = []
    for names in FEATURES_BY_COLUMN.values():
        rows = [row for name in names for row in result["rows"] if row["features"] == name]
        numbers.append(results.format_number(rows[0], column) if rows else "-")
    return numbers


def describe_evaluated_run(run_path: Path, *, has_export: bool = True) -> str:
    """Return the closing lines of an evaluated run: its table, its report and the next command.

    Args:
        run_path: Folder of the run.
        has_export: False to leave out the command that exports the run's network.
    """
    table = summary_table(results.load_newest(run_path))
    page = run_path / "report.html"
    lines = [table, ""] if table else []
    lines.append(f"report: {page}" if page.is_file() else f"run:    {run_path}")
    if has_export:
        lines.append(f"next:   {program.format_command('ssl_pretrain.eval.export', run_path)}")
    return "\n".join(lines)
