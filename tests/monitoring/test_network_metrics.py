"""The norm of several tensors. test_collapse.py tests the metrics that use it."""

import pytest
import torch

from ssl_pretrain.monitoring import collapse


def test_the_norm_is_that_of_all_tensors_together():
    tensors = [torch.tensor([3.0]), torch.tensor([[0.0, 4.0]])]
    assert collapse.norm(tensors).item() == pytest.approx(5)
