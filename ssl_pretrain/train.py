"""Pretrains one backbone. One process here, or every rank under torchrun:

python -m ssl_pretrain.train configs/simclr_digits.yaml
torchrun --nproc-per-node 8 -m ssl_pretrain.train configs/simclr_imagenet.yaml data.root=/data/imagenet
"""

from __future__ import annotations

import argparse
import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

import torch

from ssl_pretrain import build, methods
from ssl_pretrain import config as configuration
from ssl_pretrain.checkpoint import rank_agreement
from ssl_pretrain.checkpoint import state as checkpoint
from ssl_pretrain.config import RunConfig
from ssl_pretrain.data import loader, preflight, workers
from ssl_pretrain.distributed import collectives, process_group, stop_request
from ssl_pretrain.distributed.process_group import LostRankError, RendezvousError
from ssl_pretrain.fault_tolerance.nan_guard import Guard
from ssl_pretrain.fault_tolerance.run_lock import Lock
from ssl_pretrain.monitoring import background_writer, collapse, image_grids
from ssl_pretrain.monitoring import logger as log
from ssl_pretrain.monitoring.console import lasting_output
from ssl_pretrain.optim import optimizers as optim
from ssl_pretrain.parallel import memory
from ssl_pretrain.parallel.execution import Execution
from ssl_pretrain.parallel.replicas import check_replicas
from ssl_pretrain.planning import flops, plan
from ssl_pretrain.schema import COUNT
from ssl_pretrain.system import durable_files, stop_signals
from ssl_pretrain.system.exit_status import (
    DISK_REFUSED,
    LOST,
    MISTAKE,
    STOPPED,
    note_end,
    status_to_repeat,
    stopped_status,
)

# Exit statuses of errors that are not the user's mistakes.
STATUS: dict[type[Exception], int] = {
    RendezvousError: LOST,
    LostRankError: LOST,
    workers.LostWorkerError: LOST,
    checkpoint.SaveError: DISK_REFUSED,
}


class Outcome(int):
    """How far a run has come: the optimizer steps done, those that were asked for, and those of the whole run."""

    end: int
    last_step: int

    def __new__(cls, step: int, end: int, last_step: int) -> Outcome:
        outcome = super().__new__(cls, step)
        outcome.end = end
        outcome.last_step = last_step
        return outcome

    def __getnewargs__(self) -> tuple[int, int, int]:  # type: ignore[override]
        return int(self), self.end, self.last_step

    @property
    def step(self) -> int:
        return int(self)

    @property
    def finished(self) -> bool:
        return self.step >= self.last_step

    @property
    def interrupted(self) -> bool:
        """True if a signal or a full disk ended it before the steps that were asked for."""
        return self.step < self.end


def train(
    config: RunConfig,
    device: torch.device,
    stop_after: int | None = None,
    fake_preempt: int | None = None,
) -> Outcome:
    """Train to the end, to a stop request, or for `stop_after` steps, whichever comes first.

    The run is in `config.output`: config.yaml, metrics.jsonl, views.png and checkpoints, from which
    it goes on. A run that has finished is left as it is.

    Raises:
        ValueError: The run cannot begin or go on as configured, or another thread trains already.
        SaveError: The disk refused a checkpoint or a record.
        LostRankError: Another rank ended.
        LostWorkerError: A process that reads images was killed.
    """
    run = Path(config.output)
    workers.refuse_in_worker()
    with _alone_in_process(), process_group.naming_lost_ranks():
        rank_agreement.check_programs(configuration.to_dict(config), type(config.method).__module__)
        return _train_unless_finished(config, device, run, stop_after, fake_preempt)


_training = threading.Lock()


@contextmanager
def _alone_in_process() -> Iterator[None]:
    """Refuse a second training at the same time, which would take random numbers from the same generator.

    Raises:
        ValueError: Another thread of this process trains.
    """
    if not _training.acquire(blocking=False):
        raise ValueError(
            "another thread of this process is training, and two at a time would change each other's weights; "
            "train one after the other, or start each in a process of its own"
        )
    try:
        yield
    finally:
        _training.release()


def _train_unless_finished(
    config: RunConfig,
    device: torch.device,
    run: Path,
    stop_after: int | None,
    fake_preempt: int | None,
) -> Outcome:
    configuration.check(config, process_group.world_size())
    if (earlier := _finished_before(config, run)) is not None:
        _say(
            f"finished before: {run} has done its {earlier.last_step} steps, the last in "
            f"{checkpoint.folder_of(run, earlier.step)}. Nothing was trained or changed; "
            "give a new output for another run"
        )
        return earlier
    outcome = _train_in(config, device, run, stop_after, fake_preempt)
    done = f"{outcome.step} of {outcome.last_step} steps, saved in {checkpoint.folder_of(run, outcome.step)}"
    if outcome.finished:
        _say(f"finished: {done}. Evaluate it: python -m ssl_pretrain.eval.knn {run}")
    else:
        _say(f"stopped: {done}. The same command goes on from there")
    return outcome


def _say(text: str) -> None:
    if process_group.is_main():
        print(text, flush=True)


def _finished_before(config: RunConfig, run: Path) -> Outcome | None:
    """Return the outcome of a run that has nothing left to train, None for any other.

    Nothing is written, and rank 0 alone reads.

    Raises:
        ValueError: The run has done these epochs already and was configured otherwise.
    """
    found: Outcome | None = None
    problem: str | None = None
    if process_group.is_main() and config.checkpoint.resume:
        try:
            found = _done_already(config, run)
        except ValueError as error:
            problem = str(error)
    found, problem = collectives.broadcast_object((found, problem))
    if problem:
        raise ValueError(problem)
    return found


def _done_already(config: RunConfig, run: Path) -> Outcome | None:
    """Return the outcome of a run whose newest whole checkpoint has all steps of `config.epochs`."""
    path = checkpoint.last_that_reached(run, config.epochs)
    if path is None:
        return None
    manifest = checkpoint.opened(path, verified=True)
    epochs, step = manifest["config"]["epochs"], manifest["step"]
    if epochs != config.epochs:
        raise ValueError(
            f"epochs: {config.epochs} leaves nothing to train: {run} has reached step {step} with epochs={epochs}. "
            f"Nothing was changed; give epochs={epochs} or more, or a new output"
        )
    configuration.compare_for_resume(manifest["config"], config, str(path))
    return Outcome(step, step, manifest["last_step"])


def _train_in(
    config: RunConfig,
    device: torch.device,
    run: Path,
    stop_after: int | None,
    fake_preempt: int | None,
) -> Outcome:
    """Train in the run's folder, which is locked meanwhile."""
    made = partial(
        loader.build, config.data, config.views, seed=config.seed, global_batch_size=config.global_batch_size, device=device,
        view_dtype=Execution.resolve(config.parallel, device).view_dtype,
    )  # fmt: skip
    with ExitStack() as closing:
        lock = closing.enter_context(Lock(run))
        batches = closing.enter_context(made())
        source = batches.source
        rank_agreement.check_data(source.fingerprint, len(source), config.data.root)
        stop = closing.enter_context(stop_request.StopRequest(pretend_at=fake_preempt))
        return _train(config, device, run, batches, stop, stop_after, closing, lock.check)


def _train(
    config: RunConfig,
    device: torch.device,
    run: Path,
    batches: loader.Loader,
    stop: stop_request.StopRequest,
    stop_after: int | None,
    closing: ExitStack,
    check_lock: Callable[[], None] = lambda: None,
) -> Outcome:
    last_step = round(config.epochs * batches.steps_per_epoch)
    method = build.build_method(config, batches.source)
    method.num_steps, method.steps_per_epoch = last_step, batches.steps_per_epoch
    execution = Execution.resolve(config.parallel, device)
    stepper = build.build_run_stepper(method, config, execution)
    model, optimizer = stepper.model, stepper.optimizer
    facts = {
        "last_step": last_step,
        "micro_batch_size": stepper.micro_batch_size,
        "data": batches.source.fingerprint,
        "wandb_id": None,
    }
    state = checkpoint.State(method, optimizer, configuration.to_dict(config), facts, check_lock)
    first_step = resume(state, config, run, batches.source.fingerprint)
    logger = closing.enter_context(log.Logger(
        config.log, run, first_step=first_step, last_step=last_step, steps_per_epoch=batches.steps_per_epoch,
        global_batch_size=config.global_batch_size, config=state.config, facts=state.facts,
        flops_per_image=build.flops_per_image(config), peak_tflops=flops.peak_tflops(device),
        on_failure=config.checkpoint.on_failure,
    ))  # fmt: skip
    drawn = {"seed": config.seed, "steps_per_epoch": batches.steps_per_epoch}
    guard = Guard(
        config.guard,
        run,
        config.log.every_steps,
        stepper.broken_embeddings,
        partial(state.roll_back, run),
        drawn,
    )
    knn = build.online_knn(config, batches, execution)
    monitor = collapse.Monitor(
        config.health, method, optimizer, first_step, logger.past, logger.alert
    )
    end = min(last_step, first_step + stop_after) if stop_after else last_step
    step = first_step

    watched = stop.watched(preflight.watched(batches, first_step, device), first_step)
    for step, batch in zip(range(first_step + 1, end + 1), logger.waits(watched)):
        check_lock()
        logger.views(
            step,
            batch.views,
            config.views.mean,
            config.views.std,
            partial(batches.described, step - 1, image_grids.NUM_IMAGES),
        )
        progress = (step - 1) / last_step
        rates = optim.set_rates(
            optimizer, config.optim, progress, config.epochs, config.global_batch_size
        )
        straggler = collectives.straggler(step, config.log.every_steps)
        embeddings, logs = stepper(step - 1, progress, batch)
        measured = monitor.at(step, embeddings) | knn.at(
            step, method.get_submodule(method.evaluated)
        )
        replaced = batches.count_replaced(step, config.log.every_steps, last_step)
        logger.step(step, logs, rates, measured | straggler | replaced)
        guard.after(step, batch.indices, logs)
        stopping = stop.agreed(step) or step == end or logger.must_stop
        if stopping or checkpoint.due(config.checkpoint, step, last_step, batches.steps_per_epoch):
            check_replicas(model)
            state.save(run, step, config.checkpoint, batches.steps_per_epoch, wait=stopping)
        if stopping:
            break
    return Outcome(step, end, last_step)


def resume(state: checkpoint.State, config: RunConfig, run: Path, fingerprint: str) -> int:
    """Prepare the run's folder, load its newest checkpoint and return the steps done, 0 for a new run."""
    checkpoint.prepare(run)
    rank_agreement.check_checkpoints(
        run, lambda: [path / checkpoint.MANIFEST for path in checkpoint.checkpoints(run)]
    )

    def compare(manifest: dict) -> None:
        configuration.compare_for_resume(
            manifest["config"], config, str(run / "checkpoints" / f"step_{manifest['step']:08d}")
        )
        if manifest.get("data", fingerprint) != fingerprint:
            raise ValueError(
                f"data.root: the training images are not those that {run} was trained on (another list of files); "
                f"give that data set, or a new output with backbone.init={run}"
            )

    first_step = state.resume(run, config.checkpoint, compare)
    write_config(config, run / "config.yaml")
    if first_step and process_group.is_main():
        print(f"resumed {run} after step {first_step}", flush=True)
    return first_step


def write_config(config: RunConfig, path: Path) -> None:
    """Write the resolved configuration on rank 0, whole or not at all.

    Raises:
        SaveError: The disk refuses it and `checkpoint.on_failure` is `stop`.
    """
    problem = None
    if process_group.is_main():
        try:
            durable_files.replace(path, configuration.to_yaml(config))
        except OSError as error:
            problem = background_writer.refused(path, error)
    background_writer.settle(problem, config.checkpoint.on_failure)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m ssl_pretrain.train",
        description="Pretrains a backbone as a YAML says; any key of it can be overridden. "
        "Started again, it goes on from the newest checkpoint of its output.",
        epilog="""examples:
  python -m ssl_pretrain.train configs/simclr_digits.yaml                      a minute on a laptop
  python -m ssl_pretrain.train configs/simclr_cifar10_cpu.yaml data.root=data/cifar10.zip optim.base_lr=0.4
  torchrun --nproc-per-node 8 -m ssl_pretrain.train configs/simclr_imagenet.yaml data.root=/data/imagenet
  python -m ssl_pretrain.train configs/simclr_imagenet.yaml --plan             what would run, without running it

keys: method, backbone, data, views, optim, parallel, checkpoint, log, online, health, launch, evaluation, plan (each a section),
seed, epochs, global_batch_size, micro_batch_size, output. --plan prints all of them with their values.
methods: """
        + ", ".join(methods.names()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("config", help="a YAML of configs/")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="such as optim.base_lr=0.4 data.root=/data/imagenet output=runs/second",
    )
    parser.add_argument(
        "--plan",
        action="store_true",
        help="print the resolved config, the learning rate and the sizes of everything, then exit",
    )
    parser.add_argument(
        "--stop-after",
        type=COUNT,
        metavar="STEPS",
        help="do so many steps, save, and leave with status 0; the same command goes on",
    )
    parser.add_argument(
        "--fake-preempt",
        type=COUNT,
        metavar="STEP",
        help="after step STEP send rank 0 a scheduler's signal; once",
    )
    options = parser.parse_intermixed_args(arguments)  # key=value after an option, too
    if (repeated := status_to_repeat()) is not None:
        return repeated
    with stop_signals.signals_noted(), lasting_output():
        return _run(options)


def _run(options: argparse.Namespace) -> int:
    """Plan or train as the command line says, and return the exit status."""
    try:
        config = configuration.load(options.config, options.overrides)
        if "SLURM_JOB_ID" not in os.environ:
            configuration.check_slurm_keys(
                config,
                options.overrides,
                "this command submits nothing",
                "start the run with python launch/pretrain.py, or leave it out",
                typed_only=True,
            )
        if options.plan:
            print(plan.describe(config, plan.ranks(config, here=1)))
            return 0
        settings = config.parallel
        device = process_group.start(
            settings.threads, settings.deterministic, settings.timeout_seconds
        )
        if train(config, device, options.stop_after, options.fake_preempt).interrupted:
            return _leave_together(stopped_status())
    except (
        ValueError, OSError, FloatingPointError, collapse.Collapsed, torch.OutOfMemoryError,
        LostRankError, RendezvousError, workers.LostWorkerError,
    ) as error:  # fmt: skip
        if isinstance(error, ValueError) and type(error).__module__ not in (
            configuration.__name__,
            "builtins",
        ):
            raise
        print(f"error: {memory.explain(error)}", file=sys.stderr, flush=True)
        otherwise = DISK_REFUSED if durable_files.is_trouble(error) else MISTAKE
        status = next(
            (status for kind, status in STATUS.items() if isinstance(error, kind)), otherwise
        )
        if status == MISTAKE:
            note_end(status)
        return status
    finally:
        process_group.stop()
    return 0


def _leave_together(status: int) -> int:
    """Return the status once all ranks have closed their files.

    torchrun ends the other ranks at once when it sees the first of them end with it.
    """
    if status == STOPPED:
        note_end(status)
    collectives.barrier()
    return status


if __name__ == "__main__":
    sys.exit(main())
