"""Progress on a terminal and in a file."""

import io
import re
import sys

import pytest
from screen import Screen

from ssl_pretrain.monitoring import console
from ssl_pretrain.monitoring.console import Console
from ssl_pretrain.monitoring.progress import ProgressText
from ssl_pretrain.system import live_line

RECORD = {
    "step": 5,
    "epoch": 1.0,
    "loss": 4.25,
    "lr": 0.3,
    "images_per_second": 8.0,
    "seconds_per_step": 1.0,
    "data_wait": 0.25,
}


def build_screen(monkeypatch, width):
    screen = Screen(width)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setattr(live_line, "terminal_width", lambda stream: stream.width)
    return screen


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
        "skipped 2  ETA 1:00:00\n"
    )


def test_a_file_gets_at_most_one_plain_line_per_second_and_always_the_last(clock):
    stream = io.StringIO()
    progress = Console(9, stream=stream)
    for step in range(1, 10):
        progress.show_progress(RECORD | {"step": step})
        clock[0] += 0.25
    assert [line.split()[1] for line in stream.getvalue().splitlines()] == ["1/9", "5/9", "9/9"]
    assert "\x1b" not in stream.getvalue() and "━" not in stream.getvalue()


LONG_RECORD = RECORD | {
    "step": 1234567,
    "epoch": 123.45,
    "loss": 12.3456,
    "images_per_second": 12345.0,
    "knn": 0.987,
    "skipped_steps": 12.0,
}


@pytest.mark.parametrize(
    ("width", "line"),
    [
        (20, " 12 %  loss 12.3456"),
        (40, " 12 %  loss 12.3456  ETA 101d 10h"),
        (60, " 12 %  loss 12.3456  k-NN 98.7 %  ETA 101d 10h"),
        (80, " 12 %  step 1234567/9999999  loss 12.3456  k-NN 98.7 %  ETA 101d 10h"),
        (
            100,
            " 12 %  step 1234567/9999999  epoch 123.45  loss 12.3456  k-NN 98.7 %  skipped 12  "
            "ETA 101d 10h",
        ),
        (
            120,
            " 12 %  step 1234567/9999999  epoch 123.45  loss 12.3456  lr 0.3  k-NN 98.7 %  "
            "data wait 25 %  skipped 12  ETA 101d 10h",
        ),
        (
            160,
            "━━────────────────────   12 %  step 1234567/9999999  epoch 123.45  loss 12.3456  "
            "lr 0.3  k-NN 98.7 %  12,345 images/s  data wait 25 %  skipped 12  ETA 101d 10h",
        ),
    ],
)
def test_fields_that_do_not_fit_the_terminal_are_left_out_whole(clock, monkeypatch, width, line):
    screen = build_screen(monkeypatch, width)
    Console(9999999, stream=screen).show_progress(LONG_RECORD)
    assert screen.lines() == [line] and len(line) < width


def test_every_width_shows_one_whole_line_with_as_many_fields_as_fit():
    progress = ProgressText(9999999)
    progress.update(LONG_RECORD)
    fields = {"12 %", *progress.fields(LONG_RECORD).values()}
    num_shown = 0
    for width in range(1, 200):
        line = progress.line(LONG_RECORD, width)
        shown = [field for field in re.split(" {2,}", line.strip()) if field and "━" not in field]
        assert len(line) <= width and set(shown) <= fields
        assert len(shown) >= num_shown
        num_shown = len(shown)
    assert num_shown == len(fields)


def test_the_line_follows_a_resized_terminal(clock, monkeypatch):
    screen = build_screen(monkeypatch, 120)
    progress = Console(9999999, stream=screen)
    widths = []
    for step, screen.width in enumerate((120, 60, 100), start=1234567):
        clock[0] += 1
        progress.show_progress(LONG_RECORD | {"step": step})
        assert len(screen.lines()) == 1
        widths.append(len(screen.lines()[0]))
    assert 100 < widths[0] < 120 and widths[1] < 60 < widths[2] < 100


def test_messages_of_the_process_stand_above_the_line_and_no_copy_of_it_remains(clock, monkeypatch):
    screen = build_screen(monkeypatch, 80)
    monkeypatch.setattr(sys, "stdout", screen)
    monkeypatch.setattr(sys, "stderr", screen)
    progress = Console(3, stream=screen)
    for step in (1, 2, 3):
        progress.show_progress(RECORD | {"step": step})
        clock[0] += 1
        print(f"printed after step {step}", file=sys.stderr if step == 2 else None)
        assert screen.lines()[-1].startswith(f"{100 * step // 3:3d} %  step {step}/3")
    progress.warn("hot [not markup]")
    sys.stdout.write("incomplete ")
    assert screen.lines()[-1] == "incomplete"
    print("message")
    assert screen.lines()[-1].startswith("100 %")
    progress.close()
    assert screen.lines() == [
        *(f"printed after step {step}" for step in (1, 2, 3)),
        "warning: hot [not markup]",
        "incomplete message",
        "",
    ]
    assert sys.stdout is screen and sys.stderr is screen


@pytest.mark.parametrize("no_color", [False, True])
def test_warnings_on_a_terminal_are_yellow_unless_colors_are_disabled(monkeypatch, no_color):
    screen = build_screen(monkeypatch, 80)
    monkeypatch.setenv("NO_COLOR", "1" if no_color else "")
    Console(10, stream=screen).warn("hot")
    assert ("\x1b[33mwarning: hot" in screen.raw) is not no_color


def test_a_terminal_without_control_characters_gets_plain_lines(clock, monkeypatch):
    screen = build_screen(monkeypatch, 80)
    monkeypatch.setenv("TERM", "dumb")
    Console(10, stream=screen).show_progress(RECORD)
    assert screen.raw.startswith("step 5/10") and "\x1b" not in screen.raw


def test_the_time_left_survives_a_resume(clock):
    """The first step after a resume is slow, but the earlier steps still count."""
    past_records = [RECORD | {"step": step, "seconds_per_step": 2.0} for step in range(1, 100)]
    stream = io.StringIO()
    Console(1100, past_records, stream).show_progress(
        RECORD | {"step": 100, "seconds_per_step": 12.0}
    )
    assert "ETA 0:50:00" in stream.getvalue()  # 1,000 steps at 0.9 * 2 + 0.1 * 12 seconds


def test_a_result_has_the_newest_values_and_the_time_of_all_processes_of_the_run():
    past_records = [RECORD | {"step": step, "seconds_per_step": 60.0} for step in (10, 20)]
    progress = ProgressText(30, past_records)
    assert progress.result() == "loss 4.2500, 20 min 0 s of training"
    progress.update(RECORD | {"step": 30, "loss": 3.0, "knn": 0.5, "seconds_per_step": 361.0})
    assert progress.result() == "loss 3.0000, k-NN 50.0 %, 1 h 20 min of training"
