"""Every YAML of configs/: loads, opens with its provenance, builds its real model, and takes one reduced step."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import tiny
import torch

from ssl_pretrain import backbones, config, optim, plan
from ssl_pretrain.train import train
from ssl_pretrain.views import recipe

FILES = sorted((Path(__file__).parents[1] / "configs").glob("*.yaml"))
BACKBONE_PARAMETERS = {"resnet50": 23_508_032, "test_resnet": 372_688}  # timm's, without a classifier


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_header_says_where_it_comes_from(path):
    header = [line for line in path.read_text().splitlines() if line.startswith("#")]
    for wanted in ("arXiv:", "Paper's number:", "Ours:", "Hardware:", "Command:"):
        assert any(wanted in line for line in header), f"{path.name}: its header lacks {wanted!r}"
    assert any(path.name in line for line in header), f"{path.name}: its command names another file"
    assert re.match(r"[a-z0-9]+_[a-z0-9]+", path.stem)
    if "imagenet" in path.stem:
        assert any(".beton" in line and "--max-side" in line for line in header), f"{path.name}: its header does not say which file it assumes"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_it_builds_its_real_model(path):
    run = config.load(path)
    recipe.check(run.views)
    assert backbones.count_parameters(plan.method_on_meta(run).backbone) == BACKBONE_PARAMETERS[run.backbone.name]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_it_takes_a_reduced_step(path, tmp_path):
    run = config.load(path)
    data = tiny.images(tmp_path / "images")
    smaller = [f"views.crops.{name}.size=32" for name in run.views.crops]
    smaller += [f"views.crops.{name}.blur_kernel=3" for name in run.views.crops]
    reduced = config.load(
        path,
        [f"output={tmp_path / 'run'}", f"data.root={data}", "data.source=folder", f"data.cache_dir={tmp_path / 'cache'}", "data.num_workers=0",
         "backbone.name=test_resnet", "global_batch_size=16", "log.wandb=off", "log.every_steps=1", "online.knn_every_epochs=0", *smaller],
    )  # fmt: skip
    assert train(reduced, torch.device("cpu"), stop_after=1) == 1


def test_the_flagship_is_the_papers():
    run = config.load(FILES[0].with_name("simclr_imagenet.yaml"))
    assert optim.scaled_lr(run.optim, run.global_batch_size) == pytest.approx(6.788, abs=5e-4)
    described = plan.describe(run, world_size=8)
    assert "embeddings per loss: 16,384 (2 views x 8,192 images); negatives per anchor: 16,382" in described
    assert "learning rate: 6.78823 (0.075 x sqrt(8192))" in described
    assert "batch norm over 8,192 images; each rank's share of 1,024 images in 1 part, at 8 ranks" in described
    assert "group adapted: 56 tensors" in described and "group excluded: 111 tensors" in described
