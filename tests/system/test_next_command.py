"""Commands for the user to run next."""

import sys

import pytest

from ssl_pretrain.system import next_command


@pytest.mark.parametrize(
    ("program", "python", "command"),
    [
        ("/usr/bin/ssl-pretrain", "/usr/bin/python3", "ssl-pretrain knn 'runs/my run'"),
        (
            "/clone/ssl_pretrain/train.py",
            ".venv/bin/python",
            ".venv/bin/python -m ssl_pretrain.eval.knn 'runs/my run'",
        ),
    ],
)
def test_the_next_command_is_written_as_the_first_was(monkeypatch, program, python, command):
    monkeypatch.setattr(sys, "argv", [program])
    monkeypatch.setattr(sys, "orig_argv", [python, "-m", "ssl_pretrain.train"])
    assert next_command.format_command("ssl_pretrain.eval.knn", "runs/my run") == command


def test_an_activated_environment_is_named_python(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py"])
    monkeypatch.setattr(next_command.shutil, "which", lambda name: sys.executable)
    assert next_command.format_command("ssl_pretrain.eval.knn", "r") == (
        "python -m ssl_pretrain.eval.knn r"
    )
