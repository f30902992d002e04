"""The numbered fault cases, and the table of their required and observed behavior.

`pytest -m case --table docs/reliability.md` writes the table. A test names its case with
`@pytest.mark.case(NUMBER)` and reports observations with the fixture `observe`. conftest.py imports
the hooks of this module.
"""

import os
import platform
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BEGIN, END = "<!-- the table begins -->", "<!-- the table ends -->"
CASES = {  # number: (fault, required behavior)
    1: (
        "One rank is killed during a step.",
        "The other ranks end with a nonzero status. The resumed run has the same bits.",
    ),
    2: (
        "All ranks are killed, 20 times at random moments.",
        "No checkpoint is lost. The finished run has the same bits.",
    ),
    3: (
        "A rank is killed while a checkpoint is written: in the tensors, in the manifest, and "
        "before and after the rename.",
        "The newest intact checkpoint is used. Nothing unfinished remains.",
    ),
    4: (
        "One rank gets SIGUSR2 or SIGTERM. A second signal arrives during the save.",
        "All ranks save the same step and end with status 75. The second signal changes nothing.",
    ),
    5: (
        "SIGTERM leaves less time than a save takes.",
        "Nothing is damaged. The previous checkpoint is used.",
    ),
    6: (
        "The disk is full during a save.",
        "The run stops with status 74 or warns, as `checkpoint.on_failure` says. Older checkpoints "
        "stay intact.",
    ),
    7: (
        "The disk has an input/output error, is read-only, or gives no permission to write.",
        "A failed save ends as in case 6. An output that cannot be written to is refused at the "
        "start, before anything is loaded.",
    ),
    8: (
        "A file of the newest checkpoint is truncated or missing.",
        "The damage is reported and the previous checkpoint is used. The damaged one is written "
        "again.",
    ),
    9: (
        "A bit of the newest checkpoint is flipped.",
        "The damage is reported and the previous checkpoint is used.",
    ),
    10: (
        "Dangling links, empty files and empty folders lie among the checkpoints.",
        "They are skipped, and never counted when old checkpoints are pruned.",
    ),
    11: (
        "A run resumes on 4, 2 and 1 ranks, or on a number that does not divide the batch.",
        "The batches and views are the same, and the weights agree to rounding. The other number "
        "is refused, and the message names numbers that divide it.",
    ),
    12: (
        "A run resumes with another micro-batch size.",
        "The change is reported. The weights agree to rounding.",
    ),
    13: (
        "A run resumes with images other than the checkpoint's.",
        "The run is refused, and the message names the remedy.",
    ),
    14: (
        "A JPEG in a .beton is corrupt.",
        "It is named, counted and replaced by the same image in every run. The run stops if more "
        "than 0.1 % of the images are replaced.",
    ),
    15: (
        "A .beton is truncated or unfinished.",
        "The file is refused before anything starts.",
    ),
    16: (
        "The data vanish or shrink during a run.",
        "The file is named and all ranks end. Nothing hangs.",
    ),
    17: (
        "A thread or worker of the loader raises an exception.",
        "The exception is raised in the trainer.",
    ),
    18: (
        "The keys of a recipe are in a different order.",
        "The views are the same.",
    ),
    19: (
        "Images or a loss are not finite on one rank.",
        "No weight moves on any rank, and the images are recorded for replay. If it continues, "
        "the run rolls back, then stops.",
    ),
    20: (
        "A gradient is infinite under bfloat16 autocast. A weight is zero under LARS.",
        "The step is skipped and counted. The zero weight has trust ratio 1.",
    ),
    21: (
        "A rank hangs, or is stopped by SIGSTOP.",
        "The run ends within `parallel.timeout_seconds` and prints stacks. The other ranks name "
        "the rank, its host and its last operation. A short suspension does no harm.",
    ),
    22: (
        "One rank is slow.",
        "`metrics.jsonl` names it with the seconds that the others waited. If it stays slow, one "
        "line names its host and the activity in which it loses time. The bits are the same.",
    ),
    23: (
        "One rank runs out of memory.",
        "All ranks end, with advice. No half step is saved.",
    ),
    24: (
        "The W&B server refuses, never answers, or answers 401.",
        "Training continues, its numbers are kept, and the run keeps one id.",
    ),
    25: (
        "A run resumes with a different configuration.",
        "Each key is refused with the differences and two remedies, warned about, or accepted.",
    ),
    26: (
        "The checkpoint has a different format.",
        "The checkpoint is refused, and the message names the version that wrote it.",
    ),
    27: (
        "Wall clocks are a day apart, or jump back.",
        "Nothing is ordered by time. The bits are the same.",
    ),
    28: (
        "Two runs use one folder.",
        "The second is refused, and the message names process, machine and job. The lock of a dead "
        "run is taken over.",
    ),
    29: (
        "A port is in use, a host is unknown, or a host is missing.",
        "A message appears within `parallel.timeout_seconds`.",
    ),
    30: (
        "k-NN fails inside a run, or is switched off.",
        "The run continues or stops, as `online.on_failure` says. The bits are the same.",
    ),
    31: (
        "A run resumes at an epoch boundary, before the last step and after it.",
        "The bits are the same. A finished run does nothing and ends with status 0.",
    ),
    32: (
        "One kind of state is left out of a checkpoint.",
        "For each kind, the resumed run has different bits, so the comparison of bits detects it.",
    ),
    33: (
        "Ranks have different weights, at the start or later.",
        "At the start, those of rank 0 are used. Later, nothing is saved and the tensor is named.",
    ),
}
_results: dict[str, dict] = {}
_start = time.monotonic()


def pytest_addoption(parser):
    help_text = "write the table of fault cases into FILE, between its markers"
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
    # A test that is interrupted after its setup has no result.
    if not cases or (report.when == "setup" and report.passed):
        return
    default = {"cases": cases, "seconds": 0.0, "outcome": "passed"}
    result = _results.setdefault(report.nodeid, default)
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
        text = path.read_text() if path.exists() else ""
        before, _, rest = text.partition(BEGIN)
        after = rest.partition(END)[2]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{before}{BEGIN}\n{build_table(_results)}\n{END}{after}")


def build_table(results: dict[str, dict]) -> str:
    """Format a Markdown table with one row per case, followed by the observations of each case."""
    test_seconds = sum(result["seconds"] for result in results.values())
    date = time.strftime("%Y-%m-%d", time.gmtime())
    elapsed = time.monotonic() - _start
    heading = (
        f"Revision {describe_revision()}, {date}. {describe_versions()}. "
        f"The run took {elapsed:.0f} s of wall time,\nand its tests {test_seconds:.0f} s in total."
    )
    return format_table(heading, results)


def format_table(heading: str, results: dict[str, dict]) -> str:
    rows, observations = [], []
    for number, (fault, required) in CASES.items():
        case_results = {
            name: result for name, result in results.items() if number in result["cases"]
        }
        names = {name.partition("[")[0].rpartition("::")[2] for name in case_results}
        tests = ", ".join(f"`{name}`" for name in sorted(names))
        seconds = sum(result["seconds"] for result in case_results.values())
        rows.append(f"| {number}. {fault} | {required} | {tests} |")
        observations.append(f"{number}. {summarize(case_results)} ({seconds:.1f} s)")
    header = ["| what happens | what you see | tests |", "|---|---|---|"]
    return "\n".join([heading, "", *header, *rows, "", "Observed, by case:", "", *observations])


def summarize(results: dict[str, dict]) -> str:
    """Return the observations of the tests of one case, failures first."""
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
    return "; ".join(texts).replace("\n", " ")


def describe_revision() -> str:
    git = ["git", "-C", str(ROOT), "-c", f"safe.directory={ROOT}"]
    command = [*git, "describe", "--always", "--dirty", "--abbrev=12"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    return result.stdout.strip() or "not a git checkout"


def describe_versions() -> str:
    import torch

    cpus = f"{os.cpu_count()} CPUs, gloo"
    return f"Python {platform.python_version()}, torch {torch.__version__}, {cpus}"
