"""Evaluations of one run's checkpoints: those that are due, and how each one runs."""

import argparse
import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

from ssl_pretrain import config as configuration
from ssl_pretrain.checkpoint.folder import list_checkpoints, newest_checkpoint
from ssl_pretrain.fault_tolerance.run_lock import find_holder
from ssl_pretrain.launch import dashboard, held_checkpoints, local, slurm, slurm_submit
from ssl_pretrain.launch.final_evaluations import check_evaluations, command
from ssl_pretrain.launch.slurm_job import EvaluationJob
from ssl_pretrain.system.exit_status import SKIPPED, STOPPED

HELD = ".held"  # folder in RUN/eval for the checkpoints that are being evaluated


def report_stop() -> int:
    """Print that the command was asked to stop and return its exit status."""
    print("stopped; the same command goes on with what is not done", flush=True)
    return STOPPED


class EvaluationJobs:
    """The evaluations of one run.

    Attributes:
        run: Folder of the run.
        failed: Evaluations that failed in this process, in words.
    """

    def __init__(self, run: Path, options: argparse.Namespace):
        self.run, self.failed, self._options = run, list[str](), options
        # The folder may have been moved since the run was configured.
        self._config = configuration.load(run / "config.yaml", [f"output={run}"])
        if not options.jobs:
            check_evaluations(self._config)
        names = options.jobs or self._config.evaluation.at_end
        self._names = [name for name in names if name != "report"]
        self._wants_report = "report" in names
        launch = self._config.launch
        self._on_slurm = slurm.is_submitted(
            replace(launch, cluster=options.cluster or launch.cluster)
        )
        self._tried: set[tuple[str, str]] = set()  # names of checkpoint and evaluation
        self._last_notice = ""

    def due(self) -> list[tuple[Path, str]]:
        """Return the checkpoint and the name of each evaluation that is due, oldest first.

        Evaluations that this process has tried are left out.
        """
        checkpoints = list_checkpoints(self.run)
        if self._options.checkpoint:
            checkpoints = [self._options.checkpoint]
        if self._options.newest and checkpoints:
            checkpoints = [newest_checkpoint(self.run)]
        return [
            (path, name)
            for path in checkpoints
            for name in self._names
            if not self._is_done(path, name) and (path.name, name) not in self._tried
        ]

    def _is_done(self, path: Path, name: str) -> bool:
        folder = self.run / "eval" / path.name
        return (folder / f"{name}.json").exists() or (folder / f".{name}.done").exists()

    def run_due(self) -> int:
        """Run or submit the evaluations that are due, then the report.

        Returns:
            The exit status: 1 if an evaluation failed.
        """
        due = self.due()
        if self._on_slurm:
            self._submit(due)
            return 0
        for path, name in due:
            self.evaluate(path, name)
            if local.stop_requested():
                return report_stop()
        if due:
            dashboard.send(self.run)
        if self._wants_report and (due or not self._names):
            report = command(
                "report", self.run, "--device", self.device(), *self._options.overrides
            )
            if local.run(report) and not local.stop_requested():
                self.failed.append("report")
        if self.failed:
            print(f"error: failed: {', '.join(self.failed)}", file=sys.stderr)
        if local.stop_requested():
            return report_stop()
        return 1 if self.failed else 0

    def evaluate(self, path: Path, name: str) -> None:
        """Run one evaluation of one checkpoint in a process of its own.

        A checkpoint that the training has pruned is skipped with a message.
        """
        self._tried.add((path.name, name))
        with held_checkpoints.hold(path, self.run / "eval" / HELD) as checkpoint:
            if checkpoint is None:
                print(
                    f"skipped {name} of {path.name}: pruned before its turn; "
                    "checkpoint.keep_last keeps more",
                    flush=True,
                )
                return
            print(f"--- {name} of {path.name}", flush=True)
            status = local.run(self._command(checkpoint, name))
        if status == SKIPPED or local.stop_requested():
            return
        if status == 0:
            folder = self.run / "eval" / path.name
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f".{name}.done").touch()
        elif path.exists():
            self.failed.append(f"{name} of {path.name}")
        else:
            print(f"skipped {name} of {path.name}: pruned while it was read", flush=True)

    def _command(self, checkpoint: Path, name: str) -> list[str]:
        device = self.device()
        options = ["--skip-unlabeled", "--checkpoint", str(checkpoint), "--device", device]
        nice = ["nice", "-n", "10"] if device == "cpu" and shutil.which("nice") else []
        return [*nice, *command(name, self.run, *options, *self._options.overrides)]

    def device(self) -> str:
        """Return the device to evaluate on.

        It is the CPU while the run trains on this machine, unless the options say otherwise.
        """
        options, trainer = self._options, find_holder(self.run)
        if options.device != "auto" or options.share_gpu:
            return str(options.device)
        if trainer is None or not trainer.is_on_this_host():
            return "auto"
        notice = (
            f"on the CPU, as process {trainer.pid} trains in {self.run} on this machine; "
            "--share-gpu takes the GPU"
        )
        if notice != self._last_notice:
            self._last_notice = notice
            print(notice, flush=True)
        return "cpu"

    def submit_after(self, job: str) -> list[str]:
        """Submit every evaluation of the newest checkpoint, for when `job` has succeeded.

        Returns:
            The job ids, in the order in which the jobs run.
        """
        names = [*self._names, *(["report"] if self._wants_report else [])]
        jobs = [EvaluationJob(name, str(self.run)) for name in names]
        return slurm_submit.submit_chain(self._config, jobs, job)

    def _submit(self, due: list[tuple[Path, str]]) -> None:
        """Submit the evaluations that are neither done nor queued."""
        file = self.run / "slurm" / "evaluations.json"  # job ids by checkpoint and evaluation
        known = json.loads(file.read_text()) if file.exists() else {}
        new = [
            (path, name)
            for path, name in due
            if not slurm.is_queued(known.get(f"{path.name}/{name}", ""))
        ]
        self._tried |= {(path.name, name) for path, name in due}
        jobs = [
            EvaluationJob(name, str(self.run), ("--checkpoint", str(path))) for path, name in new
        ]
        ids = slurm_submit.submit_evaluations(self._config, jobs)
        if ids:
            known |= {f"{path.name}/{name}": job for (path, name), job in zip(new, ids)}
            file.write_text(json.dumps(known, indent=1))
            lines = [f"{name} of {path.name}: {job}" for (path, name), job in zip(new, ids)]
            print(f"submitted to SLURM: {', '.join(lines)}", flush=True)
        if self._wants_report and (ids or not self._names):
            dependency = f"afterany:{':'.join(ids)}" if ids else ""  # even if some of them fail
            report = EvaluationJob("report", str(self.run))
            slurm_submit.submit_evaluations(self._config, [report], dependency)
