"""eval.linear: many classifiers in one pass are the ones that SGD makes one by one, and the test images choose nothing."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from made_run import make_run
from torch import nn
from torch.nn import functional as F

from ssl_pretrain import rng
from ssl_pretrain.eval import linear, runs
from ssl_pretrain.eval.frozen import few_labels, linear_heads
from ssl_pretrain.eval.frozen.evaluation_split import hold_out


def blobs(n, seed=0, dim=5, num_classes=3):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(num_classes, (n,), generator=generator)
    centres = torch.randn(num_classes, dim, generator=torch.Generator().manual_seed(5))
    return (centres[labels] + torch.randn(n, dim, generator=generator)).double(), labels


def by_sgd(found, labels, lr, weight_decay, epochs):
    layer = nn.Linear(found.shape[1], 3).double()
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    optimizer = torch.optim.SGD(
        layer.parameters(), lr, momentum=0.9, nesterov=True, weight_decay=weight_decay
    )
    steps = epochs * -(-len(found) // linear.BATCH_SIZE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for epoch in range(epochs):
        for batch in torch.from_numpy(rng.permutation(0, epoch, len(found))).split(
            linear.BATCH_SIZE
        ):
            optimizer.zero_grad()
            F.cross_entropy(layer(found[batch]), labels[batch]).backward()
            optimizer.step()
            schedule.step()
    return torch.cat([layer.weight.T, layer.bias[None]]).detach()


def test_each_classifier_is_what_torchs_sgd_makes_of_it():
    found, labels = blobs(600)
    lrs, decays = [0.03, 0.3, 0.3], [0.0, 0.0, 0.1]
    together = linear.train_heads(found, labels, 3, lrs, decays, epochs=3)
    for head, lr, decay in zip(together, lrs, decays):
        torch.testing.assert_close(head, by_sgd(found, labels, lr, decay, epochs=3))


def test_twelve_rates_in_one_pass_are_twelve_separate_runs():
    found, labels = blobs(600)
    lrs, decays = [10.0**power for power in range(-4, 2) for _ in range(2)], [0.0, 1e-2] * 6
    together = linear.train_heads(found, labels, 3, lrs, decays, epochs=2)
    alone = [
        linear.train_heads(found, labels, 3, [lr], [decay], epochs=2)[0]
        for lr, decay in zip(lrs, decays)
    ]
    torch.testing.assert_close(together, torch.stack(alone), rtol=1e-12, atol=1e-12)
    assert not torch.equal(together[0], together[2])


def test_our_optimum_is_logistic_regressions():
    """The convex problem has one solution: with a decay of 1 / (C n) on standardized features, both reach it."""
    from sklearn.linear_model import LogisticRegression

    (found, labels), (test, truth) = (
        blobs(4000, seed=1, dim=6, num_classes=10),
        blobs(20_000, seed=2, dim=6, num_classes=10),
    )
    standardize = linear.Standardize.of(found)
    found, test = standardize(found), standardize(test)
    decay = 1e-3
    weights = linear.train_heads(found, labels, 10, [0.01, 0.1, 0.3], [decay] * 3, epochs=60)
    ours = 100 * linear_heads.accuracies(weights, test, truth)
    theirs = 100 * LogisticRegression(C=1 / (decay * len(found)), max_iter=5000).fit(
        found.numpy(), labels.numpy()
    ).score(test.numpy(), truth.numpy())
    assert 50 < theirs < 95 and (ours[1:] - theirs).abs().max() < 0.3


def test_accuracy_and_cross_entropy_of_a_known_classifier():
    weights = torch.tensor(
        [[[2.0, 0.0], [0.0, 0.0]]]
    )  # one head, one feature, two classes: logits (2x, 0)
    found, labels = torch.tensor([[1.0], [-1.0]]), torch.tensor([0, 0])
    assert linear_heads.accuracies(weights, found, labels).tolist() == [0.5]
    expected = (np.log(1 + np.exp(-2)) + np.log(1 + np.exp(2))) / 2
    assert linear_heads.cross_entropies(weights, found, labels).item() == pytest.approx(expected)


def test_the_choice_is_the_best_on_the_held_out_tenth():
    found, labels = blobs(400)
    choice = linear.choose(found, labels, 3, epochs=3)
    kept, held_out = hold_out(400)
    assert len(held_out) == 40 and sorted([*kept, *held_out]) == list(range(400))
    reached = [
        linear_heads.accuracies(
            linear.train_heads(found[kept], labels[kept], 3, [lr], [0.0], 3),
            found[held_out],
            labels[held_out],
        ).item()
        for lr in linear.LEARNING_RATES
    ]
    assert choice.held_out_accuracy == pytest.approx(max(reached)) and reached[
        linear.LEARNING_RATES.index(choice.lr)
    ] == max(reached)


def test_accuracy_chooses_and_cross_entropy_settles_a_tie():
    reached, losses = (
        torch.tensor([0.8, 0.9, 0.9, 0.9, 0.7]),
        torch.tensor([0.1, 0.5, 0.4, float("nan"), 0.0]),
    )
    assert linear_heads.best(reached, losses) == 2


def test_a_diverging_classifier_is_not_chosen():
    found, labels = blobs(300)
    found[:, 0] *= 1e30
    assert np.isfinite(linear.choose(found, labels, 3, epochs=2).held_out_accuracy)


def test_standardizing_uses_training_statistics_and_survives_a_constant_feature():
    found, _ = blobs(200)
    found[:, 2] = 7.0
    standardize = linear.Standardize.of(found)
    assert standardize(found)[:, [0, 1, 3, 4]].mean(dim=0).abs().max() < 1e-12
    torch.testing.assert_close(
        standardize(found)[:, [0, 1, 3, 4]].std(dim=0, correction=0), torch.ones(4).double()
    )
    assert torch.equal(standardize(found + 1)[:, 2], torch.zeros(200).double())


def test_few_labels_are_balanced_fixed_and_of_different_images():
    labels = np.repeat(np.arange(4), 25)
    drawn = few_labels.draws(labels, 5, list("abcd"))
    assert len(drawn) == 10 and all(
        np.bincount(labels[chosen]).tolist() == [5] * 4 for chosen in drawn
    )
    assert (
        all(len(set(chosen)) == 20 for chosen in drawn)
        and len({tuple(sorted(chosen)) for chosen in drawn}) == 10
    )
    assert all(
        np.array_equal(a, b) for a, b in zip(drawn, few_labels.draws(labels, 5, list("abcd")))
    )


def test_few_labels_refuses_more_than_there_are():
    with pytest.raises(ValueError) as error:
        few_labels.draws(np.array([0, 0, 0, 1]), 2, ["cat", "dog"])
    assert (
        str(error.value)
        == "labels-per-class: 2 is more than the 1 training images of class 'dog'; give fewer"
    )


@pytest.fixture(scope="module")
def results_and_permuted(tmp_path_factory):
    """The evaluation of one run, and the same with the test labels permuted."""
    run = runs.load_run(make_run(tmp_path_factory.mktemp("runs") / "made"), device="cpu")
    plain = linear.evaluate(run, epochs=4, labels_per_class=[1, 5])
    with pytest.MonkeyPatch.context() as patch:
        from ssl_pretrain.eval.frozen import features

        def permuted(backbone, part, offset=(0, 0)):
            found, labels = original(backbone, part, offset)
            return found, labels.roll(3) if len(part) == 500 else labels

        original = features.extract
        patch.setattr(features, "extract", permuted)
        return plain, linear.evaluate(run, epochs=4, labels_per_class=[1, 5])


def test_judges_digits_end_to_end(results_and_permuted):
    result, _ = results_and_permuted
    rows = {row["features"]: row for row in result["rows"]}
    assert list(rows["pretrained"]["metrics"]) == ["all labels", "1 per class", "5 per class"]
    assert (
        rows["raw pixels"]["metrics"]["all labels"] > 90
        and 45 < rows["raw pixels"]["metrics"]["1 per class"] < 75
    )
    assert (
        rows["raw pixels"]["spread"]["1 per class"]
        > rows["raw pixels"]["spread"]["5 per class"]
        > 0
    )
    assert rows["pretrained"]["notes"]["all labels"].startswith("learning rate ")
    assert (
        "C = 1.0" in result["protocol"]["few labels"]
        and "4 epochs" in result["protocol"]["classifier"]
    )


def test_the_test_labels_change_the_numbers_and_no_choice(results_and_permuted):
    (plain, permuted) = (
        {row["features"]: row for row in result["rows"]} for result in results_and_permuted
    )
    for name in ("random, as built", "random, recalibrated", "pretrained"):
        assert permuted[name]["metrics"]["all labels"] < plain[name]["metrics"]["all labels"] - 20
        assert permuted[name]["notes"] == plain[name]["notes"]
