"""Measure how long training takes per image on this machine, from a few real images."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ssl_pretrain.config import RunConfig
from ssl_pretrain.data import readers
from ssl_pretrain.data.image_source import Source
from ssl_pretrain.data.loader import Loader
from ssl_pretrain.data.order import BatchPlan
from ssl_pretrain.distributed import collectives
from ssl_pretrain.methods.base import Method
from ssl_pretrain.models import backbones
from ssl_pretrain.parallel.execution import Execution
from ssl_pretrain.views import recipe
from ssl_pretrain.views.batch import Batch

MAX_IMAGES = 32  # images per measured step


def seconds_per_image(config: RunConfig, source: Source) -> float:
    """Return the seconds that rank 0 takes to read an image and to train on it.

    The views of a few images are made, and go forward and backward through the network. The first
    pass warms up, and the second one is measured. The optimizer is left out. All ranks call this
    together, because losses have collectives.

    Args:
        config: Configuration of the run.
        source: Training images.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    num_images = min(MAX_IMAGES, config.global_batch_size)
    execution = Execution.resolve(config.parallel, device)
    plan = BatchPlan(config.seed, len(source), num_images, rank=0, world_size=1, window_size=0)
    reader = readers.build_reader(source, config.views, plan, device=device)
    with _keep_random_state(), Loader(reader, view_dtype=execution.view_dtype) as loader:
        image_size = recipe.crop_per_view(config.views)[0].size
        method = config.method.build(backbones.build(config.backbone, image_size))
        execution.place_module(method)
        batches = loader.iterate_from(0)
        for _ in range(2):
            start = time.perf_counter()
            _pass_through(method, execution, next(batches))
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            seconds = time.perf_counter() - start
    return float(collectives.broadcast_object(seconds / num_images))


def _pass_through(method: Method, execution: Execution, batch: Batch) -> None:
    batch = Batch(execution.place_views(batch.views), batch.labels, batch.indices)
    with execution.forward_context():
        embeddings, targets = method(batch), method.targets(batch)
        method.loss(embeddings, targets).loss.backward()


@contextmanager
def _keep_random_state() -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield
