"""Take optimizer steps with I-JEPA and with its authors' code, and compare all weights.

The authors' networks are made by their own `init_model`, from a seed. Their weights are loaded into
ours. Both take the same steps in float64 on real images, with the same masks: the student, the
predictor, the teacher, AdamW and the schedules of learning rate, weight decay and momentum.

    git clone https://github.com/facebookresearch/ijepa && git -C ijepa checkout 52c1ae95
    IJEPA_CODE=ijepa SSL_PRETRAIN_DATA=data PYTHONPATH=. python tests/foreign/ijepa.py

It prints one line with the largest relative difference. With `--ranks 2` both codes run on 2 ranks.
`data` holds imagenet_sample.zip.
"""

import argparse
import copy
import os
import sys
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing
from comparison import build_float64_stepper, read_images, relative_difference
from torch import Tensor
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from ssl_pretrain.methods.ijepa import Config
from ssl_pretrain.models import backbones
from ssl_pretrain.models.timm_networks import BackboneConfig
from ssl_pretrain.optim import optimizers
from ssl_pretrain.optim.optimizers import OptimConfig
from ssl_pretrain.optim.schedules import Progress
from ssl_pretrain.views.batch import Batch, MaskSet

SIZE, PATCH, NUM_IMAGES, NUM_STEPS, STEPS_PER_EPOCH, EPOCHS = 96, 8, 12, 3, 4, 5
PREDICTOR = {"predictor_dim": 48, "predictor_depth": 3}
ENCODER = "vit_tiny"  # 192 wide, 12 blocks, 3 heads
# The authors' numbers for 300 epochs, with a warm-up of one of five epochs.
OPTIM = OptimConfig(
    name="adamw",
    base_lr=1e-3,
    lr_scaling="none",
    warmup_epochs=1,
    warmup_start_ratio=0.2,
    final_lr_ratio=1e-3,
    weight_decay=0.04,
    final_weight_decay=0.4,
)
# From the names of our networks to those of the authors, in both kinds of networks.
RENAMED = (
    ("predictor.embed.", "predictor_embed."),
    ("predictor.mask_token", "mask_token"),
    ("predictor.blocks.", "predictor_blocks."),
    ("predictor.norm.", "predictor_norm."),
    ("predictor.project.", "predictor_proj."),
)


def build_authors() -> tuple[Any, Any, Any]:
    """Return the authors' encoder, predictor and target encoder in float64."""
    from src.helper import init_model

    torch.manual_seed(0)
    encoder, predictor = init_model(
        device="cpu",
        patch_size=PATCH,
        model_name=ENCODER,
        crop_size=SIZE,
        pred_depth=PREDICTOR["predictor_depth"],
        pred_emb_dim=PREDICTOR["predictor_dim"],
    )
    encoder, predictor = encoder.double(), predictor.double()
    teacher = copy.deepcopy(encoder).requires_grad_(False)
    with torch.no_grad():  # a teacher that is not the student
        for weight in teacher.parameters():
            weight.mul_(1.1)
    return encoder, predictor, teacher


def rename(name: str) -> tuple[str, str]:
    """Return the authors' network and the authors' name of one of our tensors."""
    for ours, theirs in RENAMED:
        if name.startswith(ours):
            return "predictor", name.replace(ours, theirs)
    network = "teacher" if name.startswith("teacher.") else "encoder"
    return network, name.removeprefix("teacher.").removeprefix("backbone.model.")


def draw_masks(step: int) -> list[tuple[list[Tensor], list[Tensor]]]:
    """Return each rank's masks of one step from the authors' collator, context before targets."""
    from src.masks.multiblock import MaskCollator

    collator = MaskCollator(
        input_size=SIZE,
        patch_size=PATCH,
        pred_mask_scale=(0.15, 0.2),
        enc_mask_scale=(0.85, 1.0),
        aspect_ratio=(0.75, 1.5),
        nenc=1,
        npred=4,
        min_keep=10,
        allow_overlap=False,
    )
    collator._itr_counter.value = step
    world_size = dist.get_world_size() if dist.is_initialized() else 1
    torch.manual_seed(100 + step)
    _, context, targets = collator([torch.zeros(1)] * NUM_IMAGES)
    rows = NUM_IMAGES // world_size
    return [
        tuple([m[r * rows : (r + 1) * rows] for m in masks] for masks in (context, targets))
        for r in range(world_size)
    ]


def add_padding(indices: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Return (B, K, length) indices and their validity, padded as in our loader."""
    valid = torch.zeros(*indices.shape[:2], length, dtype=torch.bool)
    valid[..., : indices.shape[2]] = True
    return F.pad(indices, (0, length - indices.shape[2])), valid


def take_authors_steps(images: Tensor, networks: tuple[Any, Any, Any]) -> dict[str, Any]:
    """Take NUM_STEPS steps as `main` of the authors' train.py does, and return the networks."""
    from src.helper import init_opt
    from src.masks.utils import apply_masks
    from src.utils.distributed import AllReduce

    encoder, predictor, teacher = networks
    rank, is_parallel = (dist.get_rank(), True) if dist.is_initialized() else (0, False)
    optimizer, _, schedule, decay_schedule = init_opt(
        encoder=encoder,
        predictor=predictor,
        iterations_per_epoch=STEPS_PER_EPOCH,
        start_lr=2e-4,
        ref_lr=1e-3,
        final_lr=1e-6,
        warmup=1,
        num_epochs=EPOCHS,
        wd=0.04,
        final_wd=0.4,
        ipe_scale=1.0,
    )
    wrapped: list[Any] = [encoder, predictor]
    if is_parallel:
        wrapped = [DistributedDataParallel(net, static_graph=True) for net in wrapped]
    rows = len(images)
    losses = []
    for step in range(NUM_STEPS):
        context, targets = draw_masks(step)[rank]
        schedule.step()
        decay_schedule.step()
        with torch.no_grad():
            features = teacher(images)
            features = apply_masks(F.layer_norm(features, features.shape[-1:]), targets)
        predictions = wrapped[1](wrapped[0](images, context), context, targets)
        assert len(predictions) == 4 * rows
        loss = AllReduce.apply(F.smooth_l1_loss(predictions, features))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        momentum = 0.996 + step * (1.0 - 0.996) / (STEPS_PER_EPOCH * EPOCHS)
        with torch.no_grad():
            for weight, average in zip(encoder.parameters(), teacher.parameters()):
                average.mul_(momentum).add_((1.0 - momentum) * weight)
        losses.append(loss.item())
    return {"encoder": encoder, "predictor": predictor, "teacher": teacher, "losses": losses}


def take_our_steps(images: Tensor, networks: tuple[Any, Any, Any]) -> tuple[Any, list[float]]:
    """Load the authors' weights, take NUM_STEPS steps with ours, and return the method."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    settings = BackboneConfig(
        name="vit_tiny_patch16_224",
        args={
            "patch_size": PATCH,
            "class_token": False,
            "global_pool": "avg",
            "fc_norm": False,
        },
    )
    backbone = backbones.build(settings, SIZE)
    method: Any = Config(vit_starts="authors", **PREDICTOR).build(backbone).double()
    weights = dict(zip(("encoder", "predictor", "teacher"), networks))
    state = {}
    for name in method.state_dict():
        network, key = rename(name)
        state[name] = weights[network].state_dict()[key]
    method.load_state_dict(state)
    num_patches = (SIZE // PATCH) ** 2

    def build_batch(step: int) -> Batch:
        context, targets = draw_masks(step)[rank]
        masks = []
        for name, indices in (("context", context), ("targets", targets)):
            # Our masks have a length that the configuration fixes, with padding behind.
            padded = add_padding(torch.stack(indices, dim=1), num_patches)
            masks.append(MaskSet(name, 0, *padded))
        labels = torch.zeros(len(images), dtype=torch.int64)
        return Batch([images], labels, labels, tuple(masks))

    stepper = build_float64_stepper(method, OPTIM, build_batch(0))
    num_steps = STEPS_PER_EPOCH * EPOCHS
    losses = []
    for step in range(NUM_STEPS):
        # The authors' schedules of rate and decay are one step ahead of ours.
        ahead = Progress(step + 1, num_steps, STEPS_PER_EPOCH)
        optimizers.set_rates(stepper.optimizer, OPTIM, ahead, EPOCHS, NUM_IMAGES)
        logs = stepper(Progress(step, num_steps, STEPS_PER_EPOCH), build_batch(step)).logs
        losses.append(logs["loss"].item())
    return method, losses


def compare() -> str:
    """Take all steps on this rank and describe the largest difference of any weight."""
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    images = read_images(NUM_IMAGES, SIZE).chunk(world_size)[rank]
    networks = build_authors()
    before = {
        name: net.state_dict() for name, net in zip(("encoder", "predictor", "teacher"), networks)
    }
    before = copy.deepcopy(before)
    method, losses = take_our_steps(images, networks)
    theirs = take_authors_steps(images, networks)
    worst, largest_update = (0.0, ""), 0.0
    state = method.state_dict()
    assert len(state) == sum(len(weights) for weights in before.values()) - 1  # fixed positions
    for name, value in state.items():
        network, key = rename(name)
        expected, start = theirs[network].state_dict()[key], before[network][key]
        worst = max(worst, (relative_difference(value, expected), name))
        update = (expected - start).abs().max() / start.abs().max().clamp(min=1e-3)
        largest_update = max(largest_update, update.item())
    # On several ranks our loss is this rank's, and the authors' is the mean.
    losses_text = ", ".join(
        f"{ours:.12g} / {their:.12g}" for ours, their in zip(losses, theirs["losses"])
    )
    return (
        f"{NUM_STEPS} steps, {world_size} ranks, {len(state)} tensors: largest relative difference "
        f"{worst[0]:.1e} ({worst[1]}), largest relative update {largest_update:.1e}; losses "
        f"{losses_text}"
    )


def run_rank(rank: int, world_size: int, port: int) -> None:
    """Run the comparison on one of several ranks, and print it on the first."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=world_size)
    torch.set_num_threads(1)
    text = compare()
    if rank == 0:
        print(text)
    dist.destroy_process_group()


def main() -> None:
    """Run the comparison on one process or on several ranks."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--port", type=int, default=29511)
    arguments = parser.parse_args()
    if arguments.ranks == 1:
        print(compare())
        return
    torch.multiprocessing.spawn(run_rank, (arguments.ranks, arguments.port), arguments.ranks)


sys.path.insert(0, os.environ.get("IJEPA_CODE", "ijepa"))
if __name__ == "__main__":
    main()
