"""eval.retrieval and eval.robustness: hand-computed metrics, near-duplicates, and both on a run."""

import csv
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from untrained_run import load_in_float32, make_run, write_images

from ssl_pretrain.eval import corruptions, retrieval, robustness, runs
from ssl_pretrain.eval.frozen import evaluation_split, features
from ssl_pretrain.eval.retrieval import find_near_duplicates, retrieval_metrics


def test_average_precision_and_recall_equal_those_computed_by_hand():
    bank = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.5, 0.5], [0.0, 1.0]])
    bank_labels, queries = torch.tensor([1, 0, 0, 1]), torch.tensor([[2.0, 0.0]])

    def compute_metrics(*labels):
        repeated_queries = queries.expand(len(labels), -1)
        return retrieval_metrics(bank, bank_labels, repeated_queries, torch.tensor(labels))

    # The ranking has the labels 1 0 0 1.
    assert compute_metrics(0) == {
        "mAP": pytest.approx(100 * (1 / 2 + 2 / 3) / 2),
        "recall@1": 0.0,
        "recall@5": 100.0,
        "recall@10": 100.0,
    }
    means = compute_metrics(0, 1)
    assert means["recall@1"] == 50
    mean_average_precision = ((1 / 2 + 2 / 3) / 2 + (1 + 2 / 4) / 2) / 2
    assert means["mAP"] == pytest.approx(100 * mean_average_precision)
    assert set(compute_metrics(7).values()) == {0.0}  # the bank has no image of class 7


def test_results_do_not_depend_on_the_chunk_size(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    bank, queries = (torch.randn(n, 5, generator=generator) for n in (40, 23))
    bank_labels, labels = (torch.randint(3, (n,), generator=generator) for n in (40, 23))
    metrics = retrieval_metrics(bank, bank_labels, queries, labels)
    _, num_pairs = find_near_duplicates(bank, 0.9)
    monkeypatch.setattr(retrieval.weighted_knn, "MAX_SIMILARITIES", 40 * 3)
    assert retrieval_metrics(bank, bank_labels, queries, labels) == pytest.approx(metrics)
    assert find_near_duplicates(bank, 0.9)[1] == num_pairs


def test_near_duplicates_are_listed_once_and_nearest_first(monkeypatch):
    vectors = torch.tensor([[1.0, 0.0], [0.0, 1.0], [2.0, 0.02], [3.0, 0.0]])
    pairs, num_pairs = find_near_duplicates(vectors, 0.999)
    assert [(a, b) for _, a, b in pairs] == [(0, 3), (0, 2), (2, 3)]
    assert num_pairs == 3
    assert pairs[0][0] == 1.0
    monkeypatch.setattr(retrieval, "MAX_PAIRS", 1)
    pairs, num_pairs = find_near_duplicates(vectors, 0.999)
    assert [(a, b) for _, a, b in pairs] == [(0, 3)]
    assert num_pairs == 3


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """Write a run with 12 training and 6 test images of 2 classes. One is in both splits."""
    folder = tmp_path_factory.mktemp("retrieval")
    names = [
        f"{split}/{label}/{number}.png"
        for split, count in (("train", 6), ("val", 3))
        for label in "ab"
        for number in range(count)
    ]
    root = write_images(folder / "data", names, size=16)
    shutil.copy(root / "train/a/2.png", root / "val/b/1.png")
    return make_run(folder / "run", "data.source=folder", f"data.root={root}", "evaluation.k=3")


def test_a_copied_image_is_listed_with_both_files(run_folder):
    result = retrieval.evaluate(runs.load_run(run_folder, device="cpu"), min_cosine=1.0)
    with (run_folder / "eval" / "near_duplicates.csv").open(newline="") as file:
        header, first_row, *_ = csv.reader(file)
    assert header == ["cosine", "a", "b"]
    assert first_row[0] == "1.0000"
    assert first_row[1].endswith("train/a/2.png")
    assert first_row[2].endswith("val/b/1.png")
    assert result["rows"][-1]["features"] == "pretrained"
    assert (run_folder / "eval/step_00000007/retrieval.json").exists()


def test_a_threshold_above_one_is_refused(run_folder):
    message = r"--duplicates: 1.5 is not in \(0, 1\]; give one such as 0.995"
    with pytest.raises(ValueError, match=message):
        retrieval.evaluate(runs.load_run(run_folder, device="cpu"), min_cosine=1.5)


def test_accuracy_is_measured_on_the_corrupted_views(run_folder):
    run = load_in_float32(run_folder)
    result = robustness.evaluate(run, ["contrast", "pixelate"])
    rows = {row["features"]: row["metrics"] for row in result["rows"]}
    assert list(rows) == ["clean", "contrast", "pixelate", "pretrained"]
    assert list(rows["contrast"]) == ["mean", "1", "2", "3", "4", "5"]
    mean = (rows["contrast"]["5"] + rows["pixelate"]["5"]) / 2
    assert rows["pretrained"]["5"] == pytest.approx(mean)
    _, test = evaluation_split.labeled_splits(run, "a test")
    (images, _), *_ = test.batches()
    corrupted_images = [
        corruptions.apply("contrast", image, 5, number)
        for number, image in enumerate(images.permute(0, 2, 3, 1).numpy())
    ]
    views = torch.from_numpy(np.stack(corrupted_images)).permute(0, 3, 1, 2)
    expected = run.backbone(features.normalize(run, views)).float()
    actual, _ = robustness.extract_corrupted_features(run, test, "contrast", 5)
    torch.testing.assert_close(actual, expected)


def test_an_unknown_corruption_is_refused(run_folder):
    message = "--corruptions: 'frost' is unknown; choose among: gaussian_noise"
    with pytest.raises(ValueError, match=message):
        robustness.evaluate(runs.load_run(run_folder, device="cpu"), ["frost"])


@pytest.mark.parametrize(
    "evaluate", [retrieval.evaluate, lambda run: robustness.evaluate(run, ["fog"])]
)
def test_images_without_labels_are_refused(run_folder, evaluate, tmp_path):
    for name in ("x.png", "y.png"):
        Image.new("RGB", (16, 16)).save(tmp_path / name)
    run = runs.load_run(run_folder, overrides=[f"data.root={tmp_path}"], device="cpu")
    with pytest.raises(ValueError, match="needs labels"):
        evaluate(run)
