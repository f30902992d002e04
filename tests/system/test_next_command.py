"""Commands for the user to run next."""

import sys

import pytest

from ssl_pretrain.system import next_command


@pytest.mark.parametrize(
    ("program", "command"),
    [
        ("ssl-pretrain", "ssl-pretrain knn 'runs/my run'"),
        ("", ".venv/bin/python -m ssl_pretrain.eval.knn 'runs/my run'"),
    ],
)
def test_the_next_command_is_written_as_the_first_was(monkeypatch, program, command):
    monkeypatch.setenv(next_command.PROGRAM_VARIABLE, program)
    monkeypatch.setattr(next_command.shutil, "which", lambda name: None)
    monkeypatch.setattr(sys, "orig_argv", [".venv/bin/python", "-m", "ssl_pretrain.train"])
    assert next_command.format_command("ssl_pretrain.eval.knn", "runs/my run") == command


def test_an_activated_environment_is_named_python(monkeypatch):
    monkeypatch.delenv(next_command.PROGRAM_VARIABLE, raising=False)
    monkeypatch.setattr(next_command.shutil, "which", lambda name: sys.executable)
    assert next_command.format_command("ssl_pretrain.eval.knn", "r") == (
        "python -m ssl_pretrain.eval.knn r"
    )
