"""The exact weighted k-NN, and its measurement inside a run, which must leave no trace there."""

from __future__ import annotations

import hashlib
import json
import math

import numpy as np
import pytest
import tiny
import torch
from conftest import run_ranks
from torch import nn

from ssl_pretrain import config
from ssl_pretrain.checkpoint import state as checkpoint
from ssl_pretrain.distributed import process_group
from ssl_pretrain.monitoring import linear_probe, online_knn
from ssl_pretrain.monitoring.online_knn import OnlineConfig, OnlineKNN, weighted_knn
from ssl_pretrain.train import train

CPU = torch.device("cpu")


def clusters(
    n: int, dim: int = 6, num_classes: int = 4, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(num_classes, (n,), generator=generator)
    centres = torch.randn(num_classes, dim, generator=torch.Generator().manual_seed(99))
    return centres[labels] + 1.5 * torch.randn(n, dim, generator=generator), labels


def by_the_paper(bank, bank_labels, query, k, temperature, num_classes):
    """One query, in Python's floats: the k most similar vote with exp(cosine / temperature)."""

    def cosine(a, b):
        return sum(x * y for x, y in zip(a, b)) / math.sqrt(
            sum(x * x for x in a) * sum(y * y for y in b)
        )

    nearest = sorted(
        ((cosine(query, row), label) for row, label in zip(bank, bank_labels)), reverse=True
    )[:k]
    votes = [0.0] * num_classes
    for similarity, label in nearest:
        votes[label] += math.exp(similarity / temperature)
    return votes.index(max(votes))


@pytest.mark.parametrize(("k", "temperature"), [(1, 0.07), (5, 0.07), (20, 0.5)])
def test_equals_the_papers_sum_over_neighbours(k, temperature):
    (bank, bank_labels), (queries, _) = clusters(60), clusters(25, seed=1)
    expected = [
        by_the_paper(bank.tolist(), bank_labels.tolist(), query, k, temperature, 4)
        for query in queries.tolist()
    ]
    assert weighted_knn(bank, bank_labels, 7 * queries, k, temperature, 4).tolist() == expected


def test_near_neighbours_outvote_many_far_ones():
    bank = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.6, 0.8]])
    labels, query = torch.tensor([0, 1, 1]), torch.tensor([[2.0, 0.0]])
    assert (
        weighted_knn(bank, labels, query, 3, 0.07, 2).item() == 0
    )  # e^(1/.07) against 2 e^(.6/.07)
    assert weighted_knn(bank, labels, query, 3, 10.0, 2).item() == 1  # nearly a plain majority


def test_a_small_temperature_does_not_overflow():
    (bank, labels), (queries, _) = clusters(40), clusters(10, seed=1)
    assert torch.equal(
        weighted_knn(bank, labels, queries, 5, 1e-4, 4),
        weighted_knn(bank, labels, queries, 1, 0.07, 4),
    )


def test_queries_are_scored_alike_in_any_chunks(monkeypatch):
    (bank, labels), (queries, _) = clusters(50), clusters(33, seed=1)
    whole = weighted_knn(bank, labels, queries, 7, 0.07, 4)
    monkeypatch.setattr(online_knn, "SIMILARITIES", 4 * len(bank))
    assert torch.equal(weighted_knn(bank, labels, queries, 7, 0.07, 4), whole)


@pytest.mark.parametrize(
    ("k", "temperature", "message"),
    [
        (
            0,
            0.07,
            "k: 0 neighbours cannot be found among 10 training images; give one from 1 to 10",
        ),
        (
            11,
            0.07,
            "k: 11 neighbours cannot be found among 10 training images; give one from 1 to 10",
        ),
        (5, 0.0, "temperature: 0.0 must be > 0; 0.07 is usual"),
    ],
)
def test_refuses_what_has_no_answer(k, temperature, message):
    bank, labels = clusters(10)
    with pytest.raises(ValueError) as error:
        weighted_knn(bank, labels, bank, k, temperature, 4)
    assert str(error.value) == message


class Noisy(nn.Module):
    """Features with everything in them that a measurement could disturb."""

    def __init__(self):
        super().__init__()
        self.norm, self.drop = nn.BatchNorm1d(6), nn.Dropout(0.5)

    def forward(self, images):
        return self.drop(self.norm(images))


def monitor(
    num_images: int = 100,
    unlabelled: int = 0,
    images_drawing_random_numbers: bool = False,
    **settings,
) -> OnlineKNN:
    data, labels = clusters(num_images)
    labels[:unlabelled] = -1

    def images(numbers):
        for chosen in np.array_split(numbers, 3):
            if images_drawing_random_numbers:
                torch.rand(1)  # as the start of PyTorch's loader does
            yield data[chosen], labels[chosen]

    order = np.random.RandomState(0).permutation(num_images)
    return OnlineKNN(
        OnlineConfig(**{"k": 5, **settings}),
        images,
        labels.numpy(),
        order,
        steps_per_epoch=4,
        device=CPU,
    )


def test_measures_weighted_knn_between_training_images():
    knn = monitor(max_train=50, max_test=15)
    data, labels = clusters(100)
    assert len(knn.bank) == 50 and len(knn.queries) == 15 and not set(knn.bank) & set(knn.queries)
    predicted = weighted_knn(data[knn.bank], labels[knn.bank], data[knn.queries], 5, 0.07, 4)
    expected = (predicted == labels[knn.queries]).double().mean().item()
    assert 0.3 < expected < 1 and knn.measure(nn.Identity()) == pytest.approx(expected)


def test_leaves_the_training_state_as_it_was():
    backbone = Noisy().train()
    backbone.drop.eval()  # a mixed state, as with frozen parts
    before = {key: value.clone() for key, value in backbone.state_dict().items()}
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    monitor(images_drawing_random_numbers=True).measure(backbone)
    torch.testing.assert_close(torch.rand(4), expected, rtol=0, atol=0)
    torch.testing.assert_close(dict(backbone.state_dict()), before, rtol=0, atol=0)
    assert backbone.training and backbone.norm.training and not backbone.drop.training


def test_the_training_state_returns_even_when_the_measurement_fails():
    backbone = Noisy().train()
    knn = monitor()
    knn.images = lambda numbers: iter(
        [(torch.zeros(2, 5), torch.zeros(2))]
    )  # of a shape that the norm refuses
    with pytest.raises(RuntimeError):
        knn.measure(backbone)
    assert backbone.training and backbone.norm.training


def test_measures_in_evaluation_mode_without_a_graph():
    backbone = Noisy().train()
    assert monitor().measure(backbone) == monitor().measure(backbone)  # dropout would differ
    assert all(parameter.grad is None for parameter in backbone.parameters())


def _measured_on_this_rank():
    return monitor(num_images=101, max_test=17).measure(Noisy()), process_group.world_size()


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_agree_with_one_process(world_size):
    expected, _ = _measured_on_this_rank()
    assert (
        run_ranks(_measured_on_this_rank, world_size=world_size)
        == [(expected, world_size)] * world_size
    )


def test_unlabelled_images_are_measured_by_nothing_and_said_once(capsys):
    knn = monitor(unlabelled=100)
    assert knn.measure(nn.Identity()) is None and not knn.due(4)
    assert capsys.readouterr().out == "online k-NN: off, as the training images have 0 labels\n"


def test_only_labelled_images_take_part():
    knn = monitor(unlabelled=60)
    assert sorted([*knn.bank, *knn.queries]) == list(range(60, 100)) and len(knn.queries) == 8


def test_a_k_that_does_not_fit_is_refused_before_training():
    with pytest.raises(
        ValueError, match=r"online.k: 20 neighbours cannot be found among 8 training images"
    ):
        monitor(num_images=10, k=20)


@pytest.mark.parametrize(
    ("every", "steps"),
    [(1.0, [4, 8, 12]), (0.5, [2, 4, 6, 8, 10, 12]), (0.625, [3, 5, 8, 10]), (2, [8]), (0, [])],
)
def test_is_due_when_so_many_epochs_have_passed(every, steps):
    knn = monitor(knn_every_epochs=every)
    assert [step for step in range(13) if knn.due(step)] == steps


def test_the_probe_is_logistic_regression():
    from sklearn.linear_model import LogisticRegression

    (train, labels), (test, truth) = clusters(300, seed=3), clusters(200, seed=4)
    ours = linear_probe.predict(train, labels, test, 4)
    standard = (
        (part - train.mean(0)) / train.std(0, correction=0) / 6**0.5 for part in (train, test)
    )
    fitted, asked = (part.numpy() for part in standard)
    theirs = (
        LogisticRegression(C=1 / (linear_probe.DECAY * 300), max_iter=1000)
        .fit(fitted, labels.numpy())
        .predict(asked)
    )
    assert (ours.numpy() == theirs).mean() > 0.99
    assert (
        0.5 < (ours == truth).double().mean() < 1
    )  # the four classes overlap: neither chance, a quarter, nor all of them
    assert torch.equal(ours, linear_probe.predict(100 * train + 7, labels, 100 * test + 7, 4))


def test_the_probe_reaches_neither_gradients_nor_random_numbers():
    features = clusters(60)[0].requires_grad_()
    before = torch.get_rng_state()
    linear_probe.predict(features, clusters(60)[1], features, 4)
    assert features.grad is None and torch.equal(torch.get_rng_state(), before)


def test_it_is_measured_beside_the_knn():
    knn = monitor()
    assert set(knn.at(4, nn.Identity())) == {"knn", "probe"} and knn.at(5, nn.Identity()) == {}
    data, labels = clusters(100)
    answered = linear_probe.predict(data[knn.bank], labels[knn.bank], data[knn.queries], 4)
    assert knn.probed == pytest.approx((answered == labels[knn.queries]).double().mean().item())
    assert set(monitor(probe=False).at(4, nn.Identity())) == {"knn"}


def test_a_run_has_the_same_weights_with_all_of_it_on_or_off(tmp_path):
    """By hash: what is measured inside a run moves neither its weights nor its random numbers."""
    path = tiny.config(tmp_path)
    hashes = []
    for name, measured in (
        ("off", ["online.knn_every_epochs=0"]),
        ("on", ["online.knn_every_epochs=0.4", "online.k=3", "online.probe=true"]),
    ):
        train(
            config.load(
                path, ["epochs=3", "backbone.drop_path=0.2", f"output={tmp_path / name}", *measured]
            ),
            CPU,
        )
        weights = checkpoint.checkpoints(tmp_path / name)[-1] / "method.safetensors"
        hashes.append(hashlib.sha256(weights.read_bytes()).hexdigest())
        records = [
            json.loads(line)
            for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        ]
        assert sum("probe" in record for record in records) == (0 if name == "off" else 7)
    assert hashes[0] == hashes[1]
