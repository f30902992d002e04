"""Texts of a run's state, and a list of runs as a table in the terminal."""

import math
import time
from collections.abc import Callable, Mapping
from functools import partial

from ssl_pretrain.eval import results
from ssl_pretrain.eval.run_state import STATES, RunState
from ssl_pretrain.monitoring.progress import format_eta

NONE = "-"


def describe_progress(state: RunState) -> str:
    """Return the steps done, such as "120 of 300"."""
    return f"{state.step:,} of {state.num_steps:,}" if state.num_steps else f"{state.step:,}"


def describe_percent(state: RunState) -> str:
    """Return the share of the steps that are done, rounded down."""
    return f"{math.floor(100 * state.fraction)} %" if state.num_steps else NONE


def describe_time_left(state: RunState, now: float) -> str:
    """Return the training time left as h:mm:ss, or "-"."""
    seconds = state.seconds_left(now)
    return NONE if seconds is None else format_eta(seconds)


def format_percent(value: float | None) -> str:
    """Return a percentage with one decimal, without the sign, or "-"."""
    return NONE if value is None else f"{value:.1f}"


def format_time(seconds: float | None) -> str:
    """Return a date and a time of day in the local time zone, or "-"."""
    return NONE if seconds is None else time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))


def format_epochs(state: RunState) -> str:
    """Return the epochs of the whole run, or "-"."""
    return NONE if state.num_epochs is None else f"{state.num_epochs:g}"


def evaluation_names(states: Mapping[str, RunState], max_names: int) -> list[str]:
    """Return the evaluations that most of the runs have, at most `max_names`."""
    counts: dict[str, int] = {}
    for state in states.values():
        for name in state.evaluations:
            counts[name] = counts.get(name, 0) + 1
    names = sorted(counts, key=lambda name: (-counts[name], name))[:max_names]
    return sorted(names)


def sort_by_state(states: Mapping[str, RunState]) -> dict[str, RunState]:
    """Return the runs with those that train first, and those of each state newest first."""
    order = list(STATES)

    def key(item: tuple[str, RunState]) -> tuple[int, float, str]:
        name, state = item
        return order.index(state.state), -(state.started_at or 0.0), name

    return dict(sorted(states.items(), key=key))


def format_runs(states: Mapping[str, RunState], width: int, now: float) -> str:
    """Format the runs as a table that fits the terminal. The least important columns go first.

    Args:
        states: State of each run by its name.
        width: Columns of the terminal.
        now: Present time in seconds since 1970.
    """
    if not states:
        return "no run here yet"
    states = sort_by_state(states)
    columns: dict[str, Callable[[str, RunState], str]] = {  # in the order of their importance
        "run": lambda name, _: name,
        "state": lambda _, state: state.state,
        "done": lambda _, state: describe_percent(state),
        "left": lambda _, state: describe_time_left(state, now),
        "online k-NN, %": lambda _, state: format_percent(state.best_knn),
    }
    for evaluation in evaluation_names(states, max_names=3):
        columns[f"{evaluation}, %"] = partial(_format_evaluation, evaluation)
    columns |= {
        "alerts": lambda _, state: f"{state.num_alerts or NONE}",
        "method": lambda _, state: state.method or NONE,
        "seed": lambda _, state: NONE if state.seed is None else str(state.seed),
        "epochs": lambda _, state: format_epochs(state),
        "data": lambda _, state: state.data or NONE,
        "backbone": lambda _, state: state.backbone or NONE,
        "started": lambda _, state: format_time(state.started_at),
    }
    cells = {
        title: [cell(name, state) for name, state in states.items()]
        for title, cell in columns.items()
    }
    shown = {title: texts for title, texts in cells.items() if set(texts) != {NONE}}
    while len(shown) > 2 and _width(shown) > width:
        shown.popitem()
    table = results.format_table(list(shown), [list(row) for row in zip(*shown.values())])
    return f"{table}\n\n{describe_counts(states)}{_reasons(states)}"


def _format_evaluation(evaluation: str, _name: str, state: RunState) -> str:
    return format_percent(state.evaluations.get(evaluation))


def describe_counts(states: Mapping[str, RunState]) -> str:
    """Return how many runs are in each state, such as "3 runs: 1 running, 2 finished"."""
    counts = {name: sum(state.state == name for state in states.values()) for name in STATES}
    present = ", ".join(f"{count} {name}" for name, count in counts.items() if count)
    return f"{len(states):,} run{'s' if len(states) != 1 else ''}: {present}"


def _reasons(states: Mapping[str, RunState]) -> str:
    """Return a line for each run that failed."""
    return "".join(
        f"\n{name}: {state.reason}" for name, state in states.items() if state.state == "failed"
    )


def _width(columns: Mapping[str, list[str]]) -> int:
    return sum(max(map(len, [title, *texts])) + 2 for title, texts in columns.items()) - 2
