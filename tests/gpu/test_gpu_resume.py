"""A run on a GPU that is stopped and resumed ends with the weights of one that was not, with the shipped defaults."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from on_cuda import NEEDS_CUDA
from safetensors.torch import load_file

pytestmark = NEEDS_CUDA
ROOT = Path(__file__).parents[2]
OPTIMIZERS = {"lars": [], "sgd": ["optim.name=sgd", "optim.base_lr=0.1"], "adamw": ["optim.name=adamw", "optim.base_lr=0.001"]}


def train(output: Path, *overrides: str) -> None:
    command = [sys.executable, "-m", "ssl_pretrain.train", "configs/simclr_digits.yaml", f"output={output}", "epochs=2"]
    quiet = ["online.knn_every_epochs=0", "log.wandb=off", "parallel.deterministic=true"]
    done = subprocess.run([*command, *quiet, *overrides], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def weights(run: Path) -> dict:
    newest = sorted((run / "checkpoints").glob("step_*"))[-1]
    return load_file(newest / "method.safetensors")


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_resumed_run_has_the_bits_of_a_straight_one(optimizer, tmp_path):
    overrides = OPTIMIZERS[optimizer]
    train(tmp_path / "straight", *overrides)
    train(tmp_path / "resumed", *overrides, "--stop-after", "3")
    train(tmp_path / "resumed", *overrides)
    straight, resumed = weights(tmp_path / "straight"), weights(tmp_path / "resumed")
    differing = [name for name, value in straight.items() if not value.equal(resumed[name])]
    assert differing == []
