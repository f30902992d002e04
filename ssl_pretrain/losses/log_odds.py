"""Log-odds of cosine similarities, the logits of the temperature-free contrastive loss."""

import torch
from torch import Tensor

# Cosines are clamped to this magnitude, where the log-odds are 14.5 and their slope is 1e6. A
# float32 cosine is only accurate to about 1e-7, so 1 - cosine has no more digits beyond it.
MAX_COSINE = 1 - 1e-6


def log_odds(cosines: Tensor) -> Tensor:
    """Return log((1 + c) / (1 - c)) = 2 artanh(c) of cosines clamped to MAX_COSINE.

    Excluded pairs, whose cosine is -inf, keep it.
    """
    clamped = cosines.clamp(-MAX_COSINE, MAX_COSINE)
    values = torch.log1p(clamped) - torch.log1p(-clamped)
    return values.masked_fill(cosines == -torch.inf, -torch.inf)


def log_odds_slope(cosines: Tensor) -> Tensor:
    """Return the derivative of `log_odds`, 2 / (1 - c^2). It is 0 where the clamp is active."""
    is_clamped = cosines.abs() > MAX_COSINE
    inside = cosines.masked_fill(is_clamped, 0.0)
    return (2 / ((1 - inside) * (1 + inside))).masked_fill(is_clamped, 0.0)
