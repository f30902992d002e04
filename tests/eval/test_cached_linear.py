"""eval.linear on cached features: one pass trains the heads that separate SGD runs would."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch import nn
from torch.nn import functional as F
from untrained_run import make_run

from ssl_pretrain import rng
from ssl_pretrain.eval import runs
from ssl_pretrain.eval.frozen import cached_linear, features, few_labels, linear_heads
from ssl_pretrain.eval.frozen.evaluation_split import hold_out


def sample_clusters(num_images, seed=0, dim=5, num_classes=3):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(num_classes, (num_images,), generator=generator)
    centers = torch.randn(num_classes, dim, generator=torch.Generator().manual_seed(5))
    noise = torch.randn(num_images, dim, generator=generator)
    return (centers[labels] + noise).double(), labels


def train_with_torch(values, labels, lr, weight_decay, epochs):
    layer = nn.Linear(values.shape[1], 3).double()
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    optimizer = torch.optim.SGD(
        layer.parameters(), lr, momentum=0.9, nesterov=True, weight_decay=weight_decay
    )
    batch_size = cached_linear.BATCH_SIZE
    steps = epochs * -(-len(values) // batch_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for epoch in range(epochs):
        order = torch.from_numpy(rng.permutation(0, epoch, len(values)))
        for batch in order.split(batch_size):
            optimizer.zero_grad()
            F.cross_entropy(layer(values[batch]), labels[batch]).backward()
            optimizer.step()
            schedule.step()
    return torch.cat([layer.weight.T, layer.bias[None]]).detach()


def test_each_head_equals_torchs_sgd():
    values, labels = sample_clusters(600)
    lrs, decays = [0.03, 0.3, 0.3], [0.0, 0.0, 0.1]
    heads = cached_linear.train_heads(values, labels, 3, lrs, decays, epochs=3)
    for head, lr, decay in zip(heads, lrs, decays):
        expected = train_with_torch(values, labels, lr, decay, epochs=3)
        torch.testing.assert_close(head, expected)


def test_twelve_heads_in_one_pass_equal_twelve_separate_runs():
    values, labels = sample_clusters(600)
    lrs, decays = [10.0**power for power in range(-4, 2) for _ in range(2)], [0.0, 1e-2] * 6
    heads = cached_linear.train_heads(values, labels, 3, lrs, decays, epochs=2)
    separate_heads = [
        cached_linear.train_heads(values, labels, 3, [lr], [decay], epochs=2)[0]
        for lr, decay in zip(lrs, decays)
    ]
    torch.testing.assert_close(heads, torch.stack(separate_heads), rtol=1e-12, atol=1e-12)
    assert not torch.equal(heads[0], heads[2])


def test_the_optimum_is_that_of_logistic_regression():
    """With a decay of 1 / (C n), the convex problem has one solution, and both reach it."""
    train, labels = sample_clusters(4000, seed=1, dim=6, num_classes=10)
    test, test_labels = sample_clusters(20_000, seed=2, dim=6, num_classes=10)
    standardize = cached_linear.fit_standardization(train)
    train, test = standardize(train), standardize(test)
    decay = 1e-3
    weights = cached_linear.train_heads(train, labels, 10, [0.01, 0.1, 0.3], [decay] * 3, epochs=60)
    ours = 100 * linear_heads.scores(weights, test, test_labels)[0]
    regression = LogisticRegression(C=1 / (decay * len(train)), max_iter=5000)
    regression.fit(train.numpy(), labels.numpy())
    theirs = 100 * regression.score(test.numpy(), test_labels.numpy())
    assert 50 < theirs < 95
    assert (ours[1:] - theirs).abs().max() < 0.3


def test_accuracy_and_cross_entropy_of_a_known_classifier():
    # One head, one feature, two classes: the logits of x are (2 x, 0).
    weights = torch.tensor([[[2.0, 0.0], [0.0, 0.0]]])
    values, labels = torch.tensor([[1.0], [-1.0]]), torch.tensor([0, 0])
    accuracies, losses = linear_heads.scores(weights, values, labels)
    assert accuracies.tolist() == [0.5]
    expected = (np.log(1 + np.exp(-2)) + np.log(1 + np.exp(2))) / 2
    assert losses.item() == pytest.approx(expected)


def test_the_setting_that_is_best_on_the_held_out_tenth_is_selected():
    values, labels = sample_clusters(400)
    selected = cached_linear.select_setting(values, labels, 3, epochs=3)
    train_rows, held_out_rows = hold_out(400)
    assert len(held_out_rows) == 40
    assert sorted([*train_rows, *held_out_rows]) == list(range(400))
    accuracies = []
    for lr in cached_linear.LEARNING_RATES:
        weights = cached_linear.train_heads(
            values[train_rows], labels[train_rows], 3, [lr], [0.0], 3
        )
        accuracy, _ = linear_heads.scores(weights, values[held_out_rows], labels[held_out_rows])
        accuracies.append(accuracy.item())
    assert selected.held_out_accuracy == pytest.approx(max(accuracies))
    assert accuracies[cached_linear.LEARNING_RATES.index(selected.lr)] == max(accuracies)


def test_cross_entropy_decides_between_equal_accuracies():
    accuracies, losses = [0.8, 0.9, 0.9, 0.9, 0.7], [0.1, 0.5, 0.4, float("nan"), 0.0]
    assert linear_heads.best_setting(accuracies, losses) == 2


def test_a_diverging_head_is_not_selected():
    values, labels = sample_clusters(300)
    values[:, 0] *= 1e30
    assert np.isfinite(cached_linear.select_setting(values, labels, 3, epochs=2).held_out_accuracy)


def test_standardizing_uses_training_statistics_and_survives_a_constant_feature():
    values, _ = sample_clusters(200)
    values[:, 2] = 7.0
    standardize = cached_linear.fit_standardization(values)
    varying = standardize(values)[:, [0, 1, 3, 4]]
    assert varying.mean(dim=0).abs().max() < 1e-12
    torch.testing.assert_close(varying.std(dim=0, correction=0), torch.ones(4).double())
    assert torch.equal(standardize(values + 1)[:, 2], torch.zeros(200).double())


def test_few_labels_are_balanced_and_the_same_every_time():
    labels = np.repeat(np.arange(4), 25)
    draws = few_labels.draw_rows(labels, 5, list("abcd"))
    assert len(draws) == 10
    assert all(np.bincount(labels[rows]).tolist() == [5] * 4 for rows in draws)
    assert all(len(set(rows)) == 20 for rows in draws)
    assert len({tuple(sorted(rows)) for rows in draws}) == 10
    np.testing.assert_array_equal(draws, few_labels.draw_rows(labels, 5, list("abcd")))


def test_more_labels_than_a_class_has_are_refused():
    with pytest.raises(ValueError) as error:
        few_labels.draw_rows(np.array([0, 0, 0, 1]), 2, ["cat", "dog"])
    assert str(error.value) == (
        "--labels-per-class 2: takes 2 images per class, but 'dog' has 1; give a smaller number"
    )


@pytest.fixture(scope="module")
def original_and_permuted(tmp_path_factory):
    """Return the result of one run, and its result with permuted test labels."""
    run = runs.load_run(make_run(tmp_path_factory.mktemp("runs") / "run"), device="cpu")
    original = cached_linear.evaluate(run, epochs=4, labels_per_class=[1, 5])
    extract = features.extract

    def extract_with_permuted_labels(backbone, split, offset=(0, 0)):
        values, labels = extract(backbone, split, offset)
        return values, labels.roll(3) if len(split) == 500 else labels

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(features, "extract", extract_with_permuted_labels)
        return original, cached_linear.evaluate(run, epochs=4, labels_per_class=[1, 5])


def test_digits_end_to_end(original_and_permuted):
    result, _ = original_and_permuted
    rows = {row["features"]: row for row in result["rows"]}
    assert list(rows["pretrained"]["metrics"]) == ["all labels", "1 per class", "5 per class"]
    pixels = rows["raw pixels"]
    assert pixels["metrics"]["all labels"] > 90
    assert 45 < pixels["metrics"]["1 per class"] < 75
    assert pixels["spread"]["1 per class"] > pixels["spread"]["5 per class"] > 0
    assert rows["pretrained"]["notes"]["all labels"].startswith("learning rate ")
    assert "C = 1.0" in result["protocol"]["few labels"]
    assert "4 epochs" in result["protocol"]["classifier"]


def test_the_test_labels_change_accuracies_but_no_selection(original_and_permuted):
    original, permuted = (
        {row["features"]: row for row in result["rows"]} for result in original_and_permuted
    )
    for name in ("random, as built", "random, recalibrated", "pretrained"):
        assert (
            permuted[name]["metrics"]["all labels"] < original[name]["metrics"]["all labels"] - 20
        )
        assert permuted[name]["notes"] == original[name]["notes"]
