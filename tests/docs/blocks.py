"""Find the code blocks of a page, and run them.

A comment before each block says how the test treats it:

    <!-- run -->               it runs as it is
    <!-- run: small -->        it runs, with `SMALL` settings for each pretraining
    <!-- full: reason -->      it runs in the long suite only, with the same settings
    <!-- not run: reason -->   it cannot run in a test
"""

import functools
import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import ssl_pretrain

ROOT = Path(__file__).resolve().parents[2]
BLOCK = re.compile(
    r"(?:<!-- (?P<treatment>run|full|not run)(?:: (?P<note>[^>]*?))? -->\n)?"
    r"^```(?P<language>python|bash|console)\n(?P<code>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)
# Settings that make a pretraining take seconds, for blocks that train.
SMALL = {"epochs": 1, "backbone.name": "test_resnet", "backbone.stem": "no_pool"}


@dataclass(frozen=True)
class Block:
    """A code block, and how the test treats it."""

    language: str  # "python", "bash" or "console"
    code: str
    treatment: str  # "run", "full", "not run", or "" if the page does not say
    note: str  # "small", or the reason
    line: int  # number of its first line in the page


def find_blocks(page: Path) -> list[Block]:
    """Return the Python and shell blocks of a page, in order."""
    text = page.read_text()
    return [
        Block(
            match["language"],
            match["code"],
            match["treatment"] or "",
            match["note"] or "",
            text.count("\n", 0, match.start("code")) + 1,
        )
        for match in BLOCK.finditer(text)
    ]


def run(block: Block, folder: Path, variables: dict[str, Any]) -> None:
    """Run a block in the working folder, as a reader with an activated environment would.

    Args:
        block: The block.
        folder: The working folder.
        variables: Variables of the page's earlier Python blocks. New ones are added.

    Raises:
        AssertionError: If a command fails. The message has its output.
    """
    is_small = block.treatment == "full" or block.note == "small"
    if block.language == "python":
        settings = {key.replace(".", "__"): value for key, value in SMALL.items()}
        small_pretrain = functools.partial(ssl_pretrain.pretrain, **settings)
        pretrain = small_pretrain if is_small else ssl_pretrain.pretrain
        with mock.patch.object(ssl_pretrain, "pretrain", pretrain):
            exec(block.code, variables)
        return
    code = re.sub(r"^\$ ", "", block.code, flags=re.MULTILINE)
    command = ["bash", "-euc", _shell_preamble(is_small) + code]
    result = subprocess.run(command, cwd=folder, env=_environment(), capture_output=True, text=True)
    output = result.stdout + result.stderr
    assert result.returncode == 0, f"line {block.line}:\n{code}\n{output[-3000:]}"


def _shell_preamble(is_small: bool) -> str:
    """Return functions that stand for the commands of an activated environment."""
    python = shlex.quote(sys.executable)
    small = " ".join(shlex.quote(f"{key}={value}") for key, value in SMALL.items())
    extra = f'case "$1" in pretrain | train) set -- "$@" {small};; esac; ' if is_small else ""
    return (
        f'python() {{ {python} "$@"; }}\n'
        f'ssl-pretrain() {{ {extra}{python} -m ssl_pretrain.cli "$@"; }}\n'
    )


def _environment() -> dict[str, str]:
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return os.environ | {"PYTHONPATH": path, "WANDB_MODE": "disabled"}
