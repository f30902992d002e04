"""Opening a run: all of its weights load or none do, and the random backbone is the trainer's."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from untrained_run import (
    checkpoint_of,
    edit_manifest,
    load_in_float32,
    make_run,
    renew_manifest,
    write_images,
)

from ssl_pretrain.build import build_method
from ssl_pretrain.checkpoint.folder import list_checkpoints
from ssl_pretrain.eval import runs
from ssl_pretrain.eval.frozen import evaluation_split, features


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("runs") / "run")


@pytest.fixture
def run_copy(run_folder, tmp_path):
    return shutil.copytree(run_folder, tmp_path / "run")


def error_of(*arguments, **keywords) -> str:
    with pytest.raises(ValueError) as error:
        runs.load_run(*arguments, **keywords)
    return str(error.value)


def test_the_saved_weights_are_loaded(run_folder):
    run = runs.load_run(run_folder, device="cpu")
    tensors = load_file(checkpoint_of(run_folder) / "method.safetensors")
    expected = {key: value for key, value in tensors.items() if key.startswith("backbone.")}
    actual = {f"backbone.{key}": value for key, value in run.backbone.state_dict().items()}
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)
    assert (run.step, run.network, run.image_size) == (7, "student", 16)
    assert not run.backbone.training


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "_fsdp_wrapped_module."])
def test_weights_saved_under_the_names_of_wrappers_are_loaded(run_copy, prefix):
    expected = runs.load_run(run_copy, device="cpu").backbone.state_dict()
    file = checkpoint_of(run_copy) / "method.safetensors"
    renamed_tensors = {
        f"{prefix}{key.replace('.model.', f'.{prefix}model.')}": value
        for key, value in load_file(file).items()
    }
    save_file(renamed_tensors, file)
    renew_manifest(run_copy)
    actual = runs.load_run(run_copy, device="cpu").backbone.state_dict()
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def test_a_missing_run_is_named(tmp_path):
    assert error_of(tmp_path / "none") == (
        f"{tmp_path / 'none'}: no such run folder; give the `output` of a run's config"
    )


def test_a_run_without_a_checkpoint_is_named(tmp_path):
    assert error_of(tmp_path).startswith(
        f"{tmp_path}: no checkpoint found (looked for {tmp_path}/checkpoints/step_*)"
    )


def test_a_truncated_checkpoint_is_named(run_copy):
    folder = checkpoint_of(run_copy)
    weights = folder / "method.safetensors"
    size = weights.stat().st_size
    weights.write_bytes(weights.read_bytes()[:-100])
    reason = f"step_00000007/method.safetensors is truncated: {size - 100} bytes of {size}"
    assert reason in error_of(run_copy)
    assert error_of(run_copy, folder) == (
        f"{folder.parent}: {reason}. Nothing was loaded; give another checkpoint, or none for the"
        " newest intact one"
    )


def test_the_newest_intact_checkpoint_is_opened_when_a_later_one_is_truncated(run_copy):
    later_checkpoint = shutil.copytree(
        checkpoint_of(run_copy), checkpoint_of(run_copy).with_name("step_00000009")
    )
    edit_manifest(run_copy, step=9)
    (later_checkpoint / "method.safetensors").write_bytes(b"")
    with pytest.warns(UserWarning, match="step_00000009/method.safetensors is truncated"):
        assert runs.load_run(run_copy, device="cpu").checkpoint_path.name == "step_00000007"


def test_a_missing_and_an_unexpected_key_are_listed(run_copy):
    file = checkpoint_of(run_copy) / "method.safetensors"
    tensors = load_file(file)
    tensors["backbone.model.another"] = tensors.pop("backbone.model.bn1.weight")
    save_file(tensors, file)
    renew_manifest(run_copy)
    message = error_of(run_copy)
    assert "1 missing (model.bn1.weight)" in message
    assert "1 unexpected (model.another)" in message
    assert "test_resnet" in message


def test_weights_of_another_architecture_are_refused(run_copy):
    (run_copy / "config.yaml").unlink()
    edit_manifest(run_copy, config__backbone__name="test_vit")
    message = error_of(run_copy)
    assert "for backbone.name test_vit: not the weights of this backbone" in message
    assert "missing" in message
    assert "unexpected" in message


def test_a_checkpoint_of_another_run_is_refused_and_both_are_named(run_copy, run_folder):
    edit_manifest(run_copy, config__backbone__name="test_vit")
    checkpoint_folder = checkpoint_of(run_copy)
    assert error_of(run_folder, checkpoint_folder) == (
        f"{checkpoint_folder}: has backbone.name test_vit, but {run_folder / 'config.yaml'} has"
        " test_resnet; give a checkpoint of this run"
    )


def test_only_data_and_evaluation_can_be_overridden(run_folder):
    run = runs.load_run(run_folder, overrides=["data.num_workers=1"], device="cpu")
    assert run.config.data.num_workers == 1
    assert error_of(run_folder, overrides=["epochs=3"]) == (
        "'epochs=3': an evaluation only accepts key=value settings of data, evaluation,"
        " text.templates, log.bands and parallel.precision, such as data.root=/new/place"
    )
    message = error_of(run_folder, overrides=["data.rot=/x"])
    assert "data.rot: no such key. Did you mean 'root'?" in message


def test_the_random_backbone_is_the_one_the_trainer_began_with(run_folder):
    run = runs.load_run(run_folder, device="cpu")
    initial = build_method(run.config).backbone.state_dict()
    random = features.random_backbone(run).state_dict()
    torch.testing.assert_close(random, initial, rtol=0, atol=0)
    trained = run.backbone.state_dict()["model.conv1.0.weight"]
    assert not torch.equal(random["model.conv1.0.weight"], trained)


def test_recalibrated_batch_norm_has_the_statistics_of_the_training_images(run_folder):
    run = load_in_float32(run_folder)
    train, _ = evaluation_split.labeled_splits(run, "a test")
    # The input of the first batch norm is the output of this convolution.
    convolution = features.random_backbone(run).model.conv1[0]
    with torch.no_grad():
        batches = [
            convolution(features.normalize(run, images))
            for images, _ in features.recalibration_split(train).batches()
        ]
    recalibrated = features.random_backbone(run, train)
    norm = recalibrated.model.conv1[1]
    means = torch.stack([batch.mean(dim=(0, 2, 3)) for batch in batches])
    variances = torch.stack([batch.var(dim=(0, 2, 3)) for batch in batches])
    torch.testing.assert_close(norm.running_mean, means.mean(dim=0))
    torch.testing.assert_close(norm.running_var, variances.mean(dim=0))
    assert not recalibrated.training


def test_opening_a_run_does_not_change_its_folder(run_folder):
    before = {path: path.stat().st_mtime_ns for path in run_folder.rglob("*")}
    runs.load_run(run_folder, device="cpu")
    assert {path: path.stat().st_mtime_ns for path in run_folder.rglob("*")} == before
    assert list_checkpoints(run_folder)


def test_batch_norm_is_recalibrated_on_shuffled_images(tmp_path, monkeypatch):
    names = [
        f"{split}/{label}/{number}.png"
        for split in ("train", "val")
        for label in "ab"
        for number in range(20)
    ]
    root = write_images(tmp_path / "data", names)
    folder = make_run(tmp_path / "run", "data.source=folder", f"data.root={root}")
    train, _ = evaluation_split.labeled_splits(runs.load_run(folder, device="cpu"), "a test")
    assert len(set(train.labels[:20])) == 1  # images of a folder are ordered by class
    shuffled = features.recalibration_split(train)
    assert sorted(shuffled.indices) == list(range(40))
    assert 5 <= shuffled.labels[:20].sum() <= 15
    monkeypatch.setattr(features, "MAX_RECALIBRATION_IMAGES", 12)
    assert len(features.recalibration_split(train)) == 12
