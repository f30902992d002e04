"""Three steps of configs/simclr_imagenet.yaml on ImageNet's JPEGs, 8,192 images on 8 ranks."""

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
NUM_COPIES = 41  # 41 copies of 600 images make 24,600, enough for three steps of 8,192


@pytest.mark.full
@pytest.mark.timeout(1800)
def test_the_flagship_runs_at_8192_on_8_ranks(shared_data, tmp_path):
    originals = tmp_path / "originals"
    with zipfile.ZipFile(shared_data("imagenet_sample.zip")) as archive:
        archive.extractall(originals)
    for image in originals.rglob("*.JPEG"):
        folder = tmp_path / "imagenet" / "train" / image.parent.name
        folder.mkdir(parents=True, exist_ok=True)
        for copy in range(NUM_COPIES):
            os.link(image, folder / f"{copy:02d}_{image.name}")
    run = tmp_path / "run"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command = [*torchrun, "--nproc-per-node", "8", "-m", "ssl_pretrain.train"]
    overrides = [
        f"data.root={tmp_path / 'imagenet'}",
        "backbone.name=test_resnet",
        "views.crops.global.size=32",
        "micro_batch_size=1024",
        f"output={run}",
        "log.every_steps=1",
    ]
    command += ["configs/simclr_imagenet.yaml", *overrides, "--stop-after", "3"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    manifest, tensors = read_checkpoint(newest_checkpoint(run))
    assert (manifest["step"], manifest["machine"]["world_size"]) == (3, 8)
    assert manifest["config"]["global_batch_size"] == 8192
    assert all(value.isfinite().all() for value in tensors.values() if value.is_floating_point())
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [1, 2, 3]
    assert all(record["loss"] for record in records)
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    losses = [round(record["loss"], 3) for record in records]
    speeds = [round(record["images_per_second"]) for record in records]
    seconds = records[-1]["time"] - records[0]["time"]
    print(f"\nlosses {losses}, images/s {speeds}")
    print(f"peak memory of a rank: {peak:.2f} GiB; the last two steps took {seconds:.0f} s")
