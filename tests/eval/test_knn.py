"""eval.knn: faiss and torch give one number, on real digits end to end; what it cannot do it says in one line."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from made_run import make_run, write_images

from eval import knn, parts, results, runs
from eval.results import Row


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("runs") / "made")


def features_of(n, seed, dim=32, num_classes=10):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(num_classes, (n,), generator=generator)
    centres = torch.randn(num_classes, dim, generator=torch.Generator().manual_seed(0))
    return centres[labels] + 2 * torch.randn(n, dim, generator=generator), labels


@pytest.mark.parametrize("centred", [False, True])
def test_faiss_and_torch_predict_alike(centred):
    pytest.importorskip("faiss")
    (bank, labels), (queries, truth) = features_of(700, 1), features_of(300, 2)
    searches = [knn.Search(bank + 3, labels, 20, 0.07, 10, backend, centred) for backend in ("faiss", "torch")]
    by_faiss, by_torch = (search.predict(queries + 3) for search in searches)
    assert torch.equal(by_faiss, by_torch)
    assert searches[0].accuracy(queries + 3, truth) == searches[1].accuracy(queries + 3, truth) > 50


def test_centring_subtracts_the_training_mean_from_both_sides():
    (bank, labels), (queries, _) = features_of(200, 1), features_of(50, 2)
    mean = bank.mean(dim=0)
    centred = knn.Search(bank, labels, 5, 0.07, 10, "torch", centred=True)
    by_hand = knn.Search(bank - mean, labels, 5, 0.07, 10, "torch")
    assert torch.equal(centred.predict(queries), by_hand.predict(queries - mean))


def test_judges_digits_end_to_end(made):
    result = knn.evaluate(runs.load_run(made, device="cpu"))
    assert result == json.loads((made / "eval/knn.json").read_text())
    rows = {row["features"]: row["metrics"] for row in result["rows"]}
    assert list(rows) == ["raw pixels", "random, as built", "random, recalibrated", results.BETTER, "pretrained"]
    assert list(rows["raw pixels"]) == ["clean", "shifted 1", "shifted 2"]
    assert rows["raw pixels"]["clean"] > 95 and rows["raw pixels"]["shifted 2"] < rows["raw pixels"]["shifted 1"] < 70
    assert rows["pretrained"] != rows["random, as built"]  # other weights
    as_built, recalibrated = rows["random, as built"], rows["random, recalibrated"]
    assert rows[results.BETTER] == {column: max(as_built[column], recalibrated[column]) for column in as_built}
    assert (result["checkpoint"], result["step"], result["network"]) == ("step_00000007", 7, "student")
    protocol = result["protocol"]
    assert (protocol["k"], protocol["temperature"]) == (20, 0.07)
    assert protocol["images"] == "digits: 1297 training, 500 test images, 10 classes"
    assert protocol["shifts"].endswith("1 original = 2 evaluation pixels, 2 original = 4 evaluation pixels")


def test_queries_from_the_training_part_leave_the_bank(made):
    run = runs.load_run(made, device="cpu")
    train, held_out = parts.labelled_parts(run, "a test", "train")
    assert not set(train.numbers) & set(held_out.numbers) and len(train) + len(held_out) == 1297 and len(held_out) == 130
    result = knn.evaluate(run, shifts=[], split="train")
    assert result["protocol"]["images"] == "digits: 1167 training, 130 held-out training images, 10 classes"
    assert (made / "eval/knn_train.json").exists()


def test_k_must_fit_the_images(made):
    with pytest.raises(ValueError, match="k: 1298 neighbours cannot be found among 1297 training images"):
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


def test_a_missing_faiss_is_a_message_only_when_it_is_asked_for(monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    assert knn.choose("auto") == "torch"
    with pytest.raises(ValueError) as error:
        knn.choose("faiss")
    assert str(error.value) == "--backend faiss: it is not installed; pip install 'ssl_pretrain[faiss]', or take --backend torch"


def test_the_better_random_backbone_is_taken_column_by_column():
    rows = [Row("random, as built", {"a": 1.0, "b": 5.0}, {"b": 0.1}), Row("random, recalibrated", {"a": 2.0, "b": 4.0}, {"b": 0.2})]
    better = results.with_better_random(rows)[-1]
    assert (better.metrics, better.spread) == ({"a": 2.0, "b": 5.0}, {"b": 0.1})
    assert better.notes == {"a": "recalibrated", "b": "as built"}


def test_a_users_mistake_ends_in_one_line_and_exit_code_2(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["eval/knn.py", str(tmp_path / "none")])
    with pytest.raises(SystemExit) as ended:
        results.command(knn.main, "eval.knn")
    assert ended.value.code == 2
    assert capsys.readouterr() == ("", f"eval.knn: {tmp_path / 'none'}: there is no such run folder; give the `output` of a run's config\n")


def test_the_command_line_prints_protocol_and_table(made, capsys):
    knn.main([str(made), "--k", "5", "--shifts", "1", "--backend", "torch", "--device", "cpu", "evaluation.temperature=0.1"])
    printed = capsys.readouterr().out
    assert "  k: 5\n  temperature: 0.1\n  backend: torch\n" in printed
    assert "accuracy, %             clean  shifted 1\n" in printed and "\npretrained  " in printed
    assert printed.rstrip().endswith(f"kept in {made / 'eval/knn.json'}")


@pytest.mark.parametrize("offset", [(2, 0), (-2, 0), (0, 3), (0, -3), (1, -2)])
def test_a_shift_moves_every_pixel_and_lets_black_in(offset):
    images = torch.randint(1, 256, (2, 3, 8, 8), dtype=torch.uint8)
    moved = parts.shift(images, *offset)
    dx, dy = offset
    for y in range(8):
        for x in range(8):
            inside = 0 <= y - dy < 8 and 0 <= x - dx < 8
            expected = images[:, :, y - dy, x - dx] if inside else torch.zeros(2, 3, dtype=torch.uint8)
            assert torch.equal(moved[:, :, y, x], expected)
