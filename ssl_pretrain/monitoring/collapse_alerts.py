"""When a measure says that something is wrong: what it looks like, and what others did about it, in plain words.

A run that begins close together, as many do, is not a collapsed one: an alarm asks that a measure is bad, that it was better
before or has been bad for long, that two measurements in a row say so or one says it loudly, and, where two views of an image
are measured, that they cannot be told from views of others. docs/health.md shows when each of them rang.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

IN_A_ROW = 2  # measurements
LOUD = 0.5  # of a rule's `bad` and of its `fell`: one measurement is enough
WITNESS, CONFUSED = (
    "positive_chance",
    0.5,
)  # half of what chance gives: an image's other view is lost among the others'
PATIENCE = 1000  # steps that a run may begin in a bad state


@dataclass(frozen=True)
class Alarm:
    title: str
    text: str
    collapse: bool = True  # else it is only worth a look


@dataclass(frozen=True)
class Rule:
    """`key` is bad where it is below `bad`, and an alarm where it is also below `fell` times its best so far."""

    title: str
    key: str
    bad: float
    fell: float
    looks: str
    others: str
    confused: bool = True  # counts only where the witness says so, if it was measured
    collapse: bool = True

    def is_bad(self, value: float, numbers: dict[str, Any]) -> bool:
        witness = numbers.get(WITNESS)
        sure = not self.confused or not isinstance(witness, int | float) or not witness <= CONFUSED
        return value < self.bad and sure

    def fallen(self, value: float, best: float) -> int:
        """0: not; 1: yes; IN_A_ROW: so far that once is enough."""
        if value < LOUD * self.bad and value < LOUD * self.fell * best:
            return IN_A_ROW
        return int(value < self.fell * best)


RULES = (
    Rule(
        "collapse", "embedding_std", 0.2, 0.6,
        "the embeddings of different images have moved together: on the way to the same output for every image, whatever the loss says",
        "Others then found the stopped gradient, the predictor or the teacher missing (SimSiam, BYOL), a variance weight of 0 or all "
        "weights 1 (VICReg), or a learning rate too high for the batch: halve optim.base_lr, lengthen the warm-up",
    ),
    Rule(
        "shrinking", "embedding_scale", 0.02, 0.25,
        "the embeddings shrink to a point before they are normalized: what still differs between images is close to rounding",
        "Others restored the variance term (VICReg: variance_weight 25, eq. 1) or ended the head with batch norm (SimCLR, SimSiam)",
    ),
    Rule(
        "dimensional collapse", "rank_share", 0.1, 0.5,
        "the embeddings have collapsed to a few directions: images still differ, but in almost nothing",
        "Others raised the covariance or decorrelation weight (VICReg, Barlow Twins), lowered the temperature, weakened the colour "
        "jitter or widened the head; a linear head collapses so (Jing et al., arXiv:2110.09348)",
    ),
    Rule(
        "dead prototypes", "prototype_entropy", 0.3, 0.5,
        "nearly all images are assigned to a few prototypes",
        "SwAV's authors, with the loss stuck at ln(prototypes), lower epsilon to 0.03, freeze the prototypes longer, use fewer crops, and "
        "start the queue later; DINO's, a lower teacher temperature or its warm-up, and a frozen last layer",
        confused=False,
    ),
)  # fmt: skip


class Alarms:
    """Remembers the best of each measure, and which alarms have rung: each rings once, and again only after it was well.

    past: records of the run so far, whose measures count as seen.
    """

    def __init__(self, past: list[dict[str, Any]]):
        self._best: dict[str, float] = {}
        self._count: dict[str, int] = {}
        self._low_since: dict[str, int] = {}
        self._rung: set[str] = set()
        for record in past:
            self.judge(record["step"], record)

    def judge(self, step: int, numbers: dict[str, Any]) -> list[Alarm]:
        """The alarms of this measurement, after `step` steps; usually none. What is missing or not finite is passed over."""
        found = []
        for rule in RULES:
            value = numbers.get(rule.key)
            if not isinstance(value, int | float) or not math.isfinite(value):
                continue
            best = self._best[rule.key] = max(self._best.get(rule.key, value), value)
            if not rule.is_bad(value, numbers):
                self._forget(rule)
                continue
            since = self._low_since.setdefault(rule.title, step)
            fallen = rule.fallen(value, best)
            self._count[rule.title] = self._count.get(rule.title, 0) + fallen if fallen else 0
            late = step - since >= PATIENCE
            if rule.title not in self._rung and (late or self._count[rule.title] >= IN_A_ROW):
                self._rung.add(rule.title)
                found.append(self._alarm(rule, step, value, best, since if late else None))
        return found

    def _forget(self, rule: Rule) -> None:
        self._count.pop(rule.title, None)
        self._low_since.pop(rule.title, None)
        self._rung.discard(rule.title)

    @staticmethod
    def _alarm(rule: Rule, step: int, value: float, best: float, since: int | None) -> Alarm:
        was = (
            f"{step - since} steps without leaving this state"
            if since is not None
            else f"it was {best:.3g}"
        )
        return Alarm(
            rule.title,
            f"step {step}: {rule.key} is {value:.3g}, {was}: {rule.looks}. {rule.others}.",
            rule.collapse,
        )
