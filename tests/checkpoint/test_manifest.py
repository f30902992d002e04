"""A manifest is only accepted if not a single bit of it has changed."""

import json
import random

import pytest
import saving
import torch

from ssl_pretrain.checkpoint.folder import newest_checkpoint
from ssl_pretrain.checkpoint.manifest import HASH_KEY, read_manifest, to_json, verify_checkpoint

NAME = "step_00000004/manifest.json"
CONFIG = {"method": {"name": "simclr"}, "views": {"mean": [0.1, 0.2], "name": "µ"}}


@pytest.fixture
def run(tmp_path):
    torch.manual_seed(0)
    checkpoints = saving.build_checkpoints(
        tmp_path, saving.build_linear_state(), config=CONFIG, keep_last=5
    )
    for step in (2, 4):
        checkpoints.save(step)
    return tmp_path


def find_manifest(run):
    return run / "checkpoints" / NAME


def find_skip_reason(run):
    """Return the reason why the newest checkpoint is skipped in favor of the previous one."""
    with pytest.warns(UserWarning) as warnings:
        assert newest_checkpoint(run).name == "step_00000002"
    text = str(warnings[0].message)
    return text.removesuffix("; using step_00000002 instead").removeprefix(f"{NAME} ")


@pytest.mark.parametrize("number", [400, pytest.param(3000, marks=pytest.mark.full)])
def test_any_flipped_bit_is_detected(run, number):
    path, rng = find_manifest(run), random.Random(0)
    intact = path.read_bytes()
    positions = rng.sample(range(8 * len(intact)), min(number, 8 * len(intact)))
    for text in (b'"format"', b"manifest_sha256"):
        start = 8 * intact.index(text)
        positions += range(start, start + 8 * 14)
    accepted_positions = []
    for position in positions:
        content = bytearray(intact)
        content[position // 8] ^= 1 << position % 8
        path.write_bytes(content)
        try:
            verify_checkpoint(path.parent)
            accepted_positions.append(position)
        except ValueError:
            pass
    assert accepted_positions == []
    path.write_bytes(intact)
    assert verify_checkpoint(path.parent)["step"] == 4


def test_truncations_and_additions_are_detected(run):
    path = find_manifest(run)
    intact = path.read_bytes()
    for content in (
        intact[:-1],
        intact[: len(intact) // 2],
        b"",
        intact + b"\n",
        intact + b"{}",
        intact.replace(b"\n", b"\r\n"),
        bytes(len(intact)),
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=rf"{NAME} (cannot be read|is damaged)"):
            verify_checkpoint(path.parent)


def test_the_manifest_of_another_step_is_detected(run):
    other = run / "checkpoints" / "step_00000002" / "manifest.json"
    find_manifest(run).write_bytes(other.read_bytes())
    assert find_skip_reason(run) == "cannot be read: it belongs to the checkpoint of step 2"


MALFORMED = {
    "a list": ([], "it is not a JSON object"),
    "null": (None, "it is not a JSON object"),
    "a number": (5, "it is not a JSON object"),
    "files is a list": ({"files": []}, "files is missing or is not an object"),
    "a file without its size": (
        {"files": {"method.safetensors": {}}},
        "files: 'method.safetensors' has no valid bytes or sha256 entry",
    ),
    "a file elsewhere": (
        {"files": {"../x": {"bytes": 1, "sha256": ""}}},
        "files: '../x' is not a file name in the checkpoint's folder",
    ),
    "no files": (
        {"files": {}},
        "files: needs method.safetensors and optimizer.safetensors, or a shard-* file",
    ),
    "step is text": ({"step": "4"}, "step is missing or is not a number"),
    "config is text": ({"config": "x"}, "config is missing or is not an object"),
    "machine is null": ({"machine": None}, "machine is missing or is not an object"),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_manifests_are_refused_even_with_a_correct_hash(run, name):
    changes, message = MALFORMED[name]
    path = find_manifest(run)
    if isinstance(changes, dict):
        path.write_text(to_json(json.loads(path.read_text()) | changes))
    else:
        path.write_text(json.dumps(changes))
    assert find_skip_reason(run) == f"cannot be read: {message}"


def test_a_deeply_nested_manifest_is_refused(run):
    find_manifest(run).write_text("[" * 100_000)
    assert find_skip_reason(run).startswith("cannot be read (")


def test_a_tensor_file_that_is_not_listed_is_detected(run):
    path = find_manifest(run)
    manifest = json.loads(path.read_text())
    entry = manifest["files"].pop("optimizer.safetensors")
    manifest["files"]["shard-00001-of-00001.safetensors"] = entry
    path.write_text(to_json(manifest))
    expected = "files: optimizer.safetensors is in the folder but not in the manifest"
    assert find_skip_reason(run) == f"cannot be read: {expected}"


def test_a_folder_at_the_path_of_a_file_is_detected(run):
    file = find_manifest(run).with_name("method.safetensors")
    file.unlink()
    file.mkdir()
    manifest = json.loads(find_manifest(run).read_text())
    manifest["files"]["method.safetensors"]["bytes"] = file.stat().st_size
    find_manifest(run).write_text(to_json(manifest))
    with pytest.raises(ValueError, match=r"method\.safetensors cannot be read: Is a directory"):
        verify_checkpoint(find_manifest(run).parent)


def test_manifests_of_format_1_are_read_with_every_other_check(run):
    path = find_manifest(run)
    manifest = json.loads(path.read_text())
    del manifest[HASH_KEY]
    path.write_text(json.dumps(manifest | {"format": 1}, indent=1))
    assert read_manifest(path.parent)["step"] == 4
    path.write_text(json.dumps(manifest | {"format": 1, "step": 6}, indent=1))
    assert find_skip_reason(run) == "cannot be read: it belongs to the checkpoint of step 6"
    path.write_text(json.dumps(manifest, indent=1))
    assert find_skip_reason(run) == "is damaged: its SHA-256 does not match"


def test_entries_of_older_manifests_are_read_under_their_current_names(run):
    path = find_manifest(run)
    manifest = json.loads(path.read_text())
    manifest["local_batch_size"] = manifest.pop("micro_batch_size")
    manifest["machine"]["local_batch_size"] = manifest["machine"].pop("micro_batch_size")
    path.write_text(to_json(manifest))
    entries = read_manifest(path.parent)
    assert entries["micro_batch_size"] == entries["machine"]["micro_batch_size"] == 8
    assert "local_batch_size" not in entries.keys() | entries["machine"].keys()
