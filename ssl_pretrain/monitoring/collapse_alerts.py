"""Rules that decide when the collapse metrics raise an alert, with known causes and remedies.

Many healthy runs begin with similar embeddings, so a bad value alone raises no alert. The value
must also have fallen from a better one, or have been bad for `GRACE_STEPS`. It must be bad in
`MIN_CONSECUTIVE` measurements in a row, or severe. If pairs of views are measured, they must be
hard to match. docs/health.md shows when each alert was raised in runs that were made to collapse.
"""

import math
from dataclasses import dataclass
from typing import Any

MIN_CONSECUTIVE = 2  # bad measurements in a row that raise an alert
SEVERE_FRACTION = 0.5  # a single value below this fraction of both limits raises an alert
GUARD_METRIC = "positive_chance"
CHANCE_THRESHOLD = 0.5  # the views of an image match up to this value of the guard metric
GRACE_STEPS = 1000  # a value that stays bad this long raises an alert even if it has not fallen


@dataclass(frozen=True)
class Alert:
    """A message for the user."""

    title: str
    text: str


@dataclass(frozen=True)
class Rule:
    """Limits of one metric, and the alert that it raises.

    A value is bad below `bad_below`. It has fallen when it is below `fallen_below` times the best
    value so far.
    """

    title: str
    metric: str
    bad_below: float
    fallen_below: float
    symptom: str
    remedies: str
    is_guarded: bool = True  # the guard metric, if measured, must agree that a value is bad

    def is_bad(self, value: float, metrics: dict[str, Any]) -> bool:
        """Return True if the value is bad and the guard metric does not contradict it."""
        guard = metrics.get(GUARD_METRIC)
        views_match = isinstance(guard, int | float) and guard <= CHANCE_THRESHOLD
        return value < self.bad_below and not (self.is_guarded and views_match)

    def weight(self, value: float, best: float) -> int:
        """Return how many measurements a bad value counts as, which is 0 unless it has fallen."""
        limits = (self.bad_below, self.fallen_below * best)
        if all(value < SEVERE_FRACTION * limit for limit in limits):
            return MIN_CONSECUTIVE
        return int(value < self.fallen_below * best)


RULES = (
    Rule(
        "collapse",
        "embedding_std",
        bad_below=0.2,
        fallen_below=0.6,
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
        bad_below=0.02,
        fallen_below=0.25,
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
        bad_below=0.1,
        fallen_below=0.5,
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
        "dead prototypes",
        "prototype_entropy",
        bad_below=0.3,
        fallen_below=0.5,
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
    num_fallen: int = 0  # fallen measurements in a row, where a severe one counts double
    first_bad_step: int | None = None
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
            self.check(record["step"], record)

    def check(self, step: int, metrics: dict[str, Any]) -> list[Alert]:
        """Return the alerts that a measurement raises, usually none.

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
            if not rule.is_bad(value, metrics):
                self._states[rule.title] = _State(state.best)
                continue
            if state.first_bad_step is None:
                state.first_bad_step = step
            weight = rule.weight(value, state.best)
            state.num_fallen = state.num_fallen + weight if weight else 0
            num_steps = step - state.first_bad_step
            is_overdue = num_steps >= GRACE_STEPS
            if not state.is_raised and (is_overdue or state.num_fallen >= MIN_CONSECUTIVE):
                state.is_raised = True
                best = f"its best was {state.best:.3g}"
                reason = f"low for {num_steps} steps" if is_overdue else best
                text = f"step {step}: {rule.metric} is {value:.3g}, {reason}: {rule.symptom}. "
                alerts.append(Alert(rule.title, f"{text}{rule.remedies}."))
        return alerts
