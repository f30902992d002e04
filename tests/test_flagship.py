"""The flagship itself: configs/simclr_imagenet.yaml at 8,192 images on 8 gloo ranks, on real ImageNet JPEGs, 3 steps."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from ssl_pretrain.checkpoint.folder import newest_checkpoint
from ssl_pretrain.checkpoint.tensor_files import read_checkpoint

ROOT = Path(__file__).parents[1]
COPIES = 41  # of 600 images: 24,600, three steps of 8,192


@pytest.mark.full
@pytest.mark.timeout(1800)
def test_the_flagship_runs_at_8192_on_8_ranks(shared_data, tmp_path):
    originals = tmp_path / "originals"
    with zipfile.ZipFile(shared_data("imagenet_sample.zip")) as archive:
        archive.extractall(originals)
    for image in originals.rglob("*.JPEG"):
        folder = tmp_path / "imagenet" / "train" / image.parent.name
        folder.mkdir(parents=True, exist_ok=True)
        for copy in range(COPIES):
            os.link(image, folder / f"{copy:02d}_{image.name}")
    run = tmp_path / "run"
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "8", "-m", "ssl_pretrain.train",
        "configs/simclr_imagenet.yaml", f"data.root={tmp_path / 'imagenet'}", "backbone.name=test_resnet", "views.crops.global.size=32",
        "micro_batch_size=1024", f"output={run}", "log.every_steps=1", "--stop-after", "3",
    ]  # fmt: skip
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 1, result.stdout[-2000:] + result.stderr[-4000:]
    manifest, tensors = read_checkpoint(newest_checkpoint(run))
    assert (
        manifest["step"] == 3
        and manifest["machine"]["world_size"] == 8
        and manifest["config"]["global_batch_size"] == 8192
    )
    assert all(value.isfinite().all() for value in tensors.values() if value.is_floating_point())
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [1, 2, 3] and all(
        record["loss"] for record in records
    )
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    print(
        f"\nlosses {[round(record['loss'], 3) for record in records]}, images/s {[round(r['images_per_second']) for r in records]}"
    )
    print(
        f"largest resident memory of a rank: {peak:.2f} GiB; seconds: {records[-1]['time'] - records[0]['time']:.0f} for the last two steps"
    )
