"""Formats in which views reach the model."""

import torch

from ssl_pretrain.parallel.execution import Execution
from ssl_pretrain.parallel.parallel_config import ParallelConfig

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def test_evaluations_keep_float32_although_training_views_are_bfloat16():
    """Evaluations run without autocast, so their views must not be rounded."""
    execution = Execution.resolve(ParallelConfig(), CUDA)
    assert execution.view_dtype == torch.bfloat16
    training, evaluation = torch.zeros(1, 3, 4, 4, dtype=torch.bfloat16), torch.zeros(1, 3, 4, 4)
    views = execution.place_views([training, evaluation])
    assert [view.dtype for view in views] == [torch.bfloat16, torch.float32]
    assert all(view.is_contiguous(memory_format=torch.channels_last) for view in views)


def test_views_on_a_cpu_are_float32():
    assert Execution.resolve(ParallelConfig(), CPU).view_dtype == torch.float32


def test_a_float64_model_gets_float64_views():
    execution = Execution.resolve(ParallelConfig(precision="float64"), CUDA)
    assert execution.place_views([torch.zeros(1, 3, 4, 4)])[0].dtype == torch.float64
