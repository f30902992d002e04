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

from ssl_pretrain import distributed, pictures, probe

T = TypeVar("T")
Images = Callable[[np.ndarray], Iterator[tuple[Tensor, Tensor]]]  # samples' numbers -> (normalized images, labels), in that order
SHOWN, NEAREST = 8, 6  # queries in the picture, and neighbours of each
SIMILARITIES = 2**24  # float32 values held at once: 64 MiB


@dataclass
class OnlineConfig:
    knn_every_epochs: float = 1.0  # passes over the data between two measurements; 0: none
    k: int = 20  # neighbours that vote
    temperature: float = 0.07  # divides their cosine similarities
    probe: bool = True  # and a linear classifier on the same features, whenever the k-NN is measured
    max_train: int = 10000  # training images in the bank
    max_test: int = 2000  # training images held out of it as queries
    on_failure: Literal["stop", "warn"] = "warn"  # where measuring fails, on any rank: end the run, or say so and train on


class MeasureError(RuntimeError):
    """A measurement failed on some rank; raised on all of them."""


def weighted_knn(
    train_features: Tensor, train_labels: Tensor, test_features: Tensor, k: int, temperature: float, num_classes: int
) -> Tensor:
    """Predicted classes, int64 (num_test,): each of the k nearest training images votes with exp(cosine similarity / temperature).

    The protocol of InstDisc (Wu et al., CVPR 2018, arXiv:1805.01978, section 3.4) and DINO, exact, in float32.
    Votes are summed as exp((similarity - the nearest one's) / temperature): the same winner, and no overflow.

    Args:
        train_features: the bank, (num_train, dim). Normalized here, so any scale.
        train_labels: its classes in [0, num_classes), (num_train,).
        test_features: the queries, (num_test, dim).

    Raises:
        ValueError: k is not in [1, num_train], or temperature is not positive.
    """
    check(k, temperature, len(train_features))
    bank = F.normalize(train_features.float(), dim=1)
    predictions = []
    for queries in test_features.split(max(1, SIMILARITIES // len(bank))):
        similarities, neighbours = (F.normalize(queries.float(), dim=1) @ bank.T).topk(k, dim=1)
        predictions.append(vote(similarities, train_labels[neighbours], temperature, num_classes))
    return torch.cat(predictions) if predictions else train_labels.new_empty(0)


def check(k: int, temperature: float, num_train: int, section: str = "") -> None:
    if not 1 <= k <= num_train:
        raise ValueError(f"{section}k: {k} neighbours cannot be found among {num_train} training images; give one from 1 to {num_train}")
    if temperature <= 0:
        raise ValueError(f"{section}temperature: {temperature} must be > 0; 0.07 is usual")


def vote(similarities: Tensor, labels: Tensor, temperature: float, num_classes: int) -> Tensor:
    """The winning class of each query, (queries,), from its neighbours' similarities, nearest first, and labels, both (queries, k)."""
    weights = ((similarities - similarities[:, :1]) / temperature).exp()
    scores = weights.new_zeros(len(labels), num_classes).scatter_add_(1, labels, weights)
    return scores.argmax(dim=1)


class OnlineKNN:
    """Weighted k-NN accuracy of a backbone, measured inside its run on training images alone.

    Both the bank and the queries are drawn from the labelled training images, by one fixed permutation: nothing
    about the test set can steer a run. So the number is for its curve; eval/knn.py gives the one to report.

    Each rank embeds every world_size-th image. Padding gives all ranks as many forward passes, as sharded weights
    need; the counted images are the same on any number of ranks.
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
        """Chooses the bank and the queries; reads no image.

        Args:
            images: gives the evaluation views of the training images with these numbers, in their order.
            labels: of all training images, (num_train,), -1 for none.
            order: a fixed permutation of their numbers; its labelled ones become queries (at most a fifth), then the bank.
            pixels: gives uint8 (n, 3, size, size) of the images with these numbers, for `neighbours`.

        Raises:
            ValueError: k or temperature do not fit the bank.
        """
        self.config, self.images, self.labels, self.device = config, images, labels, device
        self.probed: float | None = None  # the linear classifier's accuracy at the last measurement
        self.pixels = pixels
        self.neighbours: Tensor | None = None
        self.steps_per_measure = config.knn_every_epochs * steps_per_epoch
        labelled = order[labels[order] >= 0]
        num_queries = min(config.max_test, len(labelled) // 5)
        self.queries, self.bank = labelled[:num_queries], labelled[num_queries : num_queries + config.max_train]
        if self.enabled:
            check(config.k, config.temperature, len(self.bank), "online.")
        elif config.knn_every_epochs > 0 and distributed.is_main():
            print(f"online k-NN: off, as the training images have {len(labelled)} labels", flush=True)

    @property
    def enabled(self) -> bool:
        return self.config.knn_every_epochs > 0 and len(self.queries) > 0

    def due(self, step: int) -> bool:
        """Whether to measure after `step` steps: when a multiple of knn_every_epochs has just been passed."""
        return self.enabled and step > 0 and int(step / self.steps_per_measure) > int((step - 1) / self.steps_per_measure)

    def at(self, step: int, backbone: nn.Module) -> dict[str, Any]:
        """The accuracies after `step` steps, where they are due, and on rank 0 a picture of neighbours; else nothing."""
        try:
            accuracy = self.measure(backbone) if self.due(step) else None
        except MeasureError as error:
            if self.config.on_failure == "stop":
                raise
            if distributed.is_main():
                warnings.warn(f"step {step}: {error}; the training goes on, as online.on_failure is warn", stacklevel=2)
            return {}
        if accuracy is None:
            return {}
        found = {"knn": accuracy, "probe": self.probed, "neighbours": self.neighbours}
        return {name: value for name, value in found.items() if value is not None}

    @torch.no_grad()
    def measure(self, backbone: nn.Module) -> float | None:
        """The k-NN's accuracy in [0, 1], the same on all ranks; None without labels. Leaves the training state as it was.

        The linear classifier's, where it is asked for, is then in `probed`.
        """
        if not self.enabled:
            return None
        with untouched(backbone, self.device):
            own = _on_every_rank(lambda: [self._own_features(backbone, numbers) for numbers in (self.bank, self.queries)])
        bank, queries = (self._of_all(features, numbers) for features, numbers in zip(own, (self.bank, self.queries)))
        bank_labels = torch.from_numpy(self.labels[self.bank]).to(self.device)
        mine = np.arange(distributed.rank(), len(self.queries), distributed.world_size())
        truth = torch.from_numpy(self.labels[self.queries[mine]]).to(self.device)
        classes = int(self.labels.max()) + 1

        def vote_and_show() -> Tensor:
            if self.pixels is not None and distributed.is_main():
                self.neighbours = self._picture(bank, queries[:SHOWN])
            return weighted_knn(bank, bank_labels, queries[mine], self.config.k, self.config.temperature, classes)

        predicted = _on_every_rank(vote_and_show)
        correct = distributed.reduce_sum((predicted == truth).sum().double())
        if self.config.probe:  # every rank fits the same classifier to the same bank, and asks it about its own queries
            answered = _on_every_rank(lambda: probe.predict(bank, bank_labels, queries[mine], classes))
            self.probed = distributed.reduce_sum((answered == truth).sum().double()).item() / len(self.queries)
        return correct.item() / len(self.queries)

    def _picture(self, bank: Tensor, queries: Tensor) -> Tensor:
        """The first queries, always the same, each with its nearest images of the bank."""
        assert self.pixels is not None, "asked for where pixels are given"
        found = (F.normalize(queries, dim=1) @ F.normalize(bank, dim=1).T).topk(min(NEAREST, len(bank)), dim=1).indices.cpu().numpy()
        asked, near = self.queries[: len(queries)], self.bank[found]
        shown = self.pixels(near.ravel())
        right = torch.from_numpy(self.labels[near] == self.labels[asked][:, None])
        return pictures.neighbours(self.pixels(asked), shown.view(*near.shape, *shown.shape[1:]), right)

    def _own_features(self, backbone: nn.Module, numbers: np.ndarray) -> Tensor:
        """Features of this rank's share of these images, float32 (share, dim); the shares are equal."""
        ranks = distributed.world_size()
        padded = np.concatenate([numbers, np.repeat(numbers[-1:], -len(numbers) % ranks)])
        return torch.cat([backbone(images.to(self.device)).float() for images, _ in self.images(padded[distributed.rank() :: ranks])])

    def _of_all(self, own: Tensor, numbers: np.ndarray) -> Tensor:
        """Features of these images on every rank, float32 (len(numbers), dim)."""
        features = distributed.gather(own)  # rank 0's share, then rank 1's, ...
        return features.view(distributed.world_size(), -1, features.shape[1]).transpose(0, 1).flatten(0, 1)[: len(numbers)]


def _on_every_rank(own: Callable[[], T]) -> T:
    """What `own` gives, once no rank has failed in it: one that leaves the others in a collective would hold them there.

    Raises:
        MeasureError: names the ranks and their errors, on all ranks.
    """
    try:
        result, problem = own(), None
    except Exception as error:
        result, problem = None, f"{type(error).__name__}: {error}"
    problems = distributed.gather_objects(problem)
    found = [f"rank {rank}: {problem}" for rank, problem in enumerate(problems) if problem]
    if found or result is None:
        raise MeasureError(f"online k-NN failed on {'; '.join(found)}")
    return result


@contextmanager
def untouched(backbone: nn.Module, device: torch.device) -> Iterator[None]:
    """Evaluation mode inside; after it every module's mode and the random generators are what they were."""
    modes = [(module, module.training) for module in backbone.modules()]
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        backbone.eval()
        try:
            yield
        finally:
            for module, training in modes:
                module.training = training
