"""The watchdog: silence ends a process with a message, and nothing else does."""

import os
import signal
import subprocess
import sys
import time

ENVIRONMENT = {**os.environ, "RANK": "1", "WORLD_SIZE": "2", "PYTHONPATH": os.getcwd()}
PREPARE = """
import ctypes, os, time
from ssl_pretrain.system import watchdog as module
watchdog = module.watchdog
"""


def start(code: str) -> subprocess.Popen[str]:
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    command = [sys.executable, "-c", PREPARE + code]
    return subprocess.Popen(command, env=ENVIRONMENT, text=True, **pipes)


def run(code: str) -> tuple[int, str, str]:
    """Return the exit status, the output and the errors of a process."""
    process = start(code)
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err


def test_silence_ends_the_process_and_the_message_names_its_activity():
    status, _, err = run("""
watchdog.arm(0.5, "waiting for the images of step 1", "check the disk")
time.sleep(50)
""")
    assert status == 69
    message = err.splitlines()[-1]
    assert message.startswith("error: rank 1 of 2 on ")
    assert message.endswith(
        ": no sign of life for 0.5 s (parallel.timeout_seconds) while waiting for the images of "
        "step 1: check the disk"
    )
    assert 'File "<string>"' in err  # the stack of the hung call


def test_signs_of_life_keep_the_process_alive_and_so_does_disarming():
    code = """
for step in range(8):
    watchdog.arm(1.0, "x", "y")
    time.sleep(0.3)
watchdog.disarm()
time.sleep(2)
"""
    assert run(code) == (0, "", "")


def test_a_suspended_process_is_not_silent():
    process = start("""
watchdog.arm(6.0, "x", "y")
print("ready", flush=True)
time.sleep(1)
print("alive", flush=True)
watchdog.disarm()
""")
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGSTOP)
    time.sleep(8)
    process.send_signal(signal.SIGCONT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (0, "alive\n", "")


def test_a_call_that_holds_the_interpreter_lock_is_ended():
    status, _, err = run("""
module.BACKUP_SECONDS = 1.0
watchdog.arm(0.5, "x", "y")
time.sleep(0.3)
ctypes.PyDLL(None).sleep(50)
""")
    assert status != 0 and "File" in err


def test_a_process_that_compiles_is_not_silent_unless_it_waits():
    busy_code = """
watchdog.arm(1.0, "x", "y", includes_compilation=True)
end = time.monotonic() + 4
while time.monotonic() < end: pass
watchdog.disarm()
"""
    assert run(busy_code) == (0, "", "")
    start_time = time.monotonic()
    assert run('watchdog.arm(1.0, "x", "y", includes_compilation=True)\ntime.sleep(50)')[0] == 69
    assert time.monotonic() - start_time < 20


def test_the_exit_status_can_be_set():
    assert run('watchdog.arm(0.3, "x", "y", 74)\ntime.sleep(50)')[0] == 74
