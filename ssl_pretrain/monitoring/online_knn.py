"""k-NN and linear accuracy inside a run, and the exact weighted k-NN that eval/knn.py shares."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ssl_pretrain.distributed import collectives, process_group
from ssl_pretrain.monitoring import image_grids, linear_probe
from ssl_pretrain.schema import setting

T = TypeVar("T")
# Indices of images -> batches of (normalized images, labels), in that order.
Images = Callable[[np.ndarray], Iterator[tuple[Tensor, Tensor]]]
SHOWN, NEAREST = 8, 6  # queries in the picture, and neighbors of each
SIMILARITIES = 2**24  # similarities held at once, in float32: 64 MiB


@dataclass
class OnlineConfig:
    """Accuracies measured during a run."""

    knn_every_epochs: float = setting(1.0, "Epochs between two measurements. 0: never.")
    k: int = setting(20, "Number of nearest neighbors that vote.")
    temperature: float = setting(0.07, "Divisor of the neighbors' cosine similarities.")
    probe: bool = setting(True, "Also fit a linear classifier to the same features.")
    max_train: int = setting(10000, "Training images in the bank of neighbors.")
    max_test: int = setting(2000, "Training images used as queries. The bank does not hold them.")
    on_failure: Literal["stop", "warn"] = setting(
        "warn", "If a measurement fails on any rank, end the run, or warn and continue."
    )


class MeasureError(RuntimeError):
    """A measurement failed on some rank; raised on all of them."""


def weighted_knn(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    k: int,
    temperature: float,
    num_classes: int,
) -> Tensor:
    """Classify queries by a weighted vote of their k nearest training images.

    A neighbor's weight is exp(cosine similarity / temperature). This is the protocol of InstDisc (Wu et
    al., CVPR 2018, arXiv:1805.01978, section 3.4) and DINO, exact, in float32. The nearest similarity
    is subtracted before the exponential, which changes no winner and avoids overflow.

    Args:
        train_features: The bank, (num_train, dim). Normalized inside.
        train_labels: Its classes in [0, num_classes), (num_train,).
        test_features: The queries, (num_test, dim). Normalized inside.
        k: Number of neighbors that vote.
        temperature: Divisor of the similarities.
        num_classes: Number of classes.

    Returns:
        Predicted classes, int64, (num_test,).

    Raises:
        ValueError: k is not in [1, num_train], or the temperature is not positive.
    """
    check(k, temperature, len(train_features))
    bank = F.normalize(train_features.float(), dim=1)
    predictions = []
    for queries in test_features.split(max(1, SIMILARITIES // len(bank))):
        similarities, neighbours = (F.normalize(queries.float(), dim=1) @ bank.T).topk(k, dim=1)
        predictions.append(vote(similarities, train_labels[neighbours], temperature, num_classes))
    return torch.cat(predictions) if predictions else train_labels.new_empty(0)


def check(k: int, temperature: float, num_train: int, section: str = "") -> None:
    """Raise ValueError unless k is in [1, num_train] and the temperature is positive."""
    if not 1 <= k <= num_train:
        raise ValueError(
            f"{section}k: {k} neighbours cannot be found among {num_train} training images; give one from 1 to {num_train}"
        )
    if temperature <= 0:
        raise ValueError(f"{section}temperature: {temperature} must be > 0; 0.07 is usual")


def vote(similarities: Tensor, labels: Tensor, temperature: float, num_classes: int) -> Tensor:
    """Return the class with the largest vote per query, (num_queries,).

    Args:
        similarities: Cosine similarities of the neighbors, nearest first, (num_queries, k).
        labels: Their classes, (num_queries, k).
        temperature: Divisor of the similarities.
        num_classes: Number of classes.
    """
    weights = ((similarities - similarities[:, :1]) / temperature).exp()
    scores = weights.new_zeros(len(labels), num_classes).scatter_add_(1, labels, weights)
    return scores.argmax(dim=1)


class OnlineKNN:
    """Weighted k-NN accuracy of a backbone, measured during its run on training images alone.

    The bank and the queries are drawn from the labelled training images by one fixed permutation, so
    that nothing about the test set can steer a run. The number is for its curve. eval/knn.py gives the
    number to report.

    Each rank embeds every world_size-th image. Padding gives all ranks the same number of forward
    passes, which sharded weights need. The counted images are the same on any number of ranks.
    """

    def __init__(
        self,
        config: OnlineConfig,
        images: Images,
        labels: np.ndarray,
        order: np.ndarray,
        steps_per_epoch: int,
        device: torch.device,
        pixels: Callable[[np.ndarray], Tensor] | None = None,
    ):
        """Choose the bank and the queries. No image is read.

        Args:
            config: Bank and query sizes, k and temperature.
            images: Reads the evaluation views of training images by their indices.
            labels: Classes of all training images, (num_train,), -1 for unlabelled ones.
            order: A fixed permutation of their indices. The first labelled ones, at most a fifth, become
                the queries, and the next ones the bank.
            steps_per_epoch: Optimizer steps of one epoch.
            device: Device of the backbone.
            pixels: Reads images by their indices, uint8 (num_images, 3, size, size), for the picture.

        Raises:
            ValueError: k or temperature do not fit the bank.
        """
        self.config, self.images, self.labels, self.device = config, images, labels, device
        self.probed: float | None = (
            None  # accuracy of the linear classifier at the last measurement
        )
        self.pixels = pixels
        self.neighbours: Tensor | None = None
        self.steps_per_measure = config.knn_every_epochs * steps_per_epoch
        labelled = order[labels[order] >= 0]
        num_queries = min(config.max_test, len(labelled) // 5)
        self.queries, self.bank = (
            labelled[:num_queries],
            labelled[num_queries : num_queries + config.max_train],
        )
        if self.enabled:
            check(config.k, config.temperature, len(self.bank), "online.")
        elif config.knn_every_epochs > 0 and process_group.is_main():
            print(
                f"online k-NN: off, as the training images have {len(labelled)} labels", flush=True
            )

    @property
    def enabled(self) -> bool:
        return self.config.knn_every_epochs > 0 and len(self.queries) > 0

    def due(self, step: int) -> bool:
        """Return True if the step has just passed a multiple of knn_every_epochs."""
        return (
            self.enabled
            and step > 0
            and int(step / self.steps_per_measure) > int((step - 1) / self.steps_per_measure)
        )

    def at(self, step: int, backbone: nn.Module) -> dict[str, Any]:
        """Measure if it is due after `step` steps. Returns the accuracies, and on rank 0 a picture of neighbors.

        Raises:
            MeasureError: A rank failed, and `online.on_failure` is `stop`.
        """
        try:
            accuracy = self.measure(backbone) if self.due(step) else None
        except MeasureError as error:
            if self.config.on_failure == "stop":
                raise
            if process_group.is_main():
                warnings.warn(
                    f"step {step}: {error}; the training goes on, as online.on_failure is warn",
                    stacklevel=2,
                )
            return {}
        if accuracy is None:
            return {}
        found = {"knn": accuracy, "probe": self.probed, "neighbours": self.neighbours}
        return {name: value for name, value in found.items() if value is not None}

    @torch.no_grad()
    def measure(self, backbone: nn.Module) -> float | None:
        """Measure the accuracy of the k-NN. The state of the training stays as it was.

        The accuracy of the linear classifier is in `probed` afterwards.

        Returns:
            Accuracy in [0, 1], the same on all ranks. None without labels.

        Raises:
            MeasureError: A rank failed.
        """
        if not self.enabled:
            return None
        with untouched(backbone, self.device):
            own = _on_every_rank(
                lambda: [
                    self._own_features(backbone, numbers) for numbers in (self.bank, self.queries)
                ]
            )
        bank, queries = (
            self._of_all(features, numbers)
            for features, numbers in zip(own, (self.bank, self.queries))
        )
        bank_labels = torch.from_numpy(self.labels[self.bank]).to(self.device)
        mine = np.arange(process_group.rank(), len(self.queries), process_group.world_size())
        truth = torch.from_numpy(self.labels[self.queries[mine]]).to(self.device)
        classes = int(self.labels.max()) + 1

        def vote_and_show() -> Tensor:
            if self.pixels is not None and process_group.is_main():
                self.neighbours = self._picture(bank, queries[:SHOWN])
            return weighted_knn(
                bank, bank_labels, queries[mine], self.config.k, self.config.temperature, classes
            )

        predicted = _on_every_rank(vote_and_show)
        correct = collectives.reduce_sum((predicted == truth).sum().double())
        if (
            self.config.probe
        ):  # every rank fits the same classifier to the bank and classifies its own queries
            answered = _on_every_rank(
                lambda: linear_probe.predict(bank, bank_labels, queries[mine], classes)
            )
            self.probed = collectives.reduce_sum((answered == truth).sum().double()).item() / len(
                self.queries
            )
        return correct.item() / len(self.queries)

    def _picture(self, bank: Tensor, queries: Tensor) -> Tensor:
        """Draw the first queries, always the same, each with its nearest images of the bank."""
        assert self.pixels is not None, "a picture needs `pixels`"
        found = (
            (F.normalize(queries, dim=1) @ F.normalize(bank, dim=1).T)
            .topk(min(NEAREST, len(bank)), dim=1)
            .indices.cpu()
            .numpy()
        )
        asked, near = self.queries[: len(queries)], self.bank[found]
        shown = self.pixels(near.ravel())
        right = torch.from_numpy(self.labels[near] == self.labels[asked][:, None])
        return image_grids.neighbours(
            self.pixels(asked), shown.view(*near.shape, *shown.shape[1:]), right
        )

    def _own_features(self, backbone: nn.Module, numbers: np.ndarray) -> Tensor:
        """Features of this rank's share of the images, float32 (share, dim). All shares are equal."""
        ranks = process_group.world_size()
        padded = np.concatenate([numbers, np.repeat(numbers[-1:], -len(numbers) % ranks)])
        return torch.cat(
            [
                backbone(images.to(self.device)).float()
                for images, _ in self.images(padded[process_group.rank() :: ranks])
            ]
        )

    def _of_all(self, own: Tensor, numbers: np.ndarray) -> Tensor:
        """Gather the features of the images from all ranks, float32 (len(numbers), dim)."""
        features = collectives.gather(own)  # rank 0's share, then rank 1's, ...
        return (
            features.view(process_group.world_size(), -1, features.shape[1])
            .transpose(0, 1)
            .flatten(0, 1)[: len(numbers)]
        )


def _on_every_rank(own: Callable[[], T]) -> T:
    """Call `own` on every rank and return its result, unless a rank has failed.

    A rank that left the others alone would keep them waiting in the next collective.

    Raises:
        MeasureError: Names the ranks that failed and their errors. Raised on all ranks.
    """
    try:
        result, problem = own(), None
    except Exception as error:
        result, problem = None, f"{type(error).__name__}: {error}"
    problems = collectives.gather_objects(problem)
    found = [f"rank {rank}: {problem}" for rank, problem in enumerate(problems) if problem]
    if found or result is None:
        raise MeasureError(f"online k-NN failed on {'; '.join(found)}")
    return result


@contextmanager
def untouched(backbone: nn.Module, device: torch.device) -> Iterator[None]:
    """Switch to evaluation mode. The modes and the random generators are restored afterwards."""
    modes = [(module, module.training) for module in backbone.modules()]
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        backbone.eval()
        try:
            yield
        finally:
            for module, training in modes:
                module.training = training
