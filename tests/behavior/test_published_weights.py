"""Weights that others published start a run, and are judged by the protocol of our own."""

import argparse
import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from commands import class_folders, each, run, write_config
from safetensors.torch import save_file

pytestmark = pytest.mark.full  # each test starts several processes; `make test-full` runs them


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("weights")
    class_folders(folder / "images", "train")
    class_folders(folder / "images", "val", per_class=3, first=100)
    path = write_config(folder, folder / "images")
    path.write_text(
        path.read_text().replace("stem: no_pool", "stem: imagenet").replace("size: 16", "size: 32")
    )
    return path


def below(prefix: str, weights: dict) -> dict:
    return {f"{prefix}{key}": value for key, value in weights.items()}


def network(name: str = "test_resnet", **arguments) -> dict[str, torch.Tensor]:
    """A seeded network with the classifier of its authors' ten classes."""
    torch.manual_seed(1)
    return timm.create_model(name, num_classes=10, **arguments).state_dict()


def other() -> dict[str, torch.Tensor]:
    return {key: value + 1 for key, value in network().items()}


BARE = {key: value for key, value in network().items() if not key.startswith("fc.")}
FILES = {  # what the file holds, and what is said of it
    "supervised": (network(), "left out fc.bias, fc.weight"),
    "moco": (
        {
            "epoch": 200,
            "state_dict": below("module.encoder_q.", network())
            | below("module.encoder_k.", other())
            | {"module.queue": torch.ones(2)},
            "optimizer": {"state": {}, "param_groups": []},
        },
        "read at 'state_dict'; prefix 'encoder_q.'",
    ),
    "dino": (
        {
            "student": below("module.backbone.", other()),
            "teacher": below("backbone.", network()) | {"head.mlp.0.weight": torch.ones(2, 2)},
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
            "state_dict": below("model.backbone.", BARE) | {"classifier.weight": torch.ones(3, 96)},
            "epoch": 3,
        },
        "read at 'state_dict'; prefix 'model.backbone.'; 1 tensors outside it left out",
    ),
    "moco_v3": (
        {
            "state_dict": below("module.base_encoder.", BARE)
            | below("module.momentum_encoder.", BARE)
        },
        "read at 'state_dict'; prefix 'base_encoder.'",
    ),
}


def test_published_files_are_found_their_way_into(config, tmp_path):
    commands = []
    for name, (content, _) in FILES.items():
        torch.save(content, tmp_path / f"{name}.pth")
        commands.append(
            ["ssl_pretrain.train", str(config), f"backbone.init={tmp_path / name}.pth", "--plan"]
        )
    for (name, (_, said)), (status, out, err) in zip(FILES.items(), each(commands), strict=True):
        assert status == 0, err
        line = next(line for line in out.splitlines() if line.startswith("weights: "))
        assert line.startswith(f"weights: {tmp_path / name}.pth: {said}"), line


REFUSED = {
    "another depth": (
        network("test_vit", depth=8),
        ["backbone.name=test_vit"],
        "not the weights of this backbone: ",
    ),
    "a register token": (
        network("test_vit") | {"reg_token": torch.ones(1, 4, 64)},
        ["backbone.name=test_vit"],
        "not the weights of this backbone: ",
    ),
    "a missing key": (
        {
            key: value
            for key, value in network().items()
            if key != "conv1.weight" and "layer1.0.conv1" not in key
        },
        [],
        "not the weights of this backbone: ",
    ),
    "two networks alike": (
        below("left.", network()) | below("right.", other()),
        [],
        "not the weights of this backbone: several networks in it fit, under 'left.', 'right.'; "
        "choose one with backbone.init_prefix. Nothing was loaded",
    ),
    "a program": (
        {"state_dict": network(), "where": Path("a")},
        [],
        "holds Python objects (pathlib.PosixPath) beside its tensors, and "
        "unpickling those can run any program. "
        "If you trust the file, save its tensors alone: ",
    ),
}


def test_weights_of_another_network_are_refused(config, tmp_path):
    commands = []
    for number, (content, keys, _) in enumerate(REFUSED.values()):
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
        zip(REFUSED.values(), each(commands), strict=True)
    ):
        source = f"error: backbone.init: '{tmp_path / str(number)}.pth'"
        assert status == 2 and err.replace("': ", "' ").startswith(f"{source} {message}"), err


def test_a_key_and_a_prefix_say_which_weights_are_meant(config, tmp_path):
    torch.save(
        {"nets": {"deep": below("left.", network()) | below("right.", other())}},
        tmp_path / "nested.pth",
    )
    keys = [
        f"backbone.init={tmp_path / 'nested.pth'}",
        "backbone.init_key=nets.deep",
        "backbone.init_prefix=right.",
    ]
    done = run("-m", "ssl_pretrain.train", config, *keys, f"output={tmp_path / 'run'}")
    assert done.status == 0, done.text
    assert "read at 'nets.deep'; prefix 'right.'; " in done.stdout


def test_positions_of_another_image_size_are_resampled_and_reported(config, tmp_path):
    save_file(network("test_vit", img_size=160), tmp_path / "vit.safetensors")
    keys = [f"backbone.init={tmp_path / 'vit.safetensors'}", "backbone.name=test_vit"]
    done = run("-m", "ssl_pretrain.train", config, *keys, f"output={tmp_path / 'run'}")
    assert done.status == 0, done.text
    assert "pos_embed resampled from (1, 101, 64) to (1, 5, 64)" in done.stdout


def test_evaluations_judge_weights_without_a_run(config, tmp_path):
    torch.save({"model": network()}, tmp_path / "published.pth")
    shared = [
        str(tmp_path / "published.pth"),
        f"data.root={config.parent / 'images'}",
        "backbone.name=test_resnet",
    ]
    shared += ["evaluation.image_size=32", f"output={tmp_path / 'judged'}"]
    commands = [["eval.knn", *shared, "--k", "3"], ["eval.linear", *shared, "--epochs", "2"]]
    for status, out, err in each(commands):
        assert status == 0, err
        assert "published weights of published.pth, test_resnet" in out
    for name in ("knn", "linear"):
        result = json.loads((tmp_path / "judged" / "eval" / f"{name}.json").read_text())
        assert {row["features"] for row in result["rows"]} >= {"raw pixels", "pretrained"}


def test_every_evaluation_takes_weights_of_a_network_that_is_no_resnet_or_vit(config, tmp_path):
    torch.save({"model": network("test_efficientnet")}, tmp_path / "published.pth")
    shared = [str(tmp_path / "published.pth"), "backbone.name=test_efficientnet"]
    shared += ["evaluation.image_size=32", f"output={tmp_path / 'judged'}"]
    data = [f"data.root={config.parent / 'images'}", "evaluation.k=3"]
    picture = str(config.parent / "images" / "train" / "class_0" / "0.png")
    commands = [
        ["eval.semi", *shared, *data, "--percent", "50", "--epochs", "1"],
        ["eval.finetune", *shared, *data, "--epochs", "1"],
        ["eval.retrieval", *shared, *data],
        ["eval.robustness", *shared, *data, "--corruptions", "gaussian_noise"],
        ["eval.attention", shared[0], picture, *shared[1:]],
        ["eval.export", *shared, *data],
    ]
    for command, (status, _, err) in zip(commands, each(commands), strict=True):
        assert status == 0, f"{command[0]}: {err}"
    card = (tmp_path / "judged" / "export" / "README.md").read_text()
    assert card.startswith("# test_efficientnet of published.pth\n")
    assert "Weights that were not trained by this project, without their classifier." in card
    assert (tmp_path / "judged" / "attention" / "01_0_components.png").is_file()


def test_results_of_weights_are_not_mixed_with_others(config, tmp_path):
    torch.save(network(), tmp_path / "a.pth")
    torch.save(other(), tmp_path / "b.pth")
    keys = [
        f"data.root={config.parent / 'images'}",
        "evaluation.image_size=32",
        f"output={tmp_path / 'judged'}",
        "--k=3",
    ]
    commands = [
        ["eval.knn", str(tmp_path / name), "backbone.name=test_resnet", *keys]
        for name in ("a.pth", "b.pth")
    ]
    first, second, unnamed = each([*commands, ["eval.knn", str(tmp_path / "a.pth"), *keys]])
    assert first[0] == 0, first
    assert (
        second[0] == 2
        and (
            "judged holds a run, or the results of other weights; give another "
            "folder with output=FOLDER"
        )
        in second[2]
    )
    assert unnamed[0] == 2
    assert (
        "the network of these weights is not known; give its timm name, "
        "as in backbone.name=resnet50"
    ) in unnamed[2]
