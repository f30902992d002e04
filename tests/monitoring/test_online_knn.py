"""k-NN and linear accuracy, which are measured during a run without changing the training."""

import hashlib
import json

import numpy as np
import pytest
import tiny
import torch
from clusters import clusters
from conftest import run_ranks
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook

from ssl_pretrain import config
from ssl_pretrain.checkpoint.folder import list_checkpoints
from ssl_pretrain.distributed import process_group
from ssl_pretrain.monitoring import linear_probe, weighted_knn
from ssl_pretrain.monitoring.online_knn import OnlineConfig, OnlineKNN
from ssl_pretrain.monitoring.records import Measurements
from ssl_pretrain.parallel.execution import cpu_has_bfloat16
from ssl_pretrain.train import train

CPU = torch.device("cpu")


class Noisy(nn.Module):
    """Backbone with batch norm and dropout, which a measurement could disturb."""

    def __init__(self):
        super().__init__()
        self.norm, self.drop = nn.BatchNorm1d(6), nn.Dropout(0.5)

    def forward(self, images):
        return self.drop(self.norm(images))


def build_knn(num_images=100, num_unlabeled=0, draws_random_numbers=False, **settings):
    data, labels = clusters(num_images)
    labels[:num_unlabeled] = -1

    def read_images(indices):
        for batch in np.array_split(indices, 3):
            if draws_random_numbers:
                torch.rand(1)  # as the start of PyTorch's loader does
            yield data[batch], labels[batch]

    order = np.random.RandomState(0).permutation(num_images)
    online = OnlineConfig(**{"k": 5, **settings})
    return OnlineKNN(online, read_images, labels.numpy(), order, steps_per_epoch=4, device=CPU)


def test_the_bank_and_the_queries_are_different_training_images():
    knn = build_knn(max_train=50, max_test=15)
    assert (
        len(knn.bank_indices) == 50
        and len(knn.query_indices) == 15
        and not set(knn.bank_indices) & set(knn.query_indices)
    )


def test_the_accuracies_are_those_of_the_classifiers():
    knn = build_knn(max_train=50, max_test=15)
    data, labels = clusters(100)
    bank, bank_labels, queries = (
        data[knn.bank_indices],
        labels[knn.bank_indices],
        data[knn.query_indices],
    )
    knn_predictions = weighted_knn.predict(
        bank, bank_labels, queries, k=5, temperature=0.07, num_classes=4
    )
    probe_predictions = linear_probe.predict(bank, bank_labels, queries, 4)
    expected = [
        (predictions == labels[knn.query_indices]).double().mean().item()
        for predictions in (knn_predictions, probe_predictions)
    ]
    metrics = knn.measure(nn.Identity()).metrics
    assert [metrics["knn"], metrics["probe"]] == pytest.approx(expected) and 0.3 < expected[0] < 1


def test_both_accuracies_are_measured_when_due():
    assert set(build_knn().measure_if_due(4, nn.Identity()).metrics) == {"knn", "probe"}
    assert build_knn().measure_if_due(5, nn.Identity()).metrics == {}
    assert set(build_knn(probe=False).measure_if_due(4, nn.Identity()).metrics) == {"knn"}


def test_the_training_state_is_unchanged():
    backbone = Noisy().train()
    backbone.drop.eval()  # mixed modes, as with frozen modules
    before = {key: value.clone() for key, value in backbone.state_dict().items()}
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    build_knn(draws_random_numbers=True).measure(backbone)
    torch.testing.assert_close(torch.rand(4), expected, rtol=0, atol=0)
    torch.testing.assert_close(dict(backbone.state_dict()), before, rtol=0, atol=0)
    assert backbone.training and backbone.norm.training and not backbone.drop.training


def test_the_training_state_is_restored_after_a_failed_measurement():
    backbone, knn = Noisy().train(), build_knn()
    wrong_shape = torch.zeros(2, 5)
    knn.read_images = lambda indices: iter([(wrong_shape, torch.zeros(2))])
    with pytest.raises(RuntimeError):
        knn.measure(backbone)
    assert backbone.training and backbone.norm.training


def test_features_are_computed_in_evaluation_mode_without_a_graph():
    backbone = Noisy().train()
    assert build_knn().measure(backbone) == build_knn().measure(backbone)  # dropout would differ
    assert all(parameter.grad is None for parameter in backbone.parameters())


def _measure_on_this_rank():
    return build_knn(num_images=101, max_test=17).measure(Noisy()), process_group.world_size()


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_agree_with_one_process(world_size):
    expected, _ = _measure_on_this_rank()
    results = run_ranks(_measure_on_this_rank, world_size=world_size)
    assert results == [(expected, world_size)] * world_size


def test_without_labels_nothing_is_measured_and_one_line_says_so(capsys):
    knn = build_knn(num_unlabeled=100)
    assert knn.measure(nn.Identity()) == Measurements() and not knn.is_due(4)
    message = "online k-NN is off, because no training images have labels\n"
    assert capsys.readouterr().out == message


def test_only_labeled_images_are_used():
    knn = build_knn(num_unlabeled=60)
    assert (
        sorted([*knn.bank_indices, *knn.query_indices]) == list(range(60, 100))
        and len(knn.query_indices) == 8
    )


def test_a_k_that_does_not_fit_is_refused_before_training():
    message = r"online.k: 20 neighbors cannot be found among 8 training images"
    with pytest.raises(ValueError, match=message):
        build_knn(num_images=10, k=20)


@pytest.mark.parametrize(
    ("epochs", "steps"),
    [(1.0, [4, 8, 12]), (0.5, [2, 4, 6, 8, 10, 12]), (0.625, [3, 5, 8, 10]), (2, [8]), (0, [])],
)
def test_a_measurement_is_due_after_each_interval_of_epochs(epochs, steps):
    knn = build_knn(knn_every_epochs=epochs)
    assert [step for step in range(13) if knn.is_due(step)] == steps


def test_a_run_has_the_same_weights_with_measurements_on_or_off(tmp_path):
    path = tiny.write_config(tmp_path)
    settings = {
        "off": ["online.knn_every_epochs=0"],
        "on": ["online.knn_every_epochs=0.4", "online.k=3", "online.probe=true"],
    }
    hashes, num_measured = [], []
    for name, online in settings.items():
        run = tmp_path / name
        overrides = ["epochs=3", "backbone.drop_path=0.2", f"output={run}", *online]
        train(config.load(path, overrides), CPU)
        weights = list_checkpoints(run)[-1] / "method.safetensors"
        hashes.append(hashlib.sha256(weights.read_bytes()).hexdigest())
        records = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
        num_measured.append(sum("probe" in record for record in records))
    assert hashes[0] == hashes[1] and num_measured == [0, 7]


@pytest.mark.parametrize(
    ("precision", "uses_autocast"),
    [("bfloat16", True), ("float32", False), ("auto", cpu_has_bfloat16())],
)
def test_a_measurement_has_the_precision_of_the_run(precision, uses_autocast, tmp_path):
    states = set()

    def record(module, arguments):
        # Before the run, the width of the features is determined on meta tensors.
        is_measured = not module.training and arguments[0].device == CPU
        if isinstance(module, nn.Conv2d) and is_measured:
            states.add(torch.is_autocast_enabled("cpu"))

    path = tiny.write_config(tmp_path)
    overrides = ["epochs=1", f"parallel.precision={precision}", "online.on_failure=stop"]
    overrides += ["online.knn_every_epochs=1", "online.k=3", f"output={tmp_path / 'run'}"]
    handle = register_module_forward_pre_hook(record)
    try:
        train(config.load(path, overrides), CPU)
    finally:
        handle.remove()
    assert states == {uses_autocast}
