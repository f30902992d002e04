"""The fault cases, by number, and the table of what was seen of each: `pytest -m case --table docs/reliability.md`.

A test says which case it is by `@pytest.mark.case(NUMBER)`, and what it saw by the fixture `seen`. Its hooks are imported by conftest.py.
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
CASES = {  # number: (case, what must happen)
    1: ("one rank killed in a step", "the others end, non-zero; resumed: the same bits"),
    2: (
        "all ranks killed, 20 times at random moments",
        "nothing that was saved is lost, every time; the end has the same bits",
    ),
    3: (
        "killed while a checkpoint is written: tensors, manifest, before the rename, after it",
        "the newest whole one is used, no debris",
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
        "stop (status 74) or warn, by checkpoint.on_failure; older ones whole, no debris",
    ),
    7: (
        "input/output error, read-only, no right to write",
        "as 6; refused at the start, before anything is loaded",
    ),
    8: (
        "a file of the newest checkpoint is truncated or missing",
        "named; the one before is used, and the damaged one is written anew",
    ),
    9: ("a bit of the newest checkpoint is flipped", "named; the one before is used"),
    10: (
        "dangling links, empty files and folders among the checkpoints",
        "passed over, and never counted when pruning",
    ),
    11: (
        "resumed on 4, 2, 1 ranks; on one that does not divide",
        "the same batches and views, weights to rounding; refused by name",
    ),
    12: ("another part size after a resume", "said; the weights agree to rounding"),
    13: ("other images than the checkpoint's", "refused by name, with the remedy"),
    14: (
        "a corrupt JPEG in a .beton",
        "named, counted, replaced the same way in every run; over 0.1 % stops",
    ),
    15: ("a truncated or unfinished .beton", "refused before anything starts"),
    16: (
        "the data vanish or shrink in the middle of a run",
        "the file is named, all ranks end, nothing hangs",
    ),
    17: ("an exception in a loader's thread or worker", "raised in the trainer"),
    18: (
        "operations in a wrong order",
        "there is no order to get wrong: a recipe's keys give the same views in any",
    ),
    19: (
        "images or a loss that are not finite, on one rank",
        "nothing moves on any rank; noted for replay; then back, then stop",
    ),
    20: (
        "an infinite gradient under bfloat16 autocast; a zero weight under LARS",
        "the step is skipped and counted; trust 1",
    ),
    21: (
        "a rank hangs, or is stopped by SIGSTOP",
        "the run ends within parallel.timeout_seconds, with stacks; continued in time: goes on",
    ),
    22: ("a slow rank", "named in metrics.jsonl with the seconds the others waited; the same bits"),
    23: ("out of memory on one rank", "all end, with advice on parts; no half step is saved"),
    24: (
        "the W&B server refuses, hangs, or answers 401",
        "the training goes on, its numbers are kept; one run id",
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
    29: ("port in use, unknown host, missing node", "a message within parallel.timeout_seconds"),
    30: (
        "k-NN fails inside a run; k-NN on or off",
        "goes on or stops, by online.on_failure; the same bits",
    ),
    31: (
        "resumed at an epoch's edge, before and at the last step",
        "the same bits; a finished run does nothing, status 0",
    ),
    32: (
        "each part of the state left out of a checkpoint",
        "the comparison of the resumed run fails, for each part",
    ),
    33: (
        "ranks with different weights, at the start and later",
        "rank 0's are used; later: nothing is saved, the tensor is named",
    ),
}
_results: dict[str, dict] = {}
_began = time.monotonic()


def pytest_addoption(parser):
    parser.addoption(
        "--table",
        metavar="FILE",
        help="write what was seen of each fault case into FILE, between its marks",
    )


def pytest_collection_modifyitems(items):
    for item in items:
        item.user_properties += [
            ("case", number) for mark in item.iter_markers("case") for number in mark.args
        ]


@pytest.fixture
def seen(request):
    """`seen("the others ended after 3 s")`: a line for the table."""
    return lambda text: request.node.user_properties.append(("seen", text))


def pytest_runtest_logreport(report):
    cases = [value for name, value in report.user_properties if name == "case"]
    if not cases or (
        report.when == "setup" and report.passed
    ):  # a test that was only set up, and then interrupted, has shown nothing
        return
    result = _results.setdefault(
        report.nodeid, {"cases": cases, "seconds": 0.0, "outcome": "passed"}
    )
    result["seconds"] += report.duration
    result["seen"] = [value for name, value in report.user_properties if name == "seen"]
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
    seconds = sum(result["seconds"] for result in results.values())
    lines = [
        f"Revision {revision()}, {time.strftime('%Y-%m-%d', time.gmtime())}; {versions()}; {time.monotonic() - _began:.0f} s by the clock,\n{seconds:.0f} s in the tests below.\n",
        "| | case | must | seen | test | seconds |",
        "|---|---|---|---|---|---|",
    ]
    for number, (case, must) in CASES.items():
        own = {name: result for name, result in results.items() if number in result["cases"]}
        tests = sorted(
            {name.removeprefix("tests/").partition("[")[0].replace("::", " ") for name in own}
        )
        took = sum(result["seconds"] for result in own.values())
        lines.append(
            f"| {number} | {case} | {must} | {summary(own)} | {', '.join(f'`{name}`' for name in tests)} | {took:.1f} |"
        )
    return "\n".join(lines)


def summary(results: dict[str, dict]) -> str:
    """What the tests of one case saw: failures first."""
    if not results:
        return "**not run**"
    failed = [
        f"**failed**: {name.rpartition('::')[2]}"
        for name, result in results.items()
        if result["outcome"] == "failed"
    ]
    skipped = [
        f"skipped: {result.get('reason', '')}"
        for result in results.values()
        if result["outcome"] == "skipped"
    ]
    passed = [result for result in results.values() if result["outcome"] == "passed"]
    said = [text for result in passed for text in result["seen"]]
    silent = sum(not result["seen"] for result in passed)
    texts = [
        *failed,
        *said,
        *([f"{silent} test{'s' if silent > 1 else ''} passed"] if silent else []),
        *skipped,
    ]
    return "; ".join(dict.fromkeys(texts)).replace("|", "\\|").replace("\n", " ")


def revision() -> str:
    command = [
        "git",
        "-C",
        str(ROOT),
        "-c",
        f"safe.directory={ROOT}",
        "describe",
        "--always",
        "--dirty",
        "--abbrev=12",
    ]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    return found.stdout.strip() or "not a git checkout"


def versions() -> str:
    import torch

    return f"Python {platform.python_version()}, torch {torch.__version__}, {os.cpu_count()} CPUs, gloo"
