"""Losses of self-supervised learning as functions, for any training loop.

    from ssl_pretrain.losses import nt_xent

    z_a, z_b = model(torch.cat([view_a, view_b])).chunk(2)
    loss = nt_xent(z_a, z_b, temperature=0.2)
    loss.backward()

Every function takes the embeddings of this process's images and returns a scalar. It has no state:
teachers, queues and centers are arguments.

In a `torch.distributed` process group, losses that compare images do so over the images of all
ranks, with the true gradient. The mean of the returned scalars over ranks is the loss of the global
batch, and the average of gradients that DistributedDataParallel computes is the gradient of one
process on the whole batch. All ranks must have equally many images. Without a process group the
batch of this process is the whole batch.

Losses are computed in float32, also of embeddings in float16 or bfloat16, and autocast is off
inside. Gradients have the data type of the embeddings. Losses that compare all images with each
other work in tiles, so no matrix of all pairs is stored, except for `triplet`, `n_pair` and
`pairwise`.

Hyperparameters have a default where their paper has a single value.
"""

from ssl_pretrain.losses.balanced_targets import sinkhorn_offsets
from ssl_pretrain.losses.clustering import sinkhorn, swav
from ssl_pretrain.losses.contrastive import (
    image_text,
    info_nce,
    nt_xent,
    supervised_contrastive,
    temperature_free,
)
from ssl_pretrain.losses.distillation import byol, dino, negative_cosine, simsiam
from ssl_pretrain.losses.latent_prediction import ijepa
from ssl_pretrain.losses.metric_learning import n_pair, pairwise, triplet
from ssl_pretrain.losses.negatives import debiased, decoupled, hard_negative
from ssl_pretrain.losses.normality import lejepa, sigreg
from ssl_pretrain.losses.patch_prediction import cpc
from ssl_pretrain.losses.queues import moco, moco_v3, nnclr
from ssl_pretrain.losses.reconstruction import mae
from ssl_pretrain.losses.redundancy import barlow_twins, vicreg
from ssl_pretrain.losses.sentence_pairs import sentence_pairs
from ssl_pretrain.losses.sigmoid import sigmoid_image_text
from ssl_pretrain.losses.uniformity import align_uniform

__all__ = [
    "align_uniform",
    "barlow_twins",
    "byol",
    "cpc",
    "debiased",
    "decoupled",
    "dino",
    "hard_negative",
    "ijepa",
    "image_text",
    "info_nce",
    "lejepa",
    "mae",
    "moco",
    "moco_v3",
    "n_pair",
    "negative_cosine",
    "nnclr",
    "nt_xent",
    "pairwise",
    "sentence_pairs",
    "sigmoid_image_text",
    "sigreg",
    "simsiam",
    "sinkhorn",
    "sinkhorn_offsets",
    "supervised_contrastive",
    "swav",
    "temperature_free",
    "triplet",
    "vicreg",
]
