"""eval.export: what is written loads strictly elsewhere and gives the same features, and what is not the same network is refused."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import timm
import torch
import torchvision
from made_run import checkpoint_of, edit_manifest, make_run
from safetensors.torch import load_file, save_file
from torch import nn

from ssl_pretrain import config
from ssl_pretrain.build import build_method
from ssl_pretrain.checkpoint.manifest import MANIFEST, to_json
from ssl_pretrain.eval import export, knn, runs
from ssl_pretrain.eval.exporting import onnx
from ssl_pretrain.models import backbones
from ssl_pretrain.models.backbones import BackboneConfig

RESNET = ("backbone.name=resnet18", "views.crops.global.size=32")
VIT = (
    "backbone.name=vit_small_patch16_224",
    "views.crops.global.size=32",
    "backbone.args={num_heads: 12, depth: 2}",
)


@pytest.fixture(scope="module")
def resnet(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("runs") / "resnet", *RESNET)


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    """The export of a ViT-S of 12 heads, as MoCo v3's is; timm's has 6."""
    path = make_run(tmp_path_factory.mktemp("runs") / "vit", *VIT)
    return export.export(runs.load_run(path, device="cpu"), path.parent / "exported")


@pytest.fixture
def tiny(tmp_path):
    return make_run(tmp_path / "run")


def resave(run: Path, rename, **entries):
    """The checkpoint with other names for its tensors, whole again."""
    file = checkpoint_of(run) / "method.safetensors"
    save_file({rename(key): value for key, value in load_file(file).items()}, file)
    digest = {"bytes": file.stat().st_size, "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}
    edit_manifest(run, **entries)
    manifest = json.loads((checkpoint_of(run) / MANIFEST).read_text())
    manifest["files"]["method.safetensors"] = digest
    (checkpoint_of(run) / MANIFEST).write_text(to_json(manifest))


def compiled_names(run: Path) -> dict[str, str]:
    """What torch.compile makes of every name, from torch itself."""
    method = build_method(config.load(run / "config.yaml"))
    return dict(zip(method.state_dict(), torch.compile(method).state_dict()))


WRAPPED = {
    "student": lambda key: key,
    "DDP": lambda key: f"module.{key}",
    "FSDP": lambda key: key.replace(
        "backbone.", "_fsdp_wrapped_module.backbone._fsdp_wrapped_module."
    ),
    "compiled DDP": lambda key: f"_orig_mod.module.{key}",
    "teacher": lambda key: f"teacher.{key}",
}


@pytest.mark.parametrize("name", [*WRAPPED, "compiled"])
def test_timm_and_torchvision_load_it_strictly_and_give_the_same_features(name, resnet, tmp_path):
    path = make_run(tmp_path / "run", *RESNET)
    expected = runs.load_run(path, device="cpu").backbone
    rename = compiled_names(path).__getitem__ if name == "compiled" else WRAPPED[name]
    resave(
        path,
        rename,
        **({"evaluated": "teacher.backbone", "network": "teacher"} if name == "teacher" else {}),
    )
    folder = export.export(
        runs.load_run(path, device="cpu"), tmp_path / "exported", ["timm", "torchvision"]
    )
    images = torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    in_timm = timm.create_model(
        "resnet18", num_classes=0, checkpoint_path=str(folder / "model.safetensors")
    ).eval()
    in_torchvision = torchvision.models.resnet18(weights=None)
    in_torchvision.fc = nn.Identity()
    in_torchvision.load_state_dict(load_file(folder / "model.safetensors"), strict=True)
    with torch.no_grad():
        features = expected(images)
        for model in (in_timm, in_torchvision.eval(), export.load(folder)):
            torch.testing.assert_close(
                model(images), features, rtol=0, atol=1e-5 * features.abs().max().item()
            )
    assert json.loads((folder / "timm.json").read_text())["network"] == (
        "teacher" if name == "teacher" else "student"
    )


def test_twelve_heads_load_strictly_into_six_and_are_refused(vit):
    six = timm.create_model(
        "vit_small_patch16_224",
        num_classes=0,
        img_size=32,
        depth=2,
        checkpoint_path=str(vit / "model.safetensors"),
    )
    with pytest.raises(ValueError) as error:
        export.check(six, vit)
    text = str(error.value)
    assert (
        "the weights loaded, and the features differ by" in text
        and "this is another network than the exported one" in text
    )
    assert "num_heads 12, patch_size [16, 16]" in text and text.endswith(
        "build it with timm.json, or by eval.export.load"
    )
    twelve = timm.create_model(
        "vit_small_patch16_224",
        **json.loads((vit / "timm.json").read_text())["create_model"],
        checkpoint_path=str(vit / "model.safetensors"),
    )
    export.check(twelve, vit)
    assert export.load(vit).model.blocks[0].attn.num_heads == 12


def copied(folder: Path, to: Path) -> Path:
    to.mkdir()
    for file in folder.iterdir():
        (to / file.name).write_bytes(file.read_bytes())
    return to


def edit(folder: Path, weights=None, **arguments) -> None:
    if weights is not None:
        save_file(weights, folder / "model.safetensors")
    written = (
        json.loads((folder / "timm.json").read_text())
        | {"sha256": export._sha256(folder / "model.safetensors")}
        | arguments
    )
    (folder / "timm.json").write_text(json.dumps(written))


def test_loading_compares_the_features_too(vit, tmp_path):
    folder = copied(vit, tmp_path / "six")
    edit(folder, args={"num_heads": 6, "depth": 2})
    with pytest.raises(ValueError, match="the weights loaded, and the features differ by"):
        export.load(folder)


def test_a_missing_key_and_another_architecture_are_named(vit, tmp_path):
    folder = copied(vit, tmp_path / "cut")
    weights = load_file(folder / "model.safetensors")
    del weights["norm.bias"]
    edit(folder, weights)
    with pytest.raises(ValueError) as error:
        export.load(folder)
    assert str(error.value) == (
        f"{folder / 'model.safetensors'}: not the weights of this backbone: 1 missing (model.norm.bias). Nothing was loaded;"
        " give backbone.name, stem and args of the run that made them"
    )
    edit(folder, architecture="resnet18", args={})
    with pytest.raises(
        ValueError, match=r"not the weights of this backbone: .* missing .* unexpected"
    ):
        export.load(folder)


def test_a_damaged_or_incomplete_folder_is_named(vit, tmp_path):
    folder = copied(vit, tmp_path / "damaged")
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(ValueError) as error:
        export.load(folder)
    assert (
        str(error.value)
        == f"{folder / 'model.safetensors'} is damaged: its SHA-256 is not that of timm.json; copy or export it again"
    )
    (folder / "reference.safetensors").unlink()
    with pytest.raises(ValueError) as error:
        export.load(folder)
    assert (
        str(error.value)
        == f"{folder}: reference.safetensors is missing; give a folder that eval.export wrote"
    )


def test_the_weights_of_the_seed_are_refused_and_flagged_when_forced(tmp_path, capsys):
    run = runs.load_run(make_run(tmp_path / "run", weights_seed=0), device="cpu")
    doubt = "every weight is what seed 0 gives before the first step: a random backbone (step 7)"
    with pytest.raises(ValueError) as error:
        export.export(run, tmp_path / "out")
    assert (
        str(error.value)
        == f"{run.path}: {doubt}. Nothing was written; give another --checkpoint, or --force to export it all the same"
    )
    assert not (tmp_path / "out").exists()
    card = (export.export(run, tmp_path / "out", force=True) / "README.md").read_text()
    assert (
        f"> **WARNING: exported with --force.** {doubt}" in card
        and f"WARNING: {doubt}" in capsys.readouterr().err
    )


def test_a_collapsed_backbone_is_refused(tiny, tmp_path):
    run = runs.load_run(tiny, device="cpu")
    with torch.no_grad():
        for norm in run.backbone.model.layer4.modules():
            if isinstance(norm, nn.BatchNorm2d):
                norm.weight.zero_()
                norm.bias.fill_(1.0)
    with pytest.raises(
        ValueError,
        match=r"the features of 512 training images hardly differ: effective rank .* collapsed",
    ):
        export.export(run, tmp_path / "out")


def test_the_card_has_numbers_and_checksum_and_no_path(tiny, tmp_path, capsys):
    knn.evaluate(runs.load_run(tiny, device="cpu"), shifts=[], rows=["pretrained"])
    export.main([str(tiny), "--device", "cpu", str(tmp_path / "out"), f"data.cache_dir={tmp_path}"])
    assert capsys.readouterr().out.startswith(
        f"exported student of step_00000007 to {tmp_path / 'out'}"
    )
    card = (tmp_path / "out/README.md").read_text()
    accuracy = json.loads((tiny / "eval/knn.json").read_text())["rows"][0]["metrics"]["clean"]
    assert (
        f"### knn\n\n| accuracy, % | clean |\n|---|---|\n| pretrained | {accuracy:.1f} |\n" in card
    )
    assert (
        json.loads((tmp_path / "out/timm.json").read_text())["sha256"] in card
        and "test_resnet by simclr" in card
    )
    assert str(tmp_path) not in card and "temperature: 0.2" in card
    assert (
        export.export(runs.load_run(tiny, device="cpu"), tmp_path / "out") == tmp_path / "out"
    )  # an older export is replaced


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            (),
            "--format torchvision: it has no test_resnet that takes timm's weights; ResNets it has, such as resnet50",
        ),
        (
            (*RESNET, "backbone.stem=no_pool"),
            "--format torchvision: its resnet18 has the imagenet stem, this backbone no_pool; load it with eval.export.load",
        ),
    ],
)
def test_what_torchvision_has_not_is_said(overrides, message, tmp_path):
    path = make_run(tmp_path / "run", *overrides)
    with pytest.raises(ValueError) as error:
        export.export(runs.load_run(path, device="cpu"), tmp_path / "out", ["torchvision"])
    assert str(error.value) == message


def test_a_small_stem_loads_by_us_alone(tmp_path):
    path = make_run(tmp_path / "run", *RESNET, "backbone.stem=no_pool")
    folder = export.export(runs.load_run(path, device="cpu"), tmp_path / "out")
    assert isinstance(export.load(folder).model.maxpool, nn.Identity)
    assert "timm and torchvision have no `no_pool` stem" in (folder / "README.md").read_text()
    with pytest.raises(ValueError, match="It has stem no_pool"):
        export.check(
            timm.create_model(
                "resnet18", num_classes=0, checkpoint_path=str(folder / "model.safetensors")
            ),
            folder,
        )


def test_a_folder_that_holds_something_else_is_left_alone(tiny, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/thesis.tex").write_text("text")
    with pytest.raises(ValueError) as error:
        export.export(runs.load_run(tiny, device="cpu"), tmp_path / "out")
    assert (
        str(error.value)
        == f"{tmp_path / 'out'}: is not empty and holds no export; give a new folder"
    )


def test_a_missing_onnx_is_a_message(tiny, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime", None)
    with pytest.raises(ValueError) as error:
        export.export(runs.load_run(tiny, device="cpu"), tmp_path / "out", ["onnx"])
    assert str(error.value) == f"--format onnx: onnxruntime is not installed; {onnx.INSTALL}"


@pytest.mark.full
@pytest.mark.parametrize("overrides", [(), VIT])
def test_onnx_gives_torchs_features_for_any_number_of_images(overrides, tmp_path):
    pytest.importorskip("onnxruntime")
    run = runs.load_run(make_run(tmp_path / "run", *overrides), device="cpu")
    folder = export.export(run, tmp_path / "out", ["onnx"])
    images = torch.randn(
        5, 3, run.image_size, run.image_size, generator=torch.Generator().manual_seed(0)
    )
    with torch.no_grad():
        expected = run.backbone(images)
    torch.testing.assert_close(
        onnx.session(folder / "model.onnx")(images),
        expected,
        rtol=0,
        atol=1e-4 * expected.abs().max().item(),
    )
    small = onnx.session(folder / "model_int8.onnx")(images)
    assert small.shape == expected.shape and torch.cosine_similarity(small, expected).min() > 0.9
    card = (folder / "README.md").read_text()
    rows = [
        line.split("|")[1:-1]
        for line in card.splitlines()
        if line.startswith(("| torch,", "| onnx,"))
    ]
    assert [row[0].strip() for row in rows] == ["torch, 32 bits", "onnx, 32 bits", "onnx, 8 bits"]
    assert abs(float(rows[0][1]) - float(rows[1][1])) <= 0.4 and float(rows[1][3]) > 2 * float(
        rows[2][3]
    )


def test_the_facts_of_a_network_whose_blocks_have_no_attention():
    backbone = backbones.build(BackboneConfig(name="test_efficientnet"), 32)
    facts = export.facts(backbone)
    assert facts["feature_dim"] == backbone.feature_dim and "num_heads" not in facts
