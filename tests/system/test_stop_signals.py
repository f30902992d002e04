"""Signals that ask a run to stop: remembered once, obeyed at once the second time."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
import time

import pytest

PREPARE = """
import os, signal, sys, threading, time
from ssl_pretrain.system import stop_signals
"""
BLOCKED = """
import ctypes
lock = ctypes.create_string_buffer(64)
ctypes.CDLL(None).pthread_mutex_lock(lock)
print("ready", flush=True)
ctypes.CDLL(None).pthread_mutex_lock(lock)  # for ever, and no signal interrupts it
"""
SLEEPING = """
print("ready", flush=True)
while True: time.sleep(0.1)
"""


def start(code: str, **options) -> subprocess.Popen[str]:
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True} | options
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    return subprocess.Popen([sys.executable, "-c", PREPARE + code], env=environment, **options)


@pytest.mark.parametrize(
    "waiting", [SLEEPING, BLOCKED], ids=["in Python", "in a call that never returns"]
)
@pytest.mark.parametrize(
    ("first", "second"),
    [
        (signal.SIGTERM, signal.SIGTERM),
        (signal.SIGINT, signal.SIGTERM),
        (signal.SIGTERM, signal.SIGINT),
    ],
)
def test_a_second_signal_ends_the_process_at_once(waiting, first, second):
    process = start("s = stop_signals.StopSignals()\n" + waiting)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(first)
    time.sleep(1.3)
    assert process.poll() is None
    process.send_signal(second)
    _, err = process.communicate(timeout=10)
    assert process.returncode == 128 + second
    assert err.splitlines() == [
        "",
        f"{first.name}: saves and stops after this step; a second signal ends at once",
        "",
        f"a second signal ({second.name}): ended at once, nothing saved",
    ]


def test_the_same_signal_passed_on_by_a_launcher_counts_once_and_a_scheduler_may_warn_before():
    process = start(
        "s = stop_signals.StopSignals()\nprint('ready', flush=True)\ntime.sleep(3.5)\nprint(s.requested)"
    )
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGUSR2)  # pre-emption is announced, and the time limit follows
    time.sleep(1.3)
    process.send_signal(signal.SIGTERM)
    time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=20)[0] == "True\n" and process.returncode == 0


def test_signals_before_the_run_can_answer_are_counted_too():
    process = start("stop_signals.note_signals()\n" + SLEEPING)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    time.sleep(1.3)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=10)
    assert process.returncode == 143


def test_outside_the_main_thread_a_program_keeps_its_handlers():
    code = """
signal.signal(signal.SIGTERM, lambda *_: print("the program's own"))
def run():
    s = stop_signals.StopSignals()
    assert not s.handled and not s.requested
    os.kill(os.getpid(), signal.SIGTERM)
    s.close()
thread = threading.Thread(target=run); thread.start(); thread.join()
"""
    out, err = start(code).communicate(timeout=20)
    assert (out, err) == ("the program's own\n", "")


def test_handlers_and_the_wakeup_of_an_event_loop_come_back():
    code = """
import asyncio
async def main():
    loop, heard = asyncio.get_running_loop(), []
    loop.add_signal_handler(signal.SIGTERM, heard.append, 1)
    s = stop_signals.StopSignals(); s.close(); s.close()
    os.kill(os.getpid(), signal.SIGTERM)
    await asyncio.sleep(0.3)
    print(heard)
asyncio.run(main())
"""
    out, err = start(code).communicate(timeout=20)
    assert (out, err) == ("[1]\n", "")


def test_a_closed_terminal_asks_to_stop_and_its_output_is_dropped(tmp_path):
    main, terminal = pty.openpty()
    code = f"""
import fcntl, termios
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests may run under nohup
os.setsid(); fcntl.ioctl(1, termios.TIOCSCTTY, 0)
s = stop_signals.StopSignals()
print("ready", flush=True)
while not s.requested: time.sleep(0.05)
print("this line has no terminal", flush=True)
open({str(tmp_path / "saved")!r}, "w").close()
"""
    process = start(code, stdout=terminal, stderr=terminal, stdin=subprocess.DEVNULL)
    os.close(terminal)
    said = b""
    while not said.endswith(b"\n"):  # a terminal may hand a line over in pieces
        said += os.read(main, 100)
    assert said == b"ready\r\n"
    os.close(main)
    assert process.wait(60) == 0 and (tmp_path / "saved").exists()


def test_under_nohup_a_closed_terminal_is_nothing():
    code = "signal.signal(signal.SIGHUP, signal.SIG_IGN)\ns = stop_signals.StopSignals()\nos.kill(os.getpid(), signal.SIGHUP)\n"
    out, _ = start(code + "time.sleep(0.3)\nprint(s.requested)").communicate(timeout=20)
    assert out == "False\n"
