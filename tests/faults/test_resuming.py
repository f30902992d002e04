"""Runs that resume on other numbers of ranks, with other settings, or without some state."""

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
from reference_run import OVERRIDES, STEPS, paths, reference, resume
from safetensors.torch import load_file, save_file

from ssl_pretrain import config, step, train
from ssl_pretrain.build import build_method
from ssl_pretrain.checkpoint.folder import newest_checkpoint
from ssl_pretrain.checkpoint.manifest import describe_files, to_json
from ssl_pretrain.data import throughput_check
from ssl_pretrain.distributed import collectives
from ssl_pretrain.optim import optimizers as optim

pytestmark = [pytest.mark.full, pytest.mark.timeout(1800)]
CPU = torch.device("cpu")
FLOAT64 = "parallel.precision=float64"


def train_and_record_batches(path, output, steps):
    """Train on these ranks. Return each step's image indices and the hash of all its views."""
    batches, take_step = [], step.Stepper.__call__

    def record(stepper, progress, batch):
        digest = hashlib.sha256()
        for view in batch.views:
            digest.update(collectives.gather(view).numpy().tobytes())
        batches.append((collectives.gather(batch.indices).tolist(), digest.hexdigest()))
        return take_step(stepper, progress, batch)

    step.Stepper.__call__ = record
    try:
        train.train(config.load(path, [f"output={output}", FLOAT64]), CPU, steps)
    finally:
        step.Stepper.__call__ = take_step
    return batches


def compare_tensors(run, expected_run, tolerance):
    """Compare the floating-point tensors of two runs and return their largest difference."""
    largest, tensors = 0.0, ranks.load_tensors(run)
    for name, value in ranks.load_tensors(expected_run).items():
        if value.is_floating_point():
            torch.testing.assert_close(tensors[name], value, rtol=tolerance, atol=tolerance)
            largest = max(largest, float((tensors[name] - value).abs().max()))
    return largest


@pytest.mark.case(11)
def test_four_two_and_one_ranks_see_the_same_batches_and_views(tmp_path, observe):
    """In float64, another order of sums changes the weights by at most 1e-9."""
    path, run = tiny.write_config(tmp_path), tmp_path / "resumed"
    uninterrupted_batches = train_and_record_batches(path, tmp_path / "run", 12)
    resumed_batches = []
    for size in (4, 2, 4):
        batches_by_rank = run_ranks(train_and_record_batches, path, run, 3, world_size=size)
        assert all(batches == batches_by_rank[0] for batches in batches_by_rank)
        resumed_batches += batches_by_rank[0]
    with pytest.warns(UserWarning, match="world_size was 4 and is now 1"):
        resumed_batches += train_and_record_batches(path, run, 3)
    assert resumed_batches == uninterrupted_batches
    assert len({digest for _, digest in uninterrupted_batches}) == 12
    largest = compare_tensors(run, tmp_path / "run", 1e-9)
    observe(
        "4, 2, 4, then 1 rank, 3 steps each: 12 of 12 batches and views the same bytes; weights "
        f"within {largest:.0e}"
    )


@pytest.mark.case(11)
def test_a_world_size_that_does_not_divide_the_batch_is_refused(paths, observe):
    path, _ = paths
    assert ranks.run(path, *OVERRIDES, "--stop-after", "4", size=1)[0] == [0]
    statuses, output = ranks.run(path, *OVERRIDES, size=5)
    assert statuses == [2] * 5
    message = "error: global_batch_size: 24 does not divide evenly over 5 ranks; give 20 or 25\n"
    assert output.count(message) == 5
    observe("5 ranks: refused on all, status 2")


@pytest.mark.case(12)
def test_a_run_resumed_with_another_micro_batch_size_agrees_to_rounding(tmp_path, observe):
    path, run, uninterrupted = (
        tiny.write_config(tmp_path),
        tmp_path / "run",
        tmp_path / "uninterrupted",
    )
    assert ranks.run(path, *OVERRIDES, FLOAT64, f"output={uninterrupted}", size=1)[0] == [0]
    assert ranks.run(path, *OVERRIDES, FLOAT64, "--stop-after", "5", size=1)[0] == [0]
    statuses, output = ranks.run(path, *OVERRIDES, FLOAT64, "micro_batch_size=8", size=1)
    assert statuses == [0] and "micro_batch_size was 24 and is now 8" in output
    largest = compare_tensors(run, uninterrupted, 1e-8)
    observe(f"micro-batches of 24, then of 8: reported, weights within {largest:.0e}")


@pytest.mark.case(13)
def test_other_images_are_refused(paths, resume, observe):
    path, run = paths
    assert ranks.run(path, *OVERRIDES, "--stop-after", "4")[0] == [0] * 3
    image = min((path.parent / "images" / "train").rglob("*.png"))
    image.rename(path.parent / "moved.png")
    statuses, output = ranks.run(path, *OVERRIDES)
    message = (
        f"error: data.root: the training images are not those that {run} was trained on (the "
        f"lists of files differ); give that data set, or a new output with backbone.init={run}"
    )
    assert statuses == [2, 2, 2] and output.count(message) == 3, output
    (path.parent / "moved.png").rename(image)
    resume()
    observe("one image of 78 missing: refused on all ranks, status 2; put back: the same bits")


@pytest.mark.case(25)
def test_other_settings_are_refused_except_for_free_keys(paths, resume, observe):
    path, run = paths
    assert ranks.run(path, *OVERRIDES, "--stop-after", "4")[0] == [0] * 3
    statuses, output = ranks.run(path, *OVERRIDES, "optim.base_lr=0.5", "method.temperature=0.5")
    message = (
        f"error: {run}/checkpoints/step_00000004 was saved with a different configuration: "
        "method.temperature was 0.2 and is now 0.5; optim.base_lr was 4.0 and is now 0.5. Choose a "
        f"new output, or start a new run from its weights with backbone.init={run}\n"
    )
    assert statuses == [2, 2, 2] and output.count(message) == 3, output
    resume("log.every_steps=3", "checkpoint.keep_last=5")
    observe(
        "lr and temperature: refused with both differences on all ranks; logging and pruning: "
        "free, the same bits"
    )


@pytest.mark.case(28)
def test_a_second_run_in_the_folder_is_refused_and_a_dead_one_is_replaced(paths, resume, observe):
    path, run = paths
    first = Ranks(path, *OVERRIDES, fault="slow@0:1")
    first.wait_for_step(run, 1)
    statuses, output = ranks.run(path, *OVERRIDES)
    message = f"error: output: {run} is in use by process {first.processes[0].pid} on "
    assert statuses == [2, 2, 2] and output.count(message) == 3, output
    first.send(9)
    first.wait(10)
    assert (run / "lock.json").exists()
    resume()
    observe(
        "the second refused with process and machine on all ranks; after SIGKILL of the first, "
        "taken over: the same bits"
    )


@pytest.mark.case(31)
@pytest.mark.parametrize("stop_step", [3, STEPS - 1, STEPS])
def test_a_run_resumes_at_the_edges_of_an_epoch_and_of_the_run(paths, resume, observe, stop_step):
    path, run = paths
    assert ranks.run(path, *OVERRIDES, "--stop-after", str(stop_step))[0] == [0] * 3
    before = (run / "metrics.jsonl").read_text()
    finished = stop_step == STEPS
    output = resume()
    assert (f"has done its {STEPS} steps" if finished else f"after step {stop_step}") in output
    after = (run / "metrics.jsonl").read_text()
    assert [json.loads(line)["step"] for line in after.splitlines()] == list(range(1, STEPS + 1))
    assert not finished or after == before
    result = "the same bits" + ("; nothing done, nothing logged" if finished else "")
    observe(f"after step {stop_step} of {STEPS}: {result}")


METHOD_YAML = {
    "simclr": "{name: simclr, temperature: 0.2, projector_dims: [16, 8]}",
    "moco": "{name: moco, projector_dims: [16, 8], queue_size: 48, momentum: 0.9}",
    "dino": "{name: dino, hidden_dim: 16, bottleneck_dim: 8, num_prototypes: 12, momentum: 0.9}",
    "swav": "{name: swav, hidden_dim: 16, dim: 8, num_prototypes: 12, queue_size: 48, "
    "queue_from_epoch: 0, freeze_prototypes_steps: 0}",
}
# The omitted state, a method that has it, and a part of the names of its tensors.
OMISSIONS = {
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
    "center": ("dino", "cent"),
    "schedule position": ("simclr", "schedule"),
    "data position": ("simclr", "data"),
}
_stopped_runs: dict[str, tuple] = {}


@pytest.fixture(scope="module")
def run_4_of_8_steps(tmp_path_factory):
    """Return a function that runs 4 of 8 steps of a method, once per method.

    It takes the method's name, and returns the path of the YAML, the folder of the stopped run, and
    the tensors of a run of 8 steps.
    """

    def run_method(method):
        if method not in _stopped_runs:
            folder = tmp_path_factory.mktemp(method)
            path = tiny.write_config(folder)
            text = path.read_text().replace(METHOD_YAML["simclr"], METHOD_YAML[method])
            assert f"name: {method}" in text
            path.write_text(text)
            for name, steps in (("uninterrupted", 8), ("run", 4)):
                train.train(config.load(path, [f"output={folder / name}"]), CPU, steps)
            _stopped_runs[method] = (
                path,
                folder / "run",
                ranks.load_tensors(folder / "uninterrupted"),
            )
        return _stopped_runs[method]

    return run_method


def rewrite_tensors(folder, file, change):
    """Change the tensors in a file of a checkpoint, with a manifest that matches."""
    tensors = load_file(folder / file)
    save_file(change(tensors), folder / file)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"] |= describe_files([folder / file])
    (folder / "manifest.json").write_text(to_json(manifest))


@pytest.mark.case(32)
@pytest.mark.parametrize("state", OMISSIONS)
def test_the_comparison_fails_for_any_state_that_a_checkpoint_lacks(
    state, run_4_of_8_steps, tmp_path, monkeypatch, observe
):
    """The omitted state has the values of a new run."""
    method, omitted = OMISSIONS[state]
    path, stopped_run, expected = run_4_of_8_steps(method)
    run = tmp_path / "run"
    shutil.copytree(stopped_run, run)
    settings = config.load(path, [f"output={run}"])
    set_rates, report_bottleneck = optim.set_rates, throughput_check.report_bottleneck
    if omitted == "optimizer":
        rewrite_tensors(newest_checkpoint(run), "optimizer.safetensors", lambda tensors: {})
    elif omitted == "schedule":

        def set_earlier_rates(optimizer, config, progress, *rest):
            return set_rates(optimizer, config, replace(progress, step=progress.step - 4), *rest)

        monkeypatch.setattr(optim, "set_rates", set_earlier_rates)
    elif omitted == "data":

        def report_from_step_0(loader, first_step, device):
            return report_bottleneck(loader, 0, device)

        monkeypatch.setattr(throughput_check, "report_bottleneck", report_from_step_0)
    elif omitted is not None:
        fresh = build_method(settings).state_dict()

        def reset(tensors):
            assert any(omitted in name for name in tensors)
            return {
                name: fresh[name].to(value.dtype).contiguous() if omitted in name else value
                for name, value in tensors.items()
            }

        rewrite_tensors(newest_checkpoint(run), "method.safetensors", reset)
    train.train(settings, CPU, 4)
    resumed = ranks.load_tensors(run)
    same = all(torch.equal(resumed[name], value) for name, value in expected.items())
    assert same == (omitted is None)
    observe(f"without {state}: {'the same bits' if same else 'other bits'}")
