"""SimCLR: the scale of its loss, its head, and ten golden steps that no refactor may change."""

import json
import math

import contract
import pytest
import tiny
import torch
from instruction_set import train_with_avx2

from ssl_pretrain.methods.simclr import Config
from ssl_pretrain.models.backbones import build
from ssl_pretrain.models.timm_networks import BackboneConfig
from ssl_pretrain.optim.optimizers import OptimConfig
from ssl_pretrain.views.batch import Batch

pytestmark = pytest.mark.promise

METHOD = {"projector_dims": [8, 4], "temperature": 0.5}
OPTIM = OptimConfig(name="lars", base_lr=20.0, warmup_epochs=0.0, weight_decay=1e-4)


def build_method():
    torch.manual_seed(0)
    backbone = build(BackboneConfig(name="test_resnet", stem="no_pool"), 16)
    return Config(projector_dims=[16, 8], temperature=0.5).build(backbone)


def plain_loss(method, images):
    """Equation 1, anchor by anchor, in both directions. One forward pass takes both views."""
    n = len(images)
    z = contract.unit_rows(method.projector(method.backbone(torch.cat(images.views))))
    loss = torch.zeros((), dtype=torch.float64)
    for i in range(2 * n):
        exps = {j: torch.exp(z[i] @ z[j] / 0.5) for j in range(2 * n) if j != i}
        loss = loss - torch.log(exps[(i + n) % (2 * n)] / sum(exps.values())) / n
    return loss


def test_one_step_is_the_authors():
    simclr, images = contract.build("simclr"), contract.random_batch("simclr")
    expected = contract.copy_method(simclr)
    contract.take_step(simclr, OPTIM, images)
    contract.apply_plain_step(
        expected, OPTIM, plain_loss(expected, images), 20 * contract.ROWS / 256
    )
    contract.assert_same(simclr, expected)


def test_the_loss_is_the_sum_of_both_directions():
    ones = torch.ones(6, 8)
    loss, logs = build_method().loss({"z_a": ones, "z_b": ones}, {})
    assert loss.item() == pytest.approx(2 * math.log(2 * 6 - 1))
    assert logs["nt_xent"].item() == pytest.approx(math.log(11))
    assert logs["positive_cosine"].item() == pytest.approx(1.0)


def test_batch_norm_sees_both_views_in_one_call():
    simclr, labels = build_method(), torch.zeros(4, dtype=torch.int64)
    sizes = []
    simclr.backbone.register_forward_hook(lambda _, inputs, output: sizes.append(len(inputs[0])))
    views = [torch.randn(4, 3, 16, 16) for _ in range(2)]
    embeddings = simclr(Batch(views, labels, labels))
    assert sizes == [8]
    shapes = {name: z.shape for name, z in embeddings.items()}
    assert shapes == {"z_a": (4, 8), "z_b": (4, 8)}


def test_another_number_of_views_is_refused():
    labels = torch.zeros(4, dtype=torch.int64)
    with pytest.raises(ValueError) as error:
        build_method()(Batch([torch.zeros(4, 3, 16, 16)] * 3, labels, labels))
    assert str(error.value) == (
        "simclr: takes 2 views of one size, got 3 (16, 16, 16 pixels); set views.crops.*.count"
    )


@pytest.mark.full
def test_ten_steps_have_the_golden_losses(tmp_path):
    golden = contract.read_golden("simclr")
    path = tiny.write_config(tmp_path)
    train_with_avx2(path, "parallel.precision=float64", "--stop-after", 10)
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    losses = [json.loads(line)["loss"] for line in lines]
    assert losses == pytest.approx(golden, rel=1e-9)


def test_without_a_projector_the_embeddings_are_the_features():
    method, images = (
        contract.build("simclr", without_projector=True),
        contract.random_batch("simclr"),
    )
    embeddings = method(images)
    features = method.backbone(torch.cat(images.views))
    torch.testing.assert_close(torch.cat([embeddings["z_a"], embeddings["z_b"]]), features)
    assert not any(name.startswith("projector") for name, _ in method.named_parameters())
