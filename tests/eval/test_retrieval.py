"""Retrieval's numbers by hand, pairs that are the same image, and both evaluations on a run."""

from __future__ import annotations

import csv
import shutil

import numpy as np
import pytest
import torch
from made_run import make_run, write_images
from PIL import Image

from ssl_pretrain.eval import corruptions, retrieval, robustness, runs
from ssl_pretrain.eval.frozen import evaluation_split
from ssl_pretrain.eval.retrieval import measures, near_duplicates


def test_average_precision_and_recall_by_hand():
    bank = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.5, 0.5], [0.0, 1.0]])
    labels, queries = torch.tensor([1, 0, 0, 1]), torch.tensor([[2.0, 0.0]])
    found = measures(bank, labels, queries, torch.tensor([0]))  # the ranking's labels: 1 0 0 1
    assert found == {
        "mAP": pytest.approx(100 * (1 / 2 + 2 / 3) / 2),
        "recall@1": 0.0,
        "recall@5": 100.0,
        "recall@10": 100.0,
    }
    both = measures(bank, labels, torch.cat([queries, queries]), torch.tensor([0, 1]))
    assert both["recall@1"] == 50 and both["mAP"] == pytest.approx(
        100 * ((1 / 2 + 2 / 3) / 2 + (1 + 2 / 4) / 2) / 2
    )
    assert measures(bank, labels, queries, torch.tensor([7])) == {
        "mAP": 0.0,
        "recall@1": 0.0,
        "recall@5": 0.0,
        "recall@10": 0.0,
    }


def test_chunks_change_nothing(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    bank, queries = (torch.randn(n, 5, generator=generator) for n in (40, 23))
    labels, truth = (torch.randint(3, (n,), generator=generator) for n in (40, 23))
    whole, pairs = measures(bank, labels, queries, truth), near_duplicates(bank, 0.9)
    monkeypatch.setattr(retrieval.weighted_knn, "MAX_SIMILARITIES", 40 * 3)
    assert (
        measures(bank, labels, queries, truth) == pytest.approx(whole)
        and near_duplicates(bank, 0.9)[1] == pairs[1]
    )


def test_near_duplicates_are_pairs_once_the_nearest_first(monkeypatch):
    vectors = torch.tensor([[1.0, 0.0], [0.0, 1.0], [2.0, 0.02], [3.0, 0.0]])
    pairs, total = near_duplicates(vectors, 0.999)
    assert (
        [(a, b) for _, a, b in pairs] == [(0, 3), (0, 2), (2, 3)]
        and total == 3
        and pairs[0][0] == 1.0
    )
    monkeypatch.setattr(retrieval, "MOST_PAIRS", 1)
    assert [(a, b) for _, a, b in near_duplicates(vectors, 0.999)[0]] == [
        (0, 3)
    ] and near_duplicates(vectors, 0.999)[1] == 3


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Twelve training and six test images of two classes; one test image is a training image again."""
    folder = tmp_path_factory.mktemp("retrieval")
    names = [
        f"{part}/{kind}/{number}.png"
        for part, count in (("train", 6), ("val", 3))
        for kind in "ab"
        for number in range(count)
    ]
    root = write_images(folder / "data", names, size=16)
    shutil.copy(root / "train/a/2.png", root / "val/b/1.png")
    return make_run(
        folder / "run", "data.source=folder", f"data.root={root}", "evaluation.k=3"
    ), root


def test_a_copied_image_is_listed_with_both_files(made):
    path, _ = made
    result = retrieval.evaluate(runs.load_run(path, device="cpu"), duplicates=1.0)
    with (path / "eval" / "near_duplicates.csv").open(newline="") as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["cosine", "a", "b"] and rows[1][0] == "1.0000"
    assert rows[1][1].endswith("train/a/2.png") and rows[1][2].endswith("val/b/1.png")
    assert [row["features"] for row in result["rows"]][-1] == "pretrained" and (
        path / "eval/step_00000007/retrieval.json"
    ).exists()
    with pytest.raises(
        ValueError, match=r"--duplicates: 1.5 is not a cosine in \(0, 1\]; 0.995 is usual"
    ):
        retrieval.evaluate(runs.load_run(path, device="cpu"), duplicates=1.5)


def test_accuracy_is_of_the_corrupted_views(made):
    path, _ = made
    run = runs.load_run(path, device="cpu")
    result = robustness.evaluate(run, ["contrast", "pixelate"])
    rows = {row["features"]: row["metrics"] for row in result["rows"]}
    assert list(rows) == ["clean", "contrast", "pixelate", "pretrained"] and list(
        rows["contrast"]
    ) == ["mean", "1", "2", "3", "4", "5"]
    assert rows["pretrained"]["5"] == pytest.approx(
        (rows["contrast"]["5"] + rows["pixelate"]["5"]) / 2
    )
    _, test = evaluation_split.labelled_parts(run, "a test")
    (images, _), *_ = test.batches()
    corrupted = np.stack(
        [
            corruptions.apply("contrast", image, 5, number)
            for number, image in enumerate(images.permute(0, 2, 3, 1).numpy())
        ]
    )
    again = torch.from_numpy(corrupted).permute(0, 3, 1, 2)
    expected = run.backbone(robustness.features.normalize(run, again)).float()
    torch.testing.assert_close(robustness.extract(run, test, "contrast", 5)[0], expected)
    with pytest.raises(
        ValueError, match="--corruptions: 'frost' is none; choose among: gaussian_noise"
    ):
        robustness.evaluate(run, ["frost"])


def test_images_without_labels_are_refused(made, tmp_path):
    path, _ = made
    for name in ("x.png", "y.png"):
        Image.new("RGB", (16, 16)).save(tmp_path / name)
    run = runs.load_run(path, overrides=[f"data.root={tmp_path}"], device="cpu")
    for evaluation in (retrieval, robustness):
        with pytest.raises(ValueError, match="needs labels"):
            evaluation.evaluate(run)
