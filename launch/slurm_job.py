"""Define the SLURM jobs of a run, and submit them with submitit.

submitit pickles a PretrainingJob or an EvaluationJob at submission and calls it in each task.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ssl_pretrain import train
from ssl_pretrain.checkpoint.folder import is_finished, list_checkpoints
from ssl_pretrain.config import ConfigError, RunConfig
from ssl_pretrain.launch import local, slurm
from ssl_pretrain.system import optional_packages, program, stop_signals
from ssl_pretrain.system.exit_status import PROCESS_LOST, STOPPED

UNFINISHED = STOPPED  # exit status of every rank while the run is unfinished
UNEXPECTED_ERROR = -1  # status of this rank after an exception in training
GRACE_SECONDS = 120  # upper bound on the time that SLURM takes to end the ranks after a requeue


@dataclass
class EvaluationJob:
    """Evaluation of a run's newest checkpoint, unless `arguments` select another one."""

    name: str
    run: str
    arguments: tuple[str, ...] = ()  # additional arguments of launch/evaluate.py

    def __call__(self) -> int:
        """Run launch/evaluate.py in this task."""
        options = ["--cluster", "local", "--jobs", self.name, *(self.arguments or ("--newest",))]
        with local.forward_stop_requests():
            status = local.run(
                [sys.executable, "-m", "ssl_pretrain.launch.evaluate", self.run, *options]
            )
        if status:
            raise SystemExit(status)
        return 0


@dataclass
class PretrainingJob:
    """Training on all ranks of a job. Its pickle contains only the command line, and no secrets."""

    path: str
    overrides: tuple[str, ...]
    requeue: bool = True

    def __call__(self) -> int:
        """Train as one rank. Requeue the job unless the run has ended or failed for good."""
        # submitit's own handler would requeue at once, from rank 0 alone, in the middle of a step.
        stop_signals.install_early_handlers()
        os.environ[program.LAUNCHED_VARIABLE] = "1"
        _set_rank_environment()
        outputs = [override for override in self.overrides if override.startswith("output=")]
        run = Path(outputs[-1].removeprefix("output="))
        try:
            status = train.main([self.path, *self.overrides])
        except Exception as error:
            print(f"error: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
            status = UNEXPECTED_ERROR
        if status in (UNEXPECTED_ERROR, PROCESS_LOST):  # a rank or node may be lost
            self._exit_after_failure(run)
        if status not in (0, STOPPED):
            os._exit(status)
        if status == STOPPED or not is_finished(run):
            if self.requeue:
                _requeue_and_wait(0.0 if os.environ["RANK"] == "0" else GRACE_SECONDS / 2)
            os._exit(UNFINISHED)
        return 0

    def _exit_after_failure(self, run: Path) -> None:
        """Exit, and requeue the job if the run has saved a checkpoint since its last failure.

        A failure that repeats at the same step is not retried.
        """
        # This file stores the name of the newest checkpoint at this rank's last failure.
        marker = run / "slurm" / f"failed.{os.environ['RANK']}.json"
        checkpoints = list_checkpoints(run)
        newest = json.dumps(checkpoints[-1].name) if checkpoints else ""
        has_new_checkpoint = newest not in ("", marker.read_text() if marker.exists() else "")
        if has_new_checkpoint:
            marker.write_text(newest)
            if self.requeue:
                _requeue_and_wait(3.0 * int(os.environ["RANK"]))
        # Exit without cleanup, because a thread may hang in a collective with the lost rank.
        os._exit(UNFINISHED if has_new_checkpoint else 1)


def _set_rank_environment() -> None:
    """Set torchrun's environment variables from SLURM's."""
    import submitit

    environment = submitit.JobEnvironment()
    restarts = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
    port = 20000 + (7 * int(environment.raw_job_id) + restarts) % 20000  # changes with each requeue
    os.environ.update(
        RANK=str(environment.global_rank),
        WORLD_SIZE=str(environment.num_tasks),
        LOCAL_RANK=str(environment.local_rank),
        LOCAL_WORLD_SIZE=str(environment.num_tasks // environment.num_nodes),
        MASTER_ADDR=environment.hostnames[0],
        MASTER_PORT=str(port),
    )


def _requeue_and_wait(delay_seconds: float) -> None:
    """Ask SLURM to requeue this job, unless another rank has done so, and wait to be killed.

    The delay differs between ranks, so that usually only one of them asks.
    """
    signal.signal(signal.SIGTERM, lambda number, frame: os._exit(UNFINISHED))
    time.sleep(delay_seconds)
    job = os.environ["SLURM_JOB_ID"]
    state = subprocess.run(
        ["scontrol", "show", "job", "-o", job], capture_output=True, text=True, timeout=60
    ).stdout
    current_restart = f"Restarts={os.environ.get('SLURM_RESTART_COUNT', '0')} "
    if "JobState=RUNNING" in state and current_restart in state:
        print(f"asking SLURM to requeue job {job}", flush=True)
        with suppress(subprocess.SubprocessError):
            subprocess.run(["scontrol", "requeue", job], timeout=60, check=False)
    time.sleep(GRACE_SECONDS)


def submit(config: RunConfig, path: str, overrides: Sequence[str]) -> list[str]:
    """Submit the pretraining as a chain of `launch.chain` jobs, then its evaluations.

    Returns:
        The job ids in that order.

    Raises:
        ConfigError: If submitit is missing, a value is invalid, or SLURM refuses the job.
    """
    parameters = slurm.job_parameters(config)
    job = PretrainingJob(
        str(Path(path).absolute()), (*overrides, f"output={config.output}"), config.launch.requeue
    )
    ids: list[str] = []
    with _private_executor(config.output) as executor:
        for _ in range(config.launch.chain):
            dependency = {"dependency": f"afterany:{ids[-1]}"} if ids else {}
            additional = parameters["slurm_additional_parameters"] | dependency
            executor.update_parameters(**parameters | {"slurm_additional_parameters": additional})
            ids.append(executor.submit(job).job_id)
    return ids + submit_evaluations_after(config, config.evaluation.at_end, ids[-1])


def submit_evaluations_after(
    config: RunConfig, names: Sequence[str], pretraining_id: str
) -> list[str]:
    """Submit evaluations of the newest checkpoint, to run one after the other.

    They start once the pretraining job has succeeded. An evaluation that fails does not stop the
    later ones, so the report, which comes last, shows the results of the others.

    Returns:
        The job ids.
    """
    ids: list[str] = []
    for name in names:
        dependency = f"afterok:{pretraining_id}" + (f",afterany:{ids[-1]}" if ids else "")
        ids += submit_evaluations(config, [EvaluationJob(name, config.output)], dependency)
    return ids


def submit_evaluations(
    config: RunConfig, jobs: Sequence[EvaluationJob], dependency: str = ""
) -> list[str]:
    """Submit evaluations, each as a job on one GPU or one CPU node.

    Args:
        config: The run's configuration. Its partition, time limit and so on apply to each job.
        jobs: The evaluations.
        dependency: Dependency in SLURM's syntax, such as afterok:12. A job whose dependency can no
            longer be fulfilled is canceled.

    Returns:
        The job ids.

    Raises:
        ConfigError: If submitit is missing, a value is invalid, or SLURM refuses the job.
    """
    additional = {"open_mode": "append"}
    if dependency:
        additional |= {"dependency": dependency, "kill_on_invalid_dep": "yes"}
    if config.launch.gpus_per_node:
        additional["gpus_per_node"] = "1"
    parameters = slurm.job_parameters(config) | {
        "nodes": 1,
        "tasks_per_node": 1,
        "slurm_additional_parameters": additional,
    }
    for name in ("slurm_signal_delay_s", "slurm_srun_args"):
        del parameters[name]
    ids = []
    with _private_executor(config.output) as executor:
        for job in jobs:
            executor.update_parameters(**parameters | {"slurm_job_name": job.name})
            ids.append(executor.submit(job).job_id)
    return ids


def submit_array(runs: Sequence[tuple[RunConfig, Sequence[str]]], path: str) -> list[str]:
    """Submit a job array with one job per run. Each job has the resources of the first run.

    Args:
        runs: Configuration and overrides of each run.
        path: The YAML file that the overrides apply to.

    Returns:
        The job ids.

    Raises:
        ConfigError: If submitit is missing, a value is invalid, or SLURM refuses the job.
    """
    first_config, yaml_path = runs[0][0], str(Path(path).absolute())
    with _private_executor(str(Path(first_config.output).parent)) as executor:
        executor.update_parameters(**slurm.job_parameters(first_config))
        with executor.batch():
            jobs = [
                executor.submit(PretrainingJob(yaml_path, tuple(overrides), config.launch.requeue))
                for config, overrides in runs
            ]
    return [job.job_id for job in jobs]


@contextmanager
def _private_executor(output: str) -> Iterator[Any]:
    """Yield a submitit executor for the folder OUTPUT/slurm, which only this user can access.

    The folder is private because SLURM's jobs execute the pickles in it.

    Raises:
        ConfigError: If submitit or a SLURM command is missing, or SLURM refuses a job.
    """
    if not optional_packages.is_installed("submitit"):
        message = optional_packages.missing_message(
            "launch.cluster: slurm", "submitit", "slurm", "set launch.cluster=local"
        )
        raise ConfigError(message)
    import submitit

    for command in ("sbatch", "srun"):
        if shutil.which(command) is None:
            raise ConfigError(
                f"launch.cluster: slurm needs the command {command}, which this machine lacks; "
                "submit from a machine of the cluster, or set launch.cluster=local"
            )
    folder = Path(output).absolute() / "slurm"
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o700)
    umask = os.umask(0o077)
    try:
        yield submitit.AutoExecutor(folder=folder, cluster="slurm")
    except submitit.core.utils.FailedJobError as error:
        reason = str(error).strip().splitlines()[-1]
        raise ConfigError(
            f"SLURM refused the job: {reason}; check launch.partition, launch.account and the "
            "output of --plan"
        ) from None
    finally:
        os.umask(umask)
