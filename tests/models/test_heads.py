import pytest
import torch
from torch import nn

from ssl_pretrain.models.heads import mlp


def kinds(head):
    return [type(layer).__name__ for layer in head]


def test_simclr_head_is_the_authors():
    head = mlp(512, 2048, 2048, 128, last_batch_norm=True, last_shift=False, init_std=0.01)
    assert kinds(head) == 2 * ["Linear", "BatchNorm1d", "ReLU"] + ["Linear", "BatchNorm1d"]
    assert all(layer.bias is None for layer in head if isinstance(layer, nn.Linear))
    assert head[-1].bias is None  # center=False
    assert head[-1].weight is not None
    assert head[0].weight.std().item() == pytest.approx(0.01, rel=0.02)
    head(torch.randn(4, 512)).sum().backward()


def test_plain_head_keeps_its_last_bias():
    head = mlp(8, 16, 4)
    assert kinds(head) == ["Linear", "BatchNorm1d", "ReLU", "Linear"]
    assert head[0].bias is None
    assert head[-1].bias is not None


def test_widths_must_be_positive():
    with pytest.raises(ValueError) as error:
        mlp(8, 0)
    assert str(error.value) == "mlp: widths must be positive, got in_dim=8, dims=(0,)"


def test_byols_head_has_a_bias_before_the_norm_and_none_at_the_end():
    head = mlp(8, 16, 4, hidden_bias=True, last_bias=False)
    assert head[0].bias is not None
    assert head[-1].bias is None


def test_moco_v3s_head_has_no_bias_and_its_last_norm_no_parameters():
    head = mlp(8, 16, 4, last_batch_norm=True, last_affine=False)
    assert [head[number].bias for number in (0, 3, 4)] == [None] * 3
