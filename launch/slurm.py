"""Submits runs to SLURM with submitit, one task per rank, and is the program of their jobs."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ssl_pretrain import train
from ssl_pretrain.checkpoint.folder import is_finished, list_checkpoints
from ssl_pretrain.config import ConfigError, RunConfig, check_slurm_keys
from ssl_pretrain.launch import local
from ssl_pretrain.system import stop_signals
from ssl_pretrain.system.exit_status import LOST, STOPPED
from ssl_pretrain.system.import_path import IMPORT_ROOT

UNFINISHED = STOPPED  # exit status of every rank until the run has ended
PLACES = ("partition", "account", "qos", "constraint")
MARKS = "_.,:+@&|*!=/()[]-"  # allowed in names, lists of names and constraints
NAME = re.compile(rf"(?!-)[A-Za-z0-9{re.escape(MARKS)}]*")
CRASHED = -1  # stands for an exception that a rank did not expect
GRACE_SECONDS = 120  # longest wait for SLURM to end the ranks after a requeue


def here() -> bool:
    """Return True if jobs can be submitted: SLURM is installed, its controller answers, and this is not one of its jobs."""
    if shutil.which("sbatch") is None or "SLURM_JOB_ID" in os.environ:
        return False
    try:
        return subprocess.run(["scontrol", "ping"], capture_output=True, timeout=20).returncode == 0
    except (OSError, subprocess.SubprocessError):
        return False


def check_here(config: RunConfig, overrides: Sequence[str]) -> None:
    """Refuse keys that only SLURM heeds before anything is started on this machine.

    Raises:
        ConfigError: Names the keys.
    """
    reason = "SLURM does not answer on this machine"
    if "SLURM_JOB_ID" in os.environ:
        reason = f"this is inside its job {os.environ['SLURM_JOB_ID']} already"
    elif shutil.which("sbatch") is None:
        reason = "this machine has no sbatch"
    elif config.launch.cluster == "local":
        reason = "launch.cluster is local"
    check_slurm_keys(
        config,
        overrides,
        reason,
        "leave it out to train here (launch.ranks: processes per machine, launch.hosts: several machines), "
        "or add launch.cluster=slurm --plan to see what would be submitted",
        typed_only=config.launch.cluster == "local",
    )


def check_submission() -> None:
    """Raise ConfigError where nothing can be submitted."""
    missing = [command for command in ("sbatch", "srun") if shutil.which(command) is None]
    if missing:
        raise ConfigError(
            f"launch.cluster: slurm, and this machine has no {missing[0]}; "
            "submit from a machine of the cluster, or set launch.cluster=local"
        )


def ranks(config: RunConfig) -> int:
    """Return the number of ranks of the whole job: one per GPU, or `launch.ranks` per CPU node."""
    return config.launch.nodes * (config.launch.gpus_per_node or config.launch.ranks or 1)


def request(config: RunConfig) -> dict[str, Any]:
    """Return submitit's parameters for the pretraining job.

    Raises:
        ConfigError: A value that SLURM would refuse, or that would be more than a value in a job script.
    """
    asked = config.launch
    if asked.nodes < 1 or asked.hours <= 0 or asked.chain < 1:
        raise ConfigError(
            f"launch.nodes: {asked.nodes} and launch.chain: {asked.chain} must be at least 1, launch.hours: {asked.hours:g} more than 0"
        )
    for key in PLACES:
        if not NAME.fullmatch(getattr(asked, key)):
            raise ConfigError(
                f"launch.{key}: {getattr(asked, key)!r} is not a name that SLURM has; give letters, digits and any of {MARKS}"
            )
    if not config.output.isprintable() or "%" in config.output:
        raise ConfigError(
            f"output: {config.output!r} holds a control character or %, which mean something in a job script; give another"
        )
    minutes = math.ceil(asked.hours * 60)
    if asked.signal_seconds >= minutes * 60:
        raise ConfigError(
            f"launch.signal_seconds: {asked.signal_seconds} leaves nothing of launch.hours: {asked.hours:g}; give less"
        )
    wanted: dict[str, Any] = {
        "slurm_job_name": Path(config.output).name,
        "nodes": asked.nodes,
        "tasks_per_node": ranks(config) // asked.nodes,
        "cpus_per_task": asked.cpus_per_rank
        or max(1, config.data.num_workers if asked.gpus_per_node else 1),
        "timeout_min": minutes,
        "slurm_signal_delay_s": asked.signal_seconds,
        "slurm_setup": [
            f"export PYTHONPATH={shlex.quote(str(IMPORT_ROOT))}${{PYTHONPATH:+:$PYTHONPATH}}",
            "export SLURM_OPEN_MODE=append",
        ],
        # a step that loses a task is ended by SLURM only through us: a lost node is answered with a requeue
        "slurm_srun_args": ["--kill-on-bad-exit=0"],
    }
    more: dict[str, Any] = {
        "open_mode": "append",
        "requeue" if asked.requeue else "no_requeue": True,
    }
    if asked.gpus_per_node:
        more["gpus_per_node"] = asked.gpus_per_node
    if asked.memory_gb:
        wanted["mem_gb"] = asked.memory_gb
    for key in PLACES:
        if getattr(asked, key):
            wanted[f"slurm_{key}"] = getattr(asked, key)
    return wanted | {"slurm_additional_parameters": more}


def describe(config: RunConfig) -> list[str]:
    """Describe what would be submitted for `--plan`, one line per job.

    Raises:
        ConfigError: As `request`.
    """
    asked, launch = request(config), config.launch
    where = [f"{key} {getattr(launch, key)}" for key in PLACES if getattr(launch, key)]
    gpus = f", {launch.gpus_per_node} GPUs a node" if launch.gpus_per_node else ""
    memory = f", {launch.memory_gb} GB a node" if launch.memory_gb else ""
    again = "requeued until the run has ended" if launch.requeue else "not requeued"
    what = (
        "pretraining" if launch.chain == 1 else f"{launch.chain} x pretraining, one after the other"
    )
    lines = [
        f"SLURM job: {what} ({asked['slurm_job_name']}): {launch.nodes} nodes x {asked['tasks_per_node']} tasks = {ranks(config)} ranks, "
        f"{asked['cpus_per_task']} CPUs a task{gpus}{memory}, {asked['timeout_min']} min, SIGUSR2 {launch.signal_seconds} s before, "
        + ", ".join([again, *where])
    ]
    return lines + [
        f"SLURM job: {name}, 1 task, after the pretraining has ended well"
        + ("" if number == 0 else f" and {config.evaluation.at_end[number - 1]} has ended")
        for number, name in enumerate(config.evaluation.at_end)
    ]


def submit(config: RunConfig, path: str, overrides: Sequence[str]) -> list[str]:
    """Submit the pretraining as a chain of `launch.chain` jobs, then its evaluations. Return the job ids in that order.

    Raises:
        ConfigError: submitit is missing, SLURM refused, or the request is wrong.
    """
    wanted = request(config)
    with _private(config.output) as executor:
        jobs: list[str] = []
        for _ in range(config.launch.chain):
            more = wanted["slurm_additional_parameters"] | (
                {"dependency": f"afterany:{jobs[-1]}"} if jobs else {}
            )
            executor.update_parameters(**(wanted | {"slurm_additional_parameters": more}))
            run = Pretraining(
                str(Path(path).absolute()),
                (*overrides, f"output={config.output}"),
                config.launch.requeue,
            )
            jobs.append(executor.submit(run).job_id)
    return jobs + submit_chain(
        config, [Evaluation(name, config.output) for name in config.evaluation.at_end], jobs[-1]
    )


def submit_chain(
    config: RunConfig, evaluations: Sequence[Evaluation], pretraining: str
) -> list[str]:
    """Submit evaluations one after the other, once the pretraining has ended well; return their job ids.

    The report comes last and shows the results of the others, also if some of them failed.
    """
    jobs: list[str] = []
    for evaluation in evaluations:
        after = f"afterok:{pretraining}" + (f",afterany:{jobs[-1]}" if jobs else "")
        jobs += submit_evaluations(config, [evaluation], after)
    return jobs


def submit_evaluations(config: RunConfig, jobs: Sequence[Evaluation], after: str = "") -> list[str]:
    """Submit evaluations, each as a job on one GPU or CPU node, and return their job ids.

    Args:
        after: Their dependency in SLURM's syntax, such as afterok:12. A job whose dependency can no
            longer be fulfilled is cancelled.

    Raises:
        ConfigError: As `submit`.
    """
    dropped = ("slurm_signal_delay_s", "slurm_srun_args", "slurm_additional_parameters")
    wanted = {key: value for key, value in request(config).items() if key not in dropped}
    more: dict[str, Any] = {"open_mode": "append"} | (
        {"dependency": after, "kill_on_invalid_dep": "yes"} if after else {}
    )
    if config.launch.gpus_per_node:
        more["gpus_per_node"] = "1"
    submitted = []
    with _private(config.output) as executor:
        for job in jobs:
            name = {
                "slurm_job_name": job.name,
                "nodes": 1,
                "tasks_per_node": 1,
                "slurm_additional_parameters": more,
            }
            executor.update_parameters(**(wanted | name))
            submitted.append(executor.submit(job).job_id)
    return submitted


def waiting_or_running(job: str) -> bool:
    """Return True if the job is in SLURM's queue."""
    if not job:
        return False
    found = subprocess.run(
        ["squeue", "-h", "-j", job, "-o", "%T"], capture_output=True, text=True, timeout=60
    )
    return found.returncode == 0 and bool(found.stdout.strip())


def submit_array(runs: Sequence[tuple[RunConfig, Sequence[str]]], path: str) -> list[str]:
    """Submit one array with one job per run, all with the first run's request. Return the job ids.

    Raises:
        ConfigError: As `submit`.
    """
    first = runs[0][0]
    with _private(str(Path(first.output).parent)) as executor:
        executor.update_parameters(**request(first))
        with executor.batch():
            file = str(Path(path).absolute())
            jobs = [
                executor.submit(Pretraining(file, tuple(overrides), run.launch.requeue))
                for run, overrides in runs
            ]
    return [job.job_id for job in jobs]


@contextlib.contextmanager
def _private(output: str) -> Iterator[Any]:
    """Yield a submitit executor whose files only this user can access, since its jobs execute their pickles."""
    try:
        import submitit
    except ImportError:
        raise ConfigError(
            "launch.cluster: slurm needs submitit; pip install submitit, or set launch.cluster=local"
        ) from None
    check_submission()
    folder = Path(output).absolute() / "slurm"
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o700)
    mask = os.umask(0o077)
    try:
        yield submitit.AutoExecutor(folder=folder, cluster="slurm")
    except submitit.core.utils.FailedJobError as error:
        reason = str(error).strip().splitlines()[-1]
        raise ConfigError(
            f"SLURM refused the job: {reason}; see launch.partition, launch.account, --plan"
        ) from None
    finally:
        os.umask(mask)


@dataclass
class Evaluation:
    """One evaluation as a job of its own, of the run's newest checkpoint unless `arguments` name another."""

    name: str
    run: str
    arguments: tuple[str, ...] = ()  # for launch/evaluate.py

    def __call__(self) -> int:
        here = ["--cluster", "local", "--jobs", self.name, *(self.arguments or ("--newest",))]
        with local.stoppable():
            status = local.run(
                [sys.executable, "-m", "ssl_pretrain.launch.evaluate", self.run, *here]
            )
        if status:
            raise SystemExit(status)
        return status


@dataclass
class Pretraining:
    """The program of each task. It holds the command line only, no state and no secret."""

    path: str
    overrides: tuple[str, ...]
    requeue: bool = True

    def __call__(self) -> int:
        stop_signals.remember_signals()  # submitit's own handler would requeue at once, from rank 0 alone, in the middle of a step
        _become_a_rank()
        run = Path(
            next(
                value
                for key, _, value in (o.partition("=") for o in reversed(self.overrides))
                if key == "output"
            )
        )
        try:
            status = train.main([self.path, *self.overrides])
        except Exception as error:
            print(f"error: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
            status = CRASHED
        if status in (
            CRASHED,
            LOST,
        ):  # a lost rank or node rather than a mistake that would come again
            status = UNFINISHED if _made_progress(run) else 1
            if status == UNFINISHED and self.requeue:
                _requeue_and_wait(delay=3.0 * int(os.environ["RANK"]))
            os._exit(status)  # a rank may still hang in a collective with the lost one
        if status not in (0, STOPPED):
            os._exit(status)
        if status == STOPPED or not is_finished(run):
            if self.requeue:
                _requeue_and_wait(delay=0.0 if os.environ["RANK"] == "0" else GRACE_SECONDS / 2)
            os._exit(UNFINISHED)
        return 0


def _become_a_rank() -> None:
    """Set the environment variables of torchrun from SLURM's."""
    import submitit

    environment = submitit.JobEnvironment()
    restarts = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
    os.environ.update(
        RANK=str(environment.global_rank),
        WORLD_SIZE=str(environment.num_tasks),
        LOCAL_RANK=str(environment.local_rank),
        LOCAL_WORLD_SIZE=str(environment.num_tasks // environment.num_nodes),
        MASTER_ADDR=environment.hostnames[0],
        MASTER_PORT=str(
            20000 + (7 * int(environment.raw_job_id) + restarts) % 20000
        ),  # another after each requeue
    )


def _made_progress(run: Path) -> bool:
    """Return True if the run has saved a checkpoint since it last failed, and note the newest one.

    A failure that repeats at the same step is not retried.
    """
    found = list_checkpoints(run)
    if not found:
        return False
    note = run / "slurm" / f"failed.{os.environ['RANK']}.json"
    before = json.loads(note.read_text()) if note.exists() else None
    note.write_text(json.dumps(found[-1].name))
    return before != found[-1].name


def _requeue_and_wait(delay: float) -> None:
    """Ask SLURM to requeue this job, unless it has already been requeued, and wait to be ended."""
    signal.signal(signal.SIGTERM, lambda number, frame: os._exit(UNFINISHED))
    time.sleep(delay)
    job = os.environ["SLURM_JOB_ID"]
    state = subprocess.run(
        ["scontrol", "show", "job", "-o", job], capture_output=True, text=True, timeout=60
    ).stdout
    own = f"Restarts={os.environ.get('SLURM_RESTART_COUNT', '0')} "
    if "JobState=RUNNING" in state and own in state:
        print(f"asking SLURM to run job {job} again", flush=True)
        with contextlib.suppress(subprocess.SubprocessError):
            subprocess.run(["scontrol", "requeue", job], timeout=60, check=False)
    time.sleep(GRACE_SECONDS)
