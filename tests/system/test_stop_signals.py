"""Signals that ask a run to stop. The first is remembered, and a second one ends the process."""

import os
import pty
import signal
import subprocess
import sys
import time

import pytest

IMPORTS = """
import os, signal, sys, threading, time
from ssl_pretrain.system import stop_signals
"""
BLOCK_FOREVER = """
import ctypes
lock = ctypes.create_string_buffer(64)
ctypes.CDLL(None).pthread_mutex_lock(lock)
print("ready", flush=True)
ctypes.CDLL(None).pthread_mutex_lock(lock)  # never returns, and no signal interrupts it
"""
SLEEP_REPEATEDLY = """
print("ready", flush=True)
while True: time.sleep(0.1)
"""


def start(code: str, **options) -> subprocess.Popen[str]:
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True} | options
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    return subprocess.Popen([sys.executable, "-c", IMPORTS + code], env=environment, **options)


@pytest.mark.parametrize(
    "wait", [SLEEP_REPEATEDLY, BLOCK_FOREVER], ids=["in Python", "in a call that never returns"]
)
@pytest.mark.parametrize(
    ("first", "second"),
    [
        (signal.SIGTERM, signal.SIGTERM),
        (signal.SIGINT, signal.SIGTERM),
        (signal.SIGTERM, signal.SIGINT),
    ],
)
def test_a_second_signal_ends_the_process_at_once(wait, first, second):
    process = start("handlers = stop_signals.StopSignalHandlers()\n" + wait)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(first)
    time.sleep(1.3)
    assert process.poll() is None
    process.send_signal(second)
    _, err = process.communicate(timeout=10)
    assert process.returncode == 128 + second
    assert err.splitlines() == [
        "",
        f"{first.name}: the run saves and stops after this step; a second signal ends it without "
        "saving",
        "",
        f"{second.name} is the second signal: the process ends without saving",
    ]


def test_neither_a_schedulers_warning_nor_a_repeated_signal_of_the_launcher_counts_as_the_second():
    process = start("""
handlers = stop_signals.StopSignalHandlers()
print("ready", flush=True)
time.sleep(3.5)
print(handlers.is_stop_requested)
""")
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGUSR2)  # announces preemption, before SIGTERM
    time.sleep(1.3)
    process.send_signal(signal.SIGTERM)
    time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=20)[0] == "True\n" and process.returncode == 0


def test_signals_before_the_run_starts_count():
    process = start("stop_signals.install_early_handlers()\n" + SLEEP_REPEATEDLY)
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
    handlers = stop_signals.StopSignalHandlers()
    assert not handlers.is_installed and not handlers.is_stop_requested
    os.kill(os.getpid(), signal.SIGTERM)
    handlers.close()
thread = threading.Thread(target=run); thread.start(); thread.join()
"""
    out, err = start(code).communicate(timeout=20)
    assert (out, err) == ("the program's own\n", "")


def test_the_handlers_of_an_event_loop_are_restored():
    code = """
import asyncio
async def main():
    loop, received = asyncio.get_running_loop(), []
    loop.add_signal_handler(signal.SIGTERM, received.append, 1)
    handlers = stop_signals.StopSignalHandlers(); handlers.close(); handlers.close()
    os.kill(os.getpid(), signal.SIGTERM)
    await asyncio.sleep(0.3)
    print(received)
asyncio.run(main())
"""
    out, err = start(code).communicate(timeout=20)
    assert (out, err) == ("[1]\n", "")


def test_a_closed_terminal_is_a_stop_request_and_later_output_is_dropped(tmp_path):
    controller, terminal = pty.openpty()
    code = f"""
import fcntl, termios
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests may run under nohup
os.setsid(); fcntl.ioctl(1, termios.TIOCSCTTY, 0)
handlers = stop_signals.StopSignalHandlers()
print("ready", flush=True)
while not handlers.is_stop_requested: time.sleep(0.05)
print("this line has no terminal", flush=True)
open({str(tmp_path / "saved")!r}, "w").close()
"""
    process = start(code, stdout=terminal, stderr=terminal, stdin=subprocess.DEVNULL)
    os.close(terminal)
    line = b""
    while not line.endswith(b"\n"):  # a terminal may deliver a line in pieces
        line += os.read(controller, 100)
    assert line == b"ready\r\n"
    os.close(controller)
    assert process.wait(60) == 0 and (tmp_path / "saved").exists()


def test_under_nohup_a_closed_terminal_is_ignored():
    process = start("""
signal.signal(signal.SIGHUP, signal.SIG_IGN)
handlers = stop_signals.StopSignalHandlers()
os.kill(os.getpid(), signal.SIGHUP)
time.sleep(0.3)
print(handlers.is_stop_requested)
""")
    out, _ = process.communicate(timeout=20)
    assert out == "False\n"
