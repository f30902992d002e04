"""The exact weighted k-NN classifier."""

import math

import pytest
import torch
from clusters import clusters

from ssl_pretrain.monitoring import weighted_knn


def predict(bank, labels, queries, k, temperature, num_classes=4):
    return weighted_knn.predict(
        bank, labels, queries, k=k, temperature=temperature, num_classes=num_classes
    )


def predict_as_in_the_paper(bank, bank_labels, query, k, temperature, num_classes):
    """Classify one query in plain Python. The k nearest vote with exp(cosine / temperature)."""

    def cosine(a, b):
        norms = math.sqrt(sum(x * x for x in a) * sum(y * y for y in b))
        return sum(x * y for x, y in zip(a, b)) / norms

    pairs = [(cosine(query, row), label) for row, label in zip(bank, bank_labels)]
    votes = [0.0] * num_classes
    for similarity, label in sorted(pairs, reverse=True)[:k]:
        votes[label] += math.exp(similarity / temperature)
    return votes.index(max(votes))


@pytest.mark.parametrize(("k", "temperature"), [(1, 0.07), (5, 0.07), (20, 0.5)])
def test_predictions_equal_the_papers_sum_over_neighbors(k, temperature):
    (bank, labels), (queries, _) = clusters(60), clusters(25, seed=1)
    expected = [
        predict_as_in_the_paper(bank.tolist(), labels.tolist(), query, k, temperature, 4)
        for query in queries.tolist()
    ]
    assert predict(bank, labels, 7 * queries, k, temperature).tolist() == expected


def test_a_near_neighbor_outvotes_two_far_ones():
    bank = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.6, 0.8]])
    labels, query = torch.tensor([0, 1, 1]), torch.tensor([[2.0, 0.0]])
    assert predict(bank, labels, query, 3, 0.07).item() == 0  # e^(1/.07) against 2 e^(.6/.07)
    assert predict(bank, labels, query, 3, 10.0).item() == 1  # nearly a majority vote


def test_a_small_temperature_does_not_overflow():
    (bank, labels), (queries, _) = clusters(40), clusters(10, seed=1)
    nearest = predict(bank, labels, queries, 1, 0.07)
    assert torch.equal(predict(bank, labels, queries, 5, 1e-4), nearest)


def test_predictions_do_not_depend_on_the_chunk_size(monkeypatch):
    (bank, labels), (queries, _) = clusters(50), clusters(33, seed=1)
    expected = predict(bank, labels, queries, 7, 0.07)
    monkeypatch.setattr(weighted_knn, "MAX_SIMILARITIES", 4 * len(bank))
    assert torch.equal(predict(bank, labels, queries, 7, 0.07), expected)


@pytest.mark.parametrize(
    ("k", "temperature", "message"),
    [
        (0, 0.07, "k: 0 neighbors cannot be found among 10 training images"),
        (11, 0.07, "k: 11 neighbors cannot be found among 10 training images"),
        (5, 0.0, "temperature: 0.0 is not positive; choose a value such as 0.07"),
    ],
)
def test_impossible_settings_are_refused(k, temperature, message):
    bank, labels = clusters(10)
    with pytest.raises(ValueError) as error:
        predict(bank, labels, bank, k, temperature)
    remedy = "; choose a value from 1 to 10" if message.startswith("k") else ""
    assert str(error.value) == message + remedy
