"""Sentences that say first what a run reached, against which baselines."""

import math
import re
from collections.abc import Sequence

from ssl_pretrain.eval import result_text, results
from ssl_pretrain.eval.html import page, sections
from ssl_pretrain.eval.html.run_files import Record
from ssl_pretrain.eval.run_state import RunState

PRETRAINED = "pretrained"
BASELINES = {  # `features` entries of a row, by the words of the sentence
    "raw pixels": ("raw pixels",),
    "the random network": (results.BETTER_RANDOM,),
    "the same network trained from random weights": ("trained from random weights",),
}
SUBJECTS = {
    "knn": "k-NN",
    "knn_train": "k-NN",
    "linear": "a linear classifier",
    "attentive": "an attentive probe",
}
MAX_EVALUATIONS = 2  # in the headline
WHOLE_COLUMNS = ("clean", "all labels", "all")  # names of a result's main column
SENTENCES = {
    "running": "The run is not finished: it still trained",
    "stopped": "The run is not finished: it stopped",
    "failed": "The run failed",
}
EQUAL_POINTS = 0.05  # difference that one decimal does not show


def describe_results(evaluations: Sequence[Record]) -> str:
    """Compare the pretrained features with each baseline, in a sentence per main evaluation.

    Return an empty string if no accuracy was measured.
    """
    sentences = [
        text
        for result in sorted(evaluations, key=lambda r: sections.order_of_evaluation(r["name"]))
        if (text := describe_result(result))
    ]
    return " ".join(map(page.capitalize, sentences[:MAX_EVALUATIONS]))


def describe_result(result: Record) -> str:
    """Return the sentence about the main column of a result, or "" if it has no accuracy."""
    measure = result.get("measure", results.ACCURACY)
    rows = {row["features"]: row for row in result["rows"]}
    if not measure.endswith("%") or result["name"].endswith(results.GRID_SUFFIX):
        return ""
    column = next(iter(results.column_names(result)), "")
    value = rows.get(PRETRAINED, {"metrics": {}})["metrics"].get(column, math.nan)
    if not math.isfinite(value):
        return ""
    base, feature = results.split_name(result["name"])
    subject = SUBJECTS.get(base) or result_text.EVALUATION_TITLES.get(
        base, sections.evaluation_title(base).lower()
    )
    settings = [text for text in (feature, "" if column in WHOLE_COLUMNS else column) if text]
    subject += f" ({', '.join(settings)})" if settings else ""
    reached = f"{results.format_number(rows[PRETRAINED], column)} %"
    comparisons = [
        compare(value, rows[row_name]["metrics"][column], name)
        for name, row_names in BASELINES.items()
        for row_name in row_names
        if math.isfinite(rows.get(row_name, {"metrics": {}})["metrics"].get(column, math.nan))
    ]
    sentence = f"{subject} reaches {reached}{_describe_images(result['protocol'])}"
    return f"{sentence}, {join(comparisons)}." if comparisons else f"{sentence}."


def compare(value: float, baseline: float, name: str) -> str:
    """Return a comparison such as "12.2 points above the random network (84.0 %)"."""
    difference = value - baseline
    if abs(difference) < EQUAL_POINTS:
        return f"the same as {name} ({baseline:.1f} %)"
    direction = "above" if difference > 0 else "below"
    return f"{abs(difference):.1f} points {direction} {name} ({baseline:.1f} %)"


def _describe_images(protocol: dict[str, object]) -> str:
    """Return " on 500 test images", or "" if the protocol does not say how many there were."""
    match = re.search(
        r"([\d,]+) (test images|held-out training images)", str(protocol.get("images", ""))
    )
    return f" on {int(match[1].replace(',', '')):,} {match[2]}" if match else ""


def join(texts: Sequence[str]) -> str:
    """Return the texts with commas, and "and" before the last one."""
    return " and ".join([", ".join(texts[:-1]), texts[-1]] if len(texts) > 1 else texts)


def describe_state(state: RunState, checkpoint_step: int) -> str:
    """Return a sentence about a run that has not reached its last step, else "".

    Args:
        state: State of the run.
        checkpoint_step: Step of the weights that the report is about.
    """
    if state.state not in SENTENCES:
        return ""
    reason = f": {state.reason.rstrip('.')}" if state.state == "failed" and state.reason else ""
    progress = f" of {state.num_steps:,} steps" if state.num_steps else " steps"
    return (
        f"{SENTENCES[state.state]} after {state.step:,}{progress}{reason}."
        f" The weights are those of step {checkpoint_step:,}."
    )
