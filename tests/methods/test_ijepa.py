"""I-JEPA against its authors' arithmetic, facebookresearch/ijepa at 52c1ae95.

https://github.com/facebookresearch/ijepa/blob/52c1ae95/src/train.py
"""

import math
from dataclasses import replace

import contract
import pytest
import torch
from conftest import run_ranks

from ssl_pretrain.distributed import collectives, process_group
from ssl_pretrain.losses import ijepa
from ssl_pretrain.methods.ijepa import Config
from ssl_pretrain.models.components import Backbone
from ssl_pretrain.models.timm_networks import timm
from ssl_pretrain.models.transformer import sine_cosine_positions
from ssl_pretrain.optim.optimizers import OptimConfig, parameter_groups
from ssl_pretrain.parallel.execution import Execution, ParallelConfig
from ssl_pretrain.step import build_stepper
from ssl_pretrain.views.batch import MaskSet

VIEWS = (12,)  # 6 x 6 patches
METHOD = {
    "predictor_dim": 12,
    "predictor_depth": 2,
    "predictor_heads": 3,
    "momentum": 0.9,
    "vit_starts": "authors",
}
OPTIM = OptimConfig(
    name="adamw",
    base_lr=0.01,
    lr_scaling="none",
    warmup_epochs=2.0,
    warmup_start_ratio=0.2,
    final_lr_ratio=0.001,
    weight_decay=0.04,
    final_weight_decay=0.4,
)


def BACKBONE():
    """Build a ViT of 2 blocks and 8 features, without a class token, as in the authors' code."""
    return build_vit(embed_dim=8)


def build_vit(**arguments):
    vit = timm.models.VisionTransformer(
        img_size=12,
        patch_size=2,
        depth=2,
        num_heads=2,
        num_classes=0,
        class_token=False,
        global_pool="avg",
        fc_norm=False,
        **arguments,
    )
    return Backbone(vit)


def MASKS(rows, step):
    """Draw four targets of one size per step, and a context of up to 9 of 25 patches without them.

    As in a run, targets of 6 or 9 patches are padded to 9, and so are contexts.
    """
    generator = torch.Generator().manual_seed(step)
    height, width = [(2, 3), (3, 3), (3, 2)][step % 3]
    grid = torch.arange(36).view(6, 6)
    targets, contexts = [], []
    for _ in range(rows):
        places = torch.randint(0, 4, (5, 2), generator=generator).tolist()
        blocks = [grid[y : y + height, x : x + width].flatten() for y, x in places[:4]]
        y, x = min(places[4][0], 1), min(places[4][1], 1)
        context = grid[y : y + 5, x : x + 5].flatten()
        contexts.append([context[~torch.isin(context, torch.cat(blocks))]])
        targets.append(blocks)
    return pad("context", contexts), pad("targets", targets)


def pad(name, masks, length=9):
    """Trim or pad the masks of each image to one length."""
    indices = torch.zeros(len(masks), len(masks[0]), length, dtype=torch.int64)
    valid = torch.zeros(indices.shape, dtype=torch.bool)
    for i, image_masks in enumerate(masks):
        for k, patches in enumerate(image_masks):
            count = min(length, len(patches))
            indices[i, k, :count], valid[i, k, :count] = patches[:count], True
    return MaskSet(name, 0, indices, valid)


def normalize(row):
    mean = row.mean()
    return (row - mean) / ((row - mean).square().mean() + 1e-5).sqrt()


def smooth_l1(prediction, target):
    distance = (prediction - target).abs()
    return torch.where(distance < 1, distance.square() / 2, distance - 0.5)


def plain_loss(method, images):
    """Predict each block of each image by itself, without padding."""

    def apply_blocks(vit, tokens):
        for block in vit.blocks:
            tokens = block(tokens)
        return vit.norm(tokens)

    student, teacher = method.backbone.model, method.teacher.backbone.model
    predictor = method.predictor
    places = sine_cosine_positions(6, 6, 12).double()
    (context,), (targets,) = images.masks_named("context"), images.masks_named("targets")
    means = []
    for i in range(len(images)):
        image = images.views[0][i : i + 1]
        with torch.no_grad():
            features = apply_blocks(teacher, teacher.patch_embed(image) + teacher.pos_embed)[0]
        seen = context.indices[i, 0][context.valid[i, 0]]
        visible = (student.patch_embed(image) + student.pos_embed)[:, seen]
        visible = predictor.embed(apply_blocks(student, visible)) + places[seen]
        terms = []
        for k in range(4):
            block = targets.indices[i, k][targets.valid[i, k]]
            tokens = torch.cat([visible, predictor.mask_token + places[block]], dim=1)
            predictions = predictor.project(apply_blocks(predictor, tokens))[0, len(seen) :]
            for prediction, patch in zip(predictions, block, strict=True):
                terms.append(smooth_l1(prediction, normalize(features[patch])).mean())
        means.append(sum(terms) / len(terms))
    return sum(means) / len(means)


@pytest.mark.parametrize("step", [0, 1, 9])
def test_one_step_is_the_authors(step):
    method, images = contract.build("ijepa"), contract.random_batch("ijepa", step)
    with torch.no_grad():
        for p in method.teacher.parameters():
            p.mul_(1.1)  # a teacher that is not the student
    expected = contract.copy_method(method)
    contract.take_step(method, OPTIM, images, step)
    progress, warmup = step / 20, 4 / 20  # 2 steps per epoch
    lr = 0.002 + (0.01 - 0.002) * progress / warmup
    if step >= 4:
        after_warmup = (progress - warmup) / (1 - warmup)
        lr = 1e-5 + (0.01 - 1e-5) * (1 + math.cos(math.pi * after_warmup)) / 2
    decay = 0.4 + (0.04 - 0.4) * (1 + math.cos(math.pi * progress)) / 2
    contract.apply_plain_step(expected, OPTIM, plain_loss(expected, images), lr, decay)
    momentum = 0.9 + step * (1.0 - 0.9) / 20
    with torch.no_grad():
        for name, p in expected.teacher.named_parameters():
            p.copy_(momentum * p + (1 - momentum) * expected.get_parameter(name))
    contract.assert_same(method, expected)


def test_the_masks_of_the_tests_have_padding_and_targets_of_equal_size():
    """Without padding, the test of a step would not show that it has no effect."""
    images = contract.random_batch("ijepa")
    (context,), (targets,) = images.masks_named("context"), images.masks_named("targets")
    assert not context.valid.all() and not targets.valid.all()
    assert len(context.valid.sum(2).unique()) > 1 and context.valid.any(2).all()
    assert len(targets.valid.sum(2).unique()) == 1


def test_the_student_sees_nothing_but_the_context():
    method, images = contract.build("ijepa"), contract.random_batch("ijepa", rows=3)
    (context,) = images.masks_named("context")
    hidden = ~context.as_grid(36).view(3, 1, 6, 6)
    pixels = hidden.repeat_interleave(2, 2).repeat_interleave(2, 3)
    changed = contract.replace_views(images, [images.views[0] + pixels])
    before, after = method(images), method(changed)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not torch.allclose(method.targets(images)["z"], method.targets(changed)["z"])


def test_a_block_is_predicted_without_the_others():
    method, images = contract.build("ijepa"), contract.random_batch("ijepa", rows=3)
    context, targets = images.masks
    indices = targets.indices.clone()
    indices[:, 1] = (indices[:, 1] + 7) % 36
    moved = replace(images, masks=(context, replace(targets, indices=indices)))
    before, after = method(images)["patches"], method(moved)["patches"]
    for k in (0, 2, 3):
        torch.testing.assert_close(after[:, k], before[:, k], rtol=0, atol=1e-14)
    assert not torch.allclose(after[:, 1], before[:, 1])


def test_more_padding_changes_no_loss():
    method, images = contract.build("ijepa"), contract.random_batch("ijepa", rows=3)
    longer = tuple(
        replace(
            masks,
            indices=torch.nn.functional.pad(masks.indices, (0, 5)),
            valid=torch.nn.functional.pad(masks.valid, (0, 5)),
        )
        for masks in images.masks
    )
    losses = [
        method.loss(method(batch), method.targets(batch)).loss.item()
        for batch in (images, replace(images, masks=longer))
    ]
    assert losses[1] == pytest.approx(losses[0], rel=1e-13)


def test_the_loss_is_quadratic_below_one_and_linear_above():
    predictions, targets = torch.zeros(1, 1, 2, 2), torch.tensor([[[[0.5, 0.5], [3.0, 3.0]]]])
    assert ijepa(predictions, targets).item() == pytest.approx((0.125 + 2.5) / 2)
    valid = torch.tensor([[[True, False]]])
    assert ijepa(predictions, targets, valid).item() == pytest.approx(0.125)
    padding = targets.clone()
    padding[0, 0, 1] = math.inf
    assert ijepa(predictions, padding, valid).item() == pytest.approx(0.125)


def test_all_images_count_equally_whatever_their_blocks():
    """The loss is therefore a mean over images, as micro-batches and ranks need."""
    predictions = torch.zeros(2, 1, 3, 1)
    targets = torch.tensor([[[[2.0], [9.0], [9.0]]], [[[4.0], [4.0], [4.0]]]])
    valid = torch.tensor([[[True, False, False]], [[True, True, True]]])
    assert ijepa(predictions, targets, valid).item() == pytest.approx((1.5 + 3.5) / 2)


def test_networks_start_as_in_the_authors_code():
    torch.manual_seed(0)
    config = Config(predictor_dim=96, predictor_depth=2, vit_starts="authors")
    method = config.build(build_vit(embed_dim=192))
    for module in (*method.backbone.modules(), *method.predictor.modules()):
        if isinstance(module, torch.nn.Linear | torch.nn.Conv2d):
            assert module.weight.std().item() == pytest.approx(0.02, rel=0.1)
            assert not module.bias.any()
    assert method.predictor.mask_token.std().item() == pytest.approx(0.02, rel=0.3)
    positions = sine_cosine_positions(6, 6, 192)
    assert torch.equal(method.backbone.model.pos_embed[0], positions)
    contract.assert_equal_by_name(
        method.teacher.backbone.state_dict(), method.backbone.state_dict(), rtol=0, atol=0
    )
    # Positions are fixed. The mask token has weight decay, as every tensor of several dimensions.
    adapted, excluded = parameter_groups(OPTIM, method)
    names = adapted["names"] + excluded["names"]
    assert "backbone.model.pos_embed" not in names and "predictor.mask_token" in adapted["names"]
    assert not any(name.startswith("teacher") for name in names)


def test_the_predictor_has_as_many_heads_as_the_backbone_unless_told_otherwise():
    for heads, expected in ((0, 2), (3, 3)):
        method = contract.build("ijepa", predictor_heads=heads)
        assert {block.attn.num_heads for block in method.predictor.blocks} == {expected}


def test_two_views_missing_masks_and_networks_without_patches_are_refused():
    method, images = contract.build("ijepa"), contract.random_batch("ijepa", rows=2)
    two_views = contract.replace_views(images, images.views * 2)
    for batch, message in (
        (two_views, "ijepa: takes 1 view, got 2; set views.crops to one crop with count 1"),
        (
            replace(images, masks=()),
            "ijepa: needs the masks 'context', which no view has; "
            "set views.crops.*.mask.kind to multiblock",
        ),
    ):
        with pytest.raises(ValueError) as error:
            method(batch)
        assert str(error.value) == message
    with pytest.raises(ValueError) as error:
        Config(**METHOD).build(Backbone(contract.Network()))
    assert str(error.value) == (
        "backbone.name: Network has no patches that can be masked or left out; choose a vision "
        "transformer, such as vit_small_patch16_224 (also deit*, eva02* and vit_*_dinov3)"
    )


def take_steps(**settings):
    """Take two steps on this rank's images and return the full state."""
    config = ParallelConfig(precision="float64", **settings)
    method, execution = (
        contract.build("ijepa"),
        Execution.resolve(config, torch.device("cpu")),
    )
    rank, world_size = process_group.rank(), process_group.world_size()
    stepper = build_stepper(
        method,
        config,
        OPTIM,
        execution,
        micro_batch_size=contract.ROWS // world_size,
        global_batch_size=contract.ROWS,
        example=contract.random_batch("ijepa").slice(rank, world_size),
    )
    for step in range(2):
        progress = contract.Progress(step, contract.NUM_STEPS, contract.STEPS_PER_EPOCH)
        contract.optim.set_rates(stepper.optimizer, OPTIM, progress, 10, contract.ROWS)
        stepper(progress, contract.random_batch("ijepa", step).slice(rank, world_size))
    return {
        name: value.full_tensor() if collectives.is_sharded(value) else value
        for name, value in method.state_dict().items()
    }


def test_sharded_weights_train_as_whole_ones():
    """The predictor's blocks are units of their own, and the teacher is called by `tokens`."""
    expected = take_steps()
    for state in run_ranks(take_steps_sharded, world_size=2):
        contract.assert_equal_by_name(state, expected)


def take_steps_sharded():
    return take_steps(strategy="fsdp")


def test_recomputed_activations_change_no_bit():
    expected, state = take_steps(), take_steps(activation_checkpointing="blocks")
    assert all(torch.equal(state[name], value) for name, value in expected.items())
