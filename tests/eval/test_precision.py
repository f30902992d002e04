"""Evaluations compute features in the precision of the run, and say so in their results."""

from contextlib import contextmanager

import numpy as np
import pytest
import torch
from suites import quick_and_full
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook
from untrained_run import make_run

import ssl_pretrain
from ssl_pretrain.data.sources import open_source
from ssl_pretrain.eval import report, runs
from ssl_pretrain.eval.frozen import features
from ssl_pretrain.eval.frozen.evaluation_split import EvaluationSplit
from ssl_pretrain.eval.named_evaluations import evaluate

# Precision of a run, whether its forward passes use autocast, and the entry of the protocol.
PRECISIONS = [("bfloat16", True, "bfloat16 autocast"), ("float32", False, "float32")]
EVALUATIONS = {
    "knn": {"shift_distances": [], "k": 5},
    "linear": {"epochs": 1},
    "linear, published": {"protocol": "simclr", "epochs": 1, "rows": ["random", "pretrained"]},
    "attentive": {"epochs": 1},
    "attentive, published": {"protocol": "vjepa", "epochs": 1, "rows": ["random", "pretrained"]},
    "retrieval": {},
    "robustness": {"corruption_names": ["gaussian_noise"], "max_images": 20},
    "spectrum": {},
    "finetune": {"epochs": 1, "batch_size": 50},
}


@pytest.fixture(scope="module", params=PRECISIONS, ids=lambda case: case[0])
def case(request, tmp_path_factory):
    precision, uses_autocast, entry = request.param
    folder = tmp_path_factory.mktemp("runs") / precision
    make_run(folder, f"parallel.precision={precision}", "data.subset=200")
    return runs.load_run(folder, device="cpu"), uses_autocast, entry


@contextmanager
def recorded_autocast():
    """Collect whether bfloat16 autocast is on in the forward pass of each convolution.

    Convolutions of meta tensors only measure the size of feature maps.
    """
    states = set()

    def record(module, inputs):
        if isinstance(module, nn.Conv2d) and not inputs[0].is_meta:
            states.add(torch.is_autocast_enabled("cpu"))

    handle = register_module_forward_pre_hook(record)
    try:
        yield states
    finally:
        handle.remove()


@pytest.mark.parametrize("name", quick_and_full(["knn", "linear"], EVALUATIONS))
def test_every_evaluation_follows_the_runs_precision(name, case):
    run, uses_autocast, entry = case
    with recorded_autocast() as states:
        result = evaluate(run, name.partition(",")[0], **EVALUATIONS[name])
    assert states == {uses_autocast}
    assert result.protocol["precision"] == entry


def test_features_are_float32_values_of_the_runs_precision(case):
    run, uses_autocast, _ = case
    split = EvaluationSplit(run, open_source(run.config.data, "val"))
    values, _ = features.extract(run.backbone, split)
    views = features.normalize(run, next(split.batches())[0])
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=uses_autocast):
        expected = run.backbone(views).float()
    assert values.dtype == torch.float32
    assert torch.equal(values[: len(expected)], expected)


@pytest.mark.full
def test_embeddings_and_the_report_follow_the_runs_precision(case):
    run, uses_autocast, _ = case
    images = np.zeros((3, 8, 8), np.uint8)
    with recorded_autocast() as states:
        assert ssl_pretrain.embed(run.path, images).dtype == np.float32
    assert states == {uses_autocast}
    with recorded_autocast() as states:
        report.write(run)
    assert states == {uses_autocast}
