"""The console: a bar with the time left on a terminal, plain lines elsewhere, and each warning once whatever rank it is of."""

from __future__ import annotations

import io
import subprocess
import sys
import warnings

import pytest
from conftest import run_ranks

from ssl_pretrain.distributed import collectives, process_group
from ssl_pretrain.monitoring import console
from ssl_pretrain.monitoring.console import Console, Warnings

RECORD = {
    "step": 5,
    "epoch": 1.0,
    "loss": 4.25,
    "lr": 0.3,
    "images_per_second": 8.0,
    "seconds_per_step": 1.0,
    "data_wait": 0.25,
}


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])
    return now


def test_the_line_says_what_people_ask(clock):
    stream = io.StringIO()
    Console(3605, stream=stream).progress(RECORD | {"skipped_steps": 2.0, "knn": 0.5})
    assert stream.getvalue() == (
        "step 5/3605  epoch 1.00  loss 4.2500  lr 0.3  k-NN 50.0 %  8 images/s  data wait 25 %  2 steps skipped  ETA 1:00:00\n"
    )


def test_at_most_a_line_a_second_and_the_last_always(clock):
    stream = io.StringIO()
    made = Console(9, stream=stream)
    for step in range(1, 10):
        made.progress(RECORD | {"step": step})
        clock[0] += 0.25
    assert [line.split()[1] for line in stream.getvalue().splitlines()] == ["1/9", "5/9", "9/9"]
    assert "\x1b" not in stream.getvalue() and "█" not in stream.getvalue()


def test_a_terminal_gets_a_bar_in_place_and_colours_unless_told_not_to(clock, monkeypatch):
    for no_color in (False, True):
        monkeypatch.setenv("NO_COLOR", "1") if no_color else monkeypatch.delenv(
            "NO_COLOR", raising=False
        )
        stream = Terminal()
        made = Console(10, stream=stream)
        made.progress(RECORD)
        made.warn("hot")
        made.progress(RECORD | {"step": 10})
        text = stream.getvalue()
        assert (
            text.count("\r\x1b[K") == 3
            and text.count("\n") == 2
            and "█" * 12 + "░" * 12 in text
            and " 50 %" in text
            and "100 %" in text
        )
        assert ("\x1b[32m" in text) is not no_color and "warning: hot" in text


def test_the_time_left_survives_a_resume(clock):
    """After the resume the first step is slow, as it is; the pace of the records before still counts."""
    past = [RECORD | {"step": step, "seconds_per_step": 2.0} for step in range(1, 100)]
    stream = io.StringIO()
    Console(1100, past, stream).progress(RECORD | {"step": 100, "seconds_per_step": 12.0})
    assert "ETA 0:50:00" in stream.getvalue()  # 1,000 steps at 0.9 * 2 + 0.1 * 12 seconds


def _warn_on_ranks():
    shown = []
    taken = Warnings(shown.append if process_group.is_main() else None)
    taken.install()
    try:
        for _ in range(3):
            warnings.warn("everywhere", stacklevel=1)
            if process_group.rank() == 2:
                warnings.warn("here alone", stacklevel=1)
        waiting = len(taken.waiting)
        taken.others(collectives.gather_objects(taken.collected()))
    finally:
        taken.remove()
    return waiting, [text.partition(" (")[0] + text.partition(")")[2] for text in shown]


def test_each_warning_is_shown_once_and_names_other_ranks():
    found = run_ranks(_warn_on_ranks, world_size=3)
    assert found == [(0, ["everywhere", "here alone on rank 2"]), (1, []), (2, [])]


@pytest.mark.parametrize(
    ("shell", "said"),
    [
        (
            "{command} 2>{err} | true",
            "warning: stdout is closed (Broken pipe); going on without it",
        ),
        pytest.param("{command} >/dev/full 2>{err}", "", marks=pytest.mark.full),
        pytest.param("{command} 2>/dev/full", "", marks=pytest.mark.full),
        ("{command} >&- 2>&-", ""),
    ],
)
def test_output_that_nobody_takes_ends_nothing(tmp_path, shell, said):
    """As where `tee` was killed, the log's disk is full, or a daemon has closed the streams."""
    program = tmp_path / "program.py"
    program.write_text(
        "import sys, time\n"
        "from pathlib import Path\n"
        "from ssl_pretrain.monitoring import console\n"
        "with console.lasting_output():\n"
        "    time.sleep(0.5)\n"
        "    for number in range(3000):\n"
        "        print('step', number, flush=True)\n"
        "        print('warning', number, file=sys.stderr, flush=True)\n"
        "    Path(sys.argv[1]).write_text('the end')\n"
    )
    end, err = tmp_path / "end", tmp_path / "err"
    command = shell.format(command=f"{sys.executable} {program} {end}", err=err)
    done = subprocess.run(["bash", "-c", f"set -o pipefail; {command}"], check=False)
    assert done.returncode == 0 and end.read_text() == "the end"
    if said:
        lines = err.read_text().splitlines()
        assert lines.count(said) == 1 and lines[-1] == "warning 2999"
