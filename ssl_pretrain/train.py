"""Pretrain a backbone as configured in a YAML file, in one process or on the ranks of torchrun.

The same command resumes the run from the newest checkpoint in its output folder. Examples:
  python -m ssl_pretrain.train configs/simclr_digits.yaml
  torchrun --nproc-per-node 8 -m ssl_pretrain.train configs/simclr_imagenet.yaml data.root=DIR
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from ssl_pretrain import config as configuration
from ssl_pretrain.build import build_training
from ssl_pretrain.checkpoint import checkpoints, folder, rank_agreement
from ssl_pretrain.config import RunConfig
from ssl_pretrain.data import workers
from ssl_pretrain.distributed import collectives, process_group
from ssl_pretrain.distributed.straggler import StragglerMonitor
from ssl_pretrain.monitoring.collapse import CollapseError
from ssl_pretrain.monitoring.records import Measurements
from ssl_pretrain.parallel import memory
from ssl_pretrain.planning import plan
from ssl_pretrain.schema import POSITIVE_INT
from ssl_pretrain.schema.argument_parser import ArgumentParser
from ssl_pretrain.system import exit_status, output_streams, program, stop_signals, thread_lock

# Errors whose messages are written for users. They are printed without a traceback.
USER_ERRORS = (ValueError, OSError, FloatingPointError, CollapseError, exit_status.LostProcessError)
USER_VALUE_ERRORS = (ValueError, configuration.ConfigError)  # other kinds of ValueError are bugs


@dataclass(frozen=True)
class Outcome:
    """Result of a training process, in optimizer steps counted from the start of the run."""

    step: int  # step at which training ended
    end_step: int  # step at which this process would end without a stop request
    num_steps: int  # steps of the whole run
    result: str = ""  # latest loss and accuracy, as text, on rank 0


def train(config: RunConfig, device: torch.device, stop_after: int | None = None) -> int:
    """Train until the last step, a stop request, or `stop_after` steps, whichever comes first.

    Resumes from the newest intact checkpoint in `config.output`, if there is one. A finished run is
    not changed.

    Returns:
        The step at which training ended, counted from the start of the run.

    Raises:
        ValueError: If the run cannot start or resume as configured, or another thread is training.
        SaveError: If the disk refuses a checkpoint or a record.
        LostRankError: If another rank ends.
        LostWorkerError: If a process that reads images is killed.
    """
    return train_and_report(config, device, stop_after, preempt_at=None).step


def train_and_report(
    config: RunConfig, device: torch.device, stop_after: int | None, preempt_at: int | None
) -> Outcome:
    """Train as `train` does, then print and return the outcome."""
    run = Path(config.output)
    workers.exit_if_in_worker()
    with thread_lock.refuse_concurrent_training(), collectives.explain_lost_ranks():
        method_module = type(config.method).__module__
        rank_agreement.check_settings_and_code(configuration.to_dict(config), method_module)
        configuration.check(config, process_group.world_size())
        if channels := configuration.describe_channels(config):
            process_group.print_once(channels)
        check_config = partial(configuration.check_resume_config, config=config)
        step = checkpoints.finished_step(run, config.checkpoint, config.epochs, check_config)
        if step is not None:
            process_group.print_once(
                f"already finished: {run} has done its {step} steps, and the last one is saved in "
                f"{folder.checkpoint_path(run, step)}. Nothing was trained or changed; choose a "
                "new output for another run"
            )
            return Outcome(step, step, step)
        outcome = _train(config, device, stop_after, preempt_at)
    path = folder.checkpoint_path(run, outcome.step)
    summary = f"{outcome.step} of {outcome.num_steps} steps, saved in {path}"
    message = f"stopped: {summary}. The same command resumes the run"
    if outcome.step == outcome.num_steps:
        message = f"finished: {summary}"
    process_group.print_once(message, f"reached:  {outcome.result}")
    return outcome


def _train(
    config: RunConfig, device: torch.device, stop_after: int | None, preempt_at: int | None
) -> Outcome:
    with build_training(config, device, stop_after, preempt_at) as training:
        step = training.num_steps_done
        straggler_monitor = StragglerMonitor(config.log.every_steps)
        for progress, batch in training.steps():
            step = progress.step + 1  # records and checkpoints count from 1
            learning_rates = training.set_learning_rates(progress)
            slowest_rank = Measurements(straggler_monitor.measure(step))
            output = training.stepper(progress, batch)
            measurements = training.measure(step, output) | slowest_rank
            training.logger.log_step(step, output.logs, learning_rates, measurements)
            training.nan_guard.check(step, batch.indices, output.logs)
            should_stop = training.agree_to_stop(step)
            if should_stop or training.checkpoints.is_due(step):
                training.save_checkpoint(step, wait=should_stop)
            if should_stop:
                break
        result = training.logger.console.progress.result()
        return Outcome(step, training.end_step, training.num_steps, result)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command-line interface and return the exit status."""
    parser = ArgumentParser(
        program.usage_name("python -m ssl_pretrain.train"), description=__doc__, explains_keys=True
    )
    add = parser.add_argument
    add("config", help="a preset, such as simclr_cifar10, or a YAML file")
    add("overrides", nargs="*", metavar="key=value", help="for example optim.base_lr=0.4")
    add("--plan", action="store_true", help="print the resolved configuration and its costs")
    add("--stop-after", type=POSITIVE_INT, metavar="STEPS", help="save and exit after STEPS steps")
    add("--fake-preempt", type=POSITIVE_INT, metavar="STEP", help="send rank 0 a signal at STEP")
    options = parser.parse_intermixed_args(arguments)  # key=value may follow an option
    if (status := exit_status.status_to_repeat()) is not None:
        return status
    with stop_signals.temporary_signal_handlers(), output_streams.tolerate_lost_output():
        try:
            return _run(options)
        except (*USER_ERRORS, torch.OutOfMemoryError) as error:
            if isinstance(error, ValueError) and type(error) not in USER_VALUE_ERRORS:
                raise
            exit_status.print_error(f"error: {memory.describe_error(error)}")
            return exit_status.record_failure(error)
        finally:
            process_group.stop()


def _run(options: argparse.Namespace) -> int:
    config = configuration.load(options.config, options.overrides)
    configuration.check_training_overrides(config, options.overrides)
    if options.plan:
        print(plan.describe(config, plan.num_ranks(config, default=1)))
        return 0
    settings = config.parallel
    device = process_group.start(settings.threads, settings.deterministic, settings.timeout_seconds)
    outcome = train_and_report(config, device, options.stop_after, options.fake_preempt)
    if outcome.step == outcome.num_steps and not program.is_launched():
        process_group.print_once(f"next:     {_first_evaluation(config)}")
    if outcome.step == outcome.end_step:
        return 0
    status = exit_status.record_stop()
    collectives.barrier()  # torchrun ends the other ranks as soon as one exits with this status
    return status


def _first_evaluation(config: configuration.RunConfig) -> str:
    """Return the command of the evaluation that needs nothing but the run and its data."""
    if configuration.takes_images(config):
        return program.format_command("ssl_pretrain.eval.knn", config.output)
    if len(configuration.text_lengths(config)) > 1:
        return program.format_command("ssl_pretrain.eval.text_pairs", config.output)
    return program.format_command("ssl_pretrain.eval.sts", config.output, "--folder", "PATH")


if __name__ == "__main__":
    sys.exit(main())
