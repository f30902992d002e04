"""Segmentation of data and networks that do not fit: one message each, or the same numbers."""

import copy
from dataclasses import replace

import numpy as np
import pytest
from conftest import run_ranks
from masked_folders import write_sources
from untrained_run import make_run

from ssl_pretrain.eval import results, runs
from ssl_pretrain.eval.dense import (
    backbone_rows,
    segmentation_batches,
    segmenter_training,
    segmenters,
)
from ssl_pretrain.eval.dense.backbone_rows import SegmentationOptions
from ssl_pretrain.eval.dense.masked_images import VOID
from ssl_pretrain.eval.dense.segmentation_protocols import TRAINING_PROTOCOLS

SIZE = "views.crops.global.size=32"
PIXELS = segmentation_batches.Pixels([0.5] * 3, [0.25] * 3)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_sources(tmp_path_factory.mktemp("data"))


@pytest.fixture
def run(tmp_path):
    return runs.load_run(make_run(tmp_path / "run", SIZE), device="cpu")


def test_options_and_data_that_do_not_fit_are_refused_before_anything_is_computed(run, data):
    train, test = data.open(run)
    void = replace(train, rule=replace(train.rule, void=(0, 1, 2, VOID)))
    gray = replace(run, config=copy.deepcopy(run.config))
    gray.config.data.channels = 1
    cases = [
        (run, (train, test), {"protocol": "finetune", "steps": 10, "epochs": 2}),
        (run, (train.subset([0]), test), {"protocol": "knn"}),
        (run, (void, test), {"protocol": "knn"}),
        (gray, (train, test), {"protocol": "dinov2_linear"}),
    ]
    messages = []
    for case, splits, options in cases:
        with pytest.raises(ValueError) as error:
            backbone_rows.compare(case, splits, SegmentationOptions(**options))
        messages.append(str(error.value))
    assert messages == [
        "--epochs 2: --steps 10 is given, too; give one of them",
        f"segmentation: {train.name} has 1 training image, and one is held out to select the "
        "setting; give at least two",
        "segmentation: the 1 held-out training images of seed 0 have only void pixels; give "
        "another of --seeds, or more images",
        "--protocol dinov2_linear: its color distortion needs 3 channels, but data.channels is 1; "
        "choose another protocol",
    ]


def test_classes_that_only_one_random_network_predicts_have_a_baseline():
    rows = [
        results.Row("random, as built", {"mIoU": 10.0, "IoU cat": 3.0}),
        results.Row("random, recalibrated", {"mIoU": 12.0, "IoU dog": 4.0}),
    ]
    for order in (rows, rows[::-1]):
        *_, baseline = results.with_better_random_row(order)
        assert baseline.metrics == {"mIoU": 12.0, "IoU cat": 3.0, "IoU dog": 4.0}


def _train_convnext(folder, data):
    run = runs.load_run(folder, overrides=["parallel.precision=float32"], device="cpu")
    protocol = replace(TRAINING_PROTOCOLS["finetune"], num_steps=2, crop_size=32, batch_size=2)
    network = segmenters.build(run, 3, protocol, "pretrained", 0)
    return segmenter_training.train(network, data.open(run)[0], protocol, PIXELS, 0)[1]


@pytest.mark.full
def test_networks_with_parameters_that_tokens_do_not_use_train_on_two_ranks(tmp_path, data):
    folder = make_run(tmp_path / "run", "backbone.name=convnext_atto", SIZE)
    losses = run_ranks(_train_convnext, folder, data, world_size=2)
    assert losses[0] == losses[1] and all(np.isfinite(losses[0]))
