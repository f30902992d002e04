"""Take optimizer steps with MAE and with its authors' code, and compare all weights.

The authors' network is built by their own class, and its weights are loaded into ours. Both take
the same steps in float64 on real images, with the authors' masks, AdamW and schedule.

    git clone https://github.com/facebookresearch/mae && git -C mae checkout efb2a806
    MAE_CODE=mae SSL_PRETRAIN_DATA=data PYTHONPATH=. python tests/foreign/mae.py

It prints a line for each kind of target, with the largest relative difference. `data` holds
imagenet_sample.zip. The authors' code is for timm 0.3.2 and an older numpy. What has changed in
them since then is replaced here.
"""

import copy
import os
import sys
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import timm
import torch
from comparison import build_float64_stepper, largest_difference, read_images
from timm.optim import param_groups_weight_decay
from torch import Tensor, nn

from ssl_pretrain.methods.mae import Config
from ssl_pretrain.models import backbones
from ssl_pretrain.models.timm_networks import BackboneConfig
from ssl_pretrain.optim import optimizers
from ssl_pretrain.optim.optimizers import OptimConfig
from ssl_pretrain.optim.schedules import Progress
from ssl_pretrain.views.batch import Batch, MaskSet

SIZE, PATCH, NUM_IMAGES, NUM_STEPS, STEPS_PER_EPOCH, EPOCHS = 96, 16, 12, 3, 4, 5
ENCODER = {"embed_dim": 96, "depth": 4, "num_heads": 3}
DECODER = {"decoder_dim": 64, "decoder_depth": 2, "decoder_heads": 4}
# The authors' numbers, with a warm-up of one of five epochs.
OPTIM = OptimConfig(
    name="adamw", base_lr=1.5e-4, warmup_epochs=1, weight_decay=0.05, betas=[0.9, 0.95]
)
RENAMED = (  # beginnings of our names and of the authors'
    ("backbone.model.", ""),
    ("decoder.mask_token", "mask_token"),
    ("decoder.embed.", "decoder_embed."),
    ("decoder.blocks.", "decoder_blocks."),
    ("decoder.norm.", "decoder_norm."),
    ("decoder.project.", "decoder_pred."),
)


def build_authors(normalize_pixels: bool) -> Any:
    """Return the authors' network in float64."""
    transformer: Any = timm.models.vision_transformer
    block, np.float = transformer.Block, float  # type: ignore[attr-defined]
    transformer.Block = lambda *args, qk_scale=None, **options: block(*args, **options)
    from models_mae import MaskedAutoencoderViT

    torch.manual_seed(0)
    return MaskedAutoencoderViT(
        img_size=SIZE,
        patch_size=PATCH,
        **ENCODER,
        decoder_embed_dim=DECODER["decoder_dim"],
        decoder_depth=DECODER["decoder_depth"],
        decoder_num_heads=DECODER["decoder_heads"],
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
        norm_pix_loss=normalize_pixels,
    ).double()


def rename(name: str) -> str:
    """Return the authors' name of one of our tensors."""
    for ours, theirs in RENAMED:
        if name.startswith(ours):
            return name.replace(ours, theirs, 1)
    raise ValueError(f"the authors have no tensor {name}")


def take_authors_steps(model: Any, images: Tensor) -> tuple[list[float], list[Tensor]]:
    """Take NUM_STEPS steps as the authors do, and return the losses and the masks."""
    from util.lr_sched import adjust_learning_rate

    # The present name of the function that they call. Biases and norms are not decayed.
    groups = param_groups_weight_decay(model, OPTIM.weight_decay)
    lr = OPTIM.base_lr * NUM_IMAGES / 256
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95))
    schedule = SimpleNamespace(lr=lr, min_lr=0.0, warmup_epochs=1, epochs=EPOCHS)
    torch.manual_seed(1)
    losses, masks = [], []
    for step in range(NUM_STEPS):
        adjust_learning_rate(optimizer, step / STEPS_PER_EPOCH, schedule)
        loss, _, mask = model(images, mask_ratio=0.75)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        masks.append(mask)
    return losses, masks


def take_our_steps(
    weights: dict[str, Tensor], images: Tensor, masks: list[Tensor], normalize_pixels: bool
) -> tuple[Any, list[float]]:
    """Load the authors' weights, take NUM_STEPS steps with ours, and return method and losses."""
    args = {**ENCODER, "patch_size": PATCH}
    backbone = backbones.build(BackboneConfig(name="vit_tiny_patch16_224", args=args), SIZE)
    config = Config(vit_starts="authors", normalize_pixels=normalize_pixels, **DECODER)
    method: Any = config.build(backbone).double()
    # The fixed positions are computed, so they are compared before they are loaded.
    torch.testing.assert_close(backbone.model.pos_embed.detach(), weights["pos_embed"])
    torch.testing.assert_close(method.decoder.positions, weights["decoder_pos_embed"][0, 1:])
    method.load_state_dict({name: weights[rename(name)] for name in method.state_dict()})
    method.decoder.positions.copy_(weights["decoder_pos_embed"][0, 1:])

    def build_batch(mask: Tensor) -> Batch:
        visible = mask.argsort(dim=1, stable=True)[:, None, : int((mask[0] == 0).sum())]
        mask_set = MaskSet("visible", 0, visible, torch.ones_like(visible, dtype=torch.bool))
        zeros = torch.zeros(NUM_IMAGES, dtype=torch.int64)
        return Batch([images], zeros, zeros, (mask_set,))

    stepper = build_float64_stepper(method, OPTIM, build_batch(masks[0]))
    losses = []
    for step, mask in enumerate(masks):
        progress = Progress(step, STEPS_PER_EPOCH * EPOCHS, STEPS_PER_EPOCH)
        optimizers.set_rates(stepper.optimizer, OPTIM, progress, EPOCHS, NUM_IMAGES)
        losses.append(stepper(progress, build_batch(mask)).logs["loss"].item())
    return method, losses


def compare(normalize_pixels: bool) -> str:
    """Take all steps and describe the largest difference of any weight."""
    images, model = read_images(NUM_IMAGES, SIZE), build_authors(normalize_pixels)
    start = copy.deepcopy(model.state_dict())
    their_losses, masks = take_authors_steps(model, images)
    method, losses = take_our_steps(start, images, masks, normalize_pixels)
    theirs, ours = model.state_dict(), method.state_dict()
    assert {rename(name) for name in ours} == theirs.keys() - {"decoder_pos_embed"}
    worst = largest_difference(ours, {name: theirs[rename(name)] for name in ours})
    largest_update = 0.0
    for name in ours:
        expected, before = theirs[rename(name)], start[rename(name)]
        update = (expected - before).abs().max() / before.abs().max().clamp(min=1e-3)
        largest_update = max(largest_update, update.item())
    text = ", ".join(f"{a:.12g} / {b:.12g}" for a, b in zip(losses, their_losses))
    return (
        f"{NUM_STEPS} steps, normalized pixels {normalize_pixels}, {len(ours)} tensors: largest "
        f"relative difference {worst[0]:.1e} ({worst[1]}), largest relative update "
        f"{largest_update:.1e}; losses {text}"
    )


if __name__ == "__main__":
    sys.path.insert(0, os.environ.get("MAE_CODE", "mae"))
    for choice in (True, False):
        print(compare(choice))
