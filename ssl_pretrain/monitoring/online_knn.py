"""Measure the k-NN and linear accuracy of the backbone during training, on training images."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Literal, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ssl_pretrain.distributed import collectives, process_group
from ssl_pretrain.monitoring import image_grids, linear_probe, weighted_knn
from ssl_pretrain.monitoring.records import Measurements
from ssl_pretrain.schema import setting

T = TypeVar("T")
# Yields batches of normalized images and labels, in the order of the given indices.
ReadImages = Callable[[np.ndarray], Iterator[tuple[Tensor, Tensor]]]
NUM_QUERIES, NUM_NEIGHBORS = 8, 6  # rows and columns of the picture


@dataclass
class OnlineConfig:
    """Accuracies measured during a run."""

    knn_every_epochs: float = setting(1.0, "Epochs between two measurements, or 0 for none.")
    k: int = setting(20, "Number of nearest neighbors that vote.", unit="neighbors")
    temperature: float = setting(0.07, "Divisor of the neighbors' cosine similarities.")
    probe: bool = setting(True, "Also fit a linear classifier to the same features.")
    max_train: int = setting(10000, "Training images in the bank of neighbors.", unit="images")
    max_test: int = setting(
        2000, "Training images used as queries. They are not in the bank.", unit="images"
    )
    on_failure: Literal["stop", "warn"] = setting(
        "warn",
        "What to do if a measurement fails on any rank. stop ends the run. warn lets it continue.",
    )


class MeasurementError(RuntimeError):
    """A measurement failed on some rank. Every rank raises this error."""


class OnlineKNN:
    """Monitor of a backbone's weighted k-NN accuracy, measured on training images only.

    The bank and the queries are labeled training images, chosen by one fixed permutation, so the
    test set has no influence on a run. The accuracy shows the progress of training. Use eval/knn.py
    to measure the accuracy to report.

    Each rank embeds every world_size-th image. The last image is repeated until all ranks do the
    same number of forward passes, which sharded weights need. The measured images do not depend on
    the number of ranks.
    """

    def __init__(
        self,
        config: OnlineConfig,
        read_images: ReadImages,
        labels: np.ndarray,
        image_order: np.ndarray,
        steps_per_epoch: int,
        device: torch.device,
        read_pixels: Callable[[np.ndarray], Tensor] | None = None,
        forward_context: Callable[[], AbstractContextManager[object]] = nullcontext,
        bands: Sequence[int] = (),
    ):
        """Choose the bank and the queries. No image is read.

        Args:
            config: Bank and query sizes, k and temperature.
            read_images: Reads the normalized evaluation views of training images by index.
            labels: Classes of all training images, (num_train,), -1 for unlabeled ones.
            image_order: A fixed permutation of the training images' indices. The first labeled ones
                become the queries, at most a fifth of them. The next ones become the bank.
            steps_per_epoch: Optimizer steps of one epoch.
            device: Device of the backbone.
            read_pixels: Reads images by index, uint8 (num_images, C, height, width), for the
                picture of neighbors. None for no picture.
            forward_context: Context of the backbone's forward passes, such as autocast.
            bands: The setting `log.bands`, for the picture of neighbors.

        Raises:
            ValueError: If k does not fit the bank or the temperature is not positive.
        """
        self.config, self.labels, self.device = config, labels, device
        self.read_images, self.read_pixels = read_images, read_pixels
        self.forward_context, self.bands = forward_context, bands
        self.steps_between_measurements = config.knn_every_epochs * steps_per_epoch
        labeled = image_order[labels[image_order] >= 0]
        num_queries = min(config.max_test, len(labeled) // 5)
        self.query_indices = labeled[:num_queries]
        self.bank_indices = labeled[num_queries : num_queries + config.max_train]
        if self.is_enabled:
            weighted_knn.check_arguments(
                config.k, config.temperature, len(self.bank_indices), "online."
            )
        elif config.knn_every_epochs > 0:
            num_labels = f"only {len(labeled)}" if len(labeled) else "no"
            process_group.print_once(
                f"online k-NN is off, because {num_labels} training images have labels"
            )

    @property
    def is_enabled(self) -> bool:
        """True if the configuration and the labels allow measurements."""
        return self.config.knn_every_epochs > 0 and len(self.query_indices) > 0

    def is_due(self, step: int) -> bool:
        """Return True if the step has just passed a multiple of knn_every_epochs."""
        if not self.is_enabled or step < 1:
            return False
        interval = self.steps_between_measurements
        return int(step / interval) > int((step - 1) / interval)

    def measure_if_due(self, step: int, backbone: nn.Module) -> Measurements:
        """Measure the backbone if a measurement is due after `step` steps.

        Raises:
            MeasurementError: If a rank failed and `online.on_failure` is `stop`.
        """
        try:
            return self.measure(backbone) if self.is_due(step) else Measurements()
        except MeasurementError as error:
            if self.config.on_failure == "stop":
                raise
            if process_group.is_main():
                warnings.warn(
                    f"step {step}: {error}. Training continues because online.on_failure is warn",
                    stacklevel=2,
                )
            return Measurements()

    @torch.no_grad()
    def measure(self, backbone: nn.Module) -> Measurements:
        """Measure the backbone without changing its mode or the random generators.

        Returns:
            Accuracies in [0, 1], the same on all ranks, and a picture of neighbors on rank 0. They
            are empty if measurements are off.

        Raises:
            MeasurementError: If a rank failed.
        """
        if not self.is_enabled:
            return Measurements()
        with temporary_eval_mode(backbone, self.device):
            local_features = _call_on_every_rank(
                lambda: [
                    self._embed(backbone, indices)
                    for indices in (self.bank_indices, self.query_indices)
                ]
            )
        bank = self._gather(local_features[0], len(self.bank_indices))
        queries = self._gather(local_features[1], len(self.query_indices))
        shard = np.arange(process_group.rank(), len(self.query_indices), process_group.world_size())
        bank_labels, labels = (
            torch.from_numpy(self.labels[indices]).to(self.device)
            for indices in (self.bank_indices, self.query_indices[shard])
        )
        num_classes = int(self.labels.max()) + 1

        def classify() -> tuple[dict[str, Tensor], Tensor | None]:
            """Classify this rank's queries. Every rank fits the same linear classifier."""
            predictions = {
                "knn": weighted_knn.predict(
                    bank,
                    bank_labels,
                    queries[shard],
                    k=self.config.k,
                    temperature=self.config.temperature,
                    num_classes=num_classes,
                )
            }
            if self.config.probe:
                predictions["probe"] = linear_probe.predict(
                    bank, bank_labels, queries[shard], num_classes
                )
            return predictions, self._draw_neighbors(bank, queries[:NUM_QUERIES])

        predictions, picture = _call_on_every_rank(classify)
        num_correct = {
            name: collectives.reduce_sum((classes == labels).sum().double()).item()
            for name, classes in predictions.items()
        }
        accuracies = {name: count / len(self.query_indices) for name, count in num_correct.items()}
        return Measurements(accuracies, neighbor_grid=picture)

    def _draw_neighbors(self, bank: Tensor, queries: Tensor) -> Tensor | None:
        """Draw the first queries with their nearest images in the bank, on rank 0."""
        if self.read_pixels is None or not process_group.is_main():
            return None
        similarities = F.normalize(queries, dim=1) @ F.normalize(bank, dim=1).T
        nearest = similarities.topk(min(NUM_NEIGHBORS, len(bank)), dim=1).indices.cpu().numpy()
        query_indices, neighbor_indices = (
            self.query_indices[: len(queries)],
            self.bank_indices[nearest],
        )
        pixels = self.read_pixels(neighbor_indices.ravel())
        same_class = self.labels[neighbor_indices] == self.labels[query_indices][:, None]
        return image_grids.neighbor_grid(
            self.read_pixels(query_indices),
            pixels.view(*nearest.shape, *pixels.shape[1:]),
            torch.from_numpy(same_class),
            self.bands,
        )

    def _embed(self, backbone: nn.Module, indices: np.ndarray) -> Tensor:
        """Return the features of the images that this rank embeds, float32 (num_local, dim)."""
        num_ranks = process_group.world_size()
        padding = np.repeat(indices[-1:], -len(indices) % num_ranks)
        local_indices = np.concatenate([indices, padding])[process_group.rank() :: num_ranks]
        features = []
        for images, _ in self.read_images(local_indices):
            with self.forward_context():
                features.append(backbone(images.to(self.device)).float())
        return torch.cat(features)

    def _gather(self, local_features: Tensor, num_images: int) -> Tensor:
        """Gather the features of the images from all ranks, float32 (num_images, dim)."""
        features = collectives.gather(local_features)  # rank 0's images, then rank 1's, ...
        by_rank = features.view(process_group.world_size(), -1, features.shape[1])
        return by_rank.transpose(0, 1).flatten(0, 1)[:num_images]


def _call_on_every_rank(function: Callable[[], T]) -> T:
    """Call a function on every rank and return its result, unless a rank has failed.

    If only the failed rank raised, the others would wait forever in the next collective.

    Raises:
        MeasurementError: If any rank failed, raised on every rank. The message names the ranks that
            failed and their errors.
    """
    result, problem = None, None
    try:
        result = function()
    except Exception as error:
        problem = f"{type(error).__name__}: {error}"
    problems = [
        f"rank {rank}: {problem}"
        for rank, problem in enumerate(collectives.gather_objects(problem))
        if problem
    ]
    if problems or result is None:
        raise MeasurementError(f"online k-NN failed on {'; '.join(problems)}")
    return result


@contextmanager
def temporary_eval_mode(backbone: nn.Module, device: torch.device) -> Iterator[None]:
    """Switch to evaluation mode, then restore every module's mode and the random generators."""
    modes = [(module, module.training) for module in backbone.modules()]
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        backbone.eval()
        try:
            yield
        finally:
            for module, training in modes:
                module.training = training
