"""Other platforms lack some of Linux's system calls."""

import os
import subprocess
import sys
import threading

import pytest

from ssl_pretrain.system import platform_support

# Third-party modules are imported first, because their builds for other platforms differ.
IMPORT_WITHOUT_POSIX = """
import importlib, multiprocessing, os, pkgutil, signal, sys
import jinja2, matplotlib.pyplot, numba, omegaconf, rich.live, scipy.ndimage, sklearn.datasets
import safetensors.torch, timm, torch.distributed.checkpoint, torch.utils.data, torchvision

for name in ("fcntl", "resource", "pwd", "grp", "termios", "tty", "pty"):
    sys.modules[name] = None
for name in (
    "fork forkpty register_at_fork geteuid getuid getgid getpgid killpg setsid pread pwrite "
    "sched_getaffinity sched_setaffinity posix_fadvise set_blocking O_NONBLOCK O_CLOEXEC "
    "O_DIRECTORY O_NOFOLLOW mkfifo fchmod fchown chown sysconf statvfs uname getloadavg WNOHANG "
    "openpty preadv sync"
).split():
    delattr(os, name)
for name in (
    "SIGUSR1 SIGUSR2 SIGHUP SIGKILL SIGQUIT SIGCONT SIGCHLD SIGALRM SIGPIPE SIGSTOP SIGTSTP "
    "SIGXCPU SIGXFSZ pthread_sigmask pthread_kill sigtimedwait sigwait alarm setitimer pause "
    "SIG_BLOCK SIG_UNBLOCK SIG_SETMASK"
).split():
    delattr(signal, name)
multiprocessing.get_all_start_methods = lambda: ["spawn"]

import ssl_pretrain
for module in pkgutil.walk_packages(ssl_pretrain.__path__, "ssl_pretrain."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)

from ssl_pretrain.system import stop_signals
with stop_signals.temporary_signal_handlers():
    pass
"""


@pytest.mark.full
def test_every_module_imports_without_the_calls_that_only_posix_has():
    command = [sys.executable, "-W", "ignore", "-c", IMPORT_WITHOUT_POSIX]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("has_pread", [True, False])
def test_threads_read_the_right_bytes_of_one_file(tmp_path, monkeypatch, has_pread):
    if not has_pread:
        monkeypatch.delattr(os, "pread")
    (tmp_path / "file").write_bytes(bytes(range(256)))
    descriptor = os.open(tmp_path / "file", os.O_RDONLY)
    contents = {}

    def read(start: int) -> None:
        for offset in range(start, 256, 8):
            contents[offset] = platform_support.read_at(descriptor, 4, offset)

    threads = [threading.Thread(target=read, args=(start,)) for start in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    os.close(descriptor)
    assert contents == {offset: bytes(range(256))[offset : offset + 4] for offset in range(256)}


def test_signals_that_a_platform_lacks_are_left_out():
    names = [number.name for number in platform_support.available_signals("SIGTERM", "SIGNONE")]
    assert names == ["SIGTERM"]


def test_a_process_exists_until_it_ends():
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    assert platform_support.process_exists(process.pid)
    process.communicate()
    assert not platform_support.process_exists(process.pid)
