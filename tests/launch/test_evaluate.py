"""launch/evaluate.py evaluates each checkpoint once while a training run prunes checkpoints."""

import importlib
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "eval"))
import wandb_file
from untrained_run import edit_manifest, make_run

from ssl_pretrain.checkpoint.folder import list_checkpoints
from ssl_pretrain.checkpoint.manifest import (
    MANIFEST_FILE,
    METHOD_FILE,
    OPTIMIZER_FILE,
    to_json,
    verify_checkpoint,
)
from ssl_pretrain.eval import results, runs
from ssl_pretrain.eval.html import sections
from ssl_pretrain.fault_tolerance.lock_holder import LockHolder, process_start_time
from ssl_pretrain.fault_tolerance.run_lock import RunLock
from ssl_pretrain.launch import dashboard, evaluate, held_checkpoints, local
from ssl_pretrain.launch.evaluation_jobs import EvaluationJobs

LOCAL = ["--cluster", "local"]


def run_in_this_process(command):
    """Run an evaluation's command in this process to save the imports. Return its status."""
    index = command.index("-m") + 1
    try:
        importlib.import_module(command[index]).main(list(command[index + 1 :]))
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory):
    """Return a run with checkpoints at step 5 and at step 10, its last step."""
    run = make_run(tmp_path_factory.mktemp("runs") / "made", "log.wandb=offline", step=5)
    make_run(run, "log.wandb=offline", step=10, weights_seed=2)
    for path in list_checkpoints(run):
        manifest = json.loads((path / MANIFEST_FILE).read_text())
        (path / MANIFEST_FILE).write_text(
            to_json(manifest | {"last_step": 10, "wandb_id": "abc12345"})
        )
    return run


@pytest.fixture
def run(finished_run, tmp_path, monkeypatch):
    monkeypatch.setattr(local, "run", run_in_this_process)
    return shutil.copytree(finished_run, tmp_path / "run")


def build_jobs(run, *arguments):
    options = evaluate.parse_options([str(run), *LOCAL, "--jobs", "knn", *arguments])
    return EvaluationJobs(run, options)


def evaluate_knn(run, *arguments):
    return evaluate.main([str(run), *LOCAL, "--jobs", "knn", *arguments])


def save_result(run, path, accuracy=50.0):
    row = results.Row("pretrained", {"clean": accuracy})
    step = int(path.name.removeprefix("step_"))
    checkpoint = {"checkpoint": path.name, "step": step, "network": "student"}
    return results.save(run, "knn", {}, [row], checkpoint, 1.0)


def read_modification_times(run):
    return {path: path.stat().st_mtime_ns for path in run.rglob("eval/**/*")}


def test_every_checkpoint_is_evaluated_once_and_saved_by_step(run, capsys):
    assert evaluate_knn(run) == 0
    first, last = results.load_by_step(run)["knn"].values()
    assert (first["step"], last["step"]) == (5, 10)
    assert json.loads((run / "eval" / "knn.json").read_text())["step"] == 10
    assert first["rows"][-1]["metrics"] != last["rows"][-1]["metrics"]
    times = read_modification_times(run)
    capsys.readouterr()
    assert evaluate_knn(run) == 0
    assert "---" not in capsys.readouterr().out
    assert read_modification_times(run) == times
    assert not (run / "eval" / ".held").exists()


@pytest.mark.full
def test_the_report_and_wandb_show_each_evaluation_at_its_step(run):
    assert evaluate_knn(run) == 0
    by_step = results.load_by_step(run)["knn"]
    figure = sections.draw_evaluation_figures(run)[0]
    assert (figure.caption, figure.note) == ("k-NN of each checkpoint", "Accuracy, %")
    curve = re.search(r'<g id="curve-0"><path [^>]* d="([^"]*)"', figure.image)[1]
    assert len(re.findall("[ML]", curve)) == len(by_step) == 2
    folders = list((run / "wandb").glob("offline-run-*"))
    assert [folder.name.rpartition("-")[2] for folder in folders] == ["abc12345"]
    (log,) = folders[0].glob("*.wandb")
    name = "Evaluation/knn/clean"
    accuracies = {row["step"]: row[name] for row in wandb_file.history(log) if name in row}
    assert accuracies == {
        step: result["rows"][-1]["metrics"]["clean"] for step, result in by_step.items()
    }
    dashboard.send_evaluations_unless_training(run)
    assert len(list((run / "wandb").glob("offline-run-*"))) == 1  # nothing is sent twice


def test_an_earlier_step_does_not_replace_the_newest(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    for step, accuracy in ((10, 60.0), (5, 50.0)):
        save_result(tmp_path, Path(f"step_{step:08d}"), accuracy)
    assert json.loads((tmp_path / "eval" / "knn.json").read_text())["step"] == 10
    assert [*results.load_by_step(tmp_path)["knn"]] == [5, 10]


def test_a_checkpoint_stays_whole_while_it_is_evaluated(run):
    path = list_checkpoints(run)[0]
    with held_checkpoints.hold(path, run / "eval" / ".held") as checkpoint:
        shutil.rmtree(path)  # the training prunes it
        assert verify_checkpoint(checkpoint)["step"] == 5
        assert checkpoint.name == path.name
        backbone = runs.load_run(run, checkpoint, device="cpu").backbone
    assert backbone.feature_dim == 96
    assert not checkpoint.exists()


def test_a_pruned_checkpoint_is_skipped_with_a_message(run, capsys):
    jobs = build_jobs(run)
    due_evaluations = jobs.due_evaluations()
    assert [(path.name, name) for path, name in due_evaluations] == [
        ("step_00000005", "knn"),
        ("step_00000010", "knn"),
    ]
    shutil.rmtree(due_evaluations[0][0])
    jobs.evaluate(*due_evaluations[0])
    assert capsys.readouterr().out == (
        "skipped knn of step_00000005: the training run pruned this checkpoint before its turn; "
        "to keep more, raise checkpoint.keep_last\n"
    )
    assert not jobs.failures


def test_an_incomplete_checkpoint_counts_as_pruned(run, tmp_path):
    path = list_checkpoints(run)[0]
    (path / "optimizer.safetensors").unlink()  # as if rmtree were still running
    assert held_checkpoints.link_checkpoint(path, tmp_path / "link") is None


def test_the_links_of_a_killed_evaluation_are_removed(tmp_path):
    folder = tmp_path / ".held"
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    owner = replace(LockHolder.this_process(), pid=child.pid, born=process_start_time(child.pid))
    abandoned = folder / "abandoned"
    abandoned.mkdir(parents=True)
    (abandoned / held_checkpoints.OWNER_FILE).write_text(owner.to_json())
    held_checkpoints.remove_abandoned_folders(folder)
    assert abandoned.exists()
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # it stays a zombie
    held_checkpoints.remove_abandoned_folders(folder)
    assert not folder.exists()
    child.wait()


def test_a_failure_is_reported_and_not_repeated(run, capsys, monkeypatch):
    commands = []
    monkeypatch.setattr(local, "run", lambda command: commands.append(command) or 3)
    jobs = build_jobs(run, "--newest")
    assert jobs.run_due_evaluations() == jobs.run_due_evaluations() == 1
    assert len(commands) == 1
    assert "error: failed: knn of step_00000010" in capsys.readouterr().err


@pytest.mark.full
def test_watching_evaluates_new_checkpoints_and_ends_with_the_training(run, monkeypatch):
    last = list_checkpoints(run)[-1]
    future = last.rename(run / "future")
    evaluated_names, pauses = [], []

    def run_evaluation(command):
        path = Path(command[command.index("--checkpoint") + 1])
        evaluated_names.append(path.name)
        save_result(run, path)
        return 0

    def wait(seconds):
        pauses.append(seconds)
        if len(pauses) == 2:
            future.rename(last)
        assert len(pauses) < 5, "still watching after the last step"

    monkeypatch.setattr(local, "run", run_evaluation)
    monkeypatch.setattr(local, "wait", wait)
    assert evaluate_knn(run, "--watch", "--every-seconds", "7") == 0
    assert evaluated_names == ["step_00000005", "step_00000010"]
    assert pauses == [7.0, 7.0]


def test_watching_gives_up_when_no_process_trains(run, monkeypatch, capsys):
    shutil.rmtree(list_checkpoints(run)[-1])
    save_result(run, list_checkpoints(run)[0])
    clock = iter(range(0, 100000, 40))
    monkeypatch.setattr(local, "wait", lambda _seconds: None)
    monkeypatch.setattr(evaluate.time, "monotonic", lambda: next(clock))
    assert evaluate_knn(run, "--watch", "--give-up-minutes", "2") == 0
    assert capsys.readouterr().out == (
        f"gave up: no process has trained in {run} for 2 minutes, "
        "and the run is not finished; resume the run, then watch it again\n"
    )


def test_the_gpu_of_a_training_run_is_not_used(run, capsys):
    assert build_jobs(run).choose_device() == "auto"
    with RunLock(run):
        jobs = build_jobs(run)
        assert jobs.choose_device() == jobs.choose_device() == "cpu"
        notice = capsys.readouterr().out
        assert notice.count("\n") == 1
        assert f"is training in {run} on this machine; add --share-gpu to use the GPU" in notice
        assert build_jobs(run, "--share-gpu").choose_device() == "auto"
        assert evaluate.main([str(run), "--device", "cuda"]) == 2
        assert capsys.readouterr().err.endswith(
            "and uses its GPUs; add --share-gpu to share them, or --device cpu\n"
        )
    assert build_jobs(run).choose_device() == "auto"


def test_mistakes_are_reported_in_one_line(run, capsys):
    assert evaluate.main([str(run / "none")]) == 2
    assert capsys.readouterr().err == (
        f"error: {run / 'none'}: there is no such run folder; give the `output` of a run's config, "
        "or add --watch to wait for it\n"
    )
    assert evaluate.main([str(run), "--jobs", "knnn"]) == 2
    assert capsys.readouterr().err.startswith(
        "error: --jobs: 'knnn' is not an evaluation; choose among: knn, linear, "
    )
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(text.replace("- knn\n", "- nearest\n"))
    assert evaluate.main([str(run), *LOCAL]) == 2
    assert capsys.readouterr().err.startswith(
        "error: evaluation.at_end: 'nearest' is not an evaluation; choose among: knn, linear, "
    )


def test_a_damaged_checkpoint_fails_and_the_others_are_evaluated(run, capsys):
    wrong_entry = {"bytes": 1, "sha256": ""}
    # The newest checkpoint is damaged.
    edit_manifest(run, files={METHOD_FILE: wrong_entry, OPTIMIZER_FILE: wrong_entry})
    assert evaluate_knn(run) == 1
    assert "failed: knn of step_00000010" in capsys.readouterr().err
    assert (run / "eval/step_00000005/knn.json").exists()
