"""Settings of torch for CUDA, as far as they can be observed without a GPU."""

import os
import platform
import subprocess
import sys

import pytest
import torch

from ssl_pretrain.distributed import cuda_settings

LINUX = pytest.mark.skipif(platform.system() != "Linux", reason="only on Linux")
NEW_NAME, OLD_NAME = cuda_settings.ALLOCATOR_VARIABLES
VALUE = "expandable_segments:True"


@pytest.fixture
def unconfigured(monkeypatch):
    """An environment without settings of the allocator, restored after the test."""
    for name in cuda_settings.ALLOCATOR_VARIABLES:
        monkeypatch.setenv(name, "")  # so that monkeypatch removes what the test sets
        monkeypatch.delenv(name)
    monkeypatch.setattr(platform, "release", lambda: "6.8.0-generic")


@LINUX
def test_segments_are_expandable_unless_the_user_has_configured_the_allocator(
    unconfigured, monkeypatch
):
    cuda_settings.use_expandable_segments()
    assert os.environ[NEW_NAME] == VALUE
    for name in (NEW_NAME, OLD_NAME):
        for other in (NEW_NAME, OLD_NAME):
            monkeypatch.delenv(other, raising=False)
        monkeypatch.setenv(name, "max_split_size_mb:512")
        cuda_settings.use_expandable_segments()
        settings = {key: os.environ.get(key) for key in (NEW_NAME, OLD_NAME)}
        assert settings == {NEW_NAME: None, OLD_NAME: None} | {name: "max_split_size_mb:512"}


def test_segments_stay_as_they_are_once_cuda_is_in_use(unconfigured, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    cuda_settings.use_expandable_segments()
    assert NEW_NAME not in os.environ


def test_segments_stay_as_they_are_in_the_windows_subsystem(unconfigured, monkeypatch):
    monkeypatch.setattr(platform, "release", lambda: "5.15.90.1-microsoft-standard-WSL2")
    cuda_settings.use_expandable_segments()
    assert NEW_NAME not in os.environ


@pytest.mark.full
@LINUX
@pytest.mark.promise
def test_the_allocator_accepts_the_setting_after_torch_was_imported():
    """The allocator reads the variable late. It would refuse a name or a value that is unknown."""
    code = (
        "import os, torch; from ssl_pretrain.distributed import cuda_settings\n"
        "torch.cuda.is_available()\n"
        "cuda_settings.use_expandable_segments()\n"
        "value = os.environ['PYTORCH_ALLOC_CONF']\n"
        "os.environ['PYTORCH_ALLOC_CONF'] = {!r}.format(value)\n"
        "torch._C._accelerator_setAllocatorSettings('max_split_size_mb:512')"
    )
    names = set(cuda_settings.ALLOCATOR_VARIABLES)
    environment = {key: value for key, value in os.environ.items() if key not in names}
    results = [
        subprocess.run(
            [sys.executable, "-c", code.format(template)],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        for template in ("{}", "unknown_{}")
    ]
    assert (results[0].returncode, results[0].stderr) == (0, "")
    assert "unknown_expandable_segments" in results[1].stderr


def test_the_search_for_fast_algorithms_is_off_in_deterministic_runs(unconfigured, monkeypatch):
    devices = []
    monkeypatch.setattr(torch.cuda, "set_device", devices.append)
    for deterministic in (False, True):
        monkeypatch.setattr(torch.backends.cudnn, "benchmark", deterministic)
        cuda_settings.apply(torch.device("cuda", 3), deterministic)
        assert torch.backends.cudnn.benchmark is not deterministic
    assert devices == [torch.device("cuda", 3)] * 2
