"""Files that survive a full disk or a power cut."""

import errno
import os
from pathlib import Path

import pytest

from ssl_pretrain.system import durable_files


def raise_disk_full(*_arguments):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_an_appended_line_is_complete_or_absent(tmp_path, monkeypatch):
    """The disk fills up in the middle of a line."""
    path = tmp_path / "metrics.jsonl"
    durable_files.append(path, "first\n")
    write = os.write

    def write_three_bytes(descriptor, data):
        monkeypatch.setattr(os, "write", raise_disk_full)
        return write(descriptor, bytes(data)[:3])

    monkeypatch.setattr(os, "write", write_three_bytes)
    with pytest.raises(OSError, match="No space left"):
        durable_files.append(path, "second\n")
    assert path.read_text() == "first\n"


def test_a_replaced_file_gets_its_name_after_its_content_is_on_the_disk(tmp_path, monkeypatch):
    """A power cut between any two calls leaves the old content or the new one."""
    path, calls = tmp_path / "config.yaml", []
    path.write_text("old")
    fsync, replace = os.fsync, os.replace

    def record_fsync(descriptor):
        calls.append(f"fsync {Path(os.readlink(f'/proc/self/fd/{descriptor}')).name}")
        assert path.read_text() in ("old", "new")
        fsync(descriptor)

    def record_rename(source, target):
        calls.append(f"rename {Path(target).name}")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(os, "replace", record_rename)
    durable_files.replace(path, "new")
    assert calls == ["fsync .config.yaml.part", "rename config.yaml", f"fsync {tmp_path.name}"]
