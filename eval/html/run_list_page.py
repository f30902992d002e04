"""The page of all runs, its rows, and the same as data."""

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from markupsafe import Markup

from ssl_pretrain.eval import run_table
from ssl_pretrain.eval.html import page, sections
from ssl_pretrain.eval.run_state import STATES, RunState

MAX_EVALUATIONS = 4  # columns of the table; a row's fold has all
MAX_REASON = 80  # characters of a failure in the table; the row's fold has all of it


@dataclass(frozen=True)
class Links:
    """Addresses of a run's pages, or "" for those that are not served."""

    page: str = ""
    report: str = ""


def url_path(name: str) -> str:
    """Return a run's name for a URL. Bytes that are not UTF-8 are kept."""
    return quote(os.fsencode(name))


def served_links(name: str, state: RunState) -> Links:
    """Return the addresses of a run on the server of the list."""
    address = f"/run/{url_path(name)}/"
    return Links(address, f"{address}report.html" if state.has_report else "")


def _file_links(folder: Path, output: Path, name: str, state: RunState) -> Links:
    """Return the addresses of a run for a page that is opened from the disk."""
    if not state.has_report:
        return Links()
    run = (
        folder if name == folder.resolve().name and not (folder / name).is_dir() else folder / name
    )
    relative = os.path.relpath(run / "report.html", output.resolve().parent)
    return Links(report=url_path(relative))


def render_row(name: str, state: RunState, links: Links, evaluations: list[str]) -> str:
    """Return the row of one run.

    Args:
        name: Name of the run.
        state: Its state.
        links: Addresses of its pages.
        evaluations: Names of the results that have a column.
    """
    reason = state.reason if state.state == "failed" else ""
    return page.render(
        "run_row.html.jinja",
        name=name,
        state=state,
        links=links,
        order=list(STATES).index(state.state),
        reason=reason if len(reason) <= MAX_REASON else f"{reason[:MAX_REASON].rstrip()} …",
        percent=run_table.describe_percent(state),
        progress=run_table.describe_progress(state),
        width=f"{100 * state.fraction:.1f}",
        time_left=run_table.describe_time_left(state, time.time()),
        knn=run_table.format_percent(state.best_knn),
        numbers=[
            (sections.evaluation_title(key), run_table.format_percent(value), value)
            for key in evaluations
            for value in [state.evaluations.get(key)]
        ],
        epochs=run_table.format_epochs(state),
        started=run_table.format_time(state.started_at),
        facts=_facts(state),
    )


def render(
    states: Mapping[str, RunState],
    folder: Path,
    row_of: Callable[[str, list[str]], str],
    *,
    version: int = 0,
    refresh_seconds: float = 0,
) -> str:
    """Return the page.

    Args:
        states: States of the runs by name.
        folder: Folder that holds them.
        row_of: Function that returns the row of a run, given its name and the names of the results
            that have a column.
        version: Version of the states, from which the page asks for changes.
        refresh_seconds: Seconds between two such requests. With 0 the page does not change.
    """
    states = run_table.sort_by_state(states)
    evaluations = run_table.evaluation_names(states, MAX_EVALUATIONS)
    return page.render(
        "run_list.html.jinja",
        title=_title(folder),
        folder=folder,
        counts=run_table.describe_counts(states),
        states=STATES,
        written_at=run_table.format_time(time.time()),
        methods=sorted({state.method for state in states.values() if state.method}),
        evaluations=[(name, sections.evaluation_title(name)) for name in evaluations],
        rows=[Markup(row_of(name, evaluations)) for name in states],
        version=version,
        refresh_seconds=refresh_seconds,
    )


def render_file(states: Mapping[str, RunState], folder: Path, output: Path) -> str:
    """Return the page as a file, which has links to the reports and does not change."""

    def row_of(name: str, evaluations: list[str]) -> str:
        links = _file_links(folder, output, name, states[name])
        return render_row(name, states[name], links, evaluations)

    return render(states, folder, row_of)


def _title(folder: Path) -> str:
    name = folder.resolve().name
    return "Runs" if name == "runs" else f"Runs in {name}"


def _facts(state: RunState) -> list[tuple[str, str]]:
    """Return what the fold of a row adds to its columns."""
    facts = {
        STATES[state.state]: state.reason,
        "loss": f"{state.loss:.4f}" if isinstance(state.loss, float) else "",
        "images per second": f"{state.images_per_second:,.0f}" if state.images_per_second else "",
        "last record": run_table.format_time(state.updated_at) if state.updated_at else "",
    }
    facts |= {
        f"{sections.evaluation_title(name)}, %": f"{value:.1f}"
        for name, value in state.evaluations.items()
    }
    return [(name, value) for name, value in facts.items() if value]


def rows(states: Mapping[str, RunState], folder: Path) -> list[dict[str, Any]]:
    """Return the states as data for JSON. Times are seconds since 1970, accuracies percent."""
    return [
        {"name": name.encode(errors="backslashreplace").decode(), "folder": str(folder)}
        | asdict(state)
        for name, state in states.items()
    ]
