"""The commands skip damaged checkpoints and write files that respect the umask."""

import json
import os
import re
import stat

import commands
import pytest

pytestmark = pytest.mark.full  # each test starts several processes

TRAIN = ("-m", "ssl_pretrain.train")
EVERY_EPOCH = ("epochs=3", "checkpoint.every_epochs=1")


def flip_bit(text: bytes, prefix: bytes) -> bytes:
    """Return the text with the lowest bit of the byte after `prefix` flipped."""
    index = text.index(prefix) + len(prefix)
    return text[:index] + bytes([text[index] ^ 1]) + text[index + 1 :]


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """Train four of six steps with a checkpoint every two. Return the configuration's path."""
    folder = tmp_path_factory.mktemp("saved")
    path = commands.write_config(folder, commands.write_class_folders(folder / "images", "train"))
    result = commands.run(*TRAIN, path, *EVERY_EPOCH, "--stop-after", "4")
    assert result.status == 0, result.text
    return path


PREFIXES = {  # text of the manifest before the damaged byte
    "a learning rate": b'"base_lr": ',
    "a digit of a hash": b'"sha256": "',
    "the first letter of a key": b'"seed',
    "the data's fingerprint": b'"data": "',
}


def test_a_flipped_bit_in_a_manifest_is_detected_and_the_previous_checkpoint_is_used(config):
    """Each run resumes from step 2 and writes an intact checkpoint of step 4 for the next one."""
    run = config.parent / "run"
    manifest = run / "checkpoints" / "step_00000004" / "manifest.json"
    for name, prefix in PREFIXES.items():
        text = manifest.read_bytes()
        assert prefix in text, name
        manifest.write_bytes(flip_bit(text, prefix))
        result = commands.run(*TRAIN, config, *EVERY_EPOCH, "--stop-after", "2")
        assert result.status == 0, result.text
        assert re.search(r"step_00000004[^\n]*(manifest|damaged|hash)", result.text), result.text
        lines = (run / "metrics.jsonl").read_text().splitlines()
        assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4], name


@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_the_files_of_a_run_and_of_its_export_respect_the_umask(mask, config, tmp_path):
    run, export_folder = tmp_path / "run", tmp_path / "export"
    previous_mask = os.umask(mask)
    try:
        training = commands.run(*TRAIN, config, f"output={run}")
        export = commands.run("-m", "ssl_pretrain.eval.export", run, export_folder)
    finally:
        os.umask(previous_mask)
    assert training.status == 0 and export.status == 0, training.text + export.text
    files = [file for folder in (run, export_folder) for file in folder.rglob("*")]
    names = {file.name for file in files}
    assert {"method.safetensors", "model.safetensors", "metrics.jsonl", "config.yaml"} <= names
    for file in files:
        expected = (0o777 if file.is_dir() else 0o666) & ~mask
        assert stat.S_IMODE(file.stat().st_mode) == expected, file
