"""Measure how long reading and training take per image on this machine, from a few real steps."""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch

from ssl_pretrain.config import RunConfig, assemble_method, text_settings
from ssl_pretrain.data import readers
from ssl_pretrain.data.image_source import Source
from ssl_pretrain.data.loader import Loader
from ssl_pretrain.data.order import BatchPlan
from ssl_pretrain.data.text_maker import TextMaker
from ssl_pretrain.distributed import collectives, process_group
from ssl_pretrain.methods.base import Method
from ssl_pretrain.optim import optimizers
from ssl_pretrain.parallel.execution import Execution
from ssl_pretrain.planning import recorder
from ssl_pretrain.planning.step_trace import HALFWAY
from ssl_pretrain.system import allocator
from ssl_pretrain.views.batch import Batch, concatenate

READ_BATCH_SIZE = 16
NUM_READ_BATCHES = 4  # the first one warms up, and may wait for code to be compiled
MIN_IMAGES, MAX_IMAGES = 4, 64  # images per measured step
MAX_CPU_FLOPS = 1.5e11  # operations of a measured step, about two seconds of a core
MIN_STEPS, MAX_STEPS = 3, 5
MAX_SECONDS = 2.0  # after this time no further batch is read, and no step beyond MIN_STEPS is taken


@dataclass(frozen=True)
class Reading:
    """The views of a few images, and the seconds that each image takes to become them.

    Attributes:
        batch: The views.
        worker_seconds: Time that one process takes to decode the image and cut its crops.
        color_seconds: Time of the color augmentation, which the training process does.
        num_workers: Processes that read while the network computes. 0 means none.
        num_cores: Cores of this rank.
        is_on_cpu: True if the network computes on these cores too.
    """

    batch: Batch
    worker_seconds: float = 0.0
    color_seconds: float = 0.0
    num_workers: int = 0
    num_cores: int = 1
    is_on_cpu: bool = True

    def seconds_per_image(self, step_seconds: float) -> float:
        """Return the time per image of a run whose steps take `step_seconds` per image."""
        seconds = self.color_seconds + step_seconds
        if not self.num_workers:
            return seconds + self.worker_seconds
        if self.is_on_cpu:
            seconds += self.worker_seconds / self.num_cores
        return max(seconds, self.worker_seconds / self.num_workers)


def measure_reading(config: RunConfig, source: Source) -> Reading:
    """Read a few batches of images, and measure the time per image on rank 0.

    The ranks call this together, so that they agree on the number of batches and on the time.

    Args:
        config: Configuration of the run.
        source: Training images.
    """
    device = _device()
    execution = Execution.resolve(config.parallel, device)
    num_images = math.gcd(config.global_batch_size, READ_BATCH_SIZE)
    plan = BatchPlan(config.seed, len(source), num_images, rank=0, world_size=1, window_size=0)
    text_maker = TextMaker(source, text_settings(config), config.seed)
    reader = readers.build_reader(source, config.views, plan, device=device, text_maker=text_maker)
    batches: list[Batch] = []
    worker_seconds: list[float] = []
    color_seconds: list[float] = []
    # One thread, because the processes that read in a run have one each.
    with _threads(1), Loader(reader, view_dtype=execution.view_dtype) as loader:
        start = time.perf_counter()
        for batch in loader.iterate_from(0):
            _wait_for(device)
            batches.append(batch)
            worker_seconds.append(loader.reading_seconds - sum(worker_seconds))
            total = time.perf_counter() - start
            color_seconds.append(total - loader.reading_seconds - sum(color_seconds))
            measured_seconds = sum(worker_seconds[1:]) + sum(color_seconds[1:])
            is_late = collectives.broadcast_object(measured_seconds > MAX_SECONDS)
            if is_late or len(batches) == NUM_READ_BATCHES:
                break
    num_cores = process_group.cores_per_rank()
    warm_up = 1 if len(batches) > 1 else 0
    seconds = [min(times[warm_up:]) for times in (worker_seconds, color_seconds)]
    worker, color = collectives.broadcast_object(seconds)
    return Reading(
        concatenate(batches),
        worker / num_images,
        color / num_images,
        0 if source.explain_no_workers() else min(config.data.num_workers, num_cores),
        num_cores,
        device.type == "cpu",
    )


def measure_step(config: RunConfig, batch: Batch) -> float:
    """Return the seconds per image of an optimizer step, for all ranks together.

    A few images go through the network, and the optimizer and the teacher are updated. A small step
    warms up, and the fastest of the others counts, because other programs can only slow a step
    down. The ranks call this together, because losses have collectives. The exchange of gradients
    between ranks is left out.

    Args:
        config: Configuration of the run.
        batch: Views of a few images, in the run's shapes.
    """
    device = _device()
    if device.type == "cpu":
        allocator.keep_freed_memory()  # as in a run
    devices = [device] if device.type == "cuda" else []
    num_images = _num_images(config, device, len(batch))
    seconds: list[float] = []
    with torch.random.fork_rng(devices=devices), _threads(config.parallel.threads):
        trial = _Trial.build(config, device)
        trial.seconds(batch, min(MIN_IMAGES, num_images))
        while len(seconds) < MIN_STEPS or (
            len(seconds) < MAX_STEPS and sum(seconds) <= MAX_SECONDS
        ):
            seconds.append(collectives.broadcast_object(trial.seconds(batch, num_images)))
    return min(seconds) / num_images / process_group.world_size()


@dataclass(frozen=True)
class _Trial:
    """A method with its optimizer, for a few steps."""

    config: RunConfig
    execution: Execution
    method: Method
    optimizer: torch.optim.Optimizer

    @classmethod
    def build(cls, config: RunConfig, device: torch.device) -> "_Trial":
        execution = Execution.resolve(config.parallel, device)
        method = assemble_method(config)
        execution.place_module(method)
        optimizer = optimizers.build(config.optim, method)
        optimizers.set_rates(
            optimizer, config.optim, HALFWAY, config.epochs, config.global_batch_size
        )
        return cls(config, execution, method, optimizer)

    def seconds(self, batch: Batch, num_images: int) -> float:
        """Take a step with the first images of a batch, and return its time."""
        method, optim_config, rows = self.method, self.config.optim, slice(num_images)
        batch = batch.rows(rows)
        batch = replace(batch, views=self.execution.place_views(batch.views))
        start = time.perf_counter()
        self.optimizer.zero_grad(set_to_none=True)
        with self.execution.forward_context():
            embeddings, targets = method(batch), method.targets(batch)
        targets = method.couple_targets(targets)
        method.loss(embeddings, targets).loss.backward()
        optimizers.step_if_finite(self.optimizer, optim_config.clip_norm, optim_config.clip_by)
        method.after_step(HALFWAY, *method.without_transient(embeddings, targets))
        _wait_for(self.execution.device)
        return time.perf_counter() - start


def _num_images(config: RunConfig, device: torch.device, num_read: int) -> int:
    """Return the number of images of a measured step.

    It depends on the operations and not on a measured time. Programs that compete for the cores
    slow a step down whatever its size, so that few images would make each one seem slow.
    """
    most = float(min(MAX_IMAGES, num_read))
    if device.type == "cpu":
        most = min(most, MAX_CPU_FLOPS / max(1.0, recorder.count_flops_per_image(config)))
    num_images = math.gcd(config.global_batch_size, MIN_IMAGES)
    while 2 * num_images <= most and config.global_batch_size % (2 * num_images) == 0:
        num_images *= 2
    return num_images


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def _threads(num_threads: int) -> Iterator[None]:
    """Compute with a number of threads. 0 means this rank's share of the cores, as in a run."""
    num_before = torch.get_num_threads()
    torch.set_num_threads(num_threads or process_group.cores_per_rank())
    try:
        yield
    finally:
        torch.set_num_threads(num_before)
