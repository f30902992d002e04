"""Methods that call `tokens` of student and teacher: sharded, compiled, recomputed and cast."""

from functools import partial

import pytest
import torch
from conftest import run_ranks
from torch import nn

from ssl_pretrain.distributed import collectives, process_group
from ssl_pretrain.methods import mae
from ssl_pretrain.methods.base import LossOutput, Method, MethodConfig
from ssl_pretrain.models import backbones
from ssl_pretrain.models.components import Teacher
from ssl_pretrain.models.timm_networks import BackboneConfig
from ssl_pretrain.parallel import compilation, wrap
from ssl_pretrain.parallel.execution import Execution, ParallelConfig
from ssl_pretrain.views.batch import Batch, MaskSet

CPU, SIZE, ROWS = torch.device("cpu"), 16, 4
SMALL = {"depth": 2, "patch_size": 4, "embed_dim": 16, "num_heads": 2}


class Distillation(Method):
    """A student that sees masked patches and a part of them, and a teacher that sees all."""

    def __init__(self, config, backbone):
        super().__init__(config, backbone)
        self.mask_token = nn.Parameter(torch.ones(backbone.token_dim))
        self.teacher = Teacher(backbone=backbone)

    def forward(self, batch):
        masked = torch.zeros(len(batch), 16, dtype=torch.bool)
        masked[:, ::3] = True
        kept = (batch.indices[:, None] + torch.arange(9)) % 16
        tokens = self.backbone.tokens(
            batch.views[0], masked=masked, mask_token=self.mask_token, layers=(0,)
        )
        visible = self.backbone.tokens(batch.views[0], kept=kept, valid=kept > 2)
        return {
            "masked": tokens.patches,
            "first": tokens.intermediate[0].patches,
            "visible": visible.patches,
        }

    @torch.no_grad()
    def targets(self, batch):
        return {"teacher": self.teacher.backbone.tokens(batch.views[0]).patches}

    def loss(self, embeddings, targets):
        difference = embeddings["masked"] - targets["teacher"]
        total = difference.square().mean() + embeddings["first"].square().mean()
        return LossOutput(total + embeddings["visible"].square().mean(), {})


def build(name="test_vit"):
    """Return MAE, or `Distillation` on a network with this name."""
    torch.manual_seed(0)
    if name == "mae":
        backbone = backbones.build(BackboneConfig(name="test_vit", args=SMALL), SIZE)
        return mae.Config(decoder_dim=12, decoder_depth=2, decoder_heads=2).build(backbone)
    config = BackboneConfig(name=name, args=SMALL)
    method = Distillation(MethodConfig("distillation"), backbones.build(config, SIZE))
    for parameter in method.teacher.parameters():
        parameter.data *= 1.1
    return method


def random_batch():
    views = torch.randn(ROWS, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))
    visible = (torch.arange(ROWS)[:, None, None] + torch.tensor([[0, 5, 7, 11]])) % 16
    masks = MaskSet("visible", 0, visible, torch.ones_like(visible, dtype=torch.bool))
    return Batch([views], torch.zeros(ROWS), torch.arange(ROWS), (masks,))


def compute_gradients(name="test_vit", **settings):
    """Return the gradients of the global batch's loss, and the targets of this rank's images."""
    config = ParallelConfig(**{"precision": "float32", **settings})
    execution, method = Execution.resolve(config, CPU), build(name)
    batch = random_batch().slice(process_group.rank(), process_group.world_size())
    model = wrap.wrap(
        method,
        config,
        execution,
        micro_batch_size=len(batch),
        global_batch_size=ROWS,
        example=batch,
    )
    with execution.forward_context():
        embeddings, targets = model(batch), method.targets(batch)
        method.loss(embeddings, targets).loss.backward()
    gradients = {
        key: parameter.grad.full_tensor()
        if collectives.is_sharded(parameter.grad)
        else parameter.grad
        for key, parameter in method.named_parameters()
        if parameter.grad is not None
    }
    return gradients, targets


NAMES = ["test_vit", "vit_small_patch16_dinov3", "mae"]


def _compute_both_strategies():
    return {
        name: [compute_gradients(name, strategy=strategy) for strategy in ("ddp", "fsdp")]
        for name in NAMES
    }


def test_sharded_tokens_have_the_gradients_of_replicated_ones():
    alone = {name: compute_gradients(name)[0] for name in NAMES}
    for rank in run_ranks(_compute_both_strategies, world_size=2):
        for name, expected in alone.items():
            assert any("mask_token" in key for key in expected) and len(expected) > 20
            (ddp, replicated_targets), (sharded, sharded_targets) = rank[name]
            for key, value in sharded_targets.items():  # such as the teacher's tokens
                # Gathered weights lie elsewhere in memory, for which some processors multiply
                # matrices in another order. The teacher's weights are 1.1 times the student's.
                torch.testing.assert_close(value, replicated_targets[key], rtol=1e-5, atol=1e-6)
            for gradients in (ddp, sharded):
                assert gradients.keys() == expected.keys()
                for key, value in gradients.items():
                    torch.testing.assert_close(value, expected[key], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({"activation_checkpointing": "blocks"}, marks=pytest.mark.full),
        pytest.param({"compile": True}, marks=pytest.mark.full),
        {"compile": True, "activation_checkpointing": "blocks"},
    ],
    ids=["recomputed", "compiled", "both"],
)
def test_gradients_do_not_change(monkeypatch, name, settings):
    """Compiled parts are traced here, so that their operations run as they are."""
    expected, _ = compute_gradients(name)
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    gradients, _ = compute_gradients(name, **settings)
    assert gradients.keys() == expected.keys()
    assert [key for key in expected if not torch.equal(gradients[key], expected[key])] == []


def test_masks_are_applied_before_positions_in_compiled_networks(monkeypatch):
    """Compilation joins patch embedding and positions, which the pooled features need as one."""
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    method, compiled, batch = build(), build(), random_batch()
    compilation.compile_network(compiled, CPU, cuda_graphs=False)
    for _ in range(2):  # tokens before and after pooled features
        for key, value in compiled(batch).items():
            assert torch.equal(value, method(batch)[key]), key
        assert torch.equal(compiled.backbone(batch.views[0]), method.backbone(batch.views[0]))


def test_a_teachers_weights_for_tokens_are_cast_once(monkeypatch):
    from test_weight_casts import CastCounter

    method = build()
    batch = random_batch()
    with torch.autocast("cpu", torch.bfloat16):
        expected = method.targets(batch)["teacher"]
        weights = wrap.weight_casts.castable_weights(method.teacher)
        wrap.weight_casts.cast_once_per_step(method)
        for num_copies in (1, 0):
            with CastCounter() as counter:
                actual = method.targets(batch)["teacher"]
            assert counter.num_copies == num_copies
            shapes = {owner.get_parameter(key).shape for owner, key in weights}
            assert not shapes & set(counter.shapes)
            assert torch.equal(actual, expected)
    assert all(parameter.dtype == torch.float32 for parameter in method.teacher.parameters())
