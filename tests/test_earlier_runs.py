"""Runs of earlier revisions load, continue and can be evaluated.

`golden/earlier_run` was written before the package was divided into folders. It has six of sixteen
steps of DINO on 96 digits, with the keys and file names of that time. `expected.json` holds that
revision's results.
"""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import ranks
import torch
from instruction_set import train_with_avx2

from ssl_pretrain import config
from ssl_pretrain.build import build_method
from ssl_pretrain.eval import knn

EARLIER = Path(__file__).parent / "golden" / "earlier_run"
EXPECTED = json.loads((EARLIER / "expected.json").read_text())
LAST_STEP = 16


@pytest.fixture
def run(tmp_path) -> Path:
    return shutil.copytree(EARLIER / "run", tmp_path / "run")


def digest(run: Path) -> str:
    """Return the SHA-256 of the newest checkpoint's tensors, optimizer state included."""
    sha256 = hashlib.sha256()
    for name, tensor in sorted(ranks.load_tensors(run).items()):
        sha256.update(name.encode())
        sha256.update(tensor.contiguous().numpy().tobytes())
    return sha256.hexdigest()


@pytest.mark.full
def test_an_earlier_run_continues_to_its_end(run):
    recipe = EARLIER / "recipe.yaml"
    output = train_with_avx2(recipe, f"output={run}", f"data.cache_dir={run.parent}")
    assert f"resumed {run} after step 6" in output
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == list(range(1, LAST_STEP + 1))
    if torch.__version__ != EXPECTED["torch"]:
        pytest.skip(f"the digest is for torch {EXPECTED['torch']}")
    assert digest(run) == EXPECTED["digest_after_16_steps"]


def test_an_earlier_run_is_evaluated_to_the_same_accuracy(run):
    knn.main([str(run), "parallel.precision=float32"])
    rows = json.loads((run / "eval" / "knn.json").read_text())["rows"]
    accuracies = {row["features"]: row["metrics"] for row in rows}
    for features, metrics in EXPECTED["knn"].items():
        assert accuracies[features] == pytest.approx(metrics, abs=0.2)  # one image of 500


def test_a_new_run_starts_from_an_earlier_backbone(run):
    settings = config.load(EARLIER / "recipe.yaml", [f"backbone.init={run}"])
    backbone = build_method(settings).backbone.state_dict()
    tensors = ranks.load_tensors(run)  # DINO is evaluated by its teacher
    assert all(
        torch.equal(value, tensors[f"teacher.backbone.{n}"]) for n, value in backbone.items()
    )
