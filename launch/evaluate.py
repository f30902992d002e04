"""Every checkpoint of a run gets its evaluations: python launch/evaluate.py RUN [--watch] [--jobs knn linear ...] [key=value ...]"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

if not __package__:  # run as a file from a clone
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ssl_pretrain import config as configuration
from ssl_pretrain.checkpoint.folder import is_finished, list_checkpoints, newest_checkpoint
from ssl_pretrain.checkpoint.manifest import MANIFEST
from ssl_pretrain.fault_tolerance.run_lock import find_holder
from ssl_pretrain.launch import dashboard, held_checkpoints, local, slurm
from ssl_pretrain.launch.pretrain import EVALUATIONS, check_evaluations
from ssl_pretrain.schema import POSITIVE
from ssl_pretrain.system.exit_status import SKIPPED, STOPPED

HELD = ".held"  # folder in RUN/eval of the checkpoints that are being evaluated


def main(arguments: Sequence[str] | None = None) -> int:
    with local.launching():
        return _main(arguments)


def _main(arguments: Sequence[str] | None) -> int:
    options = parse(arguments)
    try:
        check(options)
        run = options.run
        while options.watch and not (run / "config.yaml").is_file():  # started before the training
            local.wait(options.every_seconds)
            if local.stop_requested():
                return _stopped()
        held_checkpoints.release_abandoned(run / "eval" / HELD)
        jobs = Jobs(run, options)
        if options.after:
            print(
                f"submitted to SLURM, after {options.after}: {', '.join(jobs.submit_after(options.after))}"
            )
            return 0
        return watch(jobs, options) if options.watch else jobs.once()
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _stopped() -> int:
    print("stopped; the same command goes on with what is not done", flush=True)
    return STOPPED


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python launch/evaluate.py",
        description="Runs the evaluations that a run's checkpoints do not have yet, each in a process of its own, here or as SLURM jobs. "
        "Results go to RUN/eval/<checkpoint>/<name>.json, the newest to RUN/eval/<name>.json, to the run's W&B page if it has one, "
        "and into RUN/report.html. Started again it does not repeat what is done.",
        epilog="""examples:
  python launch/evaluate.py runs/simclr_imagenet                          what evaluation.at_end lists, of every checkpoint there
  python launch/evaluate.py runs/simclr_imagenet --watch --jobs knn       and of every new one, until the training has ended
  python launch/evaluate.py runs/simclr_imagenet --newest --jobs linear spectrum
  python launch/evaluate.py runs/simclr_imagenet --after 1234             on SLURM, once job 1234 has ended well""",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", metavar="RUN", type=Path, help="folder of the run")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="for data.* and evaluation.* only, such as data.root=/new/place",
    )
    parser.add_argument(
        "--jobs",
        nargs="+",
        metavar="NAME",
        help=f"of {', '.join(EVALUATIONS)} (default: evaluation.at_end of the run)",
    )
    parser.add_argument(
        "--watch",
        action="store_true",
        help="go on with new checkpoints until the training has ended",
    )
    parser.add_argument("--newest", action="store_true", help="of the newest checkpoint alone")
    parser.add_argument("--checkpoint", type=Path, metavar="FOLDER", help="of this one alone")
    parser.add_argument(
        "--device",
        default="auto",
        help="cpu or cuda (default: cuda where there is one that no training of RUN holds)",
    )
    parser.add_argument(
        "--share-gpu", action="store_true", help="use the GPU while RUN trains on this machine"
    )
    parser.add_argument(
        "--cluster",
        choices=["auto", "local", "slurm"],
        help="where the jobs run (default: launch.cluster of the run)",
    )
    parser.add_argument(
        "--after",
        default="",
        metavar="JOB",
        help="on SLURM: begin once this job, the training, has ended well",
    )
    parser.add_argument(
        "--every-seconds",
        type=POSITIVE,
        default=30.0,
        help="between two looks of --watch (default: 30)",
    )
    parser.add_argument(
        "--give-up-minutes",
        type=POSITIVE,
        default=60.0,
        help="--watch ends when nobody has trained for so long (default: 60)",
    )
    return parser.parse_intermixed_args(arguments)


def check(options: argparse.Namespace) -> None:
    """Raises ValueError for a run, a job or a device that cannot be."""
    if not options.watch and not options.run.is_dir():
        raise ValueError(
            f"{options.run}: there is no such run folder; give the `output` of a run's config, or --watch to wait for it"
        )
    unknown = [name for name in options.jobs or [] if name not in EVALUATIONS]
    if unknown:
        raise ValueError(
            f"--jobs: {unknown[0]!r} is not an evaluation; choose among: {', '.join(EVALUATIONS)}"
        )
    trainer = find_holder(options.run)
    if (
        options.device.startswith("cuda")
        and trainer
        and trainer.is_on_this_host()
        and not options.share_gpu
    ):
        raise ValueError(
            f"--device {options.device}: process {trainer.pid} trains in {options.run} on this machine and holds its GPUs; "
            "add --share-gpu to share them, or take --device cpu"
        )


class Jobs:
    """The evaluations of one run: which are due, and how one is run."""

    def __init__(self, run: Path, options: argparse.Namespace):
        self.run, self.options = run, options
        self.config = configuration.load(
            run / "config.yaml", [f"output={run}"]
        )  # it may have moved
        if not options.jobs:
            check_evaluations(self.config)
        names = options.jobs or self.config.evaluation.at_end
        self.names, self.report = [name for name in names if name != "report"], "report" in names
        cluster = options.cluster or self.config.launch.cluster
        self.on_slurm = cluster == "slurm" or (cluster == "auto" and slurm.here())
        self.tried: set[tuple[str, str]] = set()
        self.failed: list[str] = []
        self._said = ""

    def due(self) -> list[tuple[Path, str]]:
        """(checkpoint, name) of what is not done and was not tried by this process, oldest first."""
        found = [self.options.checkpoint] if self.options.checkpoint else list_checkpoints(self.run)
        if self.options.newest and found:
            found = [newest_checkpoint(self.run)]
        each = [(path, name) for path in found for name in self.names]
        return [
            (path, name)
            for path, name in each
            if not self._done(path, name) and (path.name, name) not in self.tried
        ]

    def _done(self, path: Path, name: str) -> bool:
        folder = self.run / "eval" / path.name
        return (folder / f"{name}.json").exists() or (folder / f".{name}.done").exists()

    def once(self) -> int:
        """Runs or submits what is due, then the report; 1 if an evaluation failed."""
        due = self.due()
        if self.on_slurm:
            return self._submit(due)
        for path, name in due:
            self.judge(path, name)
            if local.stop_requested():
                return _stopped()
        if due:
            dashboard.send(self.run)
        if self.report and (due or not self.names):
            command = [
                sys.executable,
                "-m",
                "ssl_pretrain.eval.report",
                str(self.run),
                "--device",
                self.device(),
                *self.options.overrides,
            ]
            if local.run(command) and not local.stop_requested():
                self.failed.append("report")
        if self.failed:
            print(f"error: failed: {', '.join(self.failed)}", file=sys.stderr)
        if local.stop_requested():
            return _stopped()
        return 1 if self.failed else 0

    def judge(self, path: Path, name: str) -> None:
        """One evaluation of one checkpoint, in a process of its own; a checkpoint pruned before its turn is passed over with a line."""
        self.tried.add((path.name, name))
        with held(path, self.run / "eval" / HELD) as kept:
            if kept is None:
                print(
                    f"skipped {name} of {path.name}: pruned before its turn; checkpoint.keep_last keeps more",
                    flush=True,
                )
                return
            print(f"--- {name} of {path.name}", flush=True)
            where = ["--skip-unlabeled", "--checkpoint", str(kept), "--device", self.device()]
            patience = ["nice", "-n", "10"] if where[-1] == "cpu" and shutil.which("nice") else []
            status = local.run(
                [
                    *patience,
                    sys.executable,
                    "-m",
                    f"ssl_pretrain.eval.{name}",
                    str(self.run),
                    *where,
                    *self.options.overrides,
                ]
            )
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

    def device(self) -> str:
        """The CPU while the run trains on this machine, unless told to share its GPUs."""
        trainer = find_holder(self.run)
        if (
            self.options.device != "auto"
            or self.options.share_gpu
            or not (trainer and trainer.is_on_this_host())
        ):
            return self.options.device
        told = f"on the CPU, as process {trainer.pid} trains in {self.run} on this machine; --share-gpu takes the GPU"
        if told != self._said:
            self._said = told
            print(told, flush=True)
        return "cpu"

    def submit_after(self, job: str) -> list[str]:
        """Submits every evaluation of the newest checkpoint, one after the other, the first once `job` has ended well."""
        names = [*self.names, *(["report"] if self.report else [])]
        return slurm.submit_chain(
            self.config, [slurm.Evaluation(name, str(self.run)) for name in names], job
        )

    def _submit(self, due: list[tuple[Path, str]]) -> int:
        note = self.run / "slurm" / "evaluations.json"
        known = json.loads(note.read_text()) if note.exists() else {}
        new = [
            (path, name)
            for path, name in due
            if not slurm.waiting_or_running(known.get(f"{path.name}/{name}", ""))
        ]
        self.tried |= {(path.name, name) for path, name in due}
        jobs = [
            slurm.Evaluation(name, str(self.run), ("--checkpoint", str(path))) for path, name in new
        ]
        ids = slurm.submit_evaluations(self.config, jobs)
        if ids:
            note.write_text(
                json.dumps(
                    known | {f"{path.name}/{name}": job for (path, name), job in zip(new, ids)},
                    indent=1,
                )
            )
            print(
                f"submitted to SLURM: {', '.join(f'{name} of {path.name}: {job}' for (path, name), job in zip(new, ids))}",
                flush=True,
            )
        if self.report and (ids or not self.names):
            after = f"afterany:{':'.join(ids)}" if ids else ""  # whether they failed or not
            slurm.submit_evaluations(
                self.config, [slurm.Evaluation("report", str(self.run))], after
            )
        return 0


@contextmanager
def held(path: Path, folder: Path) -> Iterator[Path | None]:
    """The checkpoint by hard links, which stay whole when the training prunes it; None where it has gone already.

    Where the file system has no hard links, the checkpoint itself.
    """
    with held_checkpoints.claim(folder) as own:
        yield linked(path, own / path.name)


def linked(path: Path, to: Path) -> Path | None:
    """`to`, now with hard links to all files of the checkpoint; None where it was pruned before all were linked."""
    to.mkdir(parents=True, exist_ok=True)
    try:
        for file in sorted(path.rglob("*")):  # folders before what is in them
            other = to / file.relative_to(path)
            if file.is_dir():
                other.mkdir(exist_ok=True)
            else:
                os.link(file, other)
        manifest = json.loads((to / MANIFEST).read_text())
        return to if all((to / name).exists() for name in manifest["files"]) else None
    except FileNotFoundError:
        return None
    except (
        OSError,
        ValueError,
        KeyError,
    ):  # no hard links here, or damaged: the evaluation says so
        return path if path.exists() else None


def watch(jobs: Jobs, options: argparse.Namespace) -> int:
    """Evaluates every new checkpoint until the training has ended and all are done; 1 if an evaluation failed."""
    alone_since = None
    while True:
        status = jobs.once()
        if local.stop_requested():
            return status
        if is_finished(jobs.run) and not jobs.due():
            return status
        alone_since = None if find_holder(jobs.run) else alone_since or time.monotonic()
        if alone_since and time.monotonic() - alone_since > 60 * options.give_up_minutes:
            print(
                f"nobody has trained in {jobs.run} for {options.give_up_minutes:g} minutes and it has not reached its end: gave up",
                flush=True,
            )
            return status
        local.wait(options.every_seconds)
        if local.stop_requested():
            return _stopped()


if __name__ == "__main__":
    sys.exit(main())
