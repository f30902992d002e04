"""Without a GPU, the scaling kernel is interpreted, and compiled for each architecture."""

import pytest
import torch
import triton_interpreter

from ssl_pretrain.optim import scaling


def test_the_kernel_equals_torchs_operations():
    pytest.importorskip("triton", reason="no Triton for this platform")
    lines = triton_interpreter.run_script("tests/optim/interpreted_scaling.py")
    assert len(lines) == 12
    assert [line for line in lines if line[0] != 0.0] == []


@pytest.mark.parametrize("capability", [80, 89, 90])
@pytest.mark.parametrize("has_addend", [False, True])
@pytest.mark.parametrize("is_aligned", [False, True])
def test_the_kernel_compiles_and_loads_16_bytes_at_a_time(capability, has_addend, is_aligned):
    triton = pytest.importorskip("triton", reason="no Triton for this platform")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from ssl_pretrain.optim import scaling_triton

    constants = {
        "HAS_ADDEND": has_addend,
        "IS_ALIGNED": is_aligned,
        "CHUNK": scaling_triton.CHUNK,
    }
    signature = {"table": "*i64", "factors": "*fp32", "other_factors": "*fp32"}
    signature |= dict.fromkeys(constants, "constexpr")
    source = ASTSource(scaling_triton._scale, signature, constants)
    compiled = triton.compile(
        source, target=GPUTarget("cuda", capability, 32), options={"num_warps": 8}
    )
    assert compiled.metadata.shared == 0
    assert ("ld.global.v4.b32" in compiled.asm["ptx"]) == is_aligned


def test_the_table_has_one_row_per_chunk():
    pytest.importorskip("triton", reason="no Triton for this platform")
    from ssl_pretrain.optim.scaling_triton import CHUNK, build_table

    sizes = (CHUNK + 1, 0, 2)
    table = build_table((1024, 2048, 4096), (8192, 0, 16384), sizes, torch.device("cpu"))
    assert table.tolist() == [
        [1024, 8192, CHUNK, 0],
        [1024 + 4 * CHUNK, 8192 + 4 * CHUNK, 1, 0],
        [4096, 16384, 2, 2],
    ]


def test_the_kernel_is_only_for_dense_float32_tensors_of_one_order_on_cuda(monkeypatch):
    from torch._subclasses.fake_tensor import FakeTensorMode

    monkeypatch.setattr(scaling, "find_spec", lambda name: object())
    with FakeTensorMode(), torch.device("cuda"):
        x, factors = torch.empty(4, 3, 2, 2), torch.empty(1)
        channels_last = x.to(memory_format=torch.channels_last)
        assert scaling._has_kernel([[x]], factors)
        assert scaling._has_kernel([[channels_last], [channels_last]], factors, factors)
        assert not scaling._has_kernel([[x], [channels_last]], factors, factors)
        assert not scaling._has_kernel([[x[:, 1:]]], factors)
        assert not scaling._has_kernel([[x.bfloat16()]], factors)
        row, column = torch.empty(5, 4, 1, 1), torch.empty(5, 1, 1, 4).permute(0, 3, 1, 2)
        assert scaling._has_kernel([[row], [column]], factors, factors)
    assert not scaling._has_kernel([[torch.empty(4)]], torch.empty(1))
