"""Whole runs on rectangular views: they resume bit for bit and are evaluated."""

import base64
import io
import json
import re
from collections import Counter

import pytest
import tiny
import torch
from PIL import Image
from suites import quick_and_full

from ssl_pretrain import config
from ssl_pretrain.checkpoint.folder import newest_checkpoint
from ssl_pretrain.checkpoint.tensor_files import read_checkpoint
from ssl_pretrain.eval import export, knn, linear, report
from ssl_pretrain.eval.image_transform import ImageTransform
from ssl_pretrain.eval.runs import load_run
from ssl_pretrain.planning import plan
from ssl_pretrain.train import train

pytestmark = pytest.mark.promise

COMMON = """
data: {{source: folder, root: {root}, num_workers: 0, cache_dir: {folder}/cache}}
optim: {{name: adamw, base_lr: 0.001, lr_scaling: none}}
parallel: {{threads: 1}}
checkpoint: {{every_epochs: 0, keep_last: 10}}
online: {{knn_every_epochs: 1}}
log: {{every_steps: 1, wandb: "off"}}
evaluation: {{crop_ratio: 1.0, k: 3}}
global_batch_size: 24
epochs: 2
output: {folder}/run
"""
SIMCLR = """
method: {name: simclr, projector_dims: [16, 8]}
backbone: {name: test_resnet, stem: no_pool}
views:
  crops:
    global: {count: 2, size: [32, 96], ratio: [2.0, 4.0], jitter: 0.8, brightness: 0.4, blur: 0.5}
"""
VIT = "backbone: {name: test_vit, args: {patch_size: 8}}\n"
MAE = (
    "method: {name: mae, decoder_dim: 32, decoder_depth: 1, decoder_heads: 4}\n"
    + VIT
    + """
views:
  crops:
    global: {count: 1, size: [32, 64], mask: {kind: random, patch_size: 8}}
"""
)
DINO = (
    "method: {name: dino, hidden_dim: 32, bottleneck_dim: 16, num_prototypes: 64}\n"
    + VIT
    + """
views:
  crops:
    global: {count: 2, size: [32, 64], blur: 0.5}
    local: {count: 2, size: [24, 16], scale: [0.05, 0.4]}
"""
)


def write_config(folder, text):
    folder.mkdir(exist_ok=True)
    root = tiny.write_images(folder / "images")
    path = folder / "run.yaml"
    path.write_text(text + COMMON.format(root=root, folder=folder))
    return path


def train_run(path, *overrides, stop_after=None):
    settings = config.load(path, overrides)
    train(settings, torch.device("cpu"), stop_after)
    return read_checkpoint(newest_checkpoint(settings.output))[1]


@pytest.mark.parametrize(
    ("text", "size"),
    quick_and_full([(MAE, [32, 64])], [(SIMCLR, [32, 96]), (MAE, [32, 64]), (DINO, [32, 64])]),
    ids=["simclr", "mae", "dino"],
)
def test_a_run_on_rectangles_resumes_bit_for_bit_and_is_evaluated(text, size, tmp_path):
    path = write_config(tmp_path, text)
    uninterrupted = train_run(path)
    other = f"output={tmp_path / 'stopped'}"
    train_run(path, other, stop_after=2)
    resumed = train_run(path, other)
    assert resumed.keys() == uninterrupted.keys()
    for name, value in uninterrupted.items():
        assert torch.equal(resumed[name], value), name

    knn.main([str(tmp_path / "run")])
    run = load_run(tmp_path / "run")
    assert run.view_size == run.image_size == size
    image = torch.zeros(3, 40, 50, dtype=torch.uint8)
    assert ImageTransform.of_run(run)(image).shape == (3, *size)
    transform = json.loads((tmp_path / "run" / "eval" / "knn.json").read_text())["protocol"][
        "transform"
    ]
    assert f"central {size[0]}x{size[1]}" in transform


def test_a_multi_crop_run_on_rectangles_has_a_report_an_export_and_a_linear_probe(tmp_path):
    path = write_config(tmp_path, DINO)
    train_run(path, "online.knn_every_epochs=0", stop_after=1)
    run_folder = str(tmp_path / "run")
    linear.main([run_folder, "--epochs", "1"])
    report.main([run_folder])
    page = (tmp_path / "run" / "report.html").read_text()
    views = page[page.index("<h2>Views</h2>") : page.index("<h2>Nearest neighbors</h2>")]
    pictures = [
        Image.open(io.BytesIO(base64.b64decode(data)))
        for data in re.findall(r'src="data:image/png;base64,([^"]+)"', views)
    ]
    # The padding of the local crops, in tiles as large as the global ones, is left out.
    assert Counter(picture.size for picture in pictures) == {(64, 32): 8 * 2, (16, 24): 8 * 2}

    run = load_run(run_folder)
    export.export(run, tmp_path / "export", [], force=True)
    arguments = json.loads((tmp_path / "export" / "timm.json").read_text())
    assert arguments["built_for"] == arguments["input"]["size"] == [32, 64]
    images = torch.randn(2, 3, 32, 64)
    with torch.no_grad():
        expected = run.backbone.cpu()(images)
        torch.testing.assert_close(export.load(tmp_path / "export")(images), expected)
    card = (tmp_path / "export" / "README.md").read_text()
    assert "Input: float32 (n, 3, 32, 64). Resize the image to cover 32 x 64 pixels" in card


@pytest.mark.full
def test_a_plan_names_the_heights_and_widths(tmp_path):
    settings = config.load(write_config(tmp_path, DINO))
    settings.plan.gpu = "H100"  # with the estimates of memory and time
    text = plan.describe(settings, 1)
    assert "views per image: 32x64 px, 32x64 px, 24x16 px, 24x16 px" in text
