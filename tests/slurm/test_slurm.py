"""Runs on a real SLURM of two nodes: pre-empted, requeued, a node lost; the end is that of the run nobody disturbed."""

from __future__ import annotations

import json
import os
import re
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny
import torch

from ssl_pretrain import checkpoint

ROOT = Path(__file__).parents[2]
CLUSTER = Path(__file__).parent / "cluster.sh"
pytestmark = [pytest.mark.slurm, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """`cluster("node-down", "n2")` and the like; SLURM_CONF is set. Skips where there is no SLURM."""
    folder = tmp_path_factory.mktemp("slurm")
    started = subprocess.run([CLUSTER, "up", folder], capture_output=True, text=True, timeout=120)
    if started.returncode == 77:
        pytest.skip(started.stderr.strip())
    assert started.returncode == 0, started.stderr
    os.environ["SLURM_CONF"] = started.stdout.strip()
    yield lambda *arguments: subprocess.run([CLUSTER, arguments[0], folder, *arguments[1:]], check=True, timeout=60)
    subprocess.run([CLUSTER, "down", folder], check=True, timeout=60)
    del os.environ["SLURM_CONF"]


def submitted(path, *overrides):
    """The job ids that launch/pretrain.py says."""
    command = [sys.executable, "launch/pretrain.py", str(path), "launch.cluster=slurm", "launch.nodes=2", "launch.ranks=2", *overrides]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    return re.findall(r"(?:ranks|pretraining|knn:|,) (\d+)", result.stdout.partition("follow it")[0])


def show(job):
    text = subprocess.run(["scontrol", "show", "job", "-o", job], capture_output=True, text=True, check=True).stdout
    return dict(entry.split("=", 1) for entry in text.split() if "=" in entry)


def until(what, condition, job, seconds=240):
    """Waits; a requeued job starts at once instead of after SLURM's two minutes."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"{what}: not within {seconds} s"
        if show(job).get("Reason") == "BeginTime":
            subprocess.run(["scontrol", "update", f"JobId={job}", "StartTime=now"], capture_output=True)
        time.sleep(0.5)


def steps_logged(run):
    file = run / "metrics.jsonl"
    return [json.loads(line)["step"] for line in file.read_text().splitlines() if line.endswith("}")] if file.exists() else [0]


def undisturbed(path, output, *overrides):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4", "-m", "ssl_pretrain.train"]
    result = subprocess.run([*command, str(path), f"output={output}", *overrides], cwd=ROOT, capture_output=True, text=True, timeout=400)
    assert result.returncode == 0, result.stderr[-3000:]
    return checkpoint.read(checkpoint.newest(output))


def logs_of(run):
    return "\n".join(f"== {file.name}\n{file.read_text()[-1500:]}" for file in sorted((run / "slurm").glob("*_log.*")))


def test_preempted_once_and_evaluated(cluster, tmp_path):
    """The smoke: one signal, one requeue by the job itself, the same bits, then k-NN as a job of its own."""
    path, run = tiny.config(tmp_path), tmp_path / "run"
    jobs = submitted(path, "epochs=30", "evaluation.at_end=[knn]")
    assert len(jobs) == 2
    until("training", lambda: steps_logged(run)[-1] >= 10, jobs[0])
    subprocess.run(["scancel", "--signal=USR2", jobs[0]], check=True)
    until("the end", lambda: show(jobs[1])["JobState"] in ("COMPLETED", "FAILED"), jobs[0])
    assert (show(jobs[0])["JobState"], show(jobs[0])["Restarts"]) == ("COMPLETED", "1"), logs_of(run)
    assert show(jobs[1])["JobState"] == "COMPLETED" and (run / "eval" / "knn.json").exists(), logs_of(run)
    assert stat.S_IMODE((run / "slurm").stat().st_mode) == 0o700
    manifest, tensors = checkpoint.read(checkpoint.newest(run))
    _, expected = undisturbed(path, tmp_path / "straight", "epochs=30")
    assert manifest["step"] == 90 and all(torch.equal(tensors[name], value) for name, value in expected.items())
    steps = steps_logged(run)
    assert steps == list(range(1, 91))


@pytest.mark.full
def test_preempted_twice_and_a_node_lost(cluster, tmp_path):
    path, run = tiny.config(tmp_path), tmp_path / "run"
    more = ["epochs=80", "checkpoint.every_epochs=2", "log.wandb=offline"]
    (job,) = submitted(path, "evaluation.at_end=[]", *more)
    until("training", lambda: steps_logged(run)[-1] >= 10, job)
    subprocess.run(["scancel", "--signal=USR2", job], check=True)
    until("the first requeue", lambda: show(job)["Restarts"] == "1", job)
    until("more steps", lambda: show(job)["JobState"] == "RUNNING" and steps_logged(run)[-1] >= 60, job)
    subprocess.run(["scontrol", "requeue", job], check=True)
    until("the second requeue", lambda: show(job)["Restarts"] == "2" and show(job)["JobState"] == "RUNNING", job)
    until("more steps", lambda: steps_logged(run)[-1] >= 110, job)
    cluster("node-down", "n2")
    until("the third requeue", lambda: show(job)["Restarts"] == "3", job, 120)
    cluster("node-up", "n2")
    until("the end", lambda: show(job)["JobState"] in ("COMPLETED", "FAILED"), job)
    assert show(job)["JobState"] == "COMPLETED", logs_of(run)
    manifest, tensors = checkpoint.read(checkpoint.newest(run))
    _, expected = undisturbed(path, tmp_path / "straight", *more)
    assert manifest["step"] == 240 and all(torch.equal(tensors[name], value) for name, value in expected.items())
    assert steps_logged(run) == list(range(1, 241))
    offline = {folder.name.rpartition("-")[2] for folder in (run / "wandb").glob("offline-run-*")}
    assert offline == {manifest["wandb_id"]}


def test_a_checkpoint_is_judged_by_a_job_of_its_own(cluster, tmp_path):
    """launch/evaluate.py submits, does not submit again what waits or is done, and follows a job of the training."""
    path, run = tiny.config(tmp_path), tmp_path / "run"
    command = [sys.executable, "-m", "ssl_pretrain.train", str(path), "epochs=2"]
    assert subprocess.run(command, cwd=ROOT, capture_output=True, timeout=300).returncode == 0
    evaluate = [sys.executable, "launch/evaluate.py", str(run), "--cluster", "slurm", "--jobs", "knn"]
    said = subprocess.run(evaluate, cwd=ROOT, capture_output=True, text=True, timeout=120).stdout
    job = re.search(r"submitted to SLURM: knn of step_00000006: (\d+)", said)[1]
    again = subprocess.run(evaluate, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert again.returncode == 0 and "submitted" not in again.stdout, again.stdout + again.stderr
    until("the evaluation", lambda: show(job)["JobState"] in ("COMPLETED", "FAILED"), job)
    assert (run / "eval" / "step_00000006" / "knn.json").exists(), logs_of(run)
    after = subprocess.run([*evaluate[:-1], "spectrum", "--after", job], cwd=ROOT, capture_output=True, text=True, timeout=120).stdout
    following = re.search(rf"submitted to SLURM, after {job}: (\d+)", after)[1]
    until("the one that follows", lambda: show(following)["JobState"] in ("COMPLETED", "FAILED"), following)
    assert (run / "eval" / "spectrum.json").exists(), logs_of(run)
