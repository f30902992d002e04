"""The watchdog: silence ends a process with a message, and nothing else does."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

ENVIRONMENT = {**os.environ, "RANK": "1", "WORLD_SIZE": "2", "PYTHONPATH": os.getcwd()}


def start(code: str) -> subprocess.Popen[str]:
    text = f"import os, time\nfrom ssl_pretrain.system import watchdog as module\nw = module.watchdog\n{code}"
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([sys.executable, "-c", text], env=ENVIRONMENT, text=True, **pipes)


def ended(code: str) -> tuple[int, str, str]:
    process = start(code)
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err


def test_silence_ends_the_process_and_names_what_it_waited_for():
    status, _, err = ended(
        "w.beat(0.5, 'waiting for the images of step 1', 'see the disk')\ntime.sleep(50)"
    )
    assert status == 69
    message = err.splitlines()[-1]
    assert message.startswith("error: rank 1 of 2 on ")
    assert message.endswith(
        ": no sign of life for 0.5 s (parallel.timeout_seconds) while waiting for the images of "
        "step 1: see the disk"
    )
    assert 'File "<string>"' in err  # the stacks say where


def test_signs_of_life_and_rest_keep_it_quiet():
    code = "for step in range(8):\n    w.beat(1.0, 'x', 'y')\n    time.sleep(0.3)\nw.rest()\ntime.sleep(2)"
    assert ended(code) == (0, "", "")


def test_a_suspension_is_no_silence():
    code = "w.beat(6.0, 'x', 'y')\nprint('ready', flush=True)\ntime.sleep(1)\nprint('alive', flush=True)\nw.rest()"
    process = start(code)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGSTOP)
    time.sleep(8)
    process.send_signal(signal.SIGCONT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (0, "alive\n", "")


def test_a_call_that_keeps_the_interpreter_is_ended_too():
    code = "import ctypes\nmodule.BACKUP_SECONDS = 1.0\nw.beat(0.5, 'x', 'y')\ntime.sleep(0.3)\n"
    status, _, err = ended(code + "ctypes.PyDLL(None).sleep(50)")
    assert status != 0 and "File" in err


def test_compiling_is_no_silence_and_waiting_is():
    busy = "w.beat(1.0, 'x', 'y', compiles=True)\nend = time.monotonic() + 4\nwhile time.monotonic() < end: pass\n"
    assert ended(busy + "w.rest()") == (0, "", "")
    began = time.monotonic()
    assert ended("w.beat(1.0, 'x', 'y', compiles=True)\ntime.sleep(50)")[0] == 69
    assert time.monotonic() - began < 20


def test_the_status_can_be_that_of_the_disk():
    assert ended("w.beat(0.3, 'x', 'y', 74)\ntime.sleep(50)")[0] == 74
