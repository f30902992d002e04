"""Formats in which views reach the model, and settings that exclude each other."""

import pytest
import torch

from ssl_pretrain.parallel import execution
from ssl_pretrain.parallel.execution import Execution, ParallelConfig

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def test_evaluations_keep_float32_although_training_views_are_bfloat16():
    """Networks that run without autocast would refuse bfloat16 views."""
    gpu_execution = Execution.resolve(ParallelConfig(), CUDA)
    assert gpu_execution.view_dtype == torch.bfloat16
    training, evaluation = torch.zeros(1, 3, 4, 4, dtype=torch.bfloat16), torch.zeros(1, 3, 4, 4)
    views = gpu_execution.place_views([training, evaluation])
    assert [view.dtype for view in views] == [torch.bfloat16, torch.float32]
    assert all(view.is_contiguous(memory_format=torch.channels_last) for view in views)


def test_views_on_a_cpu_are_float32():
    assert Execution.resolve(ParallelConfig(), CPU).view_dtype == torch.float32


def test_a_float64_model_gets_float64_views():
    float64_execution = Execution.resolve(ParallelConfig(precision="float64"), CUDA)
    assert float64_execution.place_views([torch.zeros(1, 3, 4, 4)])[0].dtype == torch.float64


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"compile": True, "activation_checkpointing": "selective"},
            "parallel.activation_checkpointing: selective cannot be combined with "
            "parallel.compile, because the compiler chooses what to recompute; choose none or "
            "blocks",
        ),
        (
            {"cuda_graphs": True},
            "parallel.cuda_graphs: true needs parallel.compile; set parallel.cuda_graphs=false",
        ),
    ],
)
def test_settings_that_exclude_each_other_are_refused(settings, message):
    with pytest.raises(ValueError) as error:
        execution.check(ParallelConfig(**settings))
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("capability", "instructions", "precision"),
    [
        ("AVX512", "_is_avx512_bf16_supported", "bfloat16"),
        ("AVX512", "_is_amx_tile_supported", "bfloat16"),
        ("AVX512", None, "float32"),
        ("AVX2", "_is_avx512_bf16_supported", "float32"),
        ("DEFAULT", None, "float32"),
    ],
)
def test_auto_is_bfloat16_on_a_cpu_that_computes_it(
    monkeypatch, capability, instructions, precision
):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda name=name: name == instructions)
    assert execution.resolve_precision(ParallelConfig(), CPU) == precision
    assert Execution.resolve(ParallelConfig(), CPU).autocast == (precision == "bfloat16")
    assert execution.resolve_precision(ParallelConfig(precision="float64"), CPU) == "float64"
    assert execution.resolve_precision(ParallelConfig(), CUDA) == "bfloat16"
