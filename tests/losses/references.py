"""Slow contrastive losses from the papers: anchor by anchor, on one process, in float64."""

import math

import torch
from torch.nn import functional as F

NAMES = (
    "nt_xent",
    "temperature_free",
    "info_nce",
    "info_nce_queue",
    "supervised_contrastive",
    "decoupled",
    "decoupled_weighted",
    "debiased",
    "hard_negative",
    "image_text",
)
TAU_PLUS, BETA, SIGMA = 0.1, 0.7, 0.5


def slow_loss(name, z_a, z_b, labels, queue, temperature):
    """Return the loss `name` over the whole batch. Its gradients come from autograd."""
    if name == "info_nce":
        return _info_nce(z_a, z_b, temperature)
    if name == "info_nce_queue":
        return _info_nce_with_queue(z_a, z_b, queue, temperature)
    if name == "image_text":
        return (_info_nce(z_a, z_b, temperature) + _info_nce(z_b, z_a, temperature)) / 2
    z, n = F.normalize(torch.cat([z_a, z_b]), dim=1), len(z_a)
    similarity = [[z[i] @ z[k] / temperature for k in range(2 * n)] for i in range(2 * n)]
    closeness = [torch.exp(similarity[i][i + n] * temperature / SIGMA) for i in range(n)]
    losses = []
    for i in range(2 * n):
        positive = similarity[i][(i + n) % (2 * n)]
        others = [similarity[i][k] for k in range(2 * n) if k != i]
        negatives = [similarity[i][k] for k in range(2 * n) if k not in (i, (i + n) % (2 * n))]
        denominator = sum(torch.exp(s) for s in others)
        if name == "nt_xent":
            losses.append(torch.log(denominator) - positive)
        elif name == "temperature_free":
            odds = [(1 + s * temperature) / (1 - s * temperature) for s in (*others, positive)]
            losses.append(torch.log(sum(odds[:-1])) - torch.log(odds[-1]))
        elif name == "supervised_contrastive":
            positives = [k for k in range(2 * n) if k != i and labels[k % n] == labels[i % n]]
            ratios = [torch.exp(similarity[i][k]) / denominator for k in positives]
            losses.append(-sum(torch.log(ratio) for ratio in ratios) / len(ratios))
        elif name == "decoupled":
            losses.append(torch.log(sum(torch.exp(s) for s in negatives)) - positive)
        elif name == "decoupled_weighted":
            weight = 2 - closeness[i % n] / (sum(closeness) / n)
            losses.append(torch.log(sum(torch.exp(s) for s in negatives)) - weight * positive)
        else:  # debiased and hard_negative: the authors' criterion, from the paper's equations
            num_negatives, beta = len(negatives), BETA if name == "hard_negative" else 0.0
            importance = [torch.exp(beta * s) for s in negatives]
            weighted_sum = sum(w * torch.exp(s) for w, s in zip(importance, negatives))
            weighted_sum = weighted_sum / (sum(importance) / num_negatives)
            estimate = (weighted_sum - TAU_PLUS * num_negatives * torch.exp(positive)) / (
                1 - TAU_PLUS
            )
            negative_sum = torch.clamp(estimate, min=num_negatives * math.exp(-1 / temperature))
            losses.append(-torch.log(torch.exp(positive) / (torch.exp(positive) + negative_sum)))
    return sum(losses) / len(losses)


def _info_nce(queries, keys, temperature):
    queries, keys, losses = F.normalize(queries, dim=1), F.normalize(keys, dim=1), []
    for i, query in enumerate(queries):
        exponentials = [torch.exp(query @ key / temperature) for key in keys]
        losses.append(-torch.log(exponentials[i] / sum(exponentials)))
    return sum(losses) / len(losses)


def _info_nce_with_queue(queries, keys, queue, temperature):
    losses = []
    for query, key in zip(F.normalize(queries, dim=1), F.normalize(keys, dim=1)):
        exponentials = [torch.exp(query @ row / temperature) for row in (key, *queue)]
        losses.append(-torch.log(exponentials[0] / sum(exponentials)))
    return sum(losses) / len(losses)
