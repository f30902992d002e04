"""Published weights can start a run, and are evaluated by the same protocols as our own."""

import argparse
import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from commands import run, run_modules, write_class_folders, write_config
from safetensors.torch import save_file

pytestmark = pytest.mark.full  # each test starts several processes; `make test-full` runs them


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("weights")
    write_class_folders(folder / "images", "train")
    write_class_folders(folder / "images", "val", images_per_class=3, first_number=100)
    path = write_config(folder, folder / "images")
    path.write_text(
        path.read_text().replace("stem: no_pool", "stem: imagenet").replace("size: 16", "size: 32")
    )
    return path


def add_prefix(prefix: str, weights: dict) -> dict:
    return {f"{prefix}{key}": value for key, value in weights.items()}


def network_weights(name: str = "test_resnet", **arguments) -> dict[str, torch.Tensor]:
    """Return the seeded weights of a network with a classifier of ten classes."""
    torch.manual_seed(1)
    return timm.create_model(name, num_classes=10, **arguments).state_dict()


def other_weights() -> dict[str, torch.Tensor]:
    return {key: value + 1 for key, value in network_weights().items()}


WITHOUT_CLASSIFIER = {
    key: value for key, value in network_weights().items() if not key.startswith("fc.")
}
FILES = {  # content of the file, and how the run reports it
    "supervised": (network_weights(), "left out fc.bias, fc.weight"),
    "moco": (
        {
            "epoch": 200,
            "state_dict": add_prefix("module.encoder_q.", network_weights())
            | add_prefix("module.encoder_k.", other_weights())
            | {"module.queue": torch.ones(2)},
            "optimizer": {"state": {}, "param_groups": []},
        },
        "read at 'state_dict'; prefix 'encoder_q.'",
    ),
    "dino": (
        {
            "student": add_prefix("module.backbone.", other_weights()),
            "teacher": add_prefix("backbone.", network_weights())
            | {"head.mlp.0.weight": torch.ones(2, 2)},
            "args": argparse.Namespace(lr=1.0),
            "best": np.float64(70.5),
        },
        (
            "read at 'teacher'; prefix 'backbone.'; 1 tensors outside it left out; "
            "left out fc.bias, fc.weight"
        ),
    ),
    "lightning": (
        {
            "state_dict": add_prefix("model.backbone.", WITHOUT_CLASSIFIER)
            | {"classifier.weight": torch.ones(3, 96)},
            "epoch": 3,
        },
        "read at 'state_dict'; prefix 'model.backbone.'; 1 tensors outside it left out",
    ),
    "moco_v3": (
        {
            "state_dict": add_prefix("module.base_encoder.", WITHOUT_CLASSIFIER)
            | add_prefix("module.momentum_encoder.", WITHOUT_CLASSIFIER)
        },
        "read at 'state_dict'; prefix 'base_encoder.'",
    ),
}


def test_weights_are_found_in_published_files(config, tmp_path):
    commands = []
    for name, (content, _) in FILES.items():
        torch.save(content, tmp_path / f"{name}.pth")
        commands.append(
            ["ssl_pretrain.train", str(config), f"backbone.init={tmp_path / name}.pth", "--plan"]
        )
    for (name, (_, report)), (status, out, err) in zip(
        FILES.items(), run_modules(commands), strict=True
    ):
        assert status == 0, err
        line = next(line for line in out.splitlines() if line.startswith("weights: "))
        assert line.startswith(f"weights: {tmp_path / name}.pth: {report}"), line


REFUSED_FILES = {
    "another depth": (
        network_weights("test_vit", depth=8),
        ["backbone.name=test_vit"],
        "not the weights of this backbone: ",
    ),
    "a register token": (
        network_weights("test_vit") | {"reg_token": torch.ones(1, 4, 64)},
        ["backbone.name=test_vit"],
        "not the weights of this backbone: ",
    ),
    "a missing key": (
        {
            key: value
            for key, value in network_weights().items()
            if key != "conv1.weight" and "layer1.0.conv1" not in key
        },
        [],
        "not the weights of this backbone: ",
    ),
    "two networks alike": (
        add_prefix("left.", network_weights()) | add_prefix("right.", other_weights()),
        [],
        "several networks fit this backbone, under 'left.', 'right.'; "
        "choose one with backbone.init_prefix. Nothing was loaded",
    ),
    "a program": (
        {"state_dict": network_weights(), "where": Path("a")},
        [],
        "contains Python objects (pathlib.PosixPath) in addition to tensors, and "
        "unpickling them can run any program. "
        "If you trust the file, save its tensors alone: ",
    ),
}


def test_weights_of_another_network_are_refused(config, tmp_path):
    commands = []
    for number, (content, keys, _) in enumerate(REFUSED_FILES.values()):
        torch.save(content, tmp_path / f"{number}.pth")
        commands.append(
            [
                "ssl_pretrain.train",
                str(config),
                f"backbone.init={tmp_path / str(number)}.pth",
                *keys,
                "--plan",
            ]
        )
    for number, ((_, _, message), (status, _, err)) in enumerate(
        zip(REFUSED_FILES.values(), run_modules(commands), strict=True)
    ):
        error_start = f"error: backbone.init: '{tmp_path / str(number)}.pth'"
        assert status == 2 and err.replace("': ", "' ").startswith(f"{error_start} {message}"), err


def test_a_key_and_a_prefix_select_the_weights(config, tmp_path):
    torch.save(
        {
            "nets": {
                "deep": add_prefix("left.", network_weights())
                | add_prefix("right.", other_weights())
            }
        },
        tmp_path / "nested.pth",
    )
    keys = [
        f"backbone.init={tmp_path / 'nested.pth'}",
        "backbone.init_key=nets.deep",
        "backbone.init_prefix=right.",
    ]
    result = run("-m", "ssl_pretrain.train", config, *keys, f"output={tmp_path / 'run'}")
    assert result.status == 0, result.text
    assert "read at 'nets.deep'; prefix 'right.'; " in result.stdout


def test_position_embeddings_of_another_image_size_are_resampled_and_reported(config, tmp_path):
    save_file(network_weights("test_vit", img_size=160), tmp_path / "vit.safetensors")
    keys = [f"backbone.init={tmp_path / 'vit.safetensors'}", "backbone.name=test_vit"]
    result = run("-m", "ssl_pretrain.train", config, *keys, f"output={tmp_path / 'run'}")
    assert result.status == 0, result.text
    assert "pos_embed resampled from (1, 101, 64) to (1, 5, 64)" in result.stdout


def test_evaluations_accept_weights_without_a_run(config, tmp_path):
    torch.save({"model": network_weights()}, tmp_path / "published.pth")
    shared_arguments = [
        str(tmp_path / "published.pth"),
        f"data.root={config.parent / 'images'}",
        "backbone.name=test_resnet",
    ]
    shared_arguments += ["evaluation.image_size=32", f"output={tmp_path / 'evaluated'}"]
    commands = [
        ["eval.knn", *shared_arguments, "--k", "3"],
        ["eval.linear", *shared_arguments, "--epochs", "2"],
    ]
    for status, out, err in run_modules(commands):
        assert status == 0, err
        assert "published weights of published.pth, test_resnet" in out
    for name in ("knn", "linear"):
        result = json.loads((tmp_path / "evaluated" / "eval" / f"{name}.json").read_text())
        assert {row["features"] for row in result["rows"]} >= {"raw pixels", "pretrained"}


def test_every_evaluation_accepts_weights_of_a_network_that_is_neither_resnet_nor_vit(
    config, tmp_path
):
    torch.save({"model": network_weights("test_efficientnet")}, tmp_path / "published.pth")
    shared_arguments = [str(tmp_path / "published.pth"), "backbone.name=test_efficientnet"]
    shared_arguments += ["evaluation.image_size=32", f"output={tmp_path / 'evaluated'}"]
    data_arguments = [f"data.root={config.parent / 'images'}", "evaluation.k=3"]
    image_path = str(config.parent / "images" / "train" / "class_0" / "0.png")
    commands = [
        ["eval.semi", *shared_arguments, *data_arguments, "--percent", "50", "--epochs", "1"],
        ["eval.finetune", *shared_arguments, *data_arguments, "--epochs", "1"],
        ["eval.attentive", *shared_arguments, *data_arguments, "--epochs", "1"],
        ["eval.retrieval", *shared_arguments, *data_arguments],
        ["eval.robustness", *shared_arguments, *data_arguments, "--corruptions", "gaussian_noise"],
        ["eval.attention", shared_arguments[0], image_path, *shared_arguments[1:]],
        ["eval.export", *shared_arguments, *data_arguments],
    ]
    for command, (status, _, err) in zip(commands, run_modules(commands), strict=True):
        assert status == 0, f"{command[0]}: {err}"
    card = (tmp_path / "evaluated" / "export" / "README.md").read_text()
    assert "\n# test_efficientnet of published.pth\n" in card
    assert (
        "Weights that were not trained by this project. Their classifier is not included." in card
    )
    assert (tmp_path / "evaluated" / "attention" / "01_0_components.png").is_file()


def test_results_of_different_weights_are_not_mixed(config, tmp_path):
    torch.save(network_weights(), tmp_path / "a.pth")
    torch.save(other_weights(), tmp_path / "b.pth")
    keys = [
        f"data.root={config.parent / 'images'}",
        "evaluation.image_size=32",
        f"output={tmp_path / 'evaluated'}",
        "--k=3",
    ]
    commands = [
        ["eval.knn", str(tmp_path / name), "backbone.name=test_resnet", *keys]
        for name in ("a.pth", "b.pth")
    ]
    first, second, without_a_name = run_modules(
        [*commands, ["eval.knn", str(tmp_path / "a.pth"), *keys]]
    )
    assert first[0] == 0, first
    assert (
        second[0] == 2
        and (
            "evaluated contains a run or the results of other weights; give another "
            "folder with output=FOLDER"
        )
        in second[2]
    )
    assert without_a_name[0] == 2
    assert (
        "the network of these weights is unknown; give its timm name, as in backbone.name=resnet50"
    ) in without_a_name[2]
