"""A run is opened with 100 % of its weights, or not at all; the random backbone is the one that the trainer began with."""

from __future__ import annotations

import shutil

import pytest
import torch
from made_run import checkpoint_of, describe_again, edit_manifest, make_run, write_images
from safetensors.torch import load_file, save_file

from ssl_pretrain.build import build_method
from ssl_pretrain.checkpoint.folder import list_checkpoints
from ssl_pretrain.eval import runs
from ssl_pretrain.eval.frozen import evaluation_split, features


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("runs") / "made")


@pytest.fixture
def copy(made, tmp_path):
    return shutil.copytree(made, tmp_path / "run")


def message(*arguments, **keywords) -> str:
    with pytest.raises(ValueError) as error:
        runs.load_run(*arguments, **keywords)
    return str(error.value)


def test_opens_what_was_saved(made):
    run = runs.load_run(made, device="cpu")
    saved = load_file(checkpoint_of(made) / "method.safetensors")
    own = {f"backbone.{key}": value for key, value in run.backbone.state_dict().items()}
    torch.testing.assert_close(
        own,
        {key: value for key, value in saved.items() if key.startswith("backbone.")},
        rtol=0,
        atol=0,
    )
    assert (run.step, run.network, run.image_size, run.backbone.training) == (
        7,
        "student",
        16,
        False,
    )


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "_fsdp_wrapped_module."])
def test_understands_the_names_that_wrappers_give(copy, prefix):
    expected = runs.load_run(copy, device="cpu").backbone.state_dict()
    weights = checkpoint_of(copy) / "method.safetensors"
    save_file(
        {
            f"{prefix}{key.replace('.model.', f'.{prefix}model.')}": value
            for key, value in load_file(weights).items()
        },
        weights,
    )
    describe_again(copy)
    torch.testing.assert_close(
        runs.load_run(copy, device="cpu").backbone.state_dict(), expected, rtol=0, atol=0
    )


def test_no_such_run(tmp_path):
    assert (
        message(tmp_path / "none")
        == f"{tmp_path / 'none'}: there is no such run folder; give the `output` of a run's config"
    )


def test_no_checkpoint(tmp_path):
    assert message(tmp_path).startswith(
        f"{tmp_path}: no checkpoint found (looked for {tmp_path}/checkpoints/step_*)"
    )


def test_a_truncated_checkpoint_is_named(copy):
    found = checkpoint_of(copy)
    weights = found / "method.safetensors"
    size = weights.stat().st_size
    weights.write_bytes(weights.read_bytes()[:-100])
    told = f"step_00000007/method.safetensors is truncated: {size - 100} bytes of {size}"
    assert told in message(copy)
    assert (
        message(copy, found)
        == f"{found.parent}: {told}. Nothing was loaded; give another, or none for the newest whole one"
    )


def test_the_newest_whole_checkpoint_is_judged_when_a_later_one_is_broken(copy):
    later = shutil.copytree(checkpoint_of(copy), checkpoint_of(copy).with_name("step_00000009"))
    edit_manifest(copy, step=9)
    (later / "method.safetensors").write_bytes(b"")
    with pytest.warns(UserWarning, match="step_00000009/method.safetensors is truncated"):
        assert runs.load_run(copy, device="cpu").checkpoint_path.name == "step_00000007"


def test_a_missing_and_an_unexpected_key_are_listed(copy):
    weights = checkpoint_of(copy) / "method.safetensors"
    tensors = load_file(weights)
    tensors["backbone.model.another"] = tensors.pop("backbone.model.bn1.weight")
    save_file(tensors, weights)
    describe_again(copy)
    told = message(copy)
    assert (
        "1 missing (model.bn1.weight)" in told
        and "1 unexpected (model.another)" in told
        and "test_resnet" in told
    )


def test_weights_of_another_architecture_are_refused(copy):
    (copy / "config.yaml").unlink()
    edit_manifest(copy, config__backbone__name="test_vit")
    told = message(copy)
    assert (
        "for backbone.name test_vit: not the weights of this backbone" in told
        and "missing" in told
        and "unexpected" in told
    )


def test_a_checkpoint_of_another_run_is_refused_naming_both(copy, made):
    edit_manifest(copy, config__backbone__name="test_vit")
    found = checkpoint_of(copy)
    assert message(made, found) == (
        f"{found}: has backbone.name test_vit, and {made / 'config.yaml'} says test_resnet; give a checkpoint of this run"
    )


def test_data_may_have_moved_and_nothing_else(made):
    assert (
        runs.load_run(made, overrides=["data.num_workers=1"], device="cpu").config.data.num_workers
        == 1
    )
    told = "'epochs=3': an evaluation takes key=value of data and evaluation only, such as data.root=/new/place"
    assert message(made, overrides=["epochs=3"]) == told
    assert "data.rot: no such key. Did you mean 'root'?" in message(made, overrides=["data.rot=/x"])


def test_the_random_backbone_is_the_one_that_the_trainer_began_with(made):
    run = runs.load_run(made, device="cpu")
    began = build_method(run.config).backbone.state_dict()
    random = features.random_backbone(run).state_dict()
    torch.testing.assert_close(random, began, rtol=0, atol=0)
    assert not torch.equal(
        random["model.conv1.0.weight"], run.backbone.state_dict()["model.conv1.0.weight"]
    )


def test_recalibrated_batch_norm_has_the_statistics_of_the_training_images(made):
    run = runs.load_run(made, device="cpu")
    train_part, _ = evaluation_split.labelled_parts(run, "a test")
    convolution = features.random_backbone(run).model.conv1[
        0
    ]  # the first layer's norm sees what this one makes
    with torch.no_grad():
        batches = [
            convolution(features.normalize(run, images))
            for images, _ in features.recalibration(train_part).batches()
        ]
    recalibrated = features.random_backbone(run, train_part)
    norm = recalibrated.model.conv1[1]
    torch.testing.assert_close(
        norm.running_mean, torch.stack([batch.mean(dim=(0, 2, 3)) for batch in batches]).mean(dim=0)
    )
    torch.testing.assert_close(
        norm.running_var, torch.stack([batch.var(dim=(0, 2, 3)) for batch in batches]).mean(dim=0)
    )
    assert not recalibrated.training


def test_a_run_folder_is_only_read(made):
    before = {path: path.stat().st_mtime_ns for path in made.rglob("*")}
    runs.load_run(made, device="cpu")
    assert {
        path: path.stat().st_mtime_ns for path in made.rglob("*")
    } == before and list_checkpoints(made)


def test_batch_norm_is_recalibrated_on_mixed_batches(tmp_path, monkeypatch):
    root = write_images(
        tmp_path / "data",
        [
            f"{part}/{name}/{number}.png"
            for part in ("train", "val")
            for name in "ab"
            for number in range(20)
        ],
    )
    run = runs.load_run(
        make_run(tmp_path / "run", "data.source=folder", f"data.root={root}"), device="cpu"
    )
    train_part, _ = evaluation_split.labelled_parts(run, "a test")
    assert len(set(train_part.labels[:20])) == 1  # a folder's order: class by class
    mixed = features.recalibration(train_part)
    assert sorted(mixed.numbers) == list(range(40)) and 5 <= mixed.labels[:20].sum() <= 15
    monkeypatch.setattr(features, "RECALIBRATION", 12)
    assert len(features.recalibration(train_part)) == 12
