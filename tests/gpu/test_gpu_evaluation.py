"""Evaluations on a GPU use its precision, and neither images nor banks make the host wait."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from on_cuda import NEEDS_CUDA, cuda, forbid_synchronization  # noqa: F401

from ssl_pretrain.eval.frozen import features
from ssl_pretrain.eval.frozen.knn_search import KnnClassifier
from ssl_pretrain.models import backbones
from ssl_pretrain.models.timm_networks import BackboneConfig
from ssl_pretrain.parallel.execution import Execution, ParallelConfig

pytestmark = NEEDS_CUDA

BACKENDS = ["faiss", "torch"]
VIEWS = SimpleNamespace(mean=[0.5, 0.5, 0.5], std=[0.25, 0.25, 0.25])


@pytest.mark.parametrize("precision", ["auto", "float32"])
def test_features_have_the_runs_precision(precision, cuda, forbid_synchronization):
    settings = ParallelConfig(precision=precision)
    run = SimpleNamespace(
        device=cuda,
        config=SimpleNamespace(parallel=settings, views=VIEWS),
        execution=Execution.resolve(settings, cuda),
    )
    cpu_run = SimpleNamespace(
        device=torch.device("cpu"),
        config=run.config,
        execution=Execution.resolve(replace(settings, precision="float32"), torch.device("cpu")),
    )
    torch.manual_seed(0)
    backbone = backbones.build(BackboneConfig("resnet18"), 32).eval()
    images = torch.randint(256, (8, 3, 32, 32), dtype=torch.uint8)
    expected = features.compute(cpu_run, backbone, features.normalize(cpu_run, images))
    backbone = backbone.to(cuda, memory_format=torch.channels_last)
    output_dtypes = []
    backbone.register_forward_hook(lambda module, _, output: output_dtypes.append(output.dtype))
    features.compute(run, backbone, features.normalize(run, images))  # loads kernels
    with forbid_synchronization():
        values = features.compute(run, backbone, features.normalize(run, images))
    assert values.dtype == torch.float32
    assert set(output_dtypes) == {torch.bfloat16 if precision == "auto" else torch.float32}
    difference = (values.cpu() - expected).norm() / expected.norm()
    assert difference < (0.03 if precision == "auto" else 1e-3)


def test_faiss_on_a_gpu_finds_the_neighbors_of_torch(cuda):
    faiss = pytest.importorskip("faiss")
    if not faiss.get_num_gpus():
        pytest.skip("this faiss has no GPU support")
    torch.manual_seed(0)
    bank, queries = torch.randn(5000, 64, device=cuda), torch.randn(2500, 64, device=cuda)
    rows = torch.arange(len(bank), device=cuda)  # used as labels, so that the search returns rows
    results = [
        [torch.cat(values) for values in zip(*classifier.neighbors(queries, 20))]
        for classifier in (KnnClassifier(bank, rows, len(bank), name) for name in BACKENDS)
    ]
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-3, atol=1e-3)
    assert (results[0][1] == results[1][1]).float().mean() > 0.99  # rounding reorders near ties
