"""Exported files load strictly in other libraries with the same features, or are refused."""

import hashlib
import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
import torchvision
import yaml
from safetensors.torch import load_file, save_file
from suites import quick_and_full
from torch import nn
from untrained_run import checkpoint_of, edit_manifest, make_run, renew_manifest

import ssl_pretrain
from ssl_pretrain import config
from ssl_pretrain.build import build_method
from ssl_pretrain.eval import export, knn, runs
from ssl_pretrain.eval.exporting import (
    export_folder,
    hubconf,
    model_card,
    onnx,
    reference,
    reload,
)
from ssl_pretrain.eval.image_transform import ImageTransform
from ssl_pretrain.models import backbones
from ssl_pretrain.models.timm_networks import BackboneConfig

RESNET = ("backbone.name=resnet18", "views.crops.global.size=32")
VIT = (
    "backbone.name=vit_small_patch16_224",
    "views.crops.global.size=32",
    "backbone.args={num_heads: 12, depth: 2}",
)
WEIGHTS, ARGUMENTS = "model.safetensors", "timm.json"


@pytest.fixture(scope="module")
def vit_export(tmp_path_factory):
    """The export of a ViT-S with 12 heads, like MoCo v3's. timm's has 6."""
    path = make_run(tmp_path_factory.mktemp("runs") / "vit", *VIT)
    return export.export(runs.load_run(path, device="cpu"), path.parent / "exported", [])


@pytest.fixture
def tiny_run(tmp_path):
    return make_run(tmp_path / "run")


def error_of(function, *arguments) -> str:
    with pytest.raises(ValueError) as error:
        function(*arguments)
    return str(error.value)


def rename_tensors(run: Path, rename, **entries) -> None:
    """Rename the tensors of the newest checkpoint and change entries of its manifest."""
    file = checkpoint_of(run) / "method.safetensors"
    save_file({rename(key): value for key, value in load_file(file).items()}, file)
    edit_manifest(run, **entries)
    renew_manifest(run)


def compiled_names(run: Path) -> dict[str, str]:
    """Return the name that torch.compile gives to every tensor."""
    method = build_method(config.load(run / "config.yaml"))
    return dict(zip(method.state_dict(), torch.compile(method).state_dict()))


WRAPPERS = {
    "student": lambda key: key,
    "DDP": lambda key: f"module.{key}",
    "FSDP": lambda key: key.replace(
        "backbone.", "_fsdp_wrapped_module.backbone._fsdp_wrapped_module."
    ),
    "compiled DDP": lambda key: f"_orig_mod.module.{key}",
    "teacher": lambda key: f"teacher.{key}",
}


@pytest.mark.parametrize("name", quick_and_full(["student"], [*WRAPPERS, "compiled"]))
@torch.no_grad()
def test_timm_and_torchvision_load_an_export_strictly_with_the_same_features(name, tmp_path):
    path = make_run(tmp_path / "run", *RESNET)
    images = torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    expected = runs.load_run(path, device="cpu").backbone(images)
    rename = compiled_names(path).__getitem__ if name == "compiled" else WRAPPERS[name]
    teacher = {"evaluated": "teacher.backbone", "network": "teacher"}
    rename_tensors(path, rename, **(teacher if name == "teacher" else {}))
    run = runs.load_run(path, device="cpu")
    folder = export.export(run, tmp_path / "exported", [])
    weights = folder / WEIGHTS
    timm_model = timm.create_model("resnet18", num_classes=0, checkpoint_path=str(weights))
    torchvision_model = torchvision.models.resnet18(weights=None)
    torchvision_model.fc = nn.Identity()
    torchvision_model.load_state_dict(load_file(weights), strict=True)
    tolerance = 1e-5 * expected.abs().max().item()
    for model in (timm_model.eval(), torchvision_model.eval(), export.load(folder)):
        torch.testing.assert_close(model(images), expected, rtol=0, atol=tolerance)
    network = json.loads((folder / ARGUMENTS).read_text())["network"]
    assert network == ("teacher" if name == "teacher" else "student")


def test_weights_of_twelve_heads_load_into_six_and_are_refused(vit_export):
    weights = str(vit_export / WEIGHTS)
    six_heads = timm.create_model(
        "vit_small_patch16_224", num_classes=0, img_size=32, depth=2, checkpoint_path=weights
    )
    message = error_of(export.check, six_heads, vit_export)
    assert "the weights loaded, but the features differ by up to" in message
    assert "so this is not the exported network" in message
    assert "num_heads 12, patch_size [16, 16]" in message
    assert message.endswith("build it from timm.json, or with eval.export.load")
    arguments = json.loads((vit_export / ARGUMENTS).read_text())["create_model"]
    twelve_heads = timm.create_model("vit_small_patch16_224", **arguments, checkpoint_path=weights)
    export.check(twelve_heads, vit_export)
    assert export.load(vit_export).model.blocks[0].attn.num_heads == 12


def edit_export(folder: Path, weights=None, **entries) -> None:
    """Change the weights and the arguments of an export, and its checksum with them."""
    if weights is not None:
        save_file(weights, folder / WEIGHTS)
    digest = hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest()
    arguments = json.loads((folder / ARGUMENTS).read_text()) | {"sha256": digest} | entries
    (folder / ARGUMENTS).write_text(json.dumps(arguments))


def test_loading_compares_the_features(vit_export, tmp_path):
    folder = shutil.copytree(vit_export, tmp_path / "six")
    edit_export(folder, args={"num_heads": 6, "depth": 2})
    message = error_of(export.load, folder)
    assert "the weights loaded, but the features differ by up to" in message


def test_a_missing_key_and_another_architecture_are_named(vit_export, tmp_path):
    folder = shutil.copytree(vit_export, tmp_path / "cut")
    weights = load_file(folder / WEIGHTS)
    del weights["norm.bias"]
    edit_export(folder, weights)
    assert error_of(export.load, folder) == (
        f"{folder / WEIGHTS}: not the weights of this backbone: 1 missing (model.norm.bias)."
        " Nothing was loaded; set backbone.name, backbone.stem and backbone.args as in the run that"
        " trained them"
    )
    edit_export(folder, architecture="resnet18", args={})
    pattern = r"not the weights of this backbone: .* missing .* unexpected"
    with pytest.raises(ValueError, match=pattern):
        export.load(folder)


def test_a_damaged_or_incomplete_folder_is_named(vit_export, tmp_path):
    folder = shutil.copytree(vit_export, tmp_path / "damaged")
    content = bytearray((folder / WEIGHTS).read_bytes())
    content[-1] ^= 1
    (folder / WEIGHTS).write_bytes(content)
    assert error_of(export.load, folder) == (
        f"{folder / WEIGHTS}: is damaged: its SHA-256 differs from the one in timm.json; copy or"
        " export it again"
    )
    text = (folder / ARGUMENTS).read_text()
    for content in (text[:100], "[]"):
        (folder / ARGUMENTS).write_text(content)
        for function in (export.load, export.load_transform):
            message = f"{folder / ARGUMENTS}: is damaged; export again"
            assert error_of(function, folder) == message
    (folder / "reference.safetensors").unlink()
    assert error_of(export.load, folder) == (
        f"{folder}: reference.safetensors is missing; give a folder that eval.export wrote"
    )


def test_untrained_weights_are_refused_or_flagged(tmp_path, capsys):
    run = runs.load_run(make_run(tmp_path / "run", weights_seed=0), device="cpu")
    problem = (
        "every weight still has its initial value from seed 0, so this is a random backbone"
        " (step 7)"
    )
    out = tmp_path / "out"
    assert error_of(export.export, run, out, []) == (
        f"{run.path}: {problem}. Nothing was written; give another --checkpoint, or --force to"
        " export it anyway"
    )
    assert not out.exists()
    card = (export.export(run, out, [], force=True) / "README.md").read_text()
    assert f"> **WARNING: exported with --force.** {problem}" in card
    assert f"WARNING: {problem}" in capsys.readouterr().err


def test_a_collapsed_backbone_is_refused(tiny_run, tmp_path):
    run = runs.load_run(tiny_run, device="cpu")
    with torch.no_grad():
        for norm in run.backbone.model.layer4.modules():
            if isinstance(norm, nn.BatchNorm2d):
                norm.weight.zero_()
                norm.bias.fill_(1.0)
    reason = r"the features of 512 training images have collapsed: effective rank .* spread"
    with pytest.raises(ValueError, match=reason):
        export.export(run, tmp_path / "out", [])


@pytest.mark.full
def test_the_card_has_results_and_checksum_and_no_path(tiny_run, tmp_path, capsys):
    knn.evaluate(runs.load_run(tiny_run, device="cpu"), shift_distances=[], rows=["pretrained"])
    out = tmp_path / "out"
    export.main([str(tiny_run), "--device", "cpu", str(out), f"data.cache_dir={tmp_path}"])
    assert capsys.readouterr().out.startswith(f"exported student of step_00000007 to {out}")
    card = (out / "README.md").read_text()
    accuracy = json.loads((tiny_run / "eval/knn.json").read_text())["rows"][0]["metrics"]["clean"]
    table = f"| accuracy, % | clean |\n|---|---|\n| pretrained | {accuracy:.1f} |\n"
    assert f"### knn\n\n{table}" in card
    assert json.loads((out / ARGUMENTS).read_text())["sha256"] in card
    assert "test_resnet by simclr" in card
    assert "temperature: 0.2" in card
    assert str(tmp_path) not in card


def configuration_on_the_card(run, **data):
    """Return the configuration on the card of a run whose settings of `data` are changed."""
    run = replace(run, config=replace(run.config, data=replace(run.config.data, **data)))
    return yaml.safe_load(model_card._config(run).split("```")[1].removeprefix("yaml"))


def test_the_card_has_nothing_of_the_training_machine(tiny_run, tmp_path, monkeypatch):
    run = runs.load_run(tiny_run, device="cpu")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "relative/data").mkdir(parents=True)
    for path in (
        "/data/images",
        r"C:\Users\me\images",
        r"\\server\share",
        "s3://bucket/{0..9}.tar",
        "~/images",
        "relative/data",
    ):
        values = configuration_on_the_card(
            run, root=path, train=path, val=path, args={"token": "hf_secret", "path": path}
        )
        assert [values["data"][key] for key in ("root", "train", "val")] == 3 * [""]
        assert values["data"]["args"] == {"token": "***", "path": "***"}
        assert not {"launch", "log"} & values.keys()
    values = configuration_on_the_card(run, root="uoft-cs/cifar10", train="train", val="test")
    assert values["data"]["root"] == "uoft-cs/cifar10"
    assert (values["data"]["train"], values["data"]["val"]) == ("train", "test")


def test_an_older_export_is_replaced(tiny_run, tmp_path):
    run = runs.load_run(tiny_run, device="cpu")
    for _ in range(2):
        assert export.export(run, tmp_path / "out", []) == tmp_path / "out"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            (),
            "--format torchvision: torchvision has no test_resnet that takes timm's weights; use"
            " this format for ResNets, such as resnet50",
        ),
        (
            (*RESNET, "backbone.stem=no_pool"),
            "--format torchvision: torchvision's resnet18 has the imagenet stem, but this backbone"
            " has the no_pool stem; load it with eval.export.load",
        ),
    ],
)
def test_a_network_that_torchvision_does_not_have_is_refused(overrides, message, tmp_path):
    run = runs.load_run(make_run(tmp_path / "run", *overrides), device="cpu")
    assert error_of(export.export, run, tmp_path / "out", ["torchvision"]) == message


def test_a_small_stem_loads_only_with_this_project(tmp_path):
    path = make_run(tmp_path / "run", *RESNET, "backbone.stem=no_pool")
    folder = export.export(runs.load_run(path, device="cpu"), tmp_path / "out", [])
    assert isinstance(export.load(folder).model.maxpool, nn.Identity)
    assert "timm and torchvision have no `no_pool` stem" in (folder / "README.md").read_text()
    weights = str(folder / WEIGHTS)
    timm_model = timm.create_model("resnet18", num_classes=0, checkpoint_path=weights)
    assert "(stem no_pool," in error_of(export.check, timm_model, folder)


def test_a_folder_that_holds_something_else_is_left_unchanged(tiny_run, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.tex").write_text("text")
    assert error_of(export.export, runs.load_run(tiny_run, device="cpu"), out, []) == (
        f"{out}: is not empty and contains no export; give a new folder"
    )


def test_a_missing_onnx_is_an_error(tiny_run, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    run = runs.load_run(tiny_run, device="cpu")
    assert error_of(export.export, run, tmp_path / "out", ["onnx"]) == (
        "--format onnx: onnxruntime is not installed; install it with `pip install '.[onnx]'` in a "
        "clone, or with `pip install 'ssl_pretrain-0.1.0-py3-none-any.whl[onnx]'` where the wheel "
        "is"
    )


@pytest.mark.parametrize(
    ("name", "is_vit"),
    [("test_vit", True), ("test_efficientnet", False), ("mobilenetv3_small_050", False)],
)
def test_only_a_vit_is_quantized_without_calibration_images(name, is_vit):
    backbone = backbones.build(BackboneConfig(name=name), 32)
    assert hasattr(backbone.model, "blocks")
    assert onnx.computes_ranges_per_input(backbone) == is_vit


@pytest.mark.full
@pytest.mark.parametrize("overrides", [(), VIT])
def test_onnx_gives_torchs_features_for_any_number_of_images(overrides, tmp_path):
    pytest.importorskip("onnxruntime")
    run = runs.load_run(make_run(tmp_path / "run", *overrides), device="cpu")
    folder = export.export(run, tmp_path / "out", ["onnx"])
    shape = 5, 3, run.image_size, run.image_size
    images = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = run.backbone(images)
    features = onnx.open_session(folder / "model.onnx")(images)
    tolerance = 1e-4 * expected.abs().max().item()
    torch.testing.assert_close(features, expected, rtol=0, atol=tolerance)
    int8_features = onnx.open_session(folder / "model_int8.onnx")(images)
    assert int8_features.shape == expected.shape
    assert torch.cosine_similarity(int8_features, expected).min() > 0.9
    rows = [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in (folder / "README.md").read_text().splitlines()
        if line.startswith(("| torch,", "| onnx,"))
    ]
    row_names, accuracies, _, megabytes = zip(*rows)
    assert row_names == ("torch, 32 bits", "onnx, 32 bits", "onnx, 8 bits")
    assert abs(float(accuracies[0]) - float(accuracies[1])) <= 0.4
    assert float(megabytes[1]) > 2 * float(megabytes[2])


def test_the_facts_of_a_network_without_attention_have_no_head_count():
    backbone = backbones.build(BackboneConfig(name="test_efficientnet"), 32)
    facts = reference.architecture_facts(backbone)
    assert facts["feature_dim"] == backbone.feature_dim
    assert "num_heads" not in facts


def test_the_transform_of_an_export_is_that_of_the_run(tmp_path):
    values = ("data.channels=1", "data.range=[0,4095]", "evaluation.crop_ratio=0.7")
    run = runs.load_run(make_run(tmp_path / "run", *values), device="cpu")
    folder = export.export(run, tmp_path / "out", [], force=True)
    assert export.load_transform(folder) == ImageTransform.of_run(run)


def test_an_export_is_loaded_in_place_of_a_run(vit_export, tmp_path):
    run = runs.load_run(vit_export, None, [f"output={tmp_path / 'results'}"], device="cpu")
    assert (run.step, run.network, run.checkpoint_path.name) == (7, "student", "step_00000007")
    assert ImageTransform.of_run(run) == export.load_transform(vit_export)
    backbone, transform = ssl_pretrain.load_backbone(vit_export, device="cpu")
    expected = ssl_pretrain.load_backbone(vit_export.parent / "vit", device="cpu")
    assert transform == expected[1]
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(backbone(images), expected[0](images), rtol=0, atol=0)
    assert error_of(runs.load_run, vit_export, "step_00000007") == (
        f"--checkpoint step_00000007: {vit_export} is an export and has no checkpoints; leave the"
        " option out"
    )
    assert error_of(export.export, run, tmp_path / "again", []) == (
        f"{vit_export}: is an export already; give the run that it was exported from"
    )


LOADED_BY_OTHERS = {
    "ResNet-50": ("backbone.name=resnet50", "views.crops.global.size=64"),
    "ViT-S": ("backbone.name=vit_small_patch16_224", "views.crops.global.size=64"),
}


@pytest.mark.full
@pytest.mark.parametrize("name", LOADED_BY_OTHERS)
def test_timm_transformers_and_torch_hub_load_an_export_in_their_own_processes(name, tmp_path):
    pytest.importorskip("transformers")
    run = runs.load_run(make_run(tmp_path / "run", *LOADED_BY_OTHERS[name]), device="cpu")
    folder = export.export(run, tmp_path / "out", force=True)
    expected = ["timm", "transformers", "torchhub"]
    reloads = json.loads((folder / ARGUMENTS).read_text())["reloads"]
    assert list(reloads) == expected
    # Once more, with features that come from the run and not from the export.
    images = load_file(folder / "reference.safetensors")["images"]
    with torch.no_grad():
        save_file(
            {"images": images, "features": run.backbone(images).contiguous()},
            folder / "reference.safetensors",
        )
    results = reload.verify(folder, [*expected, "timm_wrapper"], ImageTransform.of_run(run))
    assert all(result.difference <= 1e-5 for result in results.values())


@pytest.mark.full
@pytest.mark.parametrize("overrides", [(), VIT])
def test_a_program_of_torch_export_gives_the_features_of_any_number_of_images(overrides, tmp_path):
    run = runs.load_run(make_run(tmp_path / "run", *overrides), device="cpu")
    folder = export.export(run, tmp_path / "out", ["torch_export"])
    program = torch.export.load(folder / "model.pt2").module()
    images = torch.randn(5, 3, run.image_size, run.image_size)
    with torch.no_grad():
        expected = run.backbone(images)
        tolerance = 1e-5 * expected.abs().max().item()
        torch.testing.assert_close(program(images), expected, rtol=0, atol=tolerance)


@pytest.mark.full
def test_other_features_in_another_process_fail_the_export_by_name(tiny_run, tmp_path, monkeypatch):
    run = runs.load_run(tiny_run, device="cpu")
    out = export.export(run, tmp_path / "out", [])
    before = export_folder.digests(out)
    monkeypatch.setattr(reload, "TOLERANCE", -1.0)
    message = error_of(export.export, run, out, ["torchhub"])
    assert message.startswith(
        "--format torchhub: loaded in another process, its features differ by up to "
    )
    assert message.endswith("; leave torchhub out of --format")
    assert export_folder.digests(out) == before
    assert [path.name for path in tmp_path.iterdir() if "part" in path.name] == []


def test_files_of_an_older_export_are_removed(tiny_run, tmp_path):
    out = export.export(runs.load_run(tiny_run, device="cpu"), tmp_path / "out", [])
    (out / "model.onnx").write_text("of other weights")
    (out / "notes.txt").write_text("the user's")
    export.export(runs.load_run(tiny_run, device="cpu"), out, [])
    assert not (out / "model.onnx").exists()
    assert (out / "notes.txt").read_text() == "the user's"


@pytest.mark.parametrize(
    ("overrides", "name", "message"),
    [
        (
            (*RESNET, "backbone.stem=small"),
            "timm",
            "timm's resnet18 has the imagenet stem, but this backbone has the small stem; use"
            " torchhub, torch_export or onnx, or load it with eval.export.load",
        ),
        (
            ("backbone.name=test_efficientnet", "views.crops.global.size=32"),
            "transformers",
            "transformers has no class of its own for test_efficientnet, which has no EfficientNet"
            " with these weights; use timm_wrapper, for which AutoModel.from_pretrained builds"
            " timm's network",
        ),
    ],
)
def test_a_format_that_a_network_does_not_have_is_refused(overrides, name, message, tmp_path):
    pytest.importorskip("transformers")
    run = runs.load_run(make_run(tmp_path / "run", *overrides), device="cpu")
    assert error_of(export.export, run, tmp_path / "out", [name]) == f"--format {name}: {message}"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("stem", quick_and_full(["small"], ["no_pool", "small"]))
def test_the_entry_point_of_torch_hub_builds_a_small_stem(stem, tmp_path):
    path = make_run(tmp_path / "run", *RESNET, f"backbone.stem={stem}")
    run = runs.load_run(path, device="cpu")
    folder = export.export(run, tmp_path / "out", [])
    shutil.copyfile(hubconf.__file__, folder / "hubconf.py")
    export.check(torch.hub.load(str(folder), "backbone", source="local"), folder)


def test_the_card_has_the_metadata_of_the_hub_and_claims_no_license(vit_export):
    _, front_matter, card = (vit_export / "README.md").read_text().split("---\n", 2)
    assert yaml.safe_load(front_matter) == {
        "library_name": "pytorch",
        "pipeline_tag": "image-feature-extraction",
        "tags": [
            "image-feature-extraction",
            "self-supervised-learning",
            "vit_small_patch16_224",
            "simclr",
        ],
    }
    assert card.startswith("\n# vit_small_patch16_224 by simclr\n")
