"""Is the representation alive? Measures of the embeddings that fall when it collapses, whatever the loss does."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ssl_pretrain import distributed


@dataclass
class HealthConfig:
    """When the embeddings are measured."""

    every_steps: int = 50  # 0: never
    max_rows: int = 2048  # embeddings of all ranks that enter the spectrum


def at(step: int, embeddings: dict[str, Tensor], config: HealthConfig) -> dict[str, float]:
    """The measures, every `every_steps` steps; else nothing."""
    if config.every_steps == 0 or step % config.every_steps:
        return {}
    return {name: value.item() for name, value in measure(embeddings, config).items()}


@torch.no_grad()
def measure(embeddings: dict[str, Tensor], config: HealthConfig) -> dict[str, Tensor]:
    """Of the first embedding, over all ranks: scalars on the device.

    embedding_std: mean over dimensions of the deviation of l2-normalized embeddings, times sqrt(dim): 1 on a uniform
        sphere, 0 when collapsed (SimSiam, arXiv:2011.10566, section 4.1).
    effective_rank: exp of the entropy of the normalized singular values, RankMe (arXiv:2210.02885, eq. 1).
    """
    z = next(iter(embeddings.values())).detach().float()
    z = distributed.gather(z[: max(1, config.max_rows // distributed.world_size())])
    broken = ~torch.isfinite(z).all()  # of a diverged run: the decomposition would raise, and the run says so better itself
    z = torch.where(broken, torch.zeros_like(z), z)
    unit = F.normalize(z, dim=1)
    share = torch.linalg.svdvals(z)
    share = share / share.sum().clamp(min=1e-12) + 1e-7
    measures = {"embedding_std": unit.std(0).mean() * z.shape[1] ** 0.5, "effective_rank": torch.exp(-(share * share.log()).sum())}
    return {name: torch.where(broken, torch.full_like(value, float("nan")), value) for name, value in measures.items()}
