"""Run the due evaluations of a training run, on this machine or as SLURM jobs."""

import argparse
import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

from ssl_pretrain import config as configuration
from ssl_pretrain.checkpoint.folder import list_checkpoints, newest_checkpoint
from ssl_pretrain.eval.trained_run import SENTENCE_EVALUATIONS
from ssl_pretrain.fault_tolerance.run_lock import find_holder
from ssl_pretrain.launch import dashboard, held_checkpoints, local, slurm, slurm_job
from ssl_pretrain.system.exit_status import NO_LABELS, STOPPED

EVALUATIONS = (
    *("knn", "linear", "attentive", "spectrum", "retrieval", "robustness"),
    *("semi", "finetune", "zeroshot", "captions", "sts", "text_pairs", "export", "report"),
)
WITH_TEXTS = ("zeroshot", "captions")  # depend on the section `text` as well
HELD_FOLDER = ".held"  # folder in RUN/eval with links to the checkpoints that are being evaluated


def check_evaluation_names(names: list[str], option: str) -> None:
    """Raise ConfigError if `option` lists a name that is not an evaluation."""
    unknown = [name for name in names if name not in EVALUATIONS]
    if unknown:
        raise configuration.ConfigError(
            f"{option}: {unknown[0]!r} is not an evaluation; choose among: {', '.join(EVALUATIONS)}"
        )


def check_final_evaluations(config: configuration.RunConfig) -> None:
    """Raise ConfigError if `evaluation.at_end` lists what does not exist or cannot work."""
    at_end, takes_images = config.evaluation.at_end, configuration.takes_images(config)
    check_evaluation_names(at_end, "evaluation.at_end")
    names = [name for name in EVALUATIONS if (name not in SENTENCE_EVALUATIONS) == takes_images]
    if unsuitable := [name for name in at_end if name not in names]:
        needed, taken = ("sentences", "images") if takes_images else ("images", "sentences")
        raise configuration.ConfigError(
            f"evaluation.at_end: {unsuitable[0]} needs a method of {needed}, and "
            f"{config.method.name} takes {taken}; choose among: {', '.join(names)}"
        )


def evaluation_command(name: str, run: str | Path, *arguments: str) -> list[str]:
    """Return the command line that runs the evaluation `name`."""
    return [sys.executable, "-m", f"ssl_pretrain.eval.{name}", str(run), *arguments]


def run_final_evaluations(
    config: configuration.RunConfig, evaluation_args: dict[str, list[str]]
) -> dict[str, int]:
    """Run the evaluations in `evaluation.at_end` that are missing for the last checkpoint.

    An evaluation that succeeds saves its settings in RUN/eval/<checkpoint>/.<name>.done and is
    repeated only if they change. The report is also repeated after any other evaluation has
    succeeded. If an evaluation fails, the others still run. A request to stop skips the rest.

    Args:
        config: The run's configuration.
        evaluation_args: Additional command-line arguments by name of the evaluation.

    Returns:
        The exit status of each evaluation that was run, by name.
    """
    values = configuration.to_dict(config)
    folder = Path(config.output) / "eval" / newest_checkpoint(config.output).name
    statuses: dict[str, int] = {}
    for name in config.evaluation.at_end:
        arguments = evaluation_args.get(name, [])
        sections = ["data", "evaluation", *(["text"] if name in WITH_TEXTS else [])]
        settings = {key: values[key] for key in sections} | {"arguments": arguments}
        settings_text, done_file = json.dumps(settings, indent=1), folder / f".{name}.done"
        is_done = done_file.is_file() and done_file.read_text() == settings_text
        if is_done and not (name == "report" and 0 in statuses.values()):
            print(
                f"--- {name}: already done; to repeat it, run "
                f"python -m ssl_pretrain.eval.{name} {config.output}",
                flush=True,
            )
            continue
        print(f"--- {name}", flush=True)
        command = evaluation_command(name, config.output, "--skip-unlabeled", *arguments)
        statuses[name] = local.run(command)
        if local.stop_requested():
            print(
                f"stopped during {name}, after pretraining; run the same command to continue",
                flush=True,
            )
            return statuses
        if statuses[name] == 0:
            folder.mkdir(parents=True, exist_ok=True)
            done_file.write_text(settings_text)
    return statuses


def report_stop() -> int:
    """Print how to continue after a request to stop, and return the exit status."""
    print("stopped; run the same command to continue with the remaining evaluations", flush=True)
    return STOPPED


class EvaluationJobs:
    """The evaluations of one run's checkpoints, as processes on this machine or as SLURM jobs.

    Attributes:
        run: Folder of the run.
        failures: Descriptions of the evaluations that failed in this process.
    """

    def __init__(self, run: Path, options: argparse.Namespace):
        self.run, self.failures, self._options = run, list[str](), options
        # The folder may have been moved since the run was configured.
        self._config = configuration.load(run / "config.yaml", [f"output={run}"])
        at_end, launch = self._config.evaluation.at_end, self._config.launch
        if not options.jobs:
            check_final_evaluations(self._config)
        names = options.jobs or at_end
        self._names = [name for name in names if name != "report"]
        self._wants_report = "report" in names
        self._on_slurm = slurm.uses_slurm(
            replace(launch, cluster=options.cluster or launch.cluster)
        )
        self._attempted: set[tuple[str, str]] = set()  # names of the checkpoint and the evaluation
        self._last_notice = ""

    def due_evaluations(self) -> list[tuple[Path, str]]:
        """Return the checkpoint and the name of each evaluation that is due, oldest first.

        Evaluations that this process has already attempted are left out.
        """
        checkpoints = list_checkpoints(self.run)
        if self._options.checkpoint:
            checkpoints = [self._options.checkpoint]
        if self._options.newest and checkpoints:
            checkpoints = [newest_checkpoint(self.run)]
        return [
            (checkpoint, name)
            for checkpoint in checkpoints
            for name in self._names
            if not self._is_done(checkpoint, name)
            and (checkpoint.name, name) not in self._attempted
        ]

    def _is_done(self, checkpoint: Path, name: str) -> bool:
        folder = self.run / "eval" / checkpoint.name
        return (folder / f"{name}.json").exists() or (folder / f".{name}.done").exists()

    def run_due_evaluations(self) -> int:
        """Run or submit the evaluations that are due, then the report.

        Returns:
            The exit status, which is 75 after a request to stop and 1 if an evaluation failed.
        """
        due = self.due_evaluations()
        if self._on_slurm:
            self._submit(due)
            return 0
        for checkpoint, name in due:
            self.evaluate(checkpoint, name)
            if local.stop_requested():
                return report_stop()
        if due:
            dashboard.send_evaluations_unless_training(self.run)
        if self._wants_report and (due or not self._names):
            device = ["--device", self.choose_device()]
            report = evaluation_command("report", self.run, *device, *self._options.overrides)
            if local.run(report) and not local.stop_requested():
                self.failures.append("report")
        if self.failures:
            print(f"error: failed: {', '.join(self.failures)}", file=sys.stderr)
        if local.stop_requested():
            return report_stop()
        return 1 if self.failures else 0

    def evaluate(self, checkpoint: Path, name: str) -> None:
        """Run one evaluation of one checkpoint in its own process.

        A checkpoint that the training run has pruned is skipped with a message.
        """
        self._attempted.add((checkpoint.name, name))
        with held_checkpoints.hold(checkpoint, self.run / "eval" / HELD_FOLDER) as held_checkpoint:
            if held_checkpoint is None:
                print(
                    f"skipped {name} of {checkpoint.name}: the training run pruned this checkpoint "
                    "before its turn; to keep more, raise checkpoint.keep_last",
                    flush=True,
                )
                return
            print(f"--- {name} of {checkpoint.name}", flush=True)
            device = self.choose_device()
            nice = ["nice", "-n", "10"] if device == "cpu" and shutil.which("nice") else []
            arguments = ["--skip-unlabeled", "--checkpoint", str(held_checkpoint)]
            arguments += ["--device", device, *self._options.overrides]
            command = evaluation_command(name, self.run, *arguments)
            status = local.run([*nice, *command])
        if status == NO_LABELS or local.stop_requested():
            return
        if status == 0:
            folder = self.run / "eval" / checkpoint.name
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f".{name}.done").touch()
        elif checkpoint.exists():
            self.failures.append(f"{name} of {checkpoint.name}")
        else:
            print(
                f"skipped {name} of {checkpoint.name}: the training run pruned this checkpoint "
                "during the evaluation; to keep more, raise checkpoint.keep_last",
                flush=True,
            )

    def choose_device(self) -> str:
        """Choose the device of the next evaluation, and print a notice when it changes to the CPU.

        While the run trains on this machine, the device is the CPU unless an option overrides it.
        """
        options, trainer = self._options, find_holder(self.run)
        if options.device != "auto" or options.share_gpu:
            return str(options.device)
        if trainer is None or not trainer.is_on_this_host():
            return "auto"
        notice = (
            f"evaluating on the CPU, because process {trainer.pid} is training in {self.run} on "
            "this machine; add --share-gpu to use the GPU"
        )
        if notice != self._last_notice:
            self._last_notice = notice
            print(notice, flush=True)
        return "cpu"

    def submit_after(self, job_id: str) -> list[str]:
        """Submit every evaluation of the newest checkpoint, to start once the job has succeeded.

        Returns:
            The job ids, in the order in which the jobs run.
        """
        report = ["report"] if self._wants_report else []
        return slurm_job.submit_evaluations_after(self._config, [*self._names, *report], job_id)

    def _submit(self, due: list[tuple[Path, str]]) -> None:
        """Submit the evaluations that are due and not yet queued."""
        self._attempted |= {(checkpoint.name, name) for checkpoint, name in due}
        queue_file = self.run / "slurm" / "evaluations.json"
        # Job ids by "<checkpoint>/<evaluation>".
        job_ids = json.loads(queue_file.read_text()) if queue_file.exists() else {}
        jobs = {
            f"{checkpoint.name}/{name}": slurm_job.EvaluationJob(
                name, str(self.run), ("--checkpoint", str(checkpoint))
            )
            for checkpoint, name in due
            if not slurm.is_queued(job_ids.get(f"{checkpoint.name}/{name}", ""))
        }
        new_ids = slurm_job.submit_evaluations(self._config, list(jobs.values()))
        if new_ids:
            queue_file.write_text(json.dumps(job_ids | dict(zip(jobs, new_ids)), indent=1))
            names = [" of ".join(reversed(key.split("/"))) for key in jobs]
            entries = [f"{name}: {job_id}" for name, job_id in zip(names, new_ids)]
            print(f"submitted to SLURM: {', '.join(entries)}", flush=True)
        if self._wants_report and (new_ids or not self._names):
            # The report runs even if some evaluations fail.
            dependency = f"afterany:{':'.join(new_ids)}" if new_ids else ""
            report = slurm_job.EvaluationJob("report", str(self.run))
            slurm_job.submit_evaluations(self._config, [report], dependency)
