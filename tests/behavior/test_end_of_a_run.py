"""Messages and exit statuses of runs that finish, stop or fail."""

import json
import os
import re
import signal
import subprocess
import time
from pathlib import Path

import commands
import pytest

pytestmark = pytest.mark.full  # each test starts several processes; `make test-full` runs them

ENDLESS = "epochs=100000"


def write_labeled_config(folder: Path) -> Path:
    """Write training and validation images of two classes and a configuration. Return its path."""
    root = commands.write_class_folders(folder / "data", "train")
    commands.write_class_folders(folder / "data", "val", first_number=50)
    return commands.write_config(folder, root)


def write_unlabeled_config(folder: Path) -> Path:
    root = commands.write_images(folder / "data", [f"{n:02d}.png" for n in range(16)])
    return commands.write_config(folder, root)


def read_files(run: Path) -> dict[str, tuple[int, bytes]]:
    """Return the modification time and the content of each file of the run."""
    files = [path for path in run.rglob("*") if path.is_file()]
    return {str(path): (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


def wait_until(condition, process: subprocess.Popen, seconds: float = 200) -> None:
    """Wait until `condition()` is true, while the process runs."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, commands.finish(process).text
        assert time.monotonic() < deadline, f"the condition was not met within {seconds} s"
        time.sleep(0.05)


def has_trained(run: Path):
    """Return a predicate that is true once the run has logged a step."""
    records = run / "metrics.jsonl"
    return lambda: records.exists() and "\n" in records.read_text()


def trainer_pids(run: Path) -> list[int]:
    """Return the IDs of the processes that train this run."""
    pids = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().decode(errors="replace").split("\0")
        except OSError:
            continue
        if "ssl_pretrain.train" in words and any(str(run.parent) in word for word in words):
            pids.append(int(path.parent.name))
    return pids


def newest_step(run: Path) -> int:
    return max(
        int(path.name.removeprefix("step_")) for path in (run / "checkpoints").glob("step_*")
    )


def test_a_run_without_labels_ends_with_a_report_and_status_0(tmp_path):
    config = write_unlabeled_config(tmp_path)
    result = commands.run(
        "launch/pretrain.py", config, "evaluation.at_end=[knn,report]", timeout=300
    )
    assert result.status == 0, result.text
    reason = f"data.root: k-NN needs labels, and {tmp_path / 'data'} has no labeled images"
    assert result.stdout.count(f"eval.knn: skipped: {reason}") == 1
    page = (tmp_path / "run" / "report.html").read_text()
    assert "Accuracies need labels, and these images have none." in page
    # The same command changes nothing in a finished and evaluated run.
    before = read_files(tmp_path / "run")
    second = commands.run(
        "launch/pretrain.py", config, "evaluation.at_end=[knn,report]", timeout=300
    )
    assert second.status == 0, second.text
    assert f"already finished: {tmp_path / 'run'} has done its 2 steps" in second.stdout
    assert "--- report: already done" in second.stdout
    assert read_files(tmp_path / "run") == before


def test_a_failing_evaluation_does_not_prevent_the_report(tmp_path):
    """k-NN fails because of a validation class that was never trained on."""
    config = write_labeled_config(tmp_path)
    commands.write_images(tmp_path / "data", ["val/class_9/0.png"], first_number=90)
    result = commands.run(
        "launch/pretrain.py", config, "evaluation.at_end=[knn,report]", timeout=300
    )
    assert result.status == 1, result.text
    assert "class_9" in result.stderr
    assert "error: knn (status 2) failed; the other evaluations were run" in result.stderr
    assert (tmp_path / "run" / "report.html").exists()


def test_a_finished_run_is_left_as_it_is(tmp_path):
    config = write_labeled_config(tmp_path)
    first = commands.run("-m", "ssl_pretrain.train", config, "epochs=2", "--stop-after", "3")
    assert first.status == 0, first.text
    checkpoint = tmp_path / "run/checkpoints/step_00000003"
    assert (
        f"stopped: 3 of 4 steps, saved in {checkpoint}. The same command resumes the run\n"
        in first.stdout
    )
    assert re.search(r"\nreached:  loss \d+\.\d{4}, \d+ s of training\n$", first.stdout)
    second = commands.run("-m", "ssl_pretrain.train", config, "epochs=2")
    assert second.status == 0, second.text
    finished, reached, command = second.stdout.splitlines()[-3:]
    assert finished == f"finished: 4 of 4 steps, saved in {checkpoint.with_name('step_00000004')}"
    assert reached.startswith("reached:  loss ")
    assert command.startswith("next:     ")
    assert command.endswith(f" -m ssl_pretrain.eval.knn {tmp_path / 'run'}")
    before = read_files(tmp_path / "run")
    third = commands.run("-m", "ssl_pretrain.train", config, "epochs=2")
    assert third.status == 0 and "already finished: " in third.stdout, third.text
    shorter = commands.run("-m", "ssl_pretrain.train", config, "epochs=1")
    assert shorter.status == 2 and shorter.stderr.endswith(
        f"error: epochs: 1 leaves nothing to train: {tmp_path / 'run'} has "
        f"reached step 4 with epochs=2. "
        "Nothing was changed; leave epochs at 2, or give a new output\n"
    )
    run = tmp_path / "run"
    errors = {
        "5": f"error: STEP: 5 is after the last step of {run}; give a step from 1 to 4\n",
        "0": "argument step: '0' is out of range; give a whole number >= 1 ",
    }
    for step, error in errors.items():
        replay = commands.run("-m", "ssl_pretrain.replay", run, step)
        assert replay.status == 2 and error in replay.stderr, replay.text
    assert read_files(tmp_path / "run") == before


@pytest.mark.parametrize(("name", "ranks"), [("SIGTERM", 1), ("SIGINT", 2)])
def test_the_launcher_forwards_a_signal_and_every_rank_saves(tmp_path, name, ranks):
    config, run = write_labeled_config(tmp_path), tmp_path / "run"
    process = commands.start("launch/pretrain.py", config, ENDLESS, f"launch.ranks={ranks}")
    wait_until(has_trained(run), process)
    assert len(trainer_pids(run)) >= ranks
    process.send_signal(getattr(signal, name))
    result = commands.finish(process)
    assert result.status == 75, result.text
    step = newest_step(run)
    assert (
        f"stopped: {step} of 200000 steps, saved in {run / 'checkpoints' / f'step_{step:08d}'}"
        in result.stdout
    )
    assert f"and not evaluated; the same command resumes from step_{step:08d}" in result.stdout
    assert "Traceback" not in result.text and not (run / "report.html").exists()
    assert not trainer_pids(run) and not (run / "lock.json").exists()


def test_a_sweep_stops_with_its_run(tmp_path):
    config, sweep = write_labeled_config(tmp_path), tmp_path / "sweep"
    overrides = ["seed=0,1", ENDLESS, "evaluation.at_end=[]", f"output={sweep}"]
    process = commands.start("launch/sweep.py", config, *overrides)
    wait_until(has_trained(sweep / "seed=0"), process)
    process.send_signal(signal.SIGTERM)
    result = commands.finish(process)
    assert result.status == 75, result.text
    assert "stopped in run 1 of 2; run the same command to continue" in result.stdout
    assert "=== 2 of 2" not in result.stdout and not (sweep / "seed=1").exists()


def test_a_run_is_saved_when_its_terminal_closes(tmp_path):
    config, run = write_labeled_config(tmp_path), tmp_path / "run"
    process = commands.start("-m", "ssl_pretrain.train", config, ENDLESS)
    wait_until(has_trained(run), process)
    process.send_signal(signal.SIGHUP)
    result = commands.finish(process)
    assert result.status == 75 and newest_step(run) > 0, result.text


@pytest.mark.full
def test_the_launcher_stops_on_sigterm_as_process_1_of_a_container(tmp_path):
    """The kernel drops a signal for which process 1 has no handler."""
    if subprocess.run(
        ["unshare", "--pid", "--fork", "--mount-proc", "true"], capture_output=True
    ).returncode:
        pytest.skip("this machine cannot create a PID namespace")
    config, run = write_labeled_config(tmp_path), tmp_path / "run"
    command = (
        f"exec unshare --pid --fork --mount-proc {commands.sys.executable} "
        f"launch/pretrain.py {config} {ENDLESS}"
    )
    process = subprocess.Popen(
        ["bash", "-c", command],
        cwd=commands.ROOT,
        env=os.environ | {"PYTHONPATH": str(commands.ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    wait_until(has_trained(run), process)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[0]), signal.SIGTERM)
    result = commands.finish(process)
    assert result.status == 75 and newest_step(run) > 0, result.text


def test_a_failure_of_the_last_save_is_an_error_whatever_on_failure_says(tmp_path):
    """The weights of the last step exist nowhere else."""
    config, run = write_labeled_config(tmp_path), tmp_path / "run"
    process = commands.start(
        "-m",
        "ssl_pretrain.train",
        config,
        ENDLESS,
        "checkpoint.on_failure=warn",
        "checkpoint.every_epochs=0",
    )
    wait_until(has_trained(run), process)
    (run / "checkpoints").rmdir()
    (run / "checkpoints").write_text("no folder")
    process.send_signal(signal.SIGTERM)
    result = commands.finish(process)
    assert result.status == 74, result.text
    assert re.search(r"error: checkpoint of step \d+ could not be written to ", result.stderr)


@pytest.mark.parametrize(
    "command", ["launch/pretrain.py", "launch/sweep.py", "-m ssl_pretrain.train"]
)
def test_slurm_keys_are_refused_if_nothing_is_submitted(tmp_path, command):
    config = write_labeled_config(tmp_path)
    overrides = ["launch.partition=gpu", "seed=0", "launch.hours=2"]
    result = commands.run(*command.split(), config, *overrides, PATH=str(tmp_path))
    assert result.status == 2, result.text
    assert (
        "error: launch.hours: 2.0, launch.partition: gpu: only SLURM jobs use these keys, and this "
        in result.stderr
    )
    assert not (tmp_path / "run").exists()


def test_missing_slurm_is_reported_in_one_line(tmp_path):
    config = write_labeled_config(tmp_path)
    result = commands.run("launch/pretrain.py", config, "launch.cluster=slurm", PATH=str(tmp_path))
    assert result.status == 2 and "Traceback" not in result.text
    assert result.stderr.endswith(
        "error: launch.cluster: slurm needs the command sbatch, which this machine lacks; "
        "submit from a machine of the cluster, or set launch.cluster=local\n"
    )


def test_a_checkpoint_held_by_a_killed_evaluation_is_released_by_the_next(tmp_path):
    config, run = write_labeled_config(tmp_path), tmp_path / "run"
    assert commands.run("-m", "ssl_pretrain.train", config).status == 0
    arguments = (
        "launch/evaluate.py",
        run,
        "--jobs",
        "knn",
        "--device",
        "cpu",
        "--cluster",
        "local",
    )
    for signal_number in (signal.SIGTERM, signal.SIGKILL):
        process = commands.start(*arguments)
        wait_until(lambda: list((run / "eval").rglob("*.safetensors")), process)
        process.send_signal(signal_number)
        result = commands.finish(process)
        assert result.status == (75 if signal_number == signal.SIGTERM else -signal.SIGKILL), (
            result.text
        )
        assert bool(list((run / "eval").rglob("*.safetensors"))) == (
            signal_number == signal.SIGKILL
        )
    assert commands.run(*arguments).status == 0
    assert not (run / "eval" / ".held").exists()
    assert json.loads((run / "eval" / "knn.json").read_text())["step"] == 2


def test_a_closed_pipe_ends_neither_training_nor_evaluation(tmp_path):
    """`... | tee log` closes the pipe if `tee` is killed."""
    config, run = write_labeled_config(tmp_path), tmp_path / "run"
    command = (
        f"{commands.sys.executable} launch/pretrain.py {config} epochs=4 evaluation.at_end=[knn]"
    )
    result = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {command} | head -1"],
        cwd=commands.ROOT,
        env=os.environ | {"PYTHONPATH": str(commands.ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert "warning: stdout is closed (Broken pipe); continuing without it" in result.stderr
    assert newest_step(run) == 8 and (run / "eval" / "knn.json").exists()
