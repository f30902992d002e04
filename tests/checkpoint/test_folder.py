"""A manifest is believed only if every bit of it is the one that was written."""

from __future__ import annotations

import json
import os
import random
import stat

import pytest
import torch
from torch import nn

from ssl_pretrain.checkpoint import folder as checkpoint_folder
from ssl_pretrain.checkpoint import state as checkpoint
from ssl_pretrain.checkpoint.state import CheckpointConfig, State
from ssl_pretrain.optim import optimizers as optim
from ssl_pretrain.optim.optimizers import OptimConfig

FILE = "step_00000004/manifest.json"


@pytest.fixture
def run(tmp_path):
    torch.manual_seed(0)
    method = nn.Module()
    method.backbone = nn.Linear(3, 2)
    config = {"method": {"name": "simclr"}, "views": {"mean": [0.1, 0.2], "name": "µ"}}
    state = State(
        method,
        optim.build(OptimConfig(), method),
        config,
        {"wandb_id": None, "data": "abc", "last_step": 4},
    )
    for step in (2, 4):
        state.save(tmp_path, step, CheckpointConfig(keep_last=5), 1)
    return tmp_path


def path_of(run):
    return run / "checkpoints" / FILE


def why_not(run):
    with pytest.warns(UserWarning) as warned:
        assert checkpoint_folder.newest(run).name == "step_00000002"
    return (
        str(warned[0].message)
        .removesuffix("; using step_00000002 instead")
        .removeprefix(f"{FILE} ")
    )


@pytest.mark.parametrize("number", [400, pytest.param(3000, marks=pytest.mark.full)])
def test_every_flipped_bit_is_found(run, number):
    """A manifest with one flipped bit is never taken for whole, wherever the bit is."""
    path, rng = path_of(run), random.Random(0)
    whole = path.read_bytes()
    places = rng.sample(range(8 * len(whole)), min(number, 8 * len(whole)))
    places += [
        8 * (whole.index(text) + offset) + bit
        for text in (b'"format"', b"manifest_sha256")
        for offset in range(14)
        for bit in range(8)
    ]
    taken = []
    for place in places:
        content = bytearray(whole)
        content[place // 8] ^= 1 << place % 8
        path.write_bytes(content)
        try:
            checkpoint_folder.verify(path.parent)
            taken.append(place)
        except ValueError:
            pass
    assert taken == []
    path.write_bytes(whole)
    assert checkpoint_folder.verify(path.parent)["step"] == 4


def test_cuts_and_additions_are_found(run):
    path = path_of(run)
    whole = path.read_bytes()
    for content in (
        whole[:-1],
        whole[: len(whole) // 2],
        b"",
        whole + b"\n",
        whole + b"{}",
        whole.replace(b"\n", b"\r\n"),
        bytes(len(whole)),
    ):
        path.write_bytes(content)
        with pytest.raises(
            ValueError, match=r"step_00000004/manifest\.json (cannot be read|is damaged)"
        ):
            checkpoint_folder.verify(path.parent)


def test_another_manifest_in_its_place_is_found(run):
    """The manifest of another step has a hash that fits, and is not this folder's."""
    path_of(run).write_bytes((run / "checkpoints" / "step_00000002" / "manifest.json").read_bytes())
    assert why_not(run) == "cannot be read: step 2 is not that of the folder"


MALFORMED = {
    "a list": ([], "cannot be read: it is no JSON object"),
    "null": (None, "cannot be read: it is no JSON object"),
    "a number": (5, "cannot be read: it is no JSON object"),
    "files is a list": ({"files": []}, "cannot be read: files is missing or is no object"),
    "a file without its size": (
        {"files": {"method.safetensors": {}}},
        "cannot be read: files: 'method.safetensors' has no bytes or no sha256",
    ),
    "a file elsewhere": (
        {"files": {"../x": {"bytes": 1, "sha256": ""}}},
        "cannot be read: files: '../x' is not the name of a file in that folder",
    ),
    "no files": (
        {"files": {}},
        "cannot be read: files: lists neither method.safetensors and optimizer.safetensors nor a shard-* file",
    ),
    "step is text": ({"step": "4"}, "cannot be read: step is missing or is no number"),
    "config is text": ({"config": "x"}, "cannot be read: config is missing or is no object"),
    "machine is null": ({"machine": None}, "cannot be read: machine is missing or is no object"),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_manifests_cannot_be_read_whatever_their_hash(run, name):
    changes, message = MALFORMED[name]
    path = path_of(run)
    text = (
        json.dumps(changes)
        if not isinstance(changes, dict)
        else checkpoint_folder.dumps(json.loads(path.read_text()) | changes)
    )
    path.write_text(text)
    assert why_not(run) == message


def test_a_deep_manifest_cannot_be_read(run):
    path_of(run).write_text("[" * 100_000)
    assert why_not(run).startswith("cannot be read (")


def test_a_file_that_is_not_listed_is_found(run):
    path = path_of(run)
    written = json.loads(path.read_text())
    written["files"]["shard-00001-of-00001.safetensors"] = written["files"].pop(
        "optimizer.safetensors"
    )
    path.write_text(checkpoint_folder.dumps(written))
    assert (
        why_not(run)
        == "cannot be read: files: optimizer.safetensors is in the folder and not in the list"
    )


def test_a_folder_in_the_place_of_a_file_is_found(run):
    file = path_of(run).with_name("method.safetensors")
    file.unlink()
    file.mkdir()
    written = json.loads(path_of(run).read_text())
    written["files"]["method.safetensors"]["bytes"] = file.stat().st_size
    path_of(run).write_text(checkpoint_folder.dumps(written))
    with pytest.raises(
        ValueError, match=r"step_00000004/method\.safetensors cannot be read: Is a directory"
    ):
        checkpoint_folder.verify(path_of(run).parent)


def test_checkpoints_of_format_1_are_read_with_every_other_check(run):
    path = path_of(run)
    written = json.loads(path.read_text())
    del written[checkpoint_folder.HASH]
    path.write_text(json.dumps(written | {"format": 1}, indent=1))
    assert checkpoint.opened(path.parent)["step"] == 4
    path.write_text(json.dumps(written | {"format": 1, "step": 6}, indent=1))
    assert why_not(run) == "cannot be read: step 6 is not that of the folder"
    path.write_text(json.dumps(written, indent=1))
    assert why_not(run) == "is damaged: its SHA-256 is not the one at its end"


def test_links_and_files_under_a_checkpoints_name_do_not_stop_a_save(tmp_path, run):
    """A file, a dangling link and a link to a damaged folder lie where steps 6, 8 and 10 go. Targets of links stay."""
    folder = run / "checkpoints"
    (folder / "step_00000006").write_text("")
    (folder / "step_00000008").symlink_to("nowhere")
    other = tmp_path / "elsewhere"
    other.mkdir()
    (other / "kept").write_text("kept")
    (folder / "step_00000010").symlink_to(other)
    method = nn.Module()
    method.backbone = nn.Linear(3, 2)
    state = State(method, optim.build(OptimConfig(), method), {}, {})
    for step in (6, 8, 10):
        state.save(run, step, CheckpointConfig(keep_last=9), 1)
    for step in (6, 8, 10):
        assert not (folder / f"step_{step:08d}").is_symlink()
        assert checkpoint_folder.verify(folder / f"step_{step:08d}")["step"] == step
    assert (other / "kept").read_text() == "kept"


@pytest.mark.parametrize("mask", [0o022, 0o007, 0o077])
def test_files_have_the_mode_that_the_umask_says(tmp_path, mask):
    before = os.umask(mask)
    try:
        method = nn.Module()
        method.backbone = nn.Linear(3, 2)
        State(method, optim.build(OptimConfig(), method), {}, {}).save(
            tmp_path, 1, CheckpointConfig(), 1
        )
    finally:
        os.umask(before)
    (saved,) = checkpoint.checkpoints(tmp_path)
    assert {stat.S_IMODE(file.stat().st_mode) for file in saved.iterdir()} == {0o666 & ~mask}
    assert stat.S_IMODE(saved.stat().st_mode) == 0o777 & ~mask
