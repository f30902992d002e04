"""Progress of a run, and the schedules that depend on it.

Everything is a pure function of the step number, so a resumed run needs no other state.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Self


@dataclass(frozen=True)
class Progress:
    """Position of an optimizer step in its run.

    Attributes:
        step: Number of optimizer steps before this one, 0 for the first.
        num_steps: Number of optimizer steps in the whole run.
        steps_per_epoch: Number of optimizer steps in one pass over the data.
    """

    step: int
    num_steps: int
    steps_per_epoch: int

    @property
    def fraction(self) -> float:
        """Fraction of the run that is done, from 0 to 1."""
        return self.step / self.num_steps

    @property
    def epoch(self) -> int:
        """Number of completed passes over the data."""
        return self.step // self.steps_per_epoch

    def next(self) -> Self:
        """Return the progress of the following step, or this one at the end of the run."""
        return replace(self, step=min(self.step + 1, self.num_steps))


def cosine(fraction: float, *, start: float, final: float) -> float:
    """Half a cosine from `start` at fraction 0 to `final` at fraction 1."""
    return final + (start - final) * (1 + math.cos(math.pi * fraction)) / 2


def warmup_and_decline(
    fraction: float,
    *,
    warmup_fraction: float,
    start: float = 0.0,
    peak: float = 1.0,
    final: float = 0.0,
    decline: Callable[..., float] = cosine,
) -> float:
    """Linear warm-up from `start` to `peak`, then half a cosine or a line down to `final`.

    The cosine is equation 5 of SGDR (Loshchilov and Hutter, ICLR 2017, arXiv:1608.03983).

    Args:
        fraction: Fraction of the run that is done, from 0 to 1.
        warmup_fraction: Fraction of the run that the warm-up takes, from 0 to 1.
        start: Value at the first step.
        peak: Value at the end of the warm-up.
        final: Value at the end of the run.
        decline: `cosine` or `linear`.
    """
    if fraction < warmup_fraction:
        return start + (peak - start) * fraction / warmup_fraction
    after_warmup = 1.0
    if warmup_fraction < 1:
        after_warmup = (fraction - warmup_fraction) / (1 - warmup_fraction)
    return decline(after_warmup, start=peak, final=final)


def linear(position: float, *, start: float, final: float, final_position: float = 1.0) -> float:
    """Straight line from `start` at position 0 to `final` at `final_position`, then constant."""
    if final_position <= 0:
        return final
    return start + (final - start) * min(1.0, position / final_position)
