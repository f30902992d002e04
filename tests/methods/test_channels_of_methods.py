"""Every method trains on images of other numbers of channels, from its recipe for CIFAR-10."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from suites import quick_and_full
from test_configs import FILES, reduce_recipe

from ssl_pretrain.checkpoint.folder import checkpoint_path
from ssl_pretrain.checkpoint.tensor_files import read_checkpoint
from ssl_pretrain.planning import plan
from ssl_pretrain.train import train

CPU = torch.device("cpu")
NUM_IMAGES = 32  # two batches of a reduced recipe
RECIPES = {path.stem.removesuffix("_cifar10"): path for path in FILES if "_cifar10" in path.stem}


def write_images(folder, channels, size=24):
    """Write an .npz with noise around one level per class and channel, and return its path."""
    generator = np.random.default_rng(channels)
    labels = np.arange(NUM_IMAGES) % 4
    levels = generator.integers(0, 128, (4, 1, 1, channels))
    noise = generator.integers(0, 128, (NUM_IMAGES, size, size, channels))
    path = folder / "images.npz"
    np.savez(path, x_train=(levels[labels] + noise).astype(np.uint8), y_train=labels)
    return path


def configure(method, channels, folder, *overrides):
    data = [f"data.channels={channels}", f"data.root={write_images(folder, channels)}"]
    return reduce_recipe(RECIPES[method], folder, ["data.source=folder", *data, *overrides])


def check_run(config, num_steps):
    """Check the losses, and the input channels of the first layers in the newest checkpoint."""
    lines = Path(config.output, "metrics.jsonl").read_text().splitlines()
    losses = [json.loads(line)["loss"] for line in lines]
    assert len(losses) == num_steps and all(map(math.isfinite, losses))
    _, tensors = read_checkpoint(checkpoint_path(config.output, num_steps))
    first_layers = ("backbone.model.conv1.0.weight", "backbone.model.patch_embed.proj.weight")
    channels = [tensors[name].shape[1] for name in first_layers if name in tensors]
    assert channels == [config.data.channels]


@pytest.mark.parametrize("method", quick_and_full(["dino", "mae", "moco"], list(RECIPES)))
def test_every_method_trains_on_thirteen_channels(method, tmp_path):
    config = configure(method, 13, tmp_path)
    assert train(config, CPU, stop_after=1) == 1
    check_run(config, num_steps=1)


@pytest.mark.full
@pytest.mark.parametrize("channels", [1, 2, 4, 13, 32])
@pytest.mark.parametrize("method", list(RECIPES))
def test_every_method_resumes_on_any_number_of_channels(method, channels, tmp_path):
    config = configure(method, channels, tmp_path)
    for step in (1, 2):
        assert train(config, CPU, stop_after=1) == step
    check_run(config, num_steps=2)


@pytest.mark.parametrize(
    ("method", "channels"), quick_and_full([("mae", 4)], [("simclr", 1), ("mae", 4)])
)
def test_all_parts_of_a_run_take_other_channels(method, channels, tmp_path, capsys):
    """The cache, micro-batches found by trial, half precision, k-NN, pictures and the estimate."""
    settings = ["data.cache=device", "parallel.precision=bfloat16", "micro_batch_size=auto"]
    config = configure(method, channels, tmp_path, *settings, "plan.gpu=H100")
    config.online.knn_every_epochs, config.online.k = 1, 3
    for step in (1, 2):
        assert train(config, CPU, stop_after=1) == step
    check_run(config, num_steps=2)
    pictures = {path.name for path in Path(config.output).rglob("*.png")}
    assert "views.png" in pictures and len(pictures) > 1
    lines = capsys.readouterr().out.splitlines()
    note = (
        f"data.channels: {channels}, so the views have no saturation, hue or grayscale, and the "
        f"network takes {channels} channel{'s' * (channels > 1)}"
    )
    assert lines[0] == note
    assert note in plan.describe(config)
