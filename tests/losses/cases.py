"""Every public loss as a function of one dictionary of tensors, with all its kinds of targets."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from ssl_pretrain import losses

ROWS = 12  # images in the global batch
SHARED = ("queue", "center")  # the same on all ranks; all other tensors have one row per image
Tensors = dict[str, Tensor]


def random_tensors() -> Tensors:
    """Return the tensors of the global batch in float64."""
    generator = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    embeddings = {name: noise(ROWS, 5) for name in ("z_a", "z_b", "p_a", "p_b")}
    return embeddings | {
        "labels": torch.arange(ROWS) % 5,
        "queue": F.normalize(noise(30, 5), dim=1),
        "student_logits": noise(ROWS, 4, 6),
        "teacher_logits": 0.1 * noise(ROWS, 2, 6),
        "center": 0.1 * noise(6),
        "scores": noise(ROWS, 4, 6).tanh(),
        "queue_scores": noise(ROWS, 2, 6).tanh(),
        "predictions": noise(ROWS, 2, 2, 3, 4, 4),
        "targets": noise(ROWS, 3, 4, 4),
        "images": noise(ROWS, 3, 6, 4),
        "pixels": noise(ROWS, 6, 12),
        "masked": (torch.arange(ROWS)[:, None] + torch.arange(6)) % 6 < 4,
        "logit_scale": noise(1).exp().repeat(ROWS),
        "logit_bias": -noise(ROWS).exp(),
        "predicted_patches": noise(ROWS, 2, 3, 5),
        "patches": noise(ROWS, 2, 3, 5),
        "valid": torch.arange(ROWS * 6).view(ROWS, 2, 3) % 4 > 0,
        "views": noise(ROWS, 4, 6),
    }


def slice_images(tensors: Tensors, rank: int, world_size: int) -> Tensors:
    """Return the tensors of one rank."""
    rows = slice(rank * ROWS // world_size, (rank + 1) * ROWS // world_size)
    return {name: x if name in SHARED else x[rows] for name, x in tensors.items()}


def loss_and_gradients(
    name: str, tensors: Tensors, autocast: bool = False
) -> tuple[Tensor, Tensors]:
    """Return a loss and its gradient for each tensor that it depends on, by name.

    With `autocast` the loss is computed under it and the gradient outside, as PyTorch advises.
    """
    leaves = {
        key: x.detach().clone().requires_grad_(x.is_floating_point() and key not in SHARED)
        for key, x in tensors.items()
    }
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = CASES[name](leaves)
    loss.backward()
    return loss.detach(), {key: x.grad for key, x in leaves.items() if x.grad is not None}


def _pair(loss: Callable[..., Tensor], **settings: float) -> Callable[[Tensors], Tensor]:
    return lambda x: loss(x["z_a"], x["z_b"], **settings)


def _predicted(loss: Callable[..., Tensor], **settings: float) -> Callable[[Tensors], Tensor]:
    return lambda x: loss(x["p_a"], x["p_b"], x["z_a"], x["z_b"], **settings)


# The first word of a name is the loss.
CASES: dict[str, Callable[[Tensors], Tensor]] = {
    "align_uniform": _pair(losses.align_uniform),
    "barlow_twins": _pair(losses.barlow_twins),
    "byol": _predicted(losses.byol),
    "cpc": lambda x: losses.cpc(x["predictions"], x["targets"], rows_ahead=[1, 3]),
    "debiased": _pair(losses.debiased, temperature=0.5, tau_plus=0.1),
    "decoupled": _pair(losses.decoupled, temperature=0.2),
    "decoupled weighted": _pair(losses.decoupled, temperature=0.2, sigma=0.5),
    "dino": lambda x: losses.dino(x["student_logits"], x["teacher_logits"], x["center"]),
    "hard_negative": _pair(losses.hard_negative, temperature=0.5, tau_plus=0.1, beta=1.0),
    "ijepa": lambda x: losses.ijepa(x["predicted_patches"], x["patches"]),
    "ijepa with padding": lambda x: losses.ijepa(
        x["predicted_patches"], x["patches"], valid=x["valid"]
    ),
    "image_text": lambda x: losses.image_text(x["z_a"], x["z_b"], x["logit_scale"]),
    "info_nce": _pair(losses.info_nce, temperature=0.2),
    "lejepa": lambda x: losses.lejepa(x["views"], step=3, num_slices=20),
    "mae": lambda x: losses.mae(x["pixels"], x["images"], x["masked"]),
    "mae without normalization": lambda x: losses.mae(
        x["pixels"], x["images"], x["masked"], normalize=False
    ),
    "moco": lambda x: losses.moco(x["p_a"], x["z_b"], x["queue"], temperature=0.2),
    "moco without queue": lambda x: losses.moco(x["p_a"], x["z_b"], None, temperature=0.2),
    "moco_v3": _predicted(losses.moco_v3, temperature=0.2),
    "n_pair": _pair(losses.n_pair),
    "n_pair labels": lambda x: losses.n_pair(x["z_a"], x["z_b"], x["labels"]),
    "negative_cosine": lambda x: losses.negative_cosine(x["p_a"], x["z_b"]),
    "nnclr": lambda x: losses.nnclr(
        x["p_a"], x["p_b"], x["z_a"], x["z_b"], x["queue"], temperature=0.2
    ),
    "nt_xent": _pair(losses.nt_xent, temperature=0.2),
    "pairwise": _pair(losses.pairwise, margin=3.0),
    "pairwise labels": lambda x: losses.pairwise(x["z_a"], x["z_b"], x["labels"], margin=3.0),
    "sentence_pairs": _pair(losses.sentence_pairs, temperature=0.2),
    "sentence_pairs with hard negatives": lambda x: losses.sentence_pairs(
        x["z_a"], x["z_b"], x["p_b"], temperature=0.2, hard_negative_weight=1.5
    ),
    "sentence_pairs of dot products": lambda x: losses.sentence_pairs(
        x["z_a"], x["z_b"], x["p_b"], temperature=1.0, similarity="dot"
    ),
    "sigmoid_image_text": lambda x: losses.sigmoid_image_text(
        x["z_a"], x["z_b"], x["logit_scale"], x["logit_bias"]
    ),
    "sigreg": lambda x: losses.sigreg(x["z_a"], step=torch.tensor(3), num_slices=20),
    "sigreg of views": lambda x: losses.sigreg(x["views"], step=3, seed=1, num_slices=20),
    "simsiam": _predicted(losses.simsiam),
    "simsiam collapsing": _predicted(losses.simsiam, stop_gradient=False),
    "sinkhorn_offsets": lambda x: (
        (
            losses.sinkhorn_offsets(x["teacher_logits"][:, 0], x["center"].diag(), temperature=0.1)
            * x["student_logits"][:, 0]
        )
        .sum(1)
        .mean()
    ),
    # Its mean over ranks is a mean over images, as for the losses.
    "sinkhorn": lambda x: (losses.sinkhorn(x["scores"][:, 0]) * x["scores"][:, 1]).sum(1).mean(),
    "supervised_contrastive": lambda x: losses.supervised_contrastive(
        x["z_a"], x["z_b"], x["labels"], temperature=0.2
    ),
    "swav": lambda x: losses.swav(x["scores"]),
    "swav with queue": lambda x: losses.swav(x["scores"], queue_scores=x["queue_scores"]),
    "temperature_free": _pair(losses.temperature_free),
    "triplet": _pair(losses.triplet),
    "triplet labels": lambda x: losses.triplet(x["z_a"], x["z_b"], x["labels"]),
    "vicreg": _pair(losses.vicreg),
}
