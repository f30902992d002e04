"""Runs that go on elsewhere, with other settings, or with a part of their state missing."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import replace

import pytest
import ranks
import tiny
import torch
from conftest import run_ranks
from ranks import Ranks
from safetensors.torch import load_file, save_file
from undisturbed import MORE, STEPS, goes_on, place, undisturbed

from ssl_pretrain import config, step, train
from ssl_pretrain.build import build_method
from ssl_pretrain.checkpoint import folder as manifests
from ssl_pretrain.checkpoint import state as checkpoint
from ssl_pretrain.data import preflight
from ssl_pretrain.distributed import collectives
from ssl_pretrain.optim import optimizers as optim

pytestmark = [pytest.mark.full, pytest.mark.timeout(1800)]


def _what_each_step_takes(path, output, steps):
    """[(sample numbers of the global batch, SHA-256 of all its views)] of a run on these ranks."""
    taken, real = [], step.Stepper.__call__

    def recording(stepper, progress, batch):
        digest = hashlib.sha256()
        for view in batch.views:
            digest.update(collectives.gather(view).numpy().tobytes())
        taken.append((collectives.gather(batch.indices).tolist(), digest.hexdigest()))
        return real(stepper, progress, batch)

    step.Stepper.__call__ = recording
    try:
        train.train(
            config.load(path, [f"output={output}", "parallel.precision=float64"]),
            torch.device("cpu"),
            steps,
        )
    finally:
        step.Stepper.__call__ = real
    return taken


@pytest.mark.case(11)
def test_four_two_and_one_ranks_take_the_same_batches_and_views(tmp_path, seen):
    """In float64, so that sums in another order leave the same weights to 1e-9."""
    path, run = tiny.config(tmp_path), tmp_path / "shrinking"
    straight = _what_each_step_takes(path, tmp_path / "run", 12)
    shrinking = []
    for size in (4, 2, 4):
        of_ranks = run_ranks(_what_each_step_takes, path, run, 3, world_size=size)
        assert all(taken == of_ranks[0] for taken in of_ranks)
        shrinking += of_ranks[0]
    with pytest.warns(UserWarning, match="world_size 4 then, 1 now"):
        shrinking += _what_each_step_takes(path, run, 3)
    assert shrinking == straight and len({digest for _, digest in straight}) == 12
    largest = 0.0
    tensors = ranks.weights(run)
    for name, value in ranks.weights(tmp_path / "run").items():
        if value.is_floating_point():
            torch.testing.assert_close(tensors[name], value, rtol=1e-9, atol=1e-9)
            largest = max(largest, float((tensors[name] - value).abs().max()))
    seen(
        f"4, 2, 4, then 1 rank, 3 steps each: 12 of 12 batches and views the same bytes; weights within {largest:.0e}"
    )


@pytest.mark.case(11)
def test_a_world_size_that_does_not_divide_is_refused_by_name(place, seen):
    path, _ = place
    assert ranks.run(path, *MORE, "--stop-after", "4", size=1)[0] == [0]
    statuses, said = ranks.run(path, *MORE, size=5)
    assert statuses == [2] * 5
    assert (
        said.count(
            "error: global_batch_size: 24 does not divide over 5 ranks; the nearest that do are 20 and 25\n"
        )
        == 5
    )
    seen("5 ranks: refused on all, status 2")


@pytest.mark.case(12)
def test_another_part_size_goes_on_to_rounding(tmp_path, seen):
    path, run, wide = tiny.config(tmp_path), tmp_path / "run", "parallel.precision=float64"
    assert ranks.run(path, *MORE, wide, f"output={tmp_path / 'straight'}", size=1)[0] == [0]
    assert ranks.run(path, *MORE, wide, "--stop-after", "5", size=1)[0] == [0]
    statuses, said = ranks.run(path, *MORE, wide, "micro_batch_size=8", size=1)
    assert statuses == [0] and "micro_batch_size 24 then, 8 now" in said
    tensors, largest = ranks.weights(run), 0.0
    for name, value in ranks.weights(tmp_path / "straight").items():
        if value.is_floating_point():
            torch.testing.assert_close(tensors[name], value, rtol=1e-8, atol=1e-8)
            largest = max(largest, float((tensors[name] - value).abs().max()))
    seen(f"parts of 24, then of 8: said, weights within {largest:.0e}")


@pytest.mark.case(13)
def test_other_images_are_refused(place, goes_on, seen):
    path, run = place
    assert ranks.run(path, *MORE, "--stop-after", "4")[0] == [0] * 3
    image = sorted((path.parent / "images" / "train").rglob("*.png"))[0]
    image.rename(path.parent / "kept.png")
    statuses, said = ranks.run(path, *MORE)
    message = f"error: data.root: the training images are not those that {run} was trained on (another list of files); give that data set, "
    assert (
        statuses == [2, 2, 2]
        and said.count(f"{message}or a new output with backbone.init={run}") == 3
    ), said
    (path.parent / "kept.png").rename(image)
    goes_on()
    seen("one image of 78 missing: refused on all ranks, status 2; put back: the same bits")


@pytest.mark.case(25)
def test_another_configuration_is_refused_and_a_free_key_is_not(place, goes_on, seen):
    path, run = place
    assert ranks.run(path, *MORE, "--stop-after", "4")[0] == [0] * 3
    statuses, said = ranks.run(path, *MORE, "optim.base_lr=0.5", "method.temperature=0.5")
    message = f"error: {run}/checkpoints/step_00000004 was made by another configuration: method.temperature: 0.2 then, 0.5 now; "
    message += f"optim.base_lr: 4.0 then, 0.5 now. Give a new output, or start a new run from its weights with backbone.init={run}\n"
    assert statuses == [2, 2, 2] and said.count(message) == 3, said
    goes_on("log.every_steps=3", "checkpoint.keep_last=5")
    seen(
        "lr and temperature: refused with both differences on all ranks; logging and pruning: free, the same bits"
    )


@pytest.mark.case(28)
def test_a_second_run_in_the_same_folder_is_refused_and_a_dead_ones_is_taken_over(
    place, goes_on, seen
):
    path, run = place
    first = Ranks(path, *MORE, fault="slow@0:1")
    first.until_step(run, 1)
    statuses, said = ranks.run(path, *MORE)
    assert (
        statuses == [2, 2, 2]
        and said.count(f"error: output: {run} is in use by process {first.processes[0].pid} on ")
        == 3
    ), said
    first.send(9)
    first.end(10)
    assert (run / "lock.json").exists()
    goes_on()
    seen(
        "the second refused with process and machine on all ranks; after SIGKILL of the first, taken over: the same bits"
    )


@pytest.mark.case(31)
@pytest.mark.parametrize("stopped", [3, STEPS - 1, STEPS])
def test_resumed_at_an_edge(place, goes_on, seen, stopped):
    path, run = place
    assert ranks.run(path, *MORE, "--stop-after", str(stopped))[0] == [0] * 3
    records = (run / "metrics.jsonl").read_text()
    assert (
        f"has done its {STEPS} steps" if stopped == STEPS else f"after step {stopped}"
    ) in goes_on()
    after = (run / "metrics.jsonl").read_text()
    assert [json.loads(line)["step"] for line in after.splitlines()] == list(range(1, STEPS + 1))
    assert stopped < STEPS or after == records
    seen(
        f"after step {stopped} of {STEPS}: the same bits"
        + ("; nothing done, nothing logged" if stopped == STEPS else "")
    )


SMALL = {
    "simclr": [],
    "moco": ["method={name: moco, projector_dims: [16, 8], queue_size: 48, momentum: 0.9}"],
    "dino": [
        "method={name: dino, hidden_dim: 16, bottleneck_dim: 8, num_prototypes: 12, momentum: 0.9}"
    ],
    "swav": [
        "method={name: swav, hidden_dim: 16, dim: 8, num_prototypes: 12, queue_size: 48, queue_from_epoch: 0, freeze_prototypes_steps: 0}"
    ],
}
PARTS = {  # what is left out: a method that has it, the names of its tensors
    "nothing": ("simclr", None),
    "nothing, moco": ("moco", None),
    "nothing, dino": ("dino", None),
    "nothing, swav": ("swav", None),
    "student": ("simclr", "backbone."),
    "batch norm's statistics": ("simclr", "running_"),
    "optimizer": ("simclr", "optimizer"),
    "teacher": ("moco", "teacher."),
    "queue": ("moco", "queue."),
    "queue of assignments": ("swav", "queue."),
    "centre": ("dino", "centre"),
    "schedule position": ("simclr", "schedule"),
    "data position": ("simclr", "data"),
}
_stopped: dict[str, tuple] = {}


@pytest.fixture(scope="module")
def stopped_at_4(tmp_path_factory):
    """`stopped_at_4(method)`: (its YAML, the folder of a run stopped after 4 of 8 steps, the tensors of the undisturbed one)."""

    def of(method):
        if method not in _stopped:
            folder = tmp_path_factory.mktemp(method)
            path = tiny.config(folder)
            text = path.read_text()
            for override in SMALL[method]:
                key, _, value = override.partition("=")
                text = "\n".join(
                    f"{key}: {value}" if line.startswith(f"{key}:") else line
                    for line in text.splitlines()
                )
            path.write_text(text)
            for name, steps in (("straight", 8), ("run", 4)):
                train.train(
                    config.load(path, [f"output={folder / name}"]), torch.device("cpu"), steps
                )
            _stopped[method] = path, folder / "run", ranks.weights(folder / "straight")
        return _stopped[method]

    return of


def rewritten(folder, file, change):
    """The checkpoint with other tensors in one of its files, and a manifest that knows no other."""
    tensors = load_file(folder / file)
    save_file(change(tensors), folder / file)
    manifest = json.loads((folder / "manifest.json").read_text())
    content = (folder / file).read_bytes()
    manifest["files"][file] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (folder / "manifest.json").write_text(manifests.dumps(manifest))


@pytest.mark.case(32)
@pytest.mark.parametrize("part", PARTS)
def test_the_comparison_fails_for_each_part_that_a_checkpoint_lacks(
    part, stopped_at_4, tmp_path, monkeypatch, seen
):
    """A part that is lacking has the values with which a run begins."""
    method, lacking = PARTS[part]
    path, run, expected = stopped_at_4(method)
    shutil.copytree(run, tmp_path / "run")
    settings = config.load(path, [f"output={tmp_path / 'run'}"])
    set_rates, watched = optim.set_rates, preflight.watched
    if lacking == "optimizer":
        rewritten(checkpoint.newest(tmp_path / "run"), "optimizer.safetensors", lambda tensors: {})
    elif lacking == "schedule":
        monkeypatch.setattr(
            optim,
            "set_rates",
            lambda optimizer, now, progress, *rest: set_rates(
                optimizer, now, replace(progress, step=progress.step - 4), *rest
            ),
        )
    elif lacking == "data":
        monkeypatch.setattr(
            preflight, "watched", lambda batches, first_step, device: watched(batches, 0, device)
        )
    elif lacking is not None:
        fresh = build_method(settings).state_dict()

        def without(tensors):
            assert any(lacking in name for name in tensors)
            return {
                name: fresh[name].to(value.dtype).contiguous() if lacking in name else value
                for name, value in tensors.items()
            }

        rewritten(checkpoint.newest(tmp_path / "run"), "method.safetensors", without)
    train.train(settings, torch.device("cpu"), 4)
    resumed = ranks.weights(tmp_path / "run")
    same = all(torch.equal(resumed[name], value) for name, value in expected.items())
    assert same == (lacking is None)
    seen(f"without {part}: {'the same bits' if same else 'other bits'}")
