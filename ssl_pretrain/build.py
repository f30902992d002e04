"""Build everything that the training loop calls, from a configuration."""

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ssl_pretrain import accumulation, rng
from ssl_pretrain import config as configuration
from ssl_pretrain.checkpoint import initial_weights, rank_agreement
from ssl_pretrain.checkpoint.checkpoints import Checkpoints, RunFacts
from ssl_pretrain.checkpoint.state import TrainingState
from ssl_pretrain.config import RunConfig
from ssl_pretrain.data import loader, readers, throughput_check
from ssl_pretrain.data.image_source import Source, require_labels
from ssl_pretrain.data.loader import Loader
from ssl_pretrain.distributed import process_group
from ssl_pretrain.distributed.stop_request import StopRequest
from ssl_pretrain.fault_tolerance.nan_guard import NanGuard
from ssl_pretrain.fault_tolerance.run_lock import RunLock
from ssl_pretrain.methods.base import Method
from ssl_pretrain.models import backbones
from ssl_pretrain.models.components import Backbone
from ssl_pretrain.models.timm_networks import BackboneConfig
from ssl_pretrain.monitoring import background_writer, image_grids
from ssl_pretrain.monitoring.collapse import CollapseMonitor
from ssl_pretrain.monitoring.logger import Logger
from ssl_pretrain.monitoring.online_knn import OnlineKNN
from ssl_pretrain.monitoring.records import Measurements
from ssl_pretrain.optim import optimizers, schedules
from ssl_pretrain.parallel import compile_report, micro_batch, wrap
from ssl_pretrain.parallel.execution import Execution, resolve_precision
from ssl_pretrain.planning import hardware, recorder
from ssl_pretrain.schema.image_sizes import ImageSize
from ssl_pretrain.step import StepOutput, Stepper, build_stepper
from ssl_pretrain.system import durable_files
from ssl_pretrain.views import color, crops, recipe
from ssl_pretrain.views.batch import Batch, upload


@dataclass
class Training:
    """Everything that the training loop calls.

    Its methods count steps from 1, as records and checkpoints do.
    """

    config: RunConfig
    num_steps_done: int  # steps that earlier processes of the run have taken
    end_step: int  # the step after which this process stops
    num_steps: int  # steps of the whole run
    execution: Execution
    lock: RunLock
    loader: Loader
    stop_request: StopRequest
    stepper: Stepper
    checkpoints: Checkpoints
    logger: Logger
    nan_guard: NanGuard
    collapse_monitor: CollapseMonitor
    online_knn: OnlineKNN | None

    def steps(self) -> Iterator[tuple[schedules.Progress, Batch]]:
        """Yield the progress and the batch of each step, and save the views of the first batch.

        The batches pass through the throughput check, the watchdog and the logger's clock. The lock
        of the run's folder is checked before each step.
        """
        views, device = self.config.views, self.execution.device
        batches = throughput_check.report_bottleneck(self.loader, self.num_steps_done, device)
        batches = self.logger.measure_data_wait(
            self.stop_request.watch(batches, self.num_steps_done)
        )
        for step, batch in zip(range(self.num_steps_done, self.end_step), batches):
            self.lock.check()
            if batch.views:
                describe = partial(self.loader.describe_views, step, image_grids.NUM_IMAGES)
                self.logger.save_views(step + 1, batch, views, describe)
            yield schedules.Progress(step, self.num_steps, self.loader.steps_per_epoch), batch

    def set_learning_rates(self, progress: schedules.Progress) -> dict[str, float]:
        """Set the optimizer's learning rates for a step and return them for the log."""
        config = self.config
        return optimizers.set_rates(
            self.stepper.optimizer,
            config.optim,
            progress,
            config.epochs,
            config.global_batch_size,
        )

    def measure(self, step: int, output: StepOutput) -> Measurements:
        """Take the measurements that are due after a step: collapse, k-NN, images, compilation."""
        method = self.stepper.method
        collapse = self.collapse_monitor.measure(step, output.embeddings, output.targets)
        knn = Measurements()
        if self.online_knn is not None:
            network = method.get_submodule(method.evaluated_module)
            knn = self.online_knn.measure_if_due(step, network)
        counts = self.loader.count_replaced(step, self.config.log.every_steps, self.num_steps)
        return collapse | knn | Measurements(dict(counts) | compile_report.measure())

    def agree_to_stop(self, step: int) -> bool:
        """Return True on all ranks if training ends with this step."""
        is_requested = self.stop_request.exchange_flags(step)
        return is_requested or step == self.end_step or self.logger.must_stop

    def save_checkpoint(self, step: int, wait: bool) -> None:
        """Check that all ranks have the same weights, and save them.

        Args:
            step: Steps done.
            wait: Return only when the checkpoint is on disk.
        """
        wrap.check_replicas(self.stepper.model)
        self.checkpoints.save(step, wait=wait)


@contextmanager
def build_training(
    config: RunConfig,
    device: torch.device,
    stop_after: int | None = None,
    fake_preemption_step: int | None = None,
) -> Iterator[Training]:
    """Lock the run's folder, build everything and resume from the newest checkpoint.

    Args:
        config: Configuration of the run.
        device: Device of this rank.
        stop_after: Steps to take in this process. None means all remaining steps.
        fake_preemption_step: Step after which rank 0 receives a stop signal, for tests.
    """
    run, execution = Path(config.output), Execution.resolve(config.parallel, device)
    with ExitStack() as stack:
        lock = stack.enter_context(RunLock(run))
        data_loader = stack.enter_context(build_loader(config, execution))
        source = data_loader.source
        num_steps = round(config.epochs * data_loader.steps_per_epoch)
        rank_agreement.check_data(source.fingerprint, len(source), config.data.root)
        stop_request = stack.enter_context(StopRequest(fake_preemption_step=fake_preemption_step))
        method = build_method(config, source)
        stepper = build_run_stepper(method, config, execution)
        checkpoints = Checkpoints(
            run,
            TrainingState(method, stepper.optimizer),
            config.checkpoint,
            RunFacts(
                num_steps,
                stepper.micro_batch_size,
                source.fingerprint,
                resolve_precision(config.parallel, device),
            ),
            configuration.to_dict(config),
            data_loader.steps_per_epoch,
            lock.check,
        )
        num_steps_done = checkpoints.resume(
            partial(configuration.check_resume_config, config=config)
        )
        write_config(config)
        if num_steps_done:
            process_group.print_once(f"resumed {run} after step {num_steps_done}")
        for warning in optimizers.schedule_warnings(config.optim, config.epochs):
            process_group.print_once(warning, file=sys.stderr)
        logger = stack.enter_context(
            build_logger(config, checkpoints, data_loader, device, num_steps_done)
        )
        checkpoints.facts.wandb_id = logger.wandb_id
        nan_guard = NanGuard(
            config.guard,
            run,
            config.log.every_steps,
            seed=config.seed,
            steps_per_epoch=data_loader.steps_per_epoch,
            describe_nonfinite_embeddings=stepper.describe_nonfinite_embeddings,
            roll_back=checkpoints.roll_back,
        )
        yield Training(
            config=config,
            num_steps_done=num_steps_done,
            end_step=min(num_steps, num_steps_done + (stop_after or num_steps)),
            num_steps=num_steps,
            execution=execution,
            lock=lock,
            loader=data_loader,
            stop_request=stop_request,
            stepper=stepper,
            checkpoints=checkpoints,
            logger=logger,
            nan_guard=nan_guard,
            collapse_monitor=CollapseMonitor(
                config.health,
                method,
                stepper.optimizer,
                num_steps_done,
                logger.past_records,
                logger.raise_alert,
            ),
            online_knn=build_online_knn(config, data_loader, execution),
        )


def build_loader(config: RunConfig, execution: Execution) -> Loader:
    """Open the data set and build the loader of this rank's batches.

    Raises:
        ValueError: If the data set does not have what the method takes.
    """
    data_loader = loader.build(
        config.data,
        config.views,
        seed=config.seed,
        global_batch_size=config.global_batch_size,
        device=execution.device,
        view_dtype=execution.view_dtype,
        text=configuration.text_settings(config),
    )
    try:
        configuration.check_number_of_texts(config, data_loader.source)
    except ValueError:
        data_loader.close()
        raise
    return data_loader


def build_method(config: RunConfig, source: Source | None = None) -> Method:
    """Build the method and its backbone on the CPU, with the same initial weights on every rank.

    Raises:
        ValueError: If the method needs labels and the source has none, or if the weights of
            `backbone.init` do not fit the backbone.
    """
    torch.manual_seed(rng.derive_seed(config.seed, 0, 0))
    method = configuration.assemble_method(config, _build_initialized_backbone)
    if method.needs_labels and source is not None:
        require_labels(source, f"method {config.method.name}")
    return method


def _build_initialized_backbone(config: BackboneConfig, image_size: ImageSize) -> Backbone:
    backbone = backbones.build(config, image_size)
    if notes := initial_weights.initialize(backbone, config):
        process_group.print_once(f"backbone.init: {config.init}: {'; '.join(notes)}")
    return backbone


def build_run_stepper(method: Method, config: RunConfig, execution: Execution) -> Stepper:
    """Choose the micro-batch size, distribute the method over the ranks and build its optimizer."""
    micro_batch_size = choose_micro_batch_size(method, config, execution)
    return build_stepper(
        method,
        config.parallel,
        config.optim,
        execution,
        seed=config.seed,
        micro_batch_size=micro_batch_size,
        global_batch_size=config.global_batch_size,
        example=micro_batch.blank_batch(
            config.views, micro_batch_size, execution, configuration.text_lengths(config)
        ),
    )


def choose_micro_batch_size(method: Method, config: RunConfig, execution: Execution) -> int:
    """Return the configured micro-batch size, or find the largest that fits in memory and print it.

    Raises:
        ValueError: If not even the smallest micro-batch fits, or the method's loss does not allow
            micro-batches.
    """
    world_size = process_group.world_size()
    local_batch_size = config.global_batch_size // world_size
    num_images = configuration.configured_micro_batch_size(config, world_size)
    if num_images is None:
        num_images, estimate = micro_batch.find_micro_batch_size(
            method,
            config.parallel,
            config.views,
            execution,
            text_lengths=configuration.text_lengths(config),
            local_batch_size=local_batch_size,
            global_batch_size=config.global_batch_size,
        )
        process_group.print_once(
            f"micro_batch_size: auto chose {num_images} of {local_batch_size} images per rank "
            f"({estimate})"
        )
    if num_images < local_batch_size:
        accumulation.check(method, config.parallel)
    return num_images


def write_config(config: RunConfig) -> None:
    """Write the resolved configuration to `config.yaml` in the run's folder, on rank 0.

    Raises:
        SaveError: If the file cannot be written and `checkpoint.on_failure` is `stop`.
    """
    path, problem = Path(config.output) / "config.yaml", None
    if process_group.is_main():
        try:
            durable_files.replace(path, configuration.to_yaml(config))
        except OSError as error:
            problem = background_writer.write_failure_message(path, error)
    background_writer.raise_or_warn(problem, config.checkpoint.on_failure)


def build_logger(
    config: RunConfig,
    checkpoints: Checkpoints,
    data_loader: Loader,
    device: torch.device,
    num_steps_done: int,
) -> Logger:
    """Open the run's records, and start the console output and Weights & Biases."""
    return Logger(
        config.log,
        Path(config.output),
        num_steps_done=num_steps_done,
        last_step=checkpoints.facts.last_step,
        steps_per_epoch=data_loader.steps_per_epoch,
        global_batch_size=config.global_batch_size,
        config=checkpoints.config,
        wandb_id=checkpoints.facts.wandb_id,
        flops_per_image=recorder.count_flops_per_image(config),
        peak_tflops=hardware.peak_tflops(device),
        on_failure=config.checkpoint.on_failure,
    )


def build_online_knn(
    config: RunConfig, data_loader: Loader, execution: Execution
) -> OnlineKNN | None:
    """Build the k-NN monitor, or return None for methods of sentences.

    It transforms training images as evaluations do.
    """
    if not configuration.takes_images(config):
        return None
    settings, source, views = config.evaluation, data_loader.source, config.views
    transform = partial(
        crops.evaluation_view,
        size=settings.image_size or recipe.crop_per_view(views)[0].size,
        crop_ratio=settings.crop_ratio,
        interpolation=settings.interpolation,
    )

    def read(indices: np.ndarray) -> Iterator[tuple[Tensor, Tensor]]:
        return readers.read_images(
            source,
            indices,
            transform,
            batch_size=256,
            num_workers=0,
            max_replaced=config.data.max_replaced,
        )

    def read_normalized(indices: np.ndarray) -> Iterator[tuple[Tensor, Tensor]]:
        for pixels, labels in read(indices):
            view = color.normalize(upload(pixels, execution.device), views.mean, views.std)
            yield execution.place_views([view])[0], labels

    def read_pixels(indices: np.ndarray) -> Tensor:
        return torch.cat([pixels for pixels, _ in read(indices)])

    return OnlineKNN(
        config.online,
        read_normalized,
        source.labels,
        rng.permutation(config.seed, 0, len(source)),
        data_loader.steps_per_epoch,
        execution.device,
        read_pixels,
        execution.forward_context,
        config.log.bands,
    )
