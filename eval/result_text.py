"""Show the results of evaluations on a terminal: one in short, or several in one table."""

from pathlib import Path
from typing import Any

from ssl_pretrain.eval import results
from ssl_pretrain.system import program

EVALUATION_TITLES = {
    "knn": "k-NN",
    "semi": "few labels",
    "finetune_simclr": "fine-tuning",
    "finetune_deit": "fine-tuning, DeiT",
}
# Number of columns in a summary of several evaluations, for those with more columns than that.
NUM_SUMMARY_COLUMNS = {"retrieval": 2, "robustness": 1}
FEATURES_BY_COLUMN = {  # `features` entries of a result's rows, by column of a summary
    "raw pixels": ("raw pixels",),
    "random backbone": (results.BETTER_RANDOM, "trained from random weights"),
    "pretrained": ("pretrained",),
}


def format_briefly(result: dict[str, Any], run_path: Path) -> str:
    """Return the table of a result, the file with its protocol, its duration and its file."""
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
        title = EVALUATION_TITLES.get(result["name"], result["name"].replace("_", ", "))
        columns = results.column_names(result)
        for column in columns[: NUM_SUMMARY_COLUMNS.get(result["name"])]:
            is_alone = len(columns) == 1 and column in ("clean", "all labels", "all")
            rows.append([title if is_alone else f"{title}, {column}", *_numbers(result, column)])
    if not rows:
        return ""
    return results.format_narrow_table(["accuracy, %", *FEATURES_BY_COLUMN], rows)


def _numbers(result: dict[str, Any], column: str) -> list[str]:
    """Format one column of a result, with "-" for a missing value."""

    def number(names: tuple[str, ...]) -> str:
        rows = [row for row in result["rows"] if row["features"] in names]
        return results.format_number(rows[0], column) if rows else "-"

    return [number(names) for names in FEATURES_BY_COLUMN.values()]


def describe_evaluated_run(run_path: Path) -> str:
    """Return the end of an evaluated run: its table, its report, and the next command."""
    table = summary_table(results.load_newest(run_path))
    page = run_path / "report.html"
    lines = [f"report: {page}"] if page.is_file() else [f"run:    {run_path}"]
    export = program.format_command("ssl_pretrain.eval.export", run_path)
    return "\n".join([*([table, ""] if table else []), *lines, f"next:   {export}"])
