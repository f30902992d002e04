"""The optimizers by name. Importing this module does not import torch."""

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Entry:
    """An optimizer of timm or torch.

    Attributes:
        module: Module that has the class.
        class_name: Name of the class.
        summary: One line with the idea and the paper.
        num_moments: Largest number of tensors of a parameter's shape in its state.
        needs_whole_tensors: True if shards of a tensor cannot be updated independently.
        initial_values: Initial values of the state by key, if they are not 0.
    """

    module: str
    class_name: str
    summary: str
    num_moments: int
    needs_whole_tensors: bool = False
    initial_values: Mapping[str, float] = field(default_factory=dict)

    @property
    def optimizer_class(self) -> Any:
        """The class of the library."""
        return getattr(importlib.import_module(self.module), self.class_name)


ENTRIES = {
    "timm:lion": Entry("timm.optim", "Lion", "Lion, the sign of a momentum (arXiv:2302.06675).", 1),
    "timm:muon": Entry(
        "timm.optim",
        "Muon",
        "Muon, momentum with orthogonalized matrices, and AdamW for excluded parameters.",
        2,
        needs_whole_tensors=True,
    ),
    "torch:adadelta": Entry("torch.optim", "Adadelta", "Adadelta (arXiv:1212.5701).", 2),
    "torch:adamax": Entry(
        "torch.optim", "Adamax", "Adam with a maximum norm (arXiv:1412.6980).", 2
    ),
    "torch:nadam": Entry(
        "torch.optim",
        "NAdam",
        "Adam with Nesterov momentum (Dozat, 2016).",
        2,
        initial_values={"mu_product": 1.0},
    ),
    "torch:radam": Entry("torch.optim", "RAdam", "Rectified Adam (arXiv:1908.03265).", 2),
    "torch:rmsprop": Entry("torch.optim", "RMSprop", "RMSprop (Tieleman and Hinton, 2012).", 3),
}

# Optimizers of this project: paper, moments per parameter.
SUMMARIES = {
    "lars": ("Momentum SGD with a rate per layer (arXiv:1708.03888).", 1),
    "larc": ("LARS with the sum of norms, as in NVIDIA/apex.", 1),
    "adamw": ("Adam with decoupled weight decay (arXiv:1711.05101), torch's fused kernel.", 2),
    "adam": ("Adam (arXiv:1412.6980), torch's fused kernel.", 2),
    "sgd": ("Momentum SGD.", 1),
    "lamb": ("Adam with a rate per layer, for large batches (arXiv:1904.00962).", 2),
    "adan": ("Adaptive Nesterov momentum (arXiv:2208.06677).", 4),
}


def summaries() -> dict[str, str]:
    """Return one line per optimizer name, with its memory and whether it supports sharding."""
    entries = {name: (*summary, False) for name, summary in SUMMARIES.items()} | {
        name: (entry.summary, entry.num_moments, entry.needs_whole_tensors)
        for name, entry in ENTRIES.items()
    }
    return {
        name: f"{summary} Moments per parameter: {num_moments}."
        + (" Not with parallel.strategy=fsdp or hybrid." if needs_whole_tensors else "")
        for name, (summary, num_moments, needs_whole_tensors) in entries.items()
    }
