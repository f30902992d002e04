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
import wandb_file

from ssl_pretrain.checkpoint.folder import newest_checkpoint
from ssl_pretrain.checkpoint.manifest import verify
from ssl_pretrain.checkpoint.tensor_files import read_checkpoint
from ssl_pretrain.monitoring import metric_names

ROOT = Path(__file__).parents[2]
CLUSTER = Path(__file__).parent / "cluster.sh"
SECRET = "f00d" * 10  # as long as a W&B key
FEW = [
    "parallel.bn_group_images=6"
]  # waits in a step, on a machine whose cores are fewer than the ranks
pytestmark = [pytest.mark.slurm, pytest.mark.timeout(3600)]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """`cluster("node-down", "n2")` and the like; SLURM_CONF is set. Skips where there is no SLURM."""
    folder = tmp_path_factory.mktemp("slurm")
    started = subprocess.run([CLUSTER, "up", folder], capture_output=True, text=True, timeout=900)
    if started.returncode == 77:
        pytest.skip(started.stderr.strip())
    assert started.returncode == 0, started.stderr
    os.environ["SLURM_CONF"] = started.stdout.strip()
    yield lambda *arguments: subprocess.run(
        [CLUSTER, arguments[0], folder, *arguments[1:]], check=True, timeout=120
    )
    subprocess.run([CLUSTER, "down", folder], check=True, timeout=120)
    del os.environ["SLURM_CONF"]


def submitted(path, *overrides, script="pretrain"):
    """The job ids that launch/pretrain.py says."""
    command = [
        sys.executable,
        f"launch/{script}.py",
        str(path),
        "launch.cluster=slurm",
        "launch.nodes=2",
        "launch.ranks=2",
        *overrides,
    ]
    environment = {**os.environ, "WANDB_API_KEY": SECRET}
    result = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900
    )
    assert result.returncode == 0, result.stderr
    assert SECRET not in result.stdout + result.stderr
    return re.findall(
        r"(?:ranks|pretraining|knn:|SLURM:|,) (\d+(?:_\d+)?)",
        result.stdout.partition("follow it")[0],
    )


def show(job):
    text = subprocess.run(
        ["scontrol", "show", "job", "-o", job], capture_output=True, text=True, check=True
    ).stdout
    return dict(entry.split("=", 1) for entry in text.split() if "=" in entry)


def until(what, condition, job, seconds=1200):
    """Waits; a requeued job starts at once instead of after SLURM's two minutes."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"{what}: not within {seconds} s"
        if show(job).get("Reason") == "BeginTime":
            subprocess.run(
                ["scontrol", "update", f"JobId={job}", "StartTime=now"], capture_output=True
            )
        time.sleep(0.5)


def steps_logged(run):
    file = run / "metrics.jsonl"
    return (
        [json.loads(line)["step"] for line in file.read_text().splitlines() if line.endswith("}")]
        if file.exists()
        else [0]
    )


def undisturbed(path, output, *overrides):
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "4",
        "-m",
        "ssl_pretrain.train",
    ]
    result = subprocess.run(
        [*command, str(path), f"output={output}", *overrides],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return read_checkpoint(newest_checkpoint(output))


def wandb_steps(run):
    """The steps of the offline W&B run's records, segment after segment as they would be synchronized."""
    files = sorted((run / "wandb").glob("offline-run-*/*.wandb"))
    return [
        row["_step"]
        for file in files
        for row in wandb_file.history(file)
        if metric_names.display_name("loss") in row
    ]


def logs_of(run):
    return "\n".join(
        f"== {file.name}\n{file.read_text()[-1500:]}"
        for file in sorted((run / "slurm").glob("*_log.*"))
    )


@pytest.mark.case(4)
def test_preempted_once_and_evaluated(cluster, tmp_path, observe):
    """The smoke: one signal, one requeue by the job itself, the same bits, then k-NN as a job of its own."""
    path, run = tiny.config(tmp_path), tmp_path / "run"
    jobs = submitted(path, *FEW, "epochs=30", "evaluation.at_end=[knn]")
    assert len(jobs) == 2
    until("training", lambda: steps_logged(run)[-1] >= 10, jobs[0])
    subprocess.run(["scancel", "--signal=USR2", jobs[0]], check=True)
    until("the end", lambda: show(jobs[1])["JobState"] in ("COMPLETED", "FAILED"), jobs[0])
    assert (show(jobs[0])["JobState"], show(jobs[0])["Restarts"]) == ("COMPLETED", "1"), logs_of(
        run
    )
    assert show(jobs[1])["JobState"] == "COMPLETED" and (run / "eval" / "knn.json").exists(), (
        logs_of(run)
    )
    assert stat.S_IMODE((run / "slurm").stat().st_mode) == 0o700
    manifest, tensors = read_checkpoint(newest_checkpoint(run))
    _, expected = undisturbed(path, tmp_path / "straight", *FEW, "epochs=30")
    assert manifest["step"] == 90 and all(
        torch.equal(tensors[name], value) for name, value in expected.items()
    )
    assert steps_logged(run) == list(range(1, 91))
    files = [file for file in run.rglob("*") if file.is_file()]
    assert len(files) > 10 and not [file for file in files if SECRET.encode() in file.read_bytes()]
    asked = subprocess.run(
        ["scontrol", "show", "job", "-d", jobs[0]], capture_output=True, text=True, check=True
    ).stdout
    assert SECRET not in asked
    observe(
        f"SLURM, 4 ranks on 2 nodes: pre-empted once, the same job again, the same bits; the W&B key in none of {len(files)} files"
    )


@pytest.mark.full
@pytest.mark.case(1)
@pytest.mark.case(4)
def test_preempted_twice_and_a_node_lost(cluster, tmp_path, observe):
    path, run = tiny.config(tmp_path), tmp_path / "run"
    more = [*FEW, "epochs=40", "checkpoint.every_epochs=2", "log.wandb=offline"]
    (job,) = submitted(path, "evaluation.at_end=[]", *more)
    until("training", lambda: steps_logged(run)[-1] >= 10, job)
    subprocess.run(["scancel", "--signal=USR2", job], check=True)
    until("the first requeue", lambda: show(job)["Restarts"] == "1", job)
    until(
        "more steps",
        lambda: show(job)["JobState"] == "RUNNING" and steps_logged(run)[-1] >= 40,
        job,
    )
    subprocess.run(["scontrol", "requeue", job], check=True)
    until(
        "the second requeue",
        lambda: show(job)["Restarts"] == "2" and show(job)["JobState"] == "RUNNING",
        job,
    )
    until("more steps", lambda: steps_logged(run)[-1] >= 70, job)
    cluster("node-down", "n2")
    until("the third requeue", lambda: show(job)["Restarts"] == "3", job)
    cluster("node-up", "n2")
    until("the end", lambda: show(job)["JobState"] in ("COMPLETED", "FAILED"), job)
    assert show(job)["JobState"] == "COMPLETED", logs_of(run)
    manifest, tensors = read_checkpoint(newest_checkpoint(run))
    _, expected = undisturbed(path, tmp_path / "straight", *more)
    assert manifest["step"] == 120 and all(
        torch.equal(tensors[name], value) for name, value in expected.items()
    )
    assert steps_logged(run) == list(range(1, 121))
    offline = {folder.name.rpartition("-")[2] for folder in (run / "wandb").glob("offline-run-*")}
    assert offline == {manifest["wandb_id"]}
    sent = wandb_steps(run)
    assert sent == sorted(set(sent)) and sent[-1] == 120 and len(sent) > 90, sent
    observe(
        f"SLURM, 4 ranks on 2 nodes: SIGUSR2, `scontrol requeue`, then a node killed: job {job} {show(job)['Restarts']} times again, the same "
        f"bits, one W&B run whose {len(sent)} steps neither repeat nor go back"
    )


@pytest.mark.full
@pytest.mark.case(4)
def test_a_time_limit_ends_nothing(cluster, tmp_path, observe):
    """SLURM itself sends the signal, up to a minute earlier than asked."""
    path, run = tiny.config(tmp_path), tmp_path / "run"
    more = ["epochs=100000", "launch.hours=0.05", "launch.signal_seconds=90", "log.every_steps=20"]
    (job,) = submitted(path, *FEW, *more, "evaluation.at_end=[]")
    until("the limit", lambda: show(job)["Restarts"] == "1", job)
    saved = verify(newest_checkpoint(run))["step"]
    until(
        "training again",
        lambda: show(job)["JobState"] == "RUNNING" and steps_logged(run)[-1] > saved + 20,
        job,
    )
    subprocess.run(["scancel", job], check=True)
    until("the end", lambda: show(job)["JobState"] == "CANCELLED", job)
    assert f"resumed {run} after step {saved}" in logs_of(run)
    observe(f"SLURM, time limit of 3 minutes: saved at step {saved}, the same job again from there")


@pytest.mark.full
def test_a_chain_of_jobs_that_are_not_requeued_and_an_array(cluster, tmp_path):
    path, run = tiny.config(tmp_path), tmp_path / "run"
    jobs = submitted(
        path, *FEW, "epochs=30", "evaluation.at_end=[]", "launch.requeue=false", "launch.chain=2"
    )
    assert len(jobs) == 2
    until("training", lambda: steps_logged(run)[-1] >= 10, jobs[0])
    subprocess.run(["scancel", "--signal=USR2", jobs[0]], check=True)
    until("the end", lambda: show(jobs[1])["JobState"] in ("COMPLETED", "FAILED"), jobs[1])
    assert (show(jobs[0])["JobState"], show(jobs[0])["Restarts"]) == ("FAILED", "0"), logs_of(run)
    assert (
        show(jobs[1])["JobState"] == "COMPLETED" and verify(newest_checkpoint(run))["step"] == 90
    ), logs_of(run)
    assert steps_logged(run) == list(range(1, 91))
    array = submitted(
        path,
        *FEW,
        "seed=0,1",
        "epochs=2",
        "evaluation.at_end=[]",
        f"output={tmp_path / 'sweep'}",
        script="sweep",
    )
    assert len(array) == 2 and len({job.partition("_")[0] for job in array}) == 1
    for job, seed in zip(array, (0, 1)):
        until("the array", lambda job=job: show(job)["JobState"] in ("COMPLETED", "FAILED"), job)
        assert show(job)["JobState"] == "COMPLETED", logs_of(tmp_path / "sweep")
        assert (
            verify(newest_checkpoint(tmp_path / "sweep" / f"seed={seed}"))["config"]["seed"] == seed
        )


def test_a_checkpoint_is_judged_by_a_job_of_its_own(cluster, tmp_path):
    """launch/evaluate.py submits, does not submit again what waits or is done, and follows a job of the training."""
    path, run = tiny.config(tmp_path), tmp_path / "run"
    command = [sys.executable, "-m", "ssl_pretrain.train", str(path), "epochs=2"]
    assert subprocess.run(command, cwd=ROOT, capture_output=True, timeout=300).returncode == 0
    evaluate = [
        sys.executable,
        "launch/evaluate.py",
        str(run),
        "--cluster",
        "slurm",
        "--jobs",
        "knn",
    ]
    said = subprocess.run(evaluate, cwd=ROOT, capture_output=True, text=True, timeout=120).stdout
    job = re.search(r"submitted to SLURM: knn of step_00000006: (\d+)", said)[1]
    again = subprocess.run(evaluate, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert again.returncode == 0 and "submitted" not in again.stdout, again.stdout + again.stderr
    until("the evaluation", lambda: show(job)["JobState"] in ("COMPLETED", "FAILED"), job)
    assert (run / "eval" / "step_00000006" / "knn.json").exists(), logs_of(run)
    after = subprocess.run(
        [*evaluate[:-1], "spectrum", "--after", job],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    ).stdout
    following = re.search(rf"submitted to SLURM, after {job}: (\d+)", after)[1]
    until(
        "the one that follows",
        lambda: show(following)["JobState"] in ("COMPLETED", "FAILED"),
        following,
    )
    assert (run / "eval" / "spectrum.json").exists(), logs_of(run)
