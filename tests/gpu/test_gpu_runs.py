"""Runs on a GPU resume bit for bit, and measure k-NN and a linear probe."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from on_cuda import NEEDS_CUDA
from safetensors.torch import load_file

pytestmark = NEEDS_CUDA
ROOT = Path(__file__).parents[2]
OPTIMIZERS = {
    "lars": [],
    "sgd": ["optim.name=sgd", "optim.base_lr=0.1"],
    "adamw": ["optim.name=adamw", "optim.base_lr=0.001"],
}


def train(output: Path, *overrides: str) -> None:
    """Train the digits recipe with the train command."""
    command = [sys.executable, "-m", "ssl_pretrain.train", "configs/simclr_digits.yaml"]
    result = subprocess.run(
        [*command, f"output={output}", "log.wandb=off", *overrides],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr


def load_weights(run: Path) -> dict:
    """Return the tensors of the method in the run's newest checkpoint."""
    newest = sorted((run / "checkpoints").glob("step_*"))[-1]
    return load_file(newest / "method.safetensors")


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(optimizer, tmp_path):
    overrides = [*OPTIMIZERS[optimizer], "epochs=2", "parallel.deterministic=true"]
    overrides.append("online.knn_every_epochs=0")
    train(tmp_path / "uninterrupted", *overrides)
    train(tmp_path / "resumed", *overrides, "--stop-after", "3")
    train(tmp_path / "resumed", *overrides)
    expected, resumed = load_weights(tmp_path / "uninterrupted"), load_weights(tmp_path / "resumed")
    assert [name for name, value in expected.items() if not value.equal(resumed[name])] == []


def test_the_online_evaluations_are_better_than_chance(tmp_path):
    train(tmp_path / "run", "epochs=1", "online.on_failure=stop")
    last_record = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert last_record["knn"] > 0.5 and last_record["probe"] > 0.5
