"""launch/evaluate.py: every checkpoint judged once, whatever the training prunes, and nothing taken that training holds."""

from __future__ import annotations

import importlib
import json
import shutil
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "eval"))
import wandb_file
from made_run import edit_manifest, make_run

from ssl_pretrain.checkpoint.folder import list_checkpoints
from ssl_pretrain.checkpoint.manifest import (
    MANIFEST,
    METHOD_FILE,
    OPTIMIZER_FILE,
    to_json,
    verify,
)
from ssl_pretrain.eval import results, runs
from ssl_pretrain.eval.html import sections
from ssl_pretrain.fault_tolerance.run_lock import RunLock
from ssl_pretrain.launch import dashboard, evaluate, held_checkpoints, local
from ssl_pretrain.launch.evaluation_jobs import EvaluationJobs

LOCAL = ["--cluster", "local"]


def here(command):
    """An evaluation's command in this process: the same work, without ten seconds of imports. Its exit status."""
    at = command.index("-m")
    try:
        importlib.import_module(command[at + 1]).main(list(command[at + 2 :]))
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A run with checkpoints of steps 5 and 10, the last one its end."""
    run = make_run(tmp_path_factory.mktemp("runs") / "made", "log.wandb=offline", step=5)
    make_run(run, "log.wandb=offline", step=10, weights_seed=2)
    for path in list_checkpoints(run):
        manifest = json.loads((path / MANIFEST).read_text())
        (path / MANIFEST).write_text(to_json(manifest | {"last_step": 10, "wandb_id": "abc12345"}))
    return run


@pytest.fixture
def run(made, tmp_path, monkeypatch):
    monkeypatch.setattr(local, "run", here)
    return shutil.copytree(made, tmp_path / "run")


def options(run, *arguments):
    return evaluate.parse([str(run), *LOCAL, "--jobs", "knn", *arguments])


def fake_result(run, path, name="knn", value=50.0):
    row = results.Row("pretrained", {"clean": value})
    step = int(path.name.removeprefix("step_"))
    return results.save(
        run, name, {}, [row], {"checkpoint": path.name, "step": step, "network": "student"}, 1.0
    )


def test_every_checkpoint_is_judged_once_and_kept_by_step(run, capsys):
    assert evaluate.main([str(run), *LOCAL, "--jobs", "knn"]) == 0
    by_step = list(results.by_step(run)["knn"].values())
    assert [result["step"] for result in by_step] == [5, 10]
    assert json.loads((run / "eval" / "knn.json").read_text())["step"] == 10
    assert (
        by_step[0]["rows"][-1]["metrics"] != by_step[1]["rows"][-1]["metrics"]
    )  # each of its own weights
    written = {path: path.stat().st_mtime_ns for path in run.rglob("eval/**/*")}
    capsys.readouterr()
    assert evaluate.main([str(run), *LOCAL, "--jobs", "knn"]) == 0
    assert (
        "---" not in capsys.readouterr().out
        and {path: path.stat().st_mtime_ns for path in run.rglob("eval/**/*")} == written
    )
    assert not (run / "eval" / ".held").exists()
    drawn = sections.evaluations_over_steps(run)
    assert (
        "k-NN, accuracy, % of each checkpoint" in drawn
        and "<title>clean 5: " in drawn
        and "<title>clean 10: " in drawn
    )
    # and into the same W&B run, at the step whose weights were judged
    assert [folder.name.rpartition("-")[2] for folder in (run / "wandb").glob("offline-run-*")] == [
        "abc12345"
    ]
    (log,) = (run / "wandb").glob("offline-run-*/*.wandb")
    sent = {
        row["step"]: row["Evaluation/knn, clean"]
        for row in wandb_file.history(log)
        if "Evaluation/knn, clean" in row
    }
    assert sent == {one["step"]: one["rows"][-1]["metrics"]["clean"] for one in by_step}
    dashboard.send(run)
    assert len(list((run / "wandb").glob("offline-run-*"))) == 1  # nothing is sent twice


def test_an_earlier_step_does_not_replace_the_newest(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    for step, value in ((10, 60.0), (5, 50.0)):
        fake_result(tmp_path, Path(f"step_{step:08d}"), value=value)
    assert json.loads((tmp_path / "eval" / "knn.json").read_text())["step"] == 10
    assert [*results.by_step(tmp_path)["knn"]] == [5, 10]


def test_a_checkpoint_stays_whole_while_it_is_judged(run):
    path = list_checkpoints(run)[0]
    with held_checkpoints.hold(path, run / "eval" / ".held") as kept:
        shutil.rmtree(path)  # as the training prunes
        assert verify(kept)["step"] == 5 and kept.name == path.name
        backbone = runs.load_run(run, kept, device="cpu").backbone
    assert backbone.feature_dim == 96 and not kept.exists()


def test_a_pruned_one_is_passed_over_with_a_line(run, capsys):
    jobs = EvaluationJobs(run, options(run))
    due = jobs.due()
    assert [(path.name, name) for path, name in due] == [
        ("step_00000005", "knn"),
        ("step_00000010", "knn"),
    ]
    shutil.rmtree(due[0][0])
    jobs.evaluate(*due[0])
    assert (
        capsys.readouterr().out
        == "skipped knn of step_00000005: pruned before its turn; checkpoint.keep_last keeps more\n"
    )
    assert not jobs.failed


def test_half_a_checkpoint_is_a_pruned_one(run, tmp_path):
    path = list_checkpoints(run)[0]
    (path / "optimizer.safetensors").unlink()  # rmtree is at work
    assert held_checkpoints.link(path, tmp_path / "kept") is None


def test_a_failure_is_told_and_not_repeated(run, capsys, monkeypatch):
    asked = []
    monkeypatch.setattr(local, "run", lambda command: asked.append(command) or 3)
    jobs = EvaluationJobs(run, options(run, "--newest"))
    assert jobs.run_due() == 1 and jobs.run_due() == 1 and len(asked) == 1
    assert "error: failed: knn of step_00000010" in capsys.readouterr().err


def test_watching_takes_new_checkpoints_and_ends_with_the_training(run, monkeypatch):
    last = list_checkpoints(run)[-1]
    aside = last.rename(run / "aside")
    judged = []

    def judge(command):
        path = Path(command[command.index("--checkpoint") + 1])
        judged.append(path.name)
        fake_result(run, path)
        return 0

    naps = []

    def wait(seconds):
        naps.append(seconds)
        if len(naps) == 2:
            aside.rename(last)
        assert len(naps) < 5, "watched on after the end"

    monkeypatch.setattr(local, "run", judge)
    monkeypatch.setattr(local, "wait", wait)
    assert (
        evaluate.main([str(run), *LOCAL, "--jobs", "knn", "--watch", "--every-seconds", "7"]) == 0
    )
    assert judged == ["step_00000005", "step_00000010"] and naps == [7.0, 7.0]


def test_watching_gives_up_when_nobody_trains(run, monkeypatch, capsys):
    shutil.rmtree(list_checkpoints(run)[-1])
    fake_result(run, list_checkpoints(run)[0])
    clock = iter(range(0, 100000, 40))
    monkeypatch.setattr(local, "wait", lambda _seconds: None)
    monkeypatch.setattr(evaluate.time, "monotonic", lambda: next(clock))
    assert (
        evaluate.main([str(run), *LOCAL, "--jobs", "knn", "--watch", "--give-up-minutes", "2"]) == 0
    )
    assert (
        capsys.readouterr().out
        == f"gave up: no process has trained in {run} for 2 minutes, and the run has not reached its end\n"
    )


def test_no_gpu_is_taken_that_training_holds(run, capsys):
    assert EvaluationJobs(run, options(run)).device() == "auto"
    with RunLock(run):
        jobs = EvaluationJobs(run, options(run))
        assert jobs.device() == jobs.device() == "cpu"
        told = capsys.readouterr().out
        assert (
            told.count("\n") == 1
            and f"trains in {run} on this machine; --share-gpu takes the GPU" in told
        )
        assert EvaluationJobs(run, options(run, "--share-gpu")).device() == "auto"
        assert evaluate.main([str(run), "--device", "cuda"]) == 2
        assert capsys.readouterr().err.endswith(
            "and holds its GPUs; add --share-gpu to share them, or --device cpu\n"
        )
    assert EvaluationJobs(run, options(run)).device() == "auto"


def test_mistakes_are_one_line(run, capsys):
    assert evaluate.main([str(run / "none")]) == 2
    assert capsys.readouterr().err == (
        f"error: {run / 'none'}: there is no such run folder; give the `output` of a run's config, or --watch to wait for it\n"
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


def test_a_damaged_checkpoint_fails_and_the_others_go_on(run, capsys):
    edit_manifest(
        run, files={name: {"bytes": 1, "sha256": ""} for name in (METHOD_FILE, OPTIMIZER_FILE)}
    )  # the newest
    assert evaluate.main([str(run), *LOCAL, "--jobs", "knn"]) == 1
    assert (
        "failed: knn of step_00000010" in capsys.readouterr().err
        and (run / "eval/step_00000005/knn.json").exists()
    )
