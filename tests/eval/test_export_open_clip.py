"""Both towers of CLIP and SigLIP load in open_clip with the same vectors, or are refused."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional
from untrained_run import checkpoint_of, make_run

from ssl_pretrain import train
from ssl_pretrain.eval import export, runs
from ssl_pretrain.eval.exporting import loading_section, open_clip_folder, reload
from ssl_pretrain.eval.image_transform import ImageTransform
from ssl_pretrain.views import tokenizers

pytest.importorskip("open_clip")

TEXTS = [
    "a photo of a class_1.",
    "Zoë's 2 CATS &amp; 10 birds",
    "",
    "a caption that does not fit " * 5,
]
# Runs without this project: -P keeps the current folder out of the module path.
OPEN_CLIP_ALONE = """
import json, sys
import open_clip, torch
from PIL import Image
from safetensors.torch import load_file, save_file

folder, texts = sys.argv[1], json.loads(sys.argv[2])
model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}")
tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
model.eval()
tensors = load_file(f"{folder}/inputs.safetensors")
pixels = Image.fromarray(tensors["pixels"].numpy())
with torch.no_grad():
    outputs = {
        "images": model.encode_image(tensors["images"], normalize=True),
        "texts": model.encode_text(tokenizer(texts), normalize=True),
        "view": preprocess(pixels),
        "logit_scale": model.logit_scale,
    }
    if model.logit_bias is not None:
        outputs["logit_bias"] = model.logit_bias
assert not any(name.startswith("ssl_pretrain") for name in sys.modules)
outputs = {key: value.contiguous() for key, value in outputs.items()}
save_file(outputs, f"{folder}/outputs.safetensors")
"""
NETWORKS = {
    "test_resnet": [],
    # Its own pooling, and the size for which timm builds it
    "test_vit": ["backbone.name=test_vit", "views.crops.global.size=160"],
}
CASES = {
    "clip": ("clip", "test_resnet", []),
    "siglip": (
        "siglip",
        "test_vit",
        ["text_encoder.pool=last", "text_encoder.causal=false", "backbone.drop_path=0.1"],
    ),
}


def train_run(folder, method, *overrides):
    """Train a run for two steps and return its folder."""
    path = tiny.write_text_config(folder, method)
    assert train.main([str(path), *overrides]) == 0
    return folder / "run"


@pytest.fixture(scope="module")
def clip_run(tmp_path_factory):
    return train_run(tmp_path_factory.mktemp("clip"), "clip")


@pytest.fixture
def run(clip_run):
    return runs.load_run(clip_run, device="cpu")


def change(run, section, **settings):
    """Return a run with other settings in one section of its configuration."""
    values = replace(getattr(run.config, section), **settings)
    return replace(run, config=replace(run.config, **{section: values}))


def load_with_open_clip_alone(folder, images, pixels):
    """Return the outputs of open_clip for an export, in a process without this project."""
    save_file({"images": images, "pixels": pixels}, folder / "inputs.safetensors")
    command = [sys.executable, "-P", "-c", OPEN_CLIP_ALONE, str(folder), json.dumps(TEXTS)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return load_file(folder / "outputs.safetensors")


@torch.no_grad()
def embed_by_hand(run, weights, images):
    """Return the vectors of images and texts from the modules and weights of a checkpoint."""
    method = open_clip_folder.load_method(run)
    tokens = tokenizers.build(run.config.text)(TEXTS)
    features = method.text_encoder(torch.tensor(tokens.ids), torch.tensor(tokens.valid))
    return (
        functional.normalize(run.backbone(images) @ weights["image_projection.weight"].T, dim=1),
        functional.normalize(features @ weights["text_projection.weight"].T, dim=1),
    )


@pytest.mark.parametrize("name", CASES)
def test_open_clip_alone_gives_the_vectors_of_both_towers(name, tmp_path):
    method, network, overrides = CASES[name]
    path = train_run(tmp_path, method, *NETWORKS[network], *overrides)
    run = runs.load_run(path, device="cpu")
    folder = export.export(run, tmp_path / "out", ["open_clip"], force=True)
    weights = load_file(checkpoint_of(path) / "method.safetensors")
    shape = 3, 3, run.image_size, run.image_size
    images = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    pixels = reload.sample_image()
    outputs = load_with_open_clip_alone(folder, images, pixels)
    image_vectors, text_vectors = embed_by_hand(run, weights, images)
    torch.testing.assert_close(outputs["images"], image_vectors, rtol=0, atol=1e-5)
    torch.testing.assert_close(outputs["texts"], text_vectors, rtol=0, atol=1e-5)
    assert (text_vectors[0] - text_vectors[3]).abs().max() > 1e-3
    for key in ("logit_scale", "logit_bias"):
        assert (key in outputs) == (key in weights)
        assert key not in weights or outputs[key] == weights[key].reshape(())
    # One gray level, as another rounding of the resize leaves it
    view = ImageTransform.of_run(run)(pixels.numpy())
    torch.testing.assert_close(outputs["view"], view, rtol=0, atol=1.5 / 255)


def test_the_card_names_both_towers_and_other_formats_the_image_tower_alone(run, tmp_path):
    folder = export.export(run, tmp_path / "out", ["open_clip"], force=True)
    card = (folder / "README.md").read_text()
    assert "library_name: open_clip\npipeline_tag: zero-shot-image-classification\n" in card
    assert "Image tower and text tower of the student at step 2, pretrained with clip" in card
    assert 'open_clip.create_model_and_transforms("local-dir:FOLDER")' in card
    reloads = json.loads((folder / "timm.json").read_text())["reloads"]
    assert reloads["open_clip"]["difference"] <= 1e-5
    export.export(run, folder, ["timm"], force=True)
    assert not list(folder.glob("open_clip*"))
    card = (folder / "README.md").read_text()
    assert "library_name: timm\n" in card
    assert "Backbone of the image tower of the student at step 2, pretrained with clip" in card
    assert "The text tower and the projections are not included." in card


def test_other_vectors_in_open_clip_fail_the_export(run, tmp_path, monkeypatch):
    map_weights = open_clip_folder.map_weights

    def without_projection(method):
        return {
            key: value * (key != "text_projection") for key, value in map_weights(method).items()
        }

    monkeypatch.setattr(open_clip_folder, "map_weights", without_projection)
    with pytest.raises(ValueError) as error:
        export.export(run, tmp_path / "out", ["open_clip"], force=True)
    assert str(error.value).startswith(
        "--format open_clip: loaded in another process, its features differ by up to"
    )
    assert not (tmp_path / "out").exists()


def test_a_transform_with_a_crop_is_said_not_to_be_open_clips():
    view = {"channels": 3, "crop_ratio": 0.875, "range": []}
    arguments = {"input": view, "formats": ["open_clip"], "stem": "imagenet"}
    section = loading_section.render(arguments | {"architecture": "test_vit", "reloads": {}})
    assert (
        "open_clip's crops nothing of a square image (evaluation.crop_ratio was 0.875)." in section
    )


@pytest.mark.full
def test_other_formats_of_a_clip_run_have_the_image_tower(run, tmp_path):
    formats = ["timm", "torchhub", "torch_export"]
    folder = export.export(run, tmp_path / "out", formats, force=True)
    images = load_file(folder / "reference.safetensors")["images"]
    with torch.no_grad():
        torch.testing.assert_close(export.load(folder)(images), run.backbone(images))
    assert list(json.loads((folder / "timm.json").read_text())["reloads"]) == formats


ALONE = "or export the image tower alone, with another --format"
REFUSED = {
    "bert": (
        ("text_encoder", {"name": "bert"}),
        "text_encoder.name: bert is an encoder of transformers, whose weights cannot be stored as"
        f" open_clip's; train with text_encoder.name=clip, {ALONE}",
    ),
    "tokenizer": (
        ("text", {"tokenizer": "bert-base-uncased"}),
        "text.tokenizer: bert-base-uncased would receive other texts, because open_clip cleans them"
        f" first; train with text.tokenizer=clip, {ALONE}",
    ),
    "mean": (
        ("text_encoder", {"pool": "mean"}),
        "text_encoder.pool: mean is not among the poolings of open_clip; train with"
        f" text_encoder.pool=end, first or last, {ALONE}",
    ),
    "channels": (
        ("data", {"channels": 1}),
        "data.channels: 1 is not possible, because open_clip's image towers take 3 channels; use"
        " torchhub, torch_export or onnx for the image tower alone",
    ),
    "custom": (
        ("backbone", {"name": "networks:build"}),
        "backbone.name: networks:build is a network of your own, and open_clip builds those of"
        " timm; use torch_export or onnx for the image tower alone",
    ),
    "stem": (
        ("backbone", {"stem": "small"}),
        "backbone.stem: small is not in timm's test_resnet, which open_clip builds; train with"
        " backbone.stem=imagenet, or use torchhub, torch_export or onnx for the image tower alone",
    ),
    "args": (
        ("backbone", {"args": {"act_layer": "gelu"}}),
        "backbone.args: open_clip cannot pass {'act_layer': 'gelu'} to timm's test_resnet; train a"
        f" network that timm has under a name of its own, {ALONE}",
    ),
    "view size": (
        ("backbone", {"name": "test_vit"}),
        "views.crops: 16 pixels are not possible, because open_clip builds test_vit for 160 pixels;"
        f" train with views of 160 pixels and evaluate with as many, {ALONE}",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_setting_that_open_clip_does_not_have_is_refused(name, run, tmp_path):
    (section, settings), message = REFUSED[name]
    with pytest.raises(ValueError) as error:
        export.export(change(run, section, **settings), tmp_path / "out", ["open_clip"])
    assert str(error.value) == f"--format open_clip: {message}"
    assert not (tmp_path / "out").exists()


def test_another_evaluation_size_of_a_vit_is_refused(run, tmp_path):
    run = replace(change(run, "backbone", name="test_vit"), view_size=160, image_size=176)
    with pytest.raises(ValueError) as error:
        export.export(run, tmp_path / "out", ["open_clip"])
    assert str(error.value) == (
        "--format open_clip: evaluation.image_size: 176 pixels are not possible, because open_clip"
        " builds test_vit for 160 pixels; train with views of 160 pixels and evaluate with as many,"
        f" {ALONE}"
    )


def test_weights_of_another_network_are_refused(run, tmp_path):
    # The settings are those of another ResNet than the weights.
    with pytest.raises(ValueError) as error:
        export.export(change(run, "backbone", name="resnet18"), tmp_path / "out", ["open_clip"])
    message = str(error.value)
    assert message.startswith(
        "--format open_clip: backbone.name: open_clip builds another resnet18 than this backbone: "
    )
    assert message.endswith(f"use the network of timm without backbone.args, {ALONE}")


def test_a_method_without_texts_is_refused(tmp_path):

    run = runs.load_run(make_run(tmp_path / "run"), device="cpu")
    with pytest.raises(ValueError) as error:
        export.export(run, tmp_path / "out", ["open_clip"])
    assert str(error.value) == (
        "--format open_clip: method.name: simclr has no image tower and text tower; use this format"
        " for runs of clip and siglip"
    )
