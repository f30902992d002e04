"""eval.knn: faiss and torch give one number, on real digits end to end; what it cannot do it says in one line."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
import torch
from conftest import run_ranks
from made_run import make_run, write_images
from torch.nn import functional as F

from ssl_pretrain.eval import knn, results, runs
from ssl_pretrain.eval.frozen import evaluation_split
from ssl_pretrain.eval.results import Row


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("runs") / "made")


VOTES = [(k, temperature) for k in (10, 20, 100, 200) for temperature in (0.07, 0.1)]


def features_of(n, seed, dim=32, num_classes=10):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(num_classes, (n,), generator=generator)
    centres = torch.randn(num_classes, dim, generator=torch.Generator().manual_seed(0))
    return centres[labels] + 2 * torch.randn(n, dim, generator=generator), labels


def test_the_neighbours_are_scikit_learns():
    from sklearn.neighbors import NearestNeighbors

    bank, queries = (
        features_of(n, seed)[0].double() for n, seed in ((2000, 1), (500, 2))
    )  # in float32 rounding orders near ties
    names = torch.arange(
        len(bank)
    )  # each training image a class of its own, so that labels are places
    found = [
        neighbours
        for _, neighbours in knn.Search(bank, names, len(bank), "torch").neighbours(queries, 200)
    ]
    exact = NearestNeighbors(n_neighbors=200, algorithm="brute", metric="cosine").fit(bank.numpy())
    assert np.array_equal(
        torch.cat(found).numpy(), exact.kneighbors(queries.numpy(), return_distance=False)
    )


@pytest.mark.parametrize("vote", VOTES)
def test_the_predictions_are_lightlys(vote):
    knn_predict = pytest.importorskip("lightly.utils.benchmarking").knn_predict
    (bank, labels), (queries, _) = features_of(2000, 1), features_of(500, 2)
    k, temperature = vote
    theirs = knn_predict(
        F.normalize(queries, dim=1),
        F.normalize(bank, dim=1).T,
        labels,
        10,
        knn_k=k,
        knn_t=temperature,
    )[:, 0]
    assert torch.equal(
        knn.Search(bank, labels, 10, "torch").predict(queries, VOTES)[VOTES.index(vote)], theirs
    )


def test_every_tile_of_the_bank_is_searched(monkeypatch):
    (bank, labels), (queries, _) = features_of(700, 1), features_of(90, 2)
    whole = knn.Search(bank, labels, 10, "torch").predict(queries, VOTES)
    monkeypatch.setattr(knn, "TILE", 64)
    monkeypatch.setattr(knn, "QUERIES", 7)
    assert all(
        torch.equal(a, b)
        for a, b in zip(knn.Search(bank, labels, 10, "torch").predict(queries, VOTES), whole)
    )


def judged_digits(path):
    """What one rank finds: raw pixels, which are centred over all ranks, and the backbone."""
    run = runs.load_run(path, device="cpu")
    return knn.evaluate(run, shifts=[], backend="torch", rows=["raw", "pretrained"])[
        "rows"
    ], results.load(run.path)[1]["rows"]


@pytest.mark.parametrize(
    "world_size", [2, 3]
)  # of 3 ranks one has none of the two batches of test images
def test_ranks_find_what_one_process_finds(made, world_size):
    alone = judged_digits(made)
    assert len(alone[1][0]["metrics"]) == len(VOTES)
    assert run_ranks(judged_digits, made, world_size=world_size) == [alone] * world_size


@pytest.mark.parametrize("centred", [False, True])
def test_faiss_and_torch_predict_alike(centred):
    pytest.importorskip("faiss")
    (bank, labels), (queries, truth) = features_of(700, 1), features_of(300, 2)
    searches = [
        knn.Search(bank + 3, labels, 10, backend, centred) for backend in ("faiss", "torch")
    ]
    by_faiss, by_torch = (search.predict(queries + 3, VOTES) for search in searches)
    assert all(torch.equal(a, b) for a, b in zip(by_faiss, by_torch))
    by_faiss, by_torch = (search.accuracies(queries + 3, truth, VOTES) for search in searches)
    assert by_faiss == by_torch and min(by_torch) > 50 and len(set(by_torch)) > 1


def test_centring_subtracts_the_training_mean_from_both_sides():
    (bank, labels), (queries, _) = features_of(200, 1), features_of(50, 2)
    mean = bank.mean(dim=0)
    centred = knn.Search(bank, labels, 10, "torch", centred=True)
    by_hand = knn.Search(bank - mean, labels, 10, "torch")
    assert torch.equal(
        centred.predict(queries, [(5, 0.07)])[0], by_hand.predict(queries - mean, [(5, 0.07)])[0]
    )


def test_judges_digits_end_to_end(made):
    result = knn.evaluate(runs.load_run(made, device="cpu"))
    assert result == json.loads((made / "eval/knn.json").read_text())
    rows = {row["features"]: row["metrics"] for row in result["rows"]}
    assert list(rows) == [
        "raw pixels",
        "random, as built",
        "random, recalibrated",
        results.BETTER,
        "pretrained",
    ]
    assert list(rows["raw pixels"]) == ["clean", "shifted 1", "shifted 2"]
    assert (
        rows["raw pixels"]["clean"] > 95
        and rows["raw pixels"]["shifted 2"] < rows["raw pixels"]["shifted 1"] < 70
    )
    assert rows["pretrained"] != rows["random, as built"]  # other weights
    as_built, recalibrated = rows["random, as built"], rows["random, recalibrated"]
    assert rows[results.BETTER] == {
        column: max(as_built[column], recalibrated[column]) for column in as_built
    }
    assert (result["checkpoint"], result["step"], result["network"]) == (
        "step_00000007",
        7,
        "student",
    )
    protocol = result["protocol"]
    assert (protocol["k"], protocol["temperature"]) == (20, 0.07)
    assert protocol["images"] == "digits: 1297 training, 500 test images, 10 classes"
    assert protocol["shifts"].endswith(
        "1 original = 2 evaluation pixels, 2 original = 4 evaluation pixels"
    )


def test_queries_from_the_training_part_leave_the_bank(made):
    run = runs.load_run(made, device="cpu")
    train, held_out = evaluation_split.labelled_parts(run, "a test", "train")
    assert (
        not set(train.numbers) & set(held_out.numbers)
        and len(train) + len(held_out) == 1297
        and len(held_out) == 130
    )
    result = knn.evaluate(run, shifts=[], split="train")
    assert (
        result["protocol"]["images"]
        == "digits: 1167 training, 130 held-out training images, 10 classes"
    )
    assert (made / "eval/knn_train.json").exists()


def test_k_must_fit_the_images(made):
    with pytest.raises(
        ValueError, match="k: 1298 neighbors cannot be found among 1297 training images"
    ):
        knn.evaluate(runs.load_run(made, device="cpu"), k=1298)


def test_unlabelled_images_are_refused_with_the_remedy(tmp_path):
    root = write_images(tmp_path / "photos", [f"{number}.png" for number in range(12)])
    made = make_run(tmp_path / "run", "data.source=folder", f"data.root={root}")
    with pytest.raises(ValueError) as error:
        knn.evaluate(runs.load_run(made, device="cpu"))
    assert str(error.value) == (
        f"data.root: k-NN needs labels, and {root} has no labelled images;"
        " put the images in one folder per class (<class>/<file>), or list them in a CSV as path,label"
    )


def test_what_cannot_fit_is_refused_before_it_starts(made, monkeypatch):
    monkeypatch.setattr(knn.memory, "available", lambda device: 200 * 2**20)
    with pytest.raises(ValueError) as error:
        knn.evaluate(runs.load_run(made, device="cpu"))
    assert str(error.value) == (
        "k-NN of 1,297 training and 500 test images of 768 numbers holds 0.20 GiB, more than 85% of the 0.20 GiB free. Spread it over"
        " more ranks (torchrun --nproc-per-node N -m ssl_pretrain.eval.knn ...), or take fewer images (data.subset=N); --rows pretrained leaves out"
        " raw pixels, the widest"
    )


def test_the_estimate_is_of_one_ranks_share():
    one = knn.estimate(50_000, 10_000, 2048, 10, 0)
    assert one == 2 * (50_000 + 10_000) * 2048 * 4 + 3 * 2**26 + 10 * 1024 * 4 < 2**31


def folder_run(tmp_path, train, val, *overrides):
    root = write_images(
        tmp_path / "photos", [f"train/{name}" for name in train] + [f"val/{name}" for name in val]
    )
    return runs.load_run(
        make_run(tmp_path / "run", "data.source=folder", f"data.root={root}", *overrides),
        device="cpu",
    ), root


def test_one_class_alone_is_refused(tmp_path):
    run, root = folder_run(tmp_path, [], ["a/0.png"])
    (root / "train.csv").write_text(
        "path,label\n" + "".join(f"val/a/{n}.png,cat\n" for n in range(1))
    )
    run.config.data.train = "train.csv"
    with pytest.raises(ValueError) as error:
        knn.evaluate(run)
    assert str(error.value) == (
        f"data.root: k-NN needs two classes or more, and {root / 'train.csv'} has 1 (cat): every answer would be right;"
        " put the images in one folder per class"
    )


def test_a_class_never_trained_on_is_refused(tmp_path):
    run, root = folder_run(tmp_path, ["a/0.png", "b/1.png"], ["a/0.png", "b/1.png", "c/2.png"])
    with pytest.raises(ValueError) as error:
        knn.evaluate(run)
    assert (
        str(error.value)
        == f"data.val: {root / 'val'} has the class 'c', which the training split has not; it has a, b"
    )


def test_lists_of_classes_that_disagree_are_refused(tmp_path):
    run, root = folder_run(tmp_path, ["a/0.png", "b/1.png"], ["a/0.png", "b/1.png"])
    train, val = (evaluation_split.labelled(run, split, "a test") for split in ("train", "val"))
    val.classes = ["a", "c", "d", "e", "f"]
    with pytest.raises(ValueError) as error:
        evaluation_split._check_classes(train, val)
    assert str(error.value) == (
        f"data.val: {root / 'val'} has 5 classes and {root / 'train'} 2: 4 were never trained on (c, d, e, ...); give parts of one data set"
    )
    val.classes = ["b", "a"]
    with pytest.raises(ValueError, match="numbers its 2 classes otherwise than"):
        evaluation_split._check_classes(train, val)


def test_an_empty_test_set_is_refused(tmp_path):
    run, root = folder_run(tmp_path, ["a/0.png", "b/1.png"], [])
    (root / "val").mkdir()
    with pytest.raises(ValueError) as error:
        knn.evaluate(run)
    assert (
        str(error.value)
        == f"data.root: {root / 'val'} holds no image that Pillow decodes, at any depth"
    )


def test_a_missing_faiss_is_a_message_only_when_it_is_asked_for(monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    assert knn.choose("auto") == "torch"
    with pytest.raises(ValueError) as error:
        knn.choose("faiss")
    assert (
        str(error.value)
        == "--backend faiss: it is not installed; pip install 'ssl_pretrain[faiss]', or take --backend torch"
    )


def test_the_better_random_backbone_is_taken_column_by_column():
    rows = [
        Row("random, as built", {"a": 1.0, "b": 5.0}, {"b": 0.1}),
        Row("random, recalibrated", {"a": 2.0, "b": 4.0}, {"b": 0.2}),
    ]
    better = results.with_better_random(rows)[-1]
    assert (better.metrics, better.spread) == ({"a": 2.0, "b": 5.0}, {"b": 0.1})
    assert better.notes == {"a": "recalibrated", "b": "as built"}


def test_a_users_mistake_ends_in_one_line_and_exit_code_2(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["eval/knn.py", str(tmp_path / "none")])
    with pytest.raises(SystemExit) as ended:
        results.command(knn.main, "eval.knn")
    assert ended.value.code == 2
    assert capsys.readouterr() == (
        "",
        f"eval.knn: {tmp_path / 'none'}: there is no such run folder; give the `output` of a run's config\n",
    )


def test_the_command_line_prints_protocol_and_table(made, capsys):
    knn.main(
        [
            str(made),
            "--k",
            "5",
            "--shifts",
            "1",
            "--backend",
            "torch",
            "--device",
            "cpu",
            "evaluation.temperature=0.1",
        ]
    )
    printed = capsys.readouterr().out
    assert "  k: 5\n  temperature: 0.1\n  backend: torch\n" in printed
    assert "accuracy, %             clean  shifted 1\n" in printed and "\npretrained  " in printed
    assert printed.rstrip().endswith(f"kept in {made / 'eval/knn.json'}")


@pytest.mark.parametrize("offset", [(2, 0), (-2, 0), (0, 3), (0, -3), (1, -2)])
def test_a_shift_moves_every_pixel_and_lets_black_in(offset):
    images = torch.randint(1, 256, (2, 3, 8, 8), dtype=torch.uint8)
    moved = evaluation_split.shift(images, *offset)
    dx, dy = offset
    for y in range(8):
        for x in range(8):
            inside = 0 <= y - dy < 8 and 0 <= x - dx < 8
            expected = (
                images[:, :, y - dy, x - dx] if inside else torch.zeros(2, 3, dtype=torch.uint8)
            )
            assert torch.equal(moved[:, :, y, x], expected)
