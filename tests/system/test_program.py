"""Commands for the user to run next."""

import sys

import pytest

from ssl_pretrain.system import program


@pytest.mark.parametrize(
    ("script", "command"),
    [
        ("ssl-pretrain", "ssl-pretrain knn 'runs/my run'"),
        ("", ".venv/bin/python -m ssl_pretrain.eval.knn 'runs/my run'"),
    ],
)
def test_the_next_command_is_written_as_the_first_was(monkeypatch, script, command):
    monkeypatch.setenv(program.PROGRAM_VARIABLE, script)
    monkeypatch.setattr(program.shutil, "which", lambda name: None)
    monkeypatch.setattr(sys, "orig_argv", [".venv/bin/python", "-m", "ssl_pretrain.train"])
    assert program.format_command("ssl_pretrain.eval.knn", "runs/my run") == command


def test_an_activated_environment_is_named_python(monkeypatch):
    monkeypatch.delenv(program.PROGRAM_VARIABLE, raising=False)
    monkeypatch.setattr(program.shutil, "which", lambda name: sys.executable)
    assert program.format_command("ssl_pretrain.eval.knn", "r") == (
        "python -m ssl_pretrain.eval.knn r"
    )
