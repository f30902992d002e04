"""Submission of runs and evaluations to SLURM with submitit."""

import contextlib
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ssl_pretrain.config import ConfigError, RunConfig
from ssl_pretrain.launch import slurm
from ssl_pretrain.launch.slurm_job import EvaluationJob, PretrainingJob


def submit(config: RunConfig, path: str, overrides: Sequence[str]) -> list[str]:
    """Submit the pretraining as a chain of `launch.chain` jobs, then its evaluations.

    Returns:
        The job ids in that order.

    Raises:
        ConfigError: submitit is missing, SLURM refused the job, or a value is invalid.
    """
    parameters = slurm.request(config)
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
    evaluations = [EvaluationJob(name, config.output) for name in config.evaluation.at_end]
    return ids + submit_chain(config, evaluations, ids[-1])


def submit_chain(
    config: RunConfig, evaluations: Sequence[EvaluationJob], pretraining: str
) -> list[str]:
    """Submit evaluations that run one after the other, once the pretraining job has succeeded.

    The last one, the report, shows the results of the others even if some of them failed.

    Returns:
        The job ids.
    """
    ids: list[str] = []
    for evaluation in evaluations:
        dependency = f"afterok:{pretraining}" + (f",afterany:{ids[-1]}" if ids else "")
        ids += submit_evaluations(config, [evaluation], dependency)
    return ids


def submit_evaluations(
    config: RunConfig, jobs: Sequence[EvaluationJob], dependency: str = ""
) -> list[str]:
    """Submit evaluations, each as a job on one GPU or one CPU node.

    Args:
        config: The run's configuration, whose partition, time limit and so on they share.
        jobs: The evaluations.
        dependency: SLURM's syntax, such as afterok:12. A job whose dependency cannot be fulfilled
            any more is canceled.

    Returns:
        The job ids.

    Raises:
        ConfigError: As `submit`.
    """
    parameters = slurm.request(config) | {"nodes": 1, "tasks_per_node": 1}
    for name in ("slurm_signal_delay_s", "slurm_srun_args"):
        del parameters[name]
    additional = {"open_mode": "append"}
    if dependency:
        additional |= {"dependency": dependency, "kill_on_invalid_dep": "yes"}
    if config.launch.gpus_per_node:
        additional["gpus_per_node"] = "1"
    parameters["slurm_additional_parameters"] = additional
    ids = []
    with _private_executor(config.output) as executor:
        for job in jobs:
            executor.update_parameters(**parameters | {"slurm_job_name": job.name})
            ids.append(executor.submit(job).job_id)
    return ids


def submit_array(runs: Sequence[tuple[RunConfig, Sequence[str]]], path: str) -> list[str]:
    """Submit one array with one job per run, all with the resources of the first run.

    Returns:
        The job ids.

    Raises:
        ConfigError: As `submit`.
    """
    first, file = runs[0][0], str(Path(path).absolute())
    with _private_executor(str(Path(first.output).parent)) as executor:
        executor.update_parameters(**slurm.request(first))
        with executor.batch():
            jobs = [
                executor.submit(PretrainingJob(file, tuple(overrides), run.launch.requeue))
                for run, overrides in runs
            ]
    return [job.job_id for job in jobs]


@contextlib.contextmanager
def _private_executor(output: str) -> Iterator[Any]:
    """Yield a submitit executor whose files only this user can access.

    SLURM's jobs execute the pickles in its folder.
    """
    try:
        import submitit
    except ImportError:
        raise ConfigError(
            "launch.cluster: slurm needs submitit; pip install submitit, or set "
            "launch.cluster=local"
        ) from None
    _check_commands()
    folder = Path(output).absolute() / "slurm"
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o700)
    umask = os.umask(0o077)
    try:
        yield submitit.AutoExecutor(folder=folder, cluster="slurm")
    except submitit.core.utils.FailedJobError as error:
        reason = str(error).strip().splitlines()[-1]
        raise ConfigError(
            f"SLURM refused the job: {reason}; see launch.partition, launch.account, --plan"
        ) from None
    finally:
        os.umask(umask)


def _check_commands() -> None:
    """Raise ConfigError if this machine lacks SLURM's commands."""
    missing = [command for command in ("sbatch", "srun") if shutil.which(command) is None]
    if missing:
        raise ConfigError(
            f"launch.cluster: slurm, and this machine has no {missing[0]}; "
            "submit from a machine of the cluster, or set launch.cluster=local"
        )
