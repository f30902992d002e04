"""Classifiers of single patches: k nearest neighbors, and logistic regression.

Both are those of CAPI (Darcet et al., arXiv:2502.08769), eval_segmentation.py.
"""

import warnings
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from ssl_pretrain.eval.dense.masked_images import VOID

QUERIES = 1024  # per product with the bank
BANK_ROWS = 262_144  # rows of the bank per product


class PatchClassifier(Protocol):
    """A fitted classifier of tokens."""

    def predict(self, tokens: Tensor, num_pixels: int) -> Tensor:
        """Return the labels of the patches' pixels, uint8 (num_patches, num_pixels).

        Args:
            tokens: Standardized tokens, (num_patches, dim).
            num_pixels: Number of pixels per patch.
        """

    def logits(self, tokens: Tensor) -> Tensor | None:
        """Return the classes' logits, (num_patches, num_classes), or None if there are none."""


def patch_labels(pixels: Tensor) -> Tensor:
    """Return the most frequent label of each patch, (num_patches,), of (num_patches, pixels)."""
    return pixels.mode(dim=1).values


def labeled_rows(pixels: Tensor) -> Tensor:
    """Return True for each patch whose most frequent label is a class."""
    return patch_labels(pixels) != VOID


@dataclass
class NearestNeighbors:
    """Labels of the nearest training patches, which vote for each pixel of a patch.

    Attributes:
        tokens: Training tokens, (num_patches, dim).
        pixels: Labels of their pixels, uint8 (num_patches, num_pixels).
        k: Number of neighbors.
        distance: "cosine" or "L2".
    """

    tokens: Tensor
    pixels: Tensor
    k: int
    distance: str

    def __post_init__(self) -> None:
        if self.distance == "cosine":
            self.tokens = F.normalize(self.tokens, dim=1)

    def logits(self, tokens: Tensor) -> None:
        """Return None, because neighbors vote per pixel."""

    def predict(self, tokens: Tensor, num_pixels: int) -> Tensor:
        """Return the labels of the patches' pixels, uint8 (num_patches, num_pixels)."""
        return torch.cat([self._vote(chunk) for chunk in tokens.split(QUERIES)])

    def _vote(self, queries: Tensor) -> Tensor:
        distances, rows = list[Tensor](), list[Tensor]()
        for start in range(0, len(self.tokens), BANK_ROWS):
            bank = self.tokens[start : start + BANK_ROWS]
            nearest = self._distances(queries, bank).topk(min(self.k, len(bank)), largest=False)
            distances.append(nearest.values)
            rows.append(nearest.indices + start)
        k = min(self.k, len(self.tokens))
        best = torch.cat(distances, dim=1).topk(k, dim=1, largest=False).indices
        neighbors = torch.cat(rows, dim=1).gather(1, best)
        return self.pixels[neighbors].mode(dim=1).values

    def _distances(self, queries: Tensor, bank: Tensor) -> Tensor:
        if self.distance == "L2":
            return torch.cdist(queries, bank)
        return 1 - F.normalize(queries, dim=1) @ bank.T


class LogisticRegression:
    """Multinomial logistic regression with an L2 penalty, on the most frequent label of a patch.

    The authors fit it with cuML. scikit-learn minimizes the same function.

    Args:
        tokens: Training tokens, (num_patches, dim), of at least two classes.
        pixels: Labels of their pixels, uint8 (num_patches, num_pixels).
        num_classes: Number of classes, of which some may have no training patch.
        inverse_penalty: scikit-learn's C.
        max_iterations: Iterations of L-BFGS at most.
        tolerance: Largest gradient at which it stops.
    """

    def __init__(
        self,
        tokens: Tensor,
        pixels: Tensor,
        num_classes: int,
        inverse_penalty: float,
        max_iterations: int,
        tolerance: float,
    ):
        from sklearn import linear_model
        from sklearn.exceptions import ConvergenceWarning

        labels = patch_labels(pixels)
        present = labels.unique()
        model = linear_model.LogisticRegression(
            C=inverse_penalty, max_iter=max_iterations, tol=tolerance
        )
        with warnings.catch_warnings():  # the authors' tolerance is never reached
            warnings.simplefilter("ignore", ConvergenceWarning)
            model.fit(tokens.cpu().numpy(), labels.cpu().numpy())
        # On the CPU, because the main rank sends them to ranks with other devices.
        weights = torch.from_numpy(model.coef_).to(tokens.dtype)
        bias = torch.from_numpy(model.intercept_).to(tokens.dtype)
        if len(present) == 2:  # scikit-learn keeps the logit of the second class only
            weights = torch.cat([torch.zeros_like(weights), weights])
            bias = torch.cat([torch.zeros_like(bias), bias])
        self._weights, self._bias = weights, bias
        self._classes, self._num_classes = present.cpu().long(), num_classes

    def logits(self, tokens: Tensor) -> Tensor:
        """Return the logits, (num_patches, num_classes). Classes without a patch have -inf."""
        values = tokens.new_full((len(tokens), self._num_classes), -torch.inf)
        values[:, self._classes.to(tokens.device)] = F.linear(
            tokens, self._weights.to(tokens), self._bias.to(tokens)
        )
        return values

    def predict(self, tokens: Tensor, num_pixels: int) -> Tensor:
        """Return the class of each patch for all its pixels, uint8 (num_patches, num_pixels)."""
        classes = self.logits(tokens).argmax(dim=1).to(torch.uint8)
        return classes[:, None].expand(-1, num_pixels)
