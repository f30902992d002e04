"""Runs on a real SLURM cluster of two nodes are preempted, requeued, and lose a node.

Each ends with exactly the weights of an uninterrupted run.
"""

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
from ssl_pretrain.checkpoint.manifest import verify_checkpoint
from ssl_pretrain.checkpoint.tensor_files import read_checkpoint
from ssl_pretrain.monitoring import metric_names

ROOT = Path(__file__).parents[2]
CLUSTER = Path(__file__).parent / "cluster.sh"
SECRET = "f00d" * 10  # as long as a W&B key
# There are more ranks than cores, so each collective waits. Few collectives save time.
FEW_COLLECTIVES = ["parallel.bn_group_images=6"]
pytestmark = [pytest.mark.slurm, pytest.mark.timeout(3600)]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """Start SLURM, set SLURM_CONF, and yield a function that runs commands of cluster.sh.

    The tests are skipped where SLURM is not installed.
    """
    folder = tmp_path_factory.mktemp("slurm")
    start = subprocess.run([CLUSTER, "up", folder], capture_output=True, text=True, timeout=900)
    if start.returncode == 77:
        pytest.skip(start.stderr.strip())
    assert start.returncode == 0, start.stderr
    os.environ["SLURM_CONF"] = start.stdout.strip()
    yield lambda *arguments: subprocess.run(
        [CLUSTER, arguments[0], folder, *arguments[1:]], check=True, timeout=120
    )
    subprocess.run([CLUSTER, "down", folder], check=True, timeout=120)
    del os.environ["SLURM_CONF"]


def run_and_get_output(*command, timeout=120):
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=timeout
    ).stdout


def submit(path, *overrides, script="pretrain"):
    """Submit with launch/<script>.py and return the job ids that it prints."""
    two_nodes = ["launch.cluster=slurm", "launch.nodes=2", "launch.ranks=2"]
    result = subprocess.run(
        [sys.executable, f"launch/{script}.py", str(path), *two_nodes, *overrides],
        cwd=ROOT,
        env={**os.environ, "WANDB_API_KEY": SECRET},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert result.returncode == 0, result.stderr
    assert SECRET not in result.stdout + result.stderr
    jobs = result.stdout.partition("follow it")[0]
    return re.findall(r"(?:ranks|pretraining|knn:|SLURM:|,) (\d+(?:_\d+)?)", jobs)


def read_job_info(job):
    text = run_and_get_output("scontrol", "show", "job", "-o", job)
    return dict(entry.split("=", 1) for entry in text.split() if "=" in entry)


def has_ended(job):
    return read_job_info(job)["JobState"] in ("COMPLETED", "FAILED")


def is_running(job):
    return read_job_info(job)["JobState"] == "RUNNING"


def send_usr2(job):
    subprocess.run(["scancel", "--signal=USR2", job], check=True)


def wait_until(description, condition, job, seconds=1200):
    """Wait for a condition. Start a requeued job at once instead of after SLURM's two minutes."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"{description}: not within {seconds} s"
        if read_job_info(job).get("Reason") == "BeginTime":
            command = ["scontrol", "update", f"JobId={job}", "StartTime=now"]
            subprocess.run(command, capture_output=True)
        time.sleep(0.5)


def read_logged_steps(run):
    file = run / "metrics.jsonl"
    lines = file.read_text().splitlines() if file.exists() else ['{"step": 0}']
    return [json.loads(line)["step"] for line in lines if line.endswith("}")]


def train_uninterrupted(path, output, *overrides):
    """Train on four ranks without SLURM and return the last checkpoint."""
    torchrun = ["torch.distributed.run", "--standalone", "--nproc-per-node", "4"]
    train = ["-m", "ssl_pretrain.train", str(path), f"output={output}", *overrides]
    run_and_get_output(sys.executable, "-m", *torchrun, *train, timeout=900)
    return read_checkpoint(newest_checkpoint(output))


def assert_same_tensors(tensors, expected):
    for name, value in expected.items():
        assert torch.equal(tensors[name], value), name


def read_wandb_steps(run):
    """Return the steps of the offline W&B run, in the order in which its segments are synced."""
    files = sorted((run / "wandb").glob("offline-run-*/*.wandb"))
    return [
        row["_step"]
        for file in files
        for row in wandb_file.history(file)
        if metric_names.tracker_name("loss") in row
    ]


def read_logs(run):
    files = sorted((run / "slurm").glob("*_log.*"))
    return "\n".join(f"== {file.name}\n{file.read_text()[-1500:]}" for file in files)


@pytest.mark.case(4)
def test_a_preempted_run_is_requeued_and_then_evaluated(cluster, tmp_path, observe):
    """A signal, a requeue by the job itself, the same bits, then k-NN in a separate job."""
    path, run = tiny.write_config(tmp_path), tmp_path / "run"
    settings = [*FEW_COLLECTIVES, "epochs=30"]
    training, evaluation = submit(path, *settings, "evaluation.at_end=[knn]")
    wait_until("training", lambda: read_logged_steps(run)[-1] >= 10, training)
    send_usr2(training)
    wait_until("the end", lambda: has_ended(evaluation), training)
    info = read_job_info(training)
    assert (info["JobState"], info["Restarts"]) == ("COMPLETED", "1"), read_logs(run)
    assert read_job_info(evaluation)["JobState"] == "COMPLETED", read_logs(run)
    assert (run / "eval" / "knn.json").exists(), read_logs(run)
    assert stat.S_IMODE((run / "slurm").stat().st_mode) == 0o700
    manifest, tensors = read_checkpoint(newest_checkpoint(run))
    assert manifest["step"] == 90
    _, expected = train_uninterrupted(path, tmp_path / "uninterrupted", *settings)
    assert_same_tensors(tensors, expected)
    assert read_logged_steps(run) == list(range(1, 91))
    files = [file for file in run.rglob("*") if file.is_file()]
    assert len(files) > 10
    assert not [file for file in files if SECRET.encode() in file.read_bytes()]
    assert SECRET not in run_and_get_output("scontrol", "show", "job", "-d", training)
    observe(
        "SLURM, 4 ranks on 2 nodes: preempted once, the same job again, the same bits; "
        f"the W&B key is in none of {len(files)} files"
    )


@pytest.mark.full
@pytest.mark.case(1)
@pytest.mark.case(4)
def test_a_run_survives_two_preemptions_and_the_loss_of_a_node(cluster, tmp_path, observe):
    path, run = tiny.write_config(tmp_path), tmp_path / "run"
    settings = [*FEW_COLLECTIVES, "epochs=40", "checkpoint.every_epochs=2", "log.wandb=offline"]
    (job,) = submit(path, "evaluation.at_end=[]", *settings)

    def wait_for_step(step):
        wait_until(
            f"step {step}", lambda: is_running(job) and read_logged_steps(run)[-1] >= step, job
        )

    def wait_for_restarts(count):
        wait_until(f"requeue {count}", lambda: read_job_info(job)["Restarts"] == str(count), job)

    wait_for_step(10)
    send_usr2(job)
    wait_for_restarts(1)
    wait_for_step(40)
    subprocess.run(["scontrol", "requeue", job], check=True)
    wait_for_restarts(2)
    wait_for_step(70)
    cluster("node-down", "n2")
    wait_for_restarts(3)
    cluster("node-up", "n2")
    wait_until("the end", lambda: has_ended(job), job)
    assert read_job_info(job)["JobState"] == "COMPLETED", read_logs(run)
    manifest, tensors = read_checkpoint(newest_checkpoint(run))
    assert manifest["step"] == 120
    _, expected = train_uninterrupted(path, tmp_path / "uninterrupted", *settings)
    assert_same_tensors(tensors, expected)
    assert read_logged_steps(run) == list(range(1, 121))
    wandb_ids = {folder.name.rpartition("-")[2] for folder in (run / "wandb").glob("offline-run-*")}
    assert wandb_ids == {manifest["wandb_id"]}
    steps = read_wandb_steps(run)
    assert steps == sorted(set(steps)), steps
    assert steps[-1] == 120
    assert len(steps) > 90
    observe(
        "SLURM, 4 ranks on 2 nodes: SIGUSR2, `scontrol requeue`, then a node killed: job "
        f"{job} restarted {read_job_info(job)['Restarts']} times, the same bits, one W&B run whose "
        f"{len(steps)} steps neither repeat nor go back"
    )


@pytest.mark.full
@pytest.mark.case(4)
def test_a_run_continues_after_its_time_limit(cluster, tmp_path, observe):
    """SLURM itself sends the signal, up to a minute earlier than requested."""
    path, run = tiny.write_config(tmp_path), tmp_path / "run"
    limit = ["launch.hours=0.05", "launch.signal_seconds=90"]
    settings = [*FEW_COLLECTIVES, "epochs=100000", "log.every_steps=20", "evaluation.at_end=[]"]
    (job,) = submit(path, *settings, *limit)
    wait_until("the limit", lambda: read_job_info(job)["Restarts"] == "1", job)
    step = verify_checkpoint(newest_checkpoint(run))["step"]
    wait_until(
        "the next job", lambda: is_running(job) and read_logged_steps(run)[-1] > step + 20, job
    )
    subprocess.run(["scancel", job], check=True)
    wait_until("the end", lambda: read_job_info(job)["JobState"] == "CANCELLED", job)
    assert f"resumed {run} after step {step}" in read_logs(run)
    observe(
        f"SLURM, time limit of 3 minutes: saved at step {step}, the same job continues from there"
    )


@pytest.mark.full
def test_a_chain_of_jobs_finishes_a_run_without_requeue(cluster, tmp_path):
    path, run = tiny.write_config(tmp_path), tmp_path / "run"
    settings = [*FEW_COLLECTIVES, "epochs=30", "evaluation.at_end=[]"]
    first, second = submit(path, *settings, "launch.requeue=false", "launch.chain=2")
    wait_until("training", lambda: read_logged_steps(run)[-1] >= 10, first)
    send_usr2(first)
    wait_until("the end", lambda: has_ended(second), second)
    info = read_job_info(first)
    assert (info["JobState"], info["Restarts"]) == ("FAILED", "0"), read_logs(run)
    assert read_job_info(second)["JobState"] == "COMPLETED", read_logs(run)
    assert verify_checkpoint(newest_checkpoint(run))["step"] == 90, read_logs(run)
    assert read_logged_steps(run) == list(range(1, 91))


@pytest.mark.full
def test_a_sweep_runs_as_a_job_array(cluster, tmp_path):
    path, sweep = tiny.write_config(tmp_path), tmp_path / "sweep"
    settings = [*FEW_COLLECTIVES, "epochs=2", "evaluation.at_end=[]", f"output={sweep}"]
    jobs = submit(path, "seed=0,1", *settings, script="sweep")
    assert len(jobs) == 2
    assert len({job.partition("_")[0] for job in jobs}) == 1
    for seed, job in enumerate(jobs):
        wait_until("the array", lambda job=job: has_ended(job), job)
        assert read_job_info(job)["JobState"] == "COMPLETED", read_logs(sweep)
        manifest = verify_checkpoint(newest_checkpoint(sweep / f"seed={seed}"))
        assert manifest["config"]["seed"] == seed


def test_a_checkpoint_is_evaluated_by_a_separate_job(cluster, tmp_path):
    """launch/evaluate.py submits only what is neither done nor queued, and can follow a job."""
    path, run = tiny.write_config(tmp_path), tmp_path / "run"
    run_and_get_output(
        sys.executable, "-m", "ssl_pretrain.train", str(path), "epochs=2", timeout=300
    )

    def evaluate(*arguments):
        script = [sys.executable, "launch/evaluate.py", str(run), "--cluster", "slurm"]
        return run_and_get_output(*script, "--jobs", *arguments)

    job = re.search(r"submitted to SLURM: knn of step_00000006: (\d+)", evaluate("knn"))[1]
    assert "submitted" not in evaluate("knn")
    wait_until("the evaluation", lambda: has_ended(job), job)
    assert (run / "eval" / "step_00000006" / "knn.json").exists(), read_logs(run)
    output = evaluate("spectrum", "--after", job)
    next_job = re.search(rf"submitted to SLURM, after {job}: (\d+)", output)[1]
    wait_until("the following job", lambda: has_ended(next_job), next_job)
    assert (run / "eval" / "spectrum.json").exists(), read_logs(run)
