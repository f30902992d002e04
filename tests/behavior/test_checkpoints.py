"""Checkpoints as the commands meet them: damaged ones are passed over by name, and files have the mode that the umask says."""

from __future__ import annotations

import json
import os
import re
import stat

import commands
import pytest

pytestmark = pytest.mark.full  # several processes each

TRAIN = ("-m", "ssl_pretrain.train")


def flip(text: bytes, before: bytes, bit: int) -> bytes:
    """The text with one bit of the byte after `before` flipped."""
    place = text.index(before) + len(before)
    return text[:place] + bytes([text[place] ^ 1 << bit]) + text[place + 1 :]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The configuration of a run of six steps, with a checkpoint every two."""
    folder = tmp_path_factory.mktemp("saved")
    config = commands.write_config(folder, commands.class_folders(folder / "images", "train"))
    finished = commands.run(
        *TRAIN, config, "epochs=3", "checkpoint.every_epochs=1", "--stop-after", "4"
    )
    assert finished.status == 0, finished.text
    return config


FLIPPED = {
    "a learning rate": b'"base_lr": ',
    "a digit of a hash": b'"sha256": "',
    "the first letter of a key": b'"seed',
    "the data's fingerprint": b'"data": "',
}


def test_one_flipped_bit_of_a_manifest_is_found_and_the_checkpoint_before_is_used(saved):
    """Four places in turn; each run goes on from step 2, repeats steps 3 and 4, and writes a whole checkpoint of step 4."""
    run = saved.parent / "run"
    manifest = run / "checkpoints" / "step_00000004" / "manifest.json"
    for name, before in FLIPPED.items():
        text = manifest.read_bytes()
        assert before in text, name
        manifest.write_bytes(flip(text, before, bit=0))
        finished = commands.run(
            *TRAIN, saved, "epochs=3", "checkpoint.every_epochs=1", "--stop-after", "2"
        )
        assert finished.status == 0, finished.text
        assert re.search(r"step_00000004[^\n]*(manifest|damaged|hash)", finished.text), (
            name,
            finished.text,
        )
        steps = [
            json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()
        ]
        assert steps == [1, 2, 3, 4], name


@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_a_run_and_its_export_have_the_mode_that_the_umask_says(mask, saved, tmp_path):
    """A colleague evaluates the run, or nobody may."""
    before = os.umask(mask)
    try:
        run = tmp_path / "run"
        trained = commands.run(*TRAIN, saved, f"output={run}")
        exported = commands.run("-m", "ssl_pretrain.eval.export", run, tmp_path / "exported")
    finally:
        os.umask(before)
    assert trained.status == 0 and exported.status == 0, trained.text + exported.text
    found = [file for folder in (run, tmp_path / "exported") for file in folder.rglob("*")]
    assert {"method.safetensors", "model.safetensors", "metrics.jsonl", "config.yaml"} <= {
        file.name for file in found
    }
    for file in found:
        assert stat.S_IMODE(file.stat().st_mode) == (0o777 if file.is_dir() else 0o666) & ~mask, (
            file
        )
