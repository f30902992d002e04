"""Commands start without a writable home or checkout, and with damaged files in numba's cache."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import commands
import pytest

needs_root = pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("setpriv") is None, reason="needs root and setpriv"
)
# The user may read everything, so that the modes of the folders above the checkout do not matter.
AS_STRANGER = ["setpriv", "--reuid", "12345", "--regid", "12345", "--clear-groups"]
AS_STRANGER += ["--inh-caps", "+dac_read_search", "--ambient-caps", "+dac_read_search"]
PRINT_PERMUTATION = ("-c", "from ssl_pretrain import rng; print(rng.permutation(0, 0, 4))")


def run_as_stranger(*arguments: str | Path, **environment: str) -> commands.CommandResult:
    """Run Python as a user without a passwd entry, a home or a writable checkout."""
    variables = {"PATH": os.environ["PATH"], "PYTHONPATH": str(commands.ROOT)} | environment
    command = [*AS_STRANGER, sys.executable, *map(str, arguments)]
    result = subprocess.run(
        command, env=variables, capture_output=True, text=True, timeout=300, cwd="/", check=False
    )
    return commands.CommandResult(result.returncode, result.stdout, result.stderr)


@pytest.fixture
def public_folder(tmp_path):
    """Return a folder for temporary files that every user may write to, like /tmp."""
    for parent in (tmp_path, *tmp_path.parents):
        if parent.owner() == "root" and parent != Path("/"):
            parent.chmod(parent.stat().st_mode | 0o011)
    folder = tmp_path / "tmp"
    folder.mkdir()
    folder.chmod(0o1777)
    return folder


@pytest.mark.full
@needs_root
def test_help_works_without_a_home_or_a_passwd_entry(public_folder):
    result = run_as_stranger(
        "-m", "ssl_pretrain.train", "--help", TMPDIR=str(public_folder), HOME="/none"
    )
    assert result.status == 0 and "key=value" in result.stdout, result.text


@needs_root
@pytest.mark.full
def test_training_works_without_a_home_or_a_passwd_entry(public_folder):
    root = commands.write_class_folders(public_folder / "images", "train", images_per_class=4)
    config = commands.write_config(public_folder / "work", root)
    config.write_text(
        config.read_text().replace(f", cache_dir: {public_folder / 'work/cache'}", "")
    )
    config.parent.chmod(0o777)
    result = run_as_stranger("-m", "ssl_pretrain.train", config, TMPDIR=str(public_folder))
    assert result.status == 0, result.text
    folder = public_folder / "ssl_pretrain-numba-12345"
    assert folder.stat().st_mode & 0o777 == 0o700 and folder.stat().st_uid == 12345
    assert list(folder.rglob("*.nbi"))


@needs_root
@pytest.mark.parametrize("weakness", ["another user's", "open to all", "a link"])
def test_a_cache_folder_that_another_user_prepared_is_not_used(public_folder, weakness):
    """Cached machine code is executed, so whoever can write the cache can run anything."""
    folder = public_folder / "ssl_pretrain-numba-12345"
    target = public_folder / "elsewhere" if weakness == "a link" else folder
    target.mkdir(mode=0o700)
    if weakness == "a link":
        folder.symlink_to(target)
    if weakness != "another user's":
        os.chown(target, 12345, 12345)
    if weakness == "open to all":
        target.chmod(0o777)
    result = run_as_stranger(*PRINT_PERMUTATION, TMPDIR=str(public_folder), HOME="/nonexistent")
    assert result.status == 0, result.text
    assert list(target.iterdir()) == []


def test_a_cache_folder_that_cannot_be_created_is_replaced_by_a_temporary_one(tmp_path):
    (tmp_path / "file").touch()
    temporary_folder = tmp_path / "tmp"
    temporary_folder.mkdir()
    result = commands.run(
        *PRINT_PERMUTATION,
        NUMBA_CACHE_DIR=str(tmp_path / "file" / "cache"),
        TMPDIR=str(temporary_folder),
    )
    assert result.status == 0, result.text
    assert list(temporary_folder.rglob("*.nbi"))


def test_an_empty_cache_and_a_full_disk_do_not_prevent_a_start(tmp_path):
    """A power cut leaves empty files, and on a full disk nothing can replace them."""
    limit_files_to_0_bytes = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0)); "
    first = commands.run(*PRINT_PERMUTATION, NUMBA_CACHE_DIR=str(tmp_path))
    files = [path for path in tmp_path.rglob("*") if path.suffix in (".nbi", ".nbc")]
    assert files
    for path in files:
        os.truncate(path, 0)
    second = commands.run(
        "-c", limit_files_to_0_bytes + PRINT_PERMUTATION[1], NUMBA_CACHE_DIR=str(tmp_path)
    )
    assert (second.status, second.stdout) == (0, first.stdout), second.text
    assert not any(path.stat().st_size for path in files)
