"""The numbered fault cases, and the table of what was observed of each.

`pytest -m case --table docs/reliability.md` writes the table. A test names its case by
`@pytest.mark.case(NUMBER)` and reports observations by the fixture `observe`. conftest.py imports
the hooks of this module.
"""

from __future__ import annotations

import os
import platform
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BEGIN, END = "<!-- the table begins -->", "<!-- the table ends -->"
CASES = {  # number: the fault, and the required behavior
    1: ("one rank killed in a step", "the others end, nonzero; resumed: the same bits"),
    2: (
        "all ranks killed, 20 times at random moments",
        "no checkpoint is lost; the end has the same bits",
    ),
    3: (
        "killed while a checkpoint is written: tensors, manifest, before the rename, after it",
        "the newest intact one is used, nothing unfinished remains",
    ),
    4: (
        "SIGUSR2, SIGTERM to one rank; a second signal during the save",
        "all save the same step, status 75; the second changes nothing",
    ),
    5: (
        "SIGTERM with less grace than a save takes",
        "nothing is damaged, the checkpoint before is used",
    ),
    6: (
        "the disk is full while saving",
        "stop (status 74) or warn, by checkpoint.on_failure; older checkpoints intact",
    ),
    7: (
        "input/output error, read-only, no permission to write",
        "as 6; refused at the start, before anything is loaded",
    ),
    8: (
        "a file of the newest checkpoint is truncated or missing",
        "reported; the checkpoint before is used, and the damaged one is written again",
    ),
    9: (
        "a bit of the newest checkpoint is flipped",
        "reported; the checkpoint before is used",
    ),
    10: (
        "dangling links, empty files and folders among the checkpoints",
        "skipped, and never counted when pruning",
    ),
    11: (
        "resumed on 4, 2, 1 ranks; on a number that does not divide the batch",
        "the same batches and views, weights to rounding; refused with the numbers that divide",
    ),
    12: (
        "another micro-batch size after a resume",
        "reported; the weights agree to rounding",
    ),
    13: ("other images than the checkpoint's", "refused, with the remedy"),
    14: (
        "a corrupt JPEG in a .beton",
        "named, counted, replaced the same way in every run; over 0.1 % stops",
    ),
    15: ("a truncated or unfinished .beton", "refused before anything starts"),
    16: (
        "the data vanish or shrink during a run",
        "the file is named, all ranks end, nothing hangs",
    ),
    17: ("an exception in a loader's thread or worker", "raised in the trainer"),
    18: (
        "the keys of a recipe in another order",
        "the same views",
    ),
    19: (
        "images or a loss that are not finite, on one rank",
        "no weight moves on any rank; recorded for replay; then a rollback, then a stop",
    ),
    20: (
        "an infinite gradient under bfloat16 autocast; a zero weight under LARS",
        "the step is skipped and counted; trust ratio 1",
    ),
    21: (
        "a rank hangs, or is stopped by SIGSTOP",
        "the run ends within parallel.timeout_seconds, with stacks; a short suspension is harmless",
    ),
    22: ("a slow rank", "named in metrics.jsonl with the seconds the others waited; the same bits"),
    23: ("out of memory on one rank", "all end, with advice; no half step is saved"),
    24: (
        "the W&B server refuses, never answers, or answers 401",
        "training continues, its numbers are kept; one run id",
    ),
    25: (
        "resumed with another configuration",
        "refused with the differences and two remedies, or warned, by key",
    ),
    26: ("a checkpoint of another format", "refused, with the version that wrote it"),
    27: ("wall clocks a day apart, or going back", "nothing is ordered by time; the same bits"),
    28: (
        "two runs in one folder",
        "the second is refused with process, machine and job; a dead one's lock is taken over",
    ),
    29: ("port in use, unknown host, missing host", "a message within parallel.timeout_seconds"),
    30: (
        "k-NN fails inside a run; k-NN on or off",
        "continues or stops, by online.on_failure; the same bits",
    ),
    31: (
        "resumed at an epoch's edge, before and at the last step",
        "the same bits; a finished run does nothing, status 0",
    ),
    32: (
        "each kind of state left out of a checkpoint",
        "the comparison of the resumed run fails, for each kind",
    ),
    33: (
        "ranks with different weights, at the start and later",
        "rank 0's are used; later: nothing is saved, the tensor is named",
    ),
}
_results: dict[str, dict] = {}
_start = time.monotonic()


def pytest_addoption(parser):
    help_text = "write what was observed of each fault case into FILE, between its marks"
    parser.addoption("--table", metavar="FILE", help=help_text)


def pytest_collection_modifyitems(items):
    for item in items:
        numbers = [number for mark in item.iter_markers("case") for number in mark.args]
        item.user_properties += [("case", number) for number in numbers]


@pytest.fixture
def observe(request):
    """Return a function that reports an observation, such as "the others ended after 3 s"."""
    return lambda text: request.node.user_properties.append(("observed", text))


def pytest_runtest_logreport(report):
    cases = [value for name, value in report.user_properties if name == "case"]
    only_set_up = report.when == "setup" and report.passed  # an interrupted test has shown nothing
    if not cases or only_set_up:
        return
    new = {"cases": cases, "seconds": 0.0, "outcome": "passed"}
    result = _results.setdefault(report.nodeid, new)
    result["seconds"] += report.duration
    result["observed"] = [value for name, value in report.user_properties if name == "observed"]
    if report.outcome != "passed" and result["outcome"] != "failed":
        result["outcome"] = report.outcome
    if report.skipped:
        result["reason"] = str(report.longrepr[2]).removeprefix("Skipped: ")


def pytest_sessionfinish(session):
    file = session.config.getoption("--table")
    if file and not hasattr(session.config, "workerinput"):
        path = Path(file)
        before, _, rest = (path.read_text() if path.exists() else "").partition(BEGIN)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{before}{BEGIN}\n{table(_results)}\n{END}{rest.partition(END)[2]}")


def table(results: dict[str, dict]) -> str:
    """Format a Markdown table with one row per case."""
    test_seconds = sum(result["seconds"] for result in results.values())
    date = time.strftime("%Y-%m-%d", time.gmtime())
    elapsed = time.monotonic() - _start
    lines = [
        f"Revision {revision()}, {date}; {versions()}; {elapsed:.0f} s by the clock,\n"
        f"{test_seconds:.0f} s in the tests below.\n",
        "| | case | required | observed | test | seconds |",
        "|---|---|---|---|---|---|",
    ]
    for number, (case, required) in CASES.items():
        own = {name: result for name, result in results.items() if number in result["cases"]}
        names = {name.removeprefix("tests/").partition("[")[0].replace("::", " ") for name in own}
        tests = ", ".join(f"`{name}`" for name in sorted(names))
        seconds = sum(result["seconds"] for result in own.values())
        cells = [str(number), case, required, summarize(own), tests, f"{seconds:.1f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def summarize(results: dict[str, dict]) -> str:
    """Return what the tests of one case observed, failures first."""
    if not results:
        return "**not run**"
    by_outcome = {"failed": [], "skipped": [], "passed": []}
    for name, result in results.items():
        by_outcome[result["outcome"]].append((name, result))
    failures = [f"**failed**: {name.rpartition('::')[2]}" for name, _ in by_outcome["failed"]]
    observations = [text for _, result in by_outcome["passed"] for text in result["observed"]]
    num_silent = sum(not result["observed"] for _, result in by_outcome["passed"])
    silent = [f"{num_silent} test{'s' if num_silent > 1 else ''} passed"] if num_silent else []
    skipped = [f"skipped: {result.get('reason', '')}" for _, result in by_outcome["skipped"]]
    texts = dict.fromkeys([*failures, *observations, *silent, *skipped])
    return "; ".join(texts).replace("|", "\\|").replace("\n", " ")


def revision() -> str:
    safe = f"safe.directory={ROOT}"
    command = ["git", "-C", str(ROOT), "-c", safe, "describe", "--always", "--dirty", "--abbrev=12"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    return result.stdout.strip() or "not a git checkout"


def versions() -> str:
    import torch

    cpus = f"{os.cpu_count()} CPUs, gloo"
    return f"Python {platform.python_version()}, torch {torch.__version__}, {cpus}"
