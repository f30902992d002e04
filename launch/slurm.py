"""Decide whether a run is submitted to SLURM, and which resources its job requests."""

import math
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ssl_pretrain.config import ConfigError, LaunchConfig, RunConfig, check_slurm_keys
from ssl_pretrain.system.import_path import IMPORT_ROOT

NAME_KEYS = ("partition", "account", "qos", "constraint")
NAME_SYMBOLS = "_.,:+@&|*!=/()[]-"  # allowed in names, lists of names and constraints
NAME_PATTERN = re.compile(rf"(?!-)[A-Za-z0-9{re.escape(NAME_SYMBOLS)}]*")


def is_available() -> bool:
    """Return True if jobs can be submitted from this process.

    SLURM must be installed, its controller must answer, and this process must not be part of a job.
    """
    if shutil.which("sbatch") is None or "SLURM_JOB_ID" in os.environ:
        return False
    try:
        return subprocess.run(["scontrol", "ping"], capture_output=True, timeout=20).returncode == 0
    except (OSError, subprocess.SubprocessError):
        return False


def uses_slurm(launch: LaunchConfig) -> bool:
    """Return True if the run is submitted to SLURM with these settings."""
    if launch.cluster == "auto":
        return not launch.hosts and is_available()
    return launch.cluster == "slurm"


def check_no_slurm_keys(config: RunConfig, overrides: Sequence[str]) -> None:
    """Raise ConfigError if a run that starts on this machine sets keys that only SLURM uses."""
    reason = "SLURM does not answer on this machine"
    if "SLURM_JOB_ID" in os.environ:
        reason = f"this process is already part of SLURM job {os.environ['SLURM_JOB_ID']}"
    elif shutil.which("sbatch") is None:
        reason = "this machine has no sbatch"
    elif config.launch.cluster == "local":
        reason = "launch.cluster is local"
    check_slurm_keys(
        config,
        overrides,
        reason,
        "remove such keys to train on this machine (launch.ranks sets the processes per machine, "
        "and launch.hosts lists the machines), or add launch.cluster=slurm --plan to see the job",
        overrides_only=config.launch.cluster == "local",
    )


def num_ranks(config: RunConfig) -> int:
    """Return the number of ranks on all nodes: one per GPU, or `launch.ranks` per CPU node."""
    return config.launch.nodes * (config.launch.gpus_per_node or config.launch.ranks or 1)


def is_queued(job_id: str) -> bool:
    """Return True if a job with this id is waiting or running, False for an empty id."""
    if not job_id:
        return False
    queue = subprocess.run(
        ["squeue", "-h", "-j", job_id, "-o", "%T"], capture_output=True, text=True, timeout=60
    )
    return queue.returncode == 0 and bool(queue.stdout.strip())


def job_parameters(config: RunConfig) -> dict[str, Any]:
    """Return submitit's parameters for the pretraining job.

    Raises:
        ConfigError: If SLURM would refuse a value, or a job script would interpret it.
    """
    _check_job_settings(config)
    launch = config.launch
    gpus = {"gpus_per_node": launch.gpus_per_node} if launch.gpus_per_node else {}
    num_cpus = max(1, config.data.num_workers if launch.gpus_per_node else 1)
    optional_parameters = {"mem_gb": launch.memory_gb}
    optional_parameters |= {f"slurm_{key}": getattr(launch, key) for key in NAME_KEYS}
    return {
        "slurm_job_name": Path(config.output).name,
        "nodes": launch.nodes,
        "tasks_per_node": num_ranks(config) // launch.nodes,
        "cpus_per_task": launch.cpus_per_rank or num_cpus,
        "timeout_min": _time_limit_minutes(launch),
        "slurm_signal_delay_s": launch.signal_seconds,
        "slurm_setup": [
            f"export PYTHONPATH={shlex.quote(str(IMPORT_ROOT))}${{PYTHONPATH:+:$PYTHONPATH}}",
            "export SLURM_OPEN_MODE=append",
        ],
        # SLURM must not end the job when a task fails. The job requeues itself instead.
        "slurm_srun_args": ["--kill-on-bad-exit=0"],
        "slurm_additional_parameters": {
            "open_mode": "append",
            "requeue" if launch.requeue else "no_requeue": True,
            **gpus,
        },
        **{key: value for key, value in optional_parameters.items() if value},
    }


def _check_job_settings(config: RunConfig) -> None:
    launch = config.launch
    if launch.nodes < 1 or launch.hours <= 0 or launch.chain < 1:
        raise ConfigError(
            f"launch.nodes: {launch.nodes}, launch.chain: {launch.chain}, launch.hours: "
            f"{launch.hours:g}; give 1 or more nodes, 1 or more jobs, and a time limit above 0"
        )
    for key in NAME_KEYS:
        name = getattr(launch, key)
        if not NAME_PATTERN.fullmatch(name):
            raise ConfigError(
                f"launch.{key}: {name!r} is not a valid SLURM name; "
                f"use letters, digits and any of {NAME_SYMBOLS}"
            )
    if not config.output.isprintable() or "%" in config.output:
        raise ConfigError(
            f"output: {config.output!r} contains a control character or %, which a job script "
            "would interpret; give another folder"
        )
    if launch.signal_seconds >= 60 * _time_limit_minutes(launch):
        raise ConfigError(
            f"launch.signal_seconds: {launch.signal_seconds} is not shorter than the time limit, "
            f"launch.hours: {launch.hours:g}; give fewer seconds"
        )


def _time_limit_minutes(launch: LaunchConfig) -> int:
    """Return the time limit of a job, rounded up to whole minutes."""
    return math.ceil(launch.hours * 60)


def describe_jobs(config: RunConfig) -> list[str]:
    """Describe the jobs that would be submitted, one line per job.

    Raises:
        ConfigError: If `job_parameters` refuses a value.
    """
    parameters, launch = job_parameters(config), config.launch
    jobs = (
        f"{launch.chain} x pretraining, one after the other" if launch.chain > 1 else "pretraining"
    )
    details = [
        f"{launch.nodes} nodes x {parameters['tasks_per_node']} tasks = {num_ranks(config)} ranks",
        f"{parameters['cpus_per_task']} CPUs per task",
        *([f"{launch.gpus_per_node} GPUs per node"] if launch.gpus_per_node else []),
        *([f"{launch.memory_gb} GB per node"] if launch.memory_gb else []),
        f"{parameters['timeout_min']} min",
        f"SIGUSR2 {launch.signal_seconds} s before the limit",
        "requeued until the run has ended" if launch.requeue else "not requeued",
        *(f"{key} {getattr(launch, key)}" for key in NAME_KEYS if getattr(launch, key)),
    ]
    evaluations = config.evaluation.at_end
    return [
        f"SLURM job: {jobs} ({parameters['slurm_job_name']}): {', '.join(details)}",
        *(
            f"SLURM job: {name}, 1 task, after the pretraining has succeeded"
            + (f" and {previous} has ended" if previous else "")
            for previous, name in zip(["", *evaluations], evaluations)
        ),
    ]
