"""Progress on a terminal and in a file."""

import io

import pytest

from ssl_pretrain.monitoring import console
from ssl_pretrain.monitoring.console import Console

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


def test_a_line_shows_progress_speed_and_time_left(clock):
    stream = io.StringIO()
    Console(3605, stream=stream).show_progress(RECORD | {"skipped_steps": 2.0, "knn": 0.5})
    assert stream.getvalue() == (
        "step 5/3605  epoch 1.00  loss 4.2500  lr 0.3  k-NN 50.0 %  8 images/s  data wait 25 %  "
        "2 steps skipped  ETA 1:00:00\n"
    )


def test_a_file_gets_at_most_one_plain_line_per_second_and_always_the_last(clock):
    stream = io.StringIO()
    progress = Console(9, stream=stream)
    for step in range(1, 10):
        progress.show_progress(RECORD | {"step": step})
        clock[0] += 0.25
    assert [line.split()[1] for line in stream.getvalue().splitlines()] == ["1/9", "5/9", "9/9"]
    assert "\x1b" not in stream.getvalue() and "━" not in stream.getvalue()


@pytest.mark.parametrize("no_color", [False, True])
def test_a_terminal_gets_a_bar_and_colors_unless_disabled(clock, monkeypatch, no_color):
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    if no_color:
        monkeypatch.setenv("NO_COLOR", "1")
    stream = Terminal()
    progress = Console(10, stream=stream)
    progress.show_progress(RECORD)
    progress.warn("hot [not markup]")
    progress.show_progress(RECORD | {"step": 10})
    text = stream.getvalue()
    assert "━" * 11 in text and "50%" in text and "100%" in text
    assert "step 5/10" in text and "step 10/10" in text and "warning: hot [not markup]" in text
    assert ("\x1b[33m" in text) is not no_color  # yellow
    assert text.endswith("\n\x1b[?25h")  # the cursor is visible again


def test_the_time_left_survives_a_resume(clock):
    """The first step after a resume is slow, but the earlier steps still count."""
    past_records = [RECORD | {"step": step, "seconds_per_step": 2.0} for step in range(1, 100)]
    stream = io.StringIO()
    Console(1100, past_records, stream).show_progress(
        RECORD | {"step": 100, "seconds_per_step": 12.0}
    )
    assert "ETA 0:50:00" in stream.getvalue()  # 1,000 steps at 0.9 * 2 + 0.1 * 12 seconds
