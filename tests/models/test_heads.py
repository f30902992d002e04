import pytest
import torch
from torch import nn

from ssl_pretrain.models.heads import mlp


def kinds(head):
    return [type(layer).__name__ for layer in head]


def test_simclr_head_is_the_authors():
    head = mlp(512, 2048, 2048, 128, last_batch_norm=True, last_shift=False, init_std=0.01)
    assert kinds(head) == [
        "Linear",
        "BatchNorm1d",
        "ReLU",
        "Linear",
        "BatchNorm1d",
        "ReLU",
        "Linear",
        "BatchNorm1d",
    ]
    assert all(layer.bias is None for layer in head if isinstance(layer, nn.Linear))
    assert head[-1].bias is None and head[-1].weight is not None  # center=False
    assert head[0].weight.std().item() == pytest.approx(0.01, rel=0.02)
    head(torch.randn(4, 512)).sum().backward()


def test_plain_head_keeps_its_last_bias():
    head = mlp(8, 16, 4)
    assert kinds(head) == ["Linear", "BatchNorm1d", "ReLU", "Linear"]
    assert head[0].bias is None and head[-1].bias is not None


def test_widths_must_be_positive():
    with pytest.raises(
        ValueError, match=r"^mlp: widths must be positive, got in_dim=8, dims=\(0,\)$"
    ):
        mlp(8, 0)


def test_biases_that_authors_keep_before_a_norm_or_leave_out_at_the_end():
    byol = mlp(8, 16, 4, hidden_bias=True, last_bias=False)
    assert byol[0].bias is not None and byol[-1].bias is None
    moco_v3 = mlp(8, 16, 4, last_batch_norm=True, last_affine=False)
    assert [getattr(layer, "bias", None) for layer in (moco_v3[0], moco_v3[3], moco_v3[4])] == [
        None
    ] * 3
