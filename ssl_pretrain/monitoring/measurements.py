"""Results of the monitors after one step."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor


@dataclass
class Measurements:
    """Numbers, curves and a picture, each empty unless it was due at this step."""

    metrics: dict[str, float] = field(default_factory=dict)  # joined to the next record
    curves: dict[str, list[float]] = field(default_factory=dict)  # one line of plots.jsonl
    neighbors: Tensor | None = None  # picture (3, height, width) in [0, 1], on rank 0

    def __or__(self, other: Measurements) -> Measurements:
        """Combine the results of two monitors."""
        neighbors = self.neighbors if other.neighbors is None else other.neighbors
        return Measurements(self.metrics | other.metrics, self.curves | other.curves, neighbors)
