"""Programs of SLURM jobs, which submitit pickles at submission and calls in each task."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from ssl_pretrain import train
from ssl_pretrain.checkpoint.folder import is_finished, list_checkpoints
from ssl_pretrain.launch import local
from ssl_pretrain.system import stop_signals
from ssl_pretrain.system.exit_status import LOST, STOPPED

UNFINISHED = STOPPED  # exit status of every rank until the run has ended
UNEXPECTED_ERROR = -1  # stands for an exception that training does not handle
GRACE_SECONDS = 120  # longest wait for SLURM to end the ranks after a requeue


@dataclass
class EvaluationJob:
    """One evaluation of the run's newest checkpoint, unless `arguments` name another."""

    name: str
    run: str
    arguments: tuple[str, ...] = ()  # for launch/evaluate.py

    def __call__(self) -> int:
        """Run launch/evaluate.py in this task."""
        options = ["--cluster", "local", "--jobs", self.name, *(self.arguments or ("--newest",))]
        with local.stoppable():
            status = local.run(
                [sys.executable, "-m", "ssl_pretrain.launch.evaluate", self.run, *options]
            )
        if status:
            raise SystemExit(status)
        return status


@dataclass
class PretrainingJob:
    """Training on the ranks of a job. It holds the command line only, no state and no secret."""

    path: str
    overrides: tuple[str, ...]
    requeue: bool = True

    def __call__(self) -> int:
        """Train as one rank. Requeue the job unless the run has ended or failed for good."""
        # submitit's own handler would requeue at once, from rank 0 alone, in the middle of a step.
        stop_signals.remember_signals()
        _become_a_rank()
        status = self._train()
        if status in (UNEXPECTED_ERROR, LOST):  # a lost rank or node, rather than a mistake
            self._end_after_a_loss()
        if status not in (0, STOPPED):
            os._exit(status)
        if status == STOPPED or not is_finished(self._run()):
            if self.requeue:
                _requeue_and_wait(delay=0.0 if os.environ["RANK"] == "0" else GRACE_SECONDS / 2)
            os._exit(UNFINISHED)
        return 0

    def _run(self) -> Path:
        outputs = [o.removeprefix("output=") for o in self.overrides if o.startswith("output=")]
        return Path(outputs[-1])

    def _train(self) -> int:
        try:
            return train.main([self.path, *self.overrides])
        except Exception as error:
            print(f"error: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
            return UNEXPECTED_ERROR

    def _end_after_a_loss(self) -> None:
        """Exit, and requeue the job if the run has made progress since it last failed."""
        status = UNFINISHED if _has_new_checkpoint(self._run()) else 1
        if status == UNFINISHED:
            _note_failure(self._run())
            if self.requeue:
                _requeue_and_wait(delay=3.0 * int(os.environ["RANK"]))
        os._exit(status)  # a thread may still hang in a collective with the lost rank


def _become_a_rank() -> None:
    """Set torchrun's environment variables from SLURM's."""
    import submitit

    environment = submitit.JobEnvironment()
    restarts = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
    port = 20000 + (7 * int(environment.raw_job_id) + restarts) % 20000  # new after each requeue
    os.environ.update(
        RANK=str(environment.global_rank),
        WORLD_SIZE=str(environment.num_tasks),
        LOCAL_RANK=str(environment.local_rank),
        LOCAL_WORLD_SIZE=str(environment.num_tasks // environment.num_nodes),
        MASTER_ADDR=environment.hostnames[0],
        MASTER_PORT=str(port),
    )


def _failure_note(run: Path) -> Path:
    """Return the file with the newest checkpoint at this rank's last failure."""
    return run / "slurm" / f"failed.{os.environ['RANK']}.json"


def _has_new_checkpoint(run: Path) -> bool:
    """Return True if the run has saved a checkpoint since it last failed.

    A failure that repeats at the same step is not retried.
    """
    checkpoints, note = list_checkpoints(run), _failure_note(run)
    if not checkpoints:
        return False
    return not note.exists() or json.loads(note.read_text()) != checkpoints[-1].name


def _note_failure(run: Path) -> None:
    _failure_note(run).write_text(json.dumps(list_checkpoints(run)[-1].name))


def _requeue_and_wait(delay: float) -> None:
    """Ask SLURM to requeue this job, unless it is already requeued, and wait to be ended."""
    signal.signal(signal.SIGTERM, lambda number, frame: os._exit(UNFINISHED))
    time.sleep(delay)
    job = os.environ["SLURM_JOB_ID"]
    state = subprocess.run(
        ["scontrol", "show", "job", "-o", job], capture_output=True, text=True, timeout=60
    ).stdout
    this_start = f"Restarts={os.environ.get('SLURM_RESTART_COUNT', '0')} "
    if "JobState=RUNNING" in state and this_start in state:
        print(f"asking SLURM to run job {job} again", flush=True)
        with suppress(subprocess.SubprocessError):
            subprocess.run(["scontrol", "requeue", job], timeout=60, check=False)
    time.sleep(GRACE_SECONDS)
