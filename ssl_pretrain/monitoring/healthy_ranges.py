"""Values of the collapse metrics in healthy runs, and whole scales of bounded metrics.

docs/health.md explains the metrics and has the measured runs. The limits of the alerts are those of
`collapse_alerts.RULES`.
"""

import math
from dataclasses import dataclass

from ssl_pretrain.monitoring import collapse_alerts


@dataclass(frozen=True)
class Range:
    """An interval of values. Either end may be infinite."""

    low: float = -math.inf
    high: float = math.inf

    def scaled(self, factor: float) -> "Range":
        """Return the interval with both ends multiplied by a positive factor."""
        return Range(factor * self.low, factor * self.high)

    def __str__(self) -> str:
        if math.isinf(self.high):
            return f"above {self.low:.3g}"
        if math.isinf(self.low):
            return f"below {self.high:.3g}"
        return f"{self.low:.3g} to {self.high:.3g}"


HEALTHY = {
    "embedding_std": Range(0.2, 1.0),
    "embedding_scale": Range(0.02),
    "rank_share": Range(0.2, 0.9),
    "top5_ratio": Range(0.3, 0.9),
    "gaussianity": Range(0.9, 1.0),
    "uniformity": Range(-4.0, -1.0),
    "positive_chance": Range(0.0, 0.5),
    "prototype_usage": Range(0.3, 1.0),
    "prototype_entropy": Range(0.3, 1.0),
}
UPDATE_RATIO_PREFIX = "update_ratio_"  # one metric per submodule
HEALTHY_UPDATE_RATIO = Range(1e-4, 1e-2)
WHOLE_SCALES = {
    "embedding_std": Range(0.0, 1.0),
    "rank_share": Range(0.0, 1.0),
    "top5_ratio": Range(0.0, 1.0),
    "gaussianity": Range(0.0, 1.0),
    "uniformity": Range(-4.0, 0.0),
    "positive_chance": Range(0.0, 1.0),
    "prototype_usage": Range(0.0, 1.0),
    "prototype_entropy": Range(0.0, 1.0),
    "pair_cosine": Range(0.0, 1.0),
    "alignment": Range(0.0, 2.0),
    "data_wait": Range(0.0, 1.0),
    "flops_utilization": Range(0.0, 1.0),
}
ALERT_LIMITS = {rule.metric: rule.low_threshold for rule in collapse_alerts.RULES}


def healthy_range(key: str) -> Range | None:
    """Return the values of a metric in healthy runs, or None if none are known."""
    if key.startswith(UPDATE_RATIO_PREFIX):
        return HEALTHY_UPDATE_RATIO
    return HEALTHY.get(key)
