"""Rules that decide when the collapse metrics raise an alert, with known causes and remedies.

Many healthy runs begin with similar embeddings, so a low value alone raises no alert. The value
must have dropped from a higher one in `MIN_CONSECUTIVE` measurements in a row, or once severely, or
it must have been low for `GRACE_STEPS`. If pairs of views are measured, they must also be hard to
match. docs/health.md shows when each alert was raised in runs that were made to collapse.
"""

import math
from dataclasses import dataclass
from typing import Any

MIN_CONSECUTIVE = 2  # measurements in a row with a dropped value that raise an alert
SEVERE_FRACTION = 0.5  # a single value below this fraction of both limits raises an alert
GUARD_METRIC = "positive_chance"
CHANCE_THRESHOLD = 0.5  # the views of an image can be matched up to this value of the guard metric
GRACE_STEPS = 1000  # a value that stays low this long raises an alert even if it has not dropped


@dataclass(frozen=True)
class Alert:
    """A message for the user."""

    title: str
    text: str


@dataclass(frozen=True)
class Rule:
    """Limits of one metric, and the alert that it raises.

    A value is low if it is below `low_threshold`. It has dropped if it is below `drop_fraction`
    times the best value so far.
    """

    title: str
    metric: str
    low_threshold: float
    drop_fraction: float
    symptom: str
    remedies: str
    is_guarded: bool = True  # a value only counts as low if the guard metric agrees

    def is_low(self, value: float, metrics: dict[str, Any]) -> bool:
        """Return True if the value is low and the guard metric does not contradict it."""
        guard = metrics.get(GUARD_METRIC)
        views_match = isinstance(guard, int | float) and guard <= CHANCE_THRESHOLD
        return value < self.low_threshold and not (self.is_guarded and views_match)

    def severity(self, value: float, best: float) -> int:
        """Return how many measurements a low value counts as, which is 0 unless it has dropped."""
        limits = (self.low_threshold, self.drop_fraction * best)
        if all(value < SEVERE_FRACTION * limit for limit in limits):
            return MIN_CONSECUTIVE
        return int(value < self.drop_fraction * best)


RULES = (
    Rule(
        "collapse",
        "embedding_std",
        low_threshold=0.2,
        drop_fraction=0.6,
        symptom=(
            "the embeddings of different images have become similar. The network is on its way to "
            "the same output for every image, whatever the loss is"
        ),
        remedies=(
            "Known causes: a missing stop-gradient, predictor or teacher (SimSiam, "
            "BYOL), a variance weight of 0 or all weights 1 (VICReg), or a learning rate too high "
            "for the batch. Halve optim.base_lr or lengthen the warm-up"
        ),
    ),
    Rule(
        "shrinking",
        "embedding_scale",
        low_threshold=0.02,
        drop_fraction=0.25,
        symptom=(
            "before normalization the embeddings shrink to a point. The differences between "
            "images are close to rounding errors"
        ),
        remedies=(
            "Known remedies: the variance term (VICReg: variance_weight 25, equation 1), or "
            "batch norm at the end of the head (SimCLR, SimSiam)"
        ),
    ),
    Rule(
        "dimensional collapse",
        "rank_share",
        low_threshold=0.1,
        drop_fraction=0.5,
        symptom=(
            "the embeddings have collapsed to a few directions. Images still differ, but only "
            "along these directions"
        ),
        remedies=(
            "Known remedies: a larger covariance or decorrelation weight (VICReg, Barlow "
            "Twins), a lower temperature, weaker color jitter, or a wider head. A linear head "
            "collapses this way (Jing et al., arXiv:2110.09348)"
        ),
    ),
    Rule(
        "not Gaussian",
        "gaussianity",
        low_threshold=0.3,
        drop_fraction=0.6,
        is_guarded=False,
        symptom=(
            "the embeddings are far from a standard normal distribution. They shrink to a point, "
            "lie in a few directions, or grow without limit"
        ),
        remedies=(
            "Known remedies: a larger method.sigreg_weight, because SIGReg's statistic is "
            "proportional to global_batch_size and a smaller batch weakens it, more slices "
            "(method.num_slices), or a lower optim.base_lr"
        ),
    ),
    Rule(
        "dead prototypes",
        "prototype_entropy",
        low_threshold=0.3,
        drop_fraction=0.5,
        is_guarded=False,
        symptom="nearly all images are assigned to a few prototypes",
        remedies=(
            "If the loss stays at ln(prototypes), SwAV's authors lower epsilon to 0.03, freeze the "
            "prototypes longer, use fewer crops, and start the queue later. DINO's authors lower "
            "the teacher temperature or warm it up, and freeze the last layer"
        ),
    ),
)


@dataclass
class _State:
    """Past measurements of one rule's metric."""

    best: float = -math.inf
    num_drops: int = 0  # dropped values in a row, of which a severe one counts twice
    first_low_step: int | None = None
    is_raised: bool = False


class AlertHistory:
    """State of the rules over successive measurements.

    Each alert is raised once, and again only after its metric has recovered.

    Args:
        past_records: Earlier records of a resumed run. Their alerts are not raised again.
    """

    def __init__(self, past_records: list[dict[str, Any]]):
        self._states = {rule.title: _State() for rule in RULES}
        for record in past_records:
            self.update(record["step"], record)

    def update(self, step: int, metrics: dict[str, Any]) -> list[Alert]:
        """Add a measurement and return the alerts that it raises, usually none.

        Args:
            step: Optimizer steps done.
            metrics: Measured value of each metric. Missing and non-finite values are ignored.
        """
        alerts = []
        for rule in RULES:
            value, state = metrics.get(rule.metric), self._states[rule.title]
            if not isinstance(value, int | float) or not math.isfinite(value):
                continue
            state.best = max(state.best, value)
            if not rule.is_low(value, metrics):
                self._states[rule.title] = _State(state.best)
                continue
            if state.first_low_step is None:
                state.first_low_step = step
            severity = rule.severity(value, state.best)
            state.num_drops = state.num_drops + severity if severity else 0
            num_steps = step - state.first_low_step
            is_overdue = num_steps >= GRACE_STEPS
            if not state.is_raised and (is_overdue or state.num_drops >= MIN_CONSECUTIVE):
                state.is_raised = True
                best = f"its best was {state.best:.3g}"
                reason = f"low for {num_steps} steps" if is_overdue else best
                text = f"step {step}: {rule.metric} is {value:.3g}, {reason}: {rule.symptom}. "
                alerts.append(Alert(rule.title, f"{text}{rule.remedies}."))
        return alerts
