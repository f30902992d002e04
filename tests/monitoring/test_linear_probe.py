"""The linear classifier that monitors a run."""

import torch
from clusters import clusters
from sklearn.linear_model import LogisticRegression

from ssl_pretrain.monitoring import linear_probe


def test_predictions_equal_those_of_scikit_learn():
    (train, labels), (test, truth) = clusters(300, seed=3), clusters(200, seed=4)
    ours = linear_probe.predict(train, labels, test, 4)
    mean, scale = train.mean(0), train.std(0, correction=0) * 6**0.5
    reference = LogisticRegression(C=1 / (linear_probe.WEIGHT_DECAY * 300), max_iter=1000)
    reference.fit(((train - mean) / scale).numpy(), labels.numpy())
    theirs = torch.from_numpy(reference.predict(((test - mean) / scale).numpy()))
    assert (ours == theirs).double().mean() > 0.99
    accuracy = (ours == truth).double().mean()
    assert 0.5 < accuracy < 1  # chance is 0.25, and the classes overlap


def test_predictions_do_not_depend_on_the_scale_of_the_features():
    (train, labels), (test, _) = clusters(300, seed=3), clusters(200, seed=4)
    expected = linear_probe.predict(train, labels, test, 4)
    scaled = linear_probe.predict(100 * train + 7, labels, 100 * test + 7, 4)
    assert torch.equal(scaled, expected)


def test_predicting_computes_no_gradient_and_leaves_the_random_state_alone():
    features, labels = clusters(60)
    features.requires_grad_()
    before = torch.get_rng_state()
    linear_probe.predict(features, labels, features, 4)
    assert features.grad is None and torch.equal(torch.get_rng_state(), before)
