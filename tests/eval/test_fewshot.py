"""Few-shot classification: the published arithmetic, the draws, and one table of data sets."""

import json

import numpy as np
import pytest
import torch
from untrained_run import load_in_float32, make_run, write_images

from ssl_pretrain.eval import fewshot
from ssl_pretrain.eval.frozen import few_labels, few_shot


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("runs") / "run", "data.subset=200")


def big_vision(x, y, x_test, num_classes):
    """The predictions of big_vision's `_precompute_cache` and `_eig_fewshot_acc_fn`.

    https://github.com/google-research/big_vision/blob/0127fb6b337ee2a27bf4e54dea79cff176527356/big_vision/evaluators/fewshot_lsr.py
    """
    mean, std = x.mean(axis=0, keepdims=True), x.std(axis=0, keepdims=True) + 1e-5
    x, x_test = (
        np.pad((values - mean) / std, ((0, 0), (0, 1)), constant_values=100.0)
        for values in (x, x_test)
    )
    y = 2.0 * np.eye(num_classes)[y] - 1.0
    if len(x) >= x.shape[1]:
        eigs, q = np.linalg.eigh(x.T @ x)
        rhs, lhs = q.T @ (x.T @ y), q
    else:
        eigs, q = np.linalg.eigh(x @ x.T)
        rhs, lhs = q.T @ y, x.T @ q
    w = (lhs * (1.0 / (eigs + 2.0**10)).reshape((1, -1))) @ rhs
    return np.argmax(x_test @ w, axis=1)


@pytest.mark.parametrize("num_images", [8, 90])  # fewer and more than numbers per feature
def test_least_squares_predict_like_big_vision(num_images):
    generator = np.random.default_rng(0)
    x, x_test = generator.normal(size=(num_images, 30)), generator.normal(size=(400, 30))
    y = generator.integers(0, 4, num_images)
    predictions = few_shot.least_squares(*map(torch.from_numpy, (x, y, x_test)), 4)
    assert predictions.tolist() == big_vision(x, y, x_test, 4).tolist()


@pytest.mark.parametrize("name", few_shot.CLASSIFIERS)
def test_separated_classes_are_told_apart_from_one_label_each(name):
    features, labels = 3 * torch.eye(4), torch.arange(4)
    test = (features + 0.1).repeat(2, 1)
    predictions = few_shot.CLASSIFIERS[name](features, labels, test, 4)
    assert predictions.tolist() == 2 * [0, 1, 2, 3]


def test_more_labels_contain_fewer_and_small_classes_give_all_images():
    labels = np.array([0, 1, 0, 0, 1, 0, 2, 1, 0, 1])
    draws = [few_labels.draw_per_class(labels, number, 3, seed=1) for number in (1, 2, 4)]
    assert [labels[rows].tolist() for rows in draws] == [
        [0, 1, 2],
        [0, 0, 1, 1, 2],
        [0, 0, 0, 0, 1, 1, 1, 1, 2],
    ]
    assert set(draws[0]) < set(draws[1]) < set(draws[2])
    other = few_labels.draw_per_class(labels, 2, 3, seed=2)
    assert sorted(other) != sorted(draws[1])


def test_one_table_has_all_data_sets_their_mean_and_the_baselines(run_folder, tmp_path, capsys):
    for split in ("train", "val"):
        names = [f"{split}/{label}/{number}.png" for label in "ab" for number in range(3)]
        write_images(tmp_path / "noise", names)
    arguments = ["--data", f"noise={tmp_path / 'noise'}", "digits=digits", "--shots", "1", "2"]
    fewshot.main([str(run_folder), "--device=cpu", *arguments])
    assert "digits, 1-shot" in capsys.readouterr().out
    result = json.loads((run_folder / "eval/fewshot.json").read_text())
    rows = {row["features"]: row for row in result["rows"]}
    assert {"raw pixels", "random (better of two)", "pretrained"} <= rows.keys()
    metrics, spread = rows["raw pixels"]["metrics"], rows["raw pixels"]["spread"]
    assert list(metrics) == [
        f"{name}, {shot}-shot" for name in ("noise", "digits") for shot in (1, 2)
    ] + ["mean, 1-shot", "mean, 2-shot"]
    assert metrics["mean, 2-shot"] == pytest.approx(
        (metrics["noise, 2-shot"] + metrics["digits, 2-shot"]) / 2
    )
    assert spread["mean, 2-shot"] == pytest.approx(
        np.hypot(spread["noise, 2-shot"], spread["digits, 2-shot"]) / 2
    )
    assert metrics["digits, 2-shot"] > 50  # chance is 10
    assert result["protocol"]["images of noise"].endswith("6 training, 6 test images, 2 classes")
    assert "big_vision at 0127fb6b" in result["protocol"]["classifier"]


def test_the_deviation_is_that_of_a_sample_and_one_draw_has_none(run_folder):
    run, column = load_in_float32(run_folder), "digits, 1-shot"
    outcomes = [
        fewshot.evaluate(run, [], [1], num_draws, "centroid", ["raw"]) for num_draws in (1, 2)
    ]
    (one,), (two,) = (outcome["rows"] for outcome in outcomes)
    assert one["spread"] == {}
    assert outcomes[0]["protocol"]["draws"].startswith("one fixed draw of the labeled images")
    # Half of the difference between the draws is their distance from the mean.
    half = abs(one["metrics"][column] - two["metrics"][column])
    assert two["spread"][column] == pytest.approx(half * 2**0.5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"classifier": "svm"},
            "classifier: 'svm' is not a classifier; give one of big_vision, logistic, centroid",
        ),
        ({"shots": []}, "shots: [] are not numbers of images; give at least one, each >= 1"),
        (
            {"shots": [5, 0]},
            "shots: [5, 0] are not numbers of images; give at least one, each >= 1",
        ),
        ({"num_draws": 0}, "num_draws: 0 is out of range; give a whole number >= 1"),
    ],
)
def test_a_wrong_argument_is_refused_before_any_image_is_embedded(
    run_folder, monkeypatch, arguments, message
):
    monkeypatch.setattr(fewshot, "labeled_splits", None)
    with pytest.raises(ValueError) as error:
        fewshot.evaluate(load_in_float32(run_folder), **arguments)
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (["/data/pets"], "--data /data/pets: is not NAME=ROOT; write it like pets=/data/pets"),
        (["a=x", "a=y"], "--data a=y: the name a is taken; give another one"),
    ],
)
def test_a_wrong_data_set_is_refused(run_folder, data, message):
    with pytest.raises(ValueError) as error:
        fewshot.evaluate(load_in_float32(run_folder), data)
    assert str(error.value) == message
