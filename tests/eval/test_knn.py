"""eval.knn: faiss and torch give the same accuracy, and unusable input is refused in one line."""

import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import run_ranks
from sklearn.neighbors import NearestNeighbors
from suites import quick_and_full
from torch.nn import functional as F
from untrained_run import make_run, write_images

from ssl_pretrain.eval import command_line, knn, results, runs
from ssl_pretrain.eval.frozen import evaluation_split, features, knn_search
from ssl_pretrain.eval.frozen.knn_search import KnnClassifier
from ssl_pretrain.eval.results import Row

VOTE_SETTINGS = [(k, temperature) for k in (10, 20, 100, 200) for temperature in (0.07, 0.1)]


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("runs") / "run")


def draw_clusters(num_images, seed, dim=32, num_classes=10):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(num_classes, (num_images,), generator=generator)
    centers = torch.randn(num_classes, dim, generator=torch.Generator().manual_seed(0))
    return centers[labels] + 2 * torch.randn(num_images, dim, generator=generator), labels


def test_the_neighbors_are_those_of_scikit_learn():
    # In float64, because rounding in float32 changes the order of near ties.
    bank, queries = draw_clusters(2000, 1)[0].double(), draw_clusters(500, 2)[0].double()
    rows = torch.arange(len(bank))  # used as labels, so that the search returns rows of the bank
    classifier = KnnClassifier(bank, rows, len(bank), "torch")
    neighbors = torch.cat([labels for _, labels in classifier.neighbors(queries, 200)])
    reference = NearestNeighbors(n_neighbors=200, algorithm="brute", metric="cosine").fit(
        bank.numpy()
    )
    expected = reference.kneighbors(queries.numpy(), return_distance=False)
    np.testing.assert_array_equal(neighbors.numpy(), expected)


@pytest.mark.parametrize(("k", "temperature"), VOTE_SETTINGS)
def test_the_predictions_are_those_of_lightly(k, temperature):
    knn_predict = pytest.importorskip("lightly.utils.benchmarking").knn_predict
    (bank, labels), (queries, _) = draw_clusters(2000, 1), draw_clusters(500, 2)
    unit_queries, unit_bank = F.normalize(queries, dim=1), F.normalize(bank, dim=1)
    theirs = knn_predict(unit_queries, unit_bank.T, labels, 10, knn_k=k, knn_t=temperature)[:, 0]
    predictions = KnnClassifier(bank, labels, 10, "torch").predict(queries, VOTE_SETTINGS)
    ours = predictions[VOTE_SETTINGS.index((k, temperature))]
    assert torch.equal(ours, theirs)


def test_every_tile_of_the_bank_is_searched(monkeypatch):
    (bank, labels), (queries, _) = draw_clusters(700, 1), draw_clusters(90, 2)
    expected = KnnClassifier(bank, labels, 10, "torch").predict(queries, VOTE_SETTINGS)
    monkeypatch.setattr(knn_search, "BANK_TILE_SIZE", 64)
    monkeypatch.setattr(knn_search, "QUERY_BATCH_SIZE", 7)
    predictions = KnnClassifier(bank, labels, 10, "torch").predict(queries, VOTE_SETTINGS)
    assert all(torch.equal(a, b) for a, b in zip(predictions, expected))


def evaluate_digits(path):
    """Evaluate the backbone and the raw pixels, which are centered over all ranks, on this rank."""
    run = runs.load_run(path, device="cpu")
    result = knn.evaluate(run, shift_distances=[], backend="torch", rows=["raw", "pretrained"])
    return result["rows"], results.load_newest(run.path)[1]["rows"]


# There are two batches of test images, so one of 3 ranks has none.
@pytest.mark.parametrize("world_size", quick_and_full([3], [2, 3]))
def test_ranks_agree_with_one_process(run_folder, world_size):
    expected = evaluate_digits(run_folder)
    assert len(expected[1][0]["metrics"]) == len(VOTE_SETTINGS)
    assert run_ranks(evaluate_digits, run_folder, world_size=world_size) == [expected] * world_size


@pytest.mark.parametrize("centered", [False, True])
def test_faiss_and_torch_agree(centered):
    pytest.importorskip("faiss")
    (bank, labels), (queries, truth) = draw_clusters(700, 1), draw_clusters(300, 2)
    faiss, torch_ = (
        KnnClassifier(bank + 3, labels, 10, backend, centered) for backend in ("faiss", "torch")
    )
    predictions = [classifier.predict(queries + 3, VOTE_SETTINGS) for classifier in (faiss, torch_)]
    assert all(torch.equal(a, b) for a, b in zip(*predictions))
    accuracies = torch_.accuracies(queries + 3, truth, VOTE_SETTINGS)
    assert faiss.accuracies(queries + 3, truth, VOTE_SETTINGS) == accuracies
    assert min(accuracies) > 50
    assert len(set(accuracies)) > 1


def test_faiss_searches_the_bank_on_a_cpu_without_a_copy(monkeypatch):
    faiss = pytest.importorskip("faiss")
    addresses, search = [], faiss.knn

    def record(queries, bank, *arguments, **options):
        addresses.append(bank.ctypes.data)
        return search(queries, bank, *arguments, **options)

    monkeypatch.setattr(faiss, "knn", record)
    monkeypatch.setattr(knn_search, "QUERY_BATCH_SIZE", 100)
    (bank, labels), (queries, _) = draw_clusters(700, 1), draw_clusters(300, 2)
    classifier = KnnClassifier(bank, labels, 10, "faiss")
    classifier.predict(queries, VOTE_SETTINGS)
    assert addresses == [classifier.bank.data_ptr()] * 3


class TensorOnGpu(torch.Tensor):
    """CPU tensor that claims to be on a GPU."""

    is_cuda = True


def test_faiss_reads_the_bank_where_it_is_on_a_gpu(monkeypatch):
    """A stand-in for faiss on a GPU shows that the bank is neither downloaded nor uploaded."""
    banks, resources = [], []

    def search(resource, queries, bank, k, metric, device):
        assert resource is resources[0] and (metric, device) == ("inner product", 0)
        banks.append(bank)
        return (queries @ bank.T).topk(k, dim=1)

    def create_resources():
        resources.append(object())
        return resources[-1]

    faiss = SimpleNamespace(
        METRIC_INNER_PRODUCT="inner product",
        StandardGpuResources=create_resources,
        get_num_gpus=lambda: 1,
        knn_gpu=search,
    )
    monkeypatch.setitem(sys.modules, "faiss", faiss)
    monkeypatch.setitem(sys.modules, "faiss.contrib", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "faiss.contrib.torch_utils", SimpleNamespace())
    monkeypatch.setattr(knn_search, "QUERY_BATCH_SIZE", 100)
    (bank, labels), (queries, _) = draw_clusters(700, 1), draw_clusters(300, 2)
    classifier = KnnClassifier(bank.as_subclass(TensorOnGpu), labels, 10, "faiss")
    predictions = classifier.predict(queries, VOTE_SETTINGS)
    assert len(resources) == 1 and len(banks) == 3
    assert {tensor.data_ptr() for tensor in banks} == {classifier.bank.data_ptr()}
    expected = KnnClassifier(bank, labels, 10, "torch").predict(queries, VOTE_SETTINGS)
    assert all(torch.equal(a, b) for a, b in zip(predictions, expected))


def test_centering_subtracts_the_training_mean_from_bank_and_queries():
    (bank, labels), (queries, _) = draw_clusters(200, 1), draw_clusters(50, 2)
    mean = bank.mean(dim=0)
    centered = KnnClassifier(bank, labels, 10, "torch", subtract_mean=True).predict(
        queries, [(5, 0.07)]
    )[0]
    expected = KnnClassifier(bank - mean, labels, 10, "torch").predict(queries - mean, [(5, 0.07)])[
        0
    ]
    assert torch.equal(centered, expected)


def test_the_saved_result_for_digits_has_every_row_and_the_protocol(run_folder):
    result = knn.evaluate(runs.load_run(run_folder, device="cpu"))
    assert result == json.loads((run_folder / "eval/knn.json").read_text())
    rows = {row["features"]: row["metrics"] for row in result["rows"]}
    random_rows = ["random, as built", "random, recalibrated", results.BETTER_RANDOM]
    assert list(rows) == ["raw pixels", *random_rows, "pretrained"]
    pixels = rows["raw pixels"]
    assert list(pixels) == ["clean", "shifted 1", "shifted 2"]
    assert pixels["clean"] > 95
    assert pixels["shifted 2"] < pixels["shifted 1"] < 70
    as_built, recalibrated, better = (rows[name] for name in random_rows)
    assert rows["pretrained"] != as_built
    assert better == {column: max(as_built[column], recalibrated[column]) for column in as_built}
    source = result["checkpoint"], result["step"], result["network"]
    assert source == ("step_00000007", 7, "student")
    protocol = result["protocol"]
    assert (protocol["k"], protocol["temperature"]) == (20, 0.07)
    assert protocol["images"] == "digits: 1297 training, 500 test images, 10 classes"
    assert protocol["shifts"].endswith(
        "1 original = 2 evaluation pixels, 2 original = 4 evaluation pixels"
    )


def test_queries_from_the_training_images_are_not_in_the_bank(run_folder):
    run = runs.load_run(run_folder, device="cpu")
    train, held_out = evaluation_split.labeled_splits(run, "a test", "train")
    assert not set(train.indices) & set(held_out.indices)
    assert (len(train), len(held_out)) == (1167, 130)
    result = knn.evaluate(run, shift_distances=[], query_split="train")
    assert result["protocol"]["images"] == (
        "digits: 1167 training, 130 held-out training images, 10 classes"
    )
    assert (run_folder / "eval/knn_train.json").exists()


def test_more_neighbors_than_training_images_are_refused(run_folder):
    message = "k: 1298 neighbors cannot be found among 1297 training images"
    with pytest.raises(ValueError, match=message):
        knn.evaluate(runs.load_run(run_folder, device="cpu"), k=1298)


def test_unlabeled_images_are_refused_with_a_remedy(tmp_path):
    root = write_images(tmp_path / "photos", [f"{number}.png" for number in range(12)])
    folder = make_run(tmp_path / "run", "data.source=folder", f"data.root={root}")
    with pytest.raises(ValueError) as error:
        knn.evaluate(runs.load_run(folder, device="cpu"))
    assert str(error.value) == (
        f"data.root: k-NN needs labels, and {root} has no labeled images;"
        " put the images in one folder per class (<class>/<file>), or list them in a CSV as"
        " path,label"
    )


def test_a_search_that_exceeds_the_memory_is_refused_before_it_starts(run_folder, monkeypatch):
    monkeypatch.setattr(knn.memory, "available_bytes", lambda device: 200 * 2**20)
    with pytest.raises(ValueError) as error:
        knn.evaluate(runs.load_run(run_folder, device="cpu"))
    assert str(error.value) == (
        "k-NN on 1,297 training and 500 test images with 768-dimensional features needs up to"
        " 0.20 GiB, more than 85% of the 0.20 GiB free. Use more ranks (torchrun --nproc-per-node N"
        " -m ssl_pretrain.eval.knn ...), or fewer images (data.subset=N); --rows pretrained leaves"
        " out raw pixels, the widest features"
    )


def test_the_memory_of_a_rank_is_bounded():
    num_bytes = knn_search.required_bytes(50_000, 10_000, 2048, 10, 0)
    assert num_bytes == 2 * (50_000 + 10_000) * 2048 * 4 + 3 * 2**26 + 10 * 1024 * 4 < 2**31


def make_folder_run(tmp_path, train, val):
    names = [f"train/{name}" for name in train] + [f"val/{name}" for name in val]
    root = write_images(tmp_path / "photos", names)
    folder = make_run(tmp_path / "run", "data.source=folder", f"data.root={root}")
    return runs.load_run(folder, device="cpu"), root


def test_a_single_class_is_refused(tmp_path):
    run, root = make_folder_run(tmp_path, [], ["a/0.png"])
    (root / "train.csv").write_text("path,label\nval/a/0.png,cat\n")
    run.config.data.train = "train.csv"
    with pytest.raises(ValueError) as error:
        knn.evaluate(run)
    assert str(error.value) == (
        f"data.root: k-NN needs two or more classes, and {root / 'train.csv'} has 1 (cat), so any"
        " prediction is correct; put the images in one folder per class"
    )


def test_a_class_without_training_images_is_refused(tmp_path):
    run, root = make_folder_run(tmp_path, ["a/0.png", "b/1.png"], ["a/0.png", "b/1.png", "c/2.png"])
    with pytest.raises(ValueError) as error:
        knn.evaluate(run)
    assert str(error.value) == (
        f"data.val: {root / 'val'} has the class 'c', but the training split has only a, b; "
        "check data.train and data.val"
    )


def test_class_lists_that_disagree_are_refused(tmp_path):
    run, root = make_folder_run(tmp_path, ["a/0.png", "b/1.png"], ["a/0.png", "b/1.png"])
    train, val = (
        evaluation_split.open_labeled_source(run, split, "k-NN") for split in ("train", "val")
    )
    val.classes = ["a", "c", "d", "e", "f"]
    with pytest.raises(ValueError) as error:
        evaluation_split.check_classes(train, val)
    assert str(error.value) == (
        f"data.val: 4 of the 5 classes of {root / 'val'} (c, d, e, ...) are not among the 2 of"
        f" {root / 'train'}; give splits of the same data set"
    )
    val.classes = ["b", "a"]
    with pytest.raises(ValueError, match="are in a different order than the 2 of "):
        evaluation_split.check_classes(train, val)


def test_an_empty_test_set_is_refused(tmp_path):
    run, root = make_folder_run(tmp_path, ["a/0.png", "b/1.png"], [])
    (root / "val").mkdir()
    with pytest.raises(ValueError) as error:
        knn.evaluate(run)
    assert str(error.value) == (
        f"data.root: {root / 'val'} contains no image that Pillow can decode, at any depth; "
        "give the folder of your images"
    )


def test_a_missing_faiss_is_an_error_only_if_it_is_required(monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    assert knn_search.choose_backend("auto") == "torch"
    with pytest.raises(ValueError) as error:
        knn_search.choose_backend("faiss")
    assert str(error.value) == (
        "--backend faiss: faiss is not installed; install it with `pip install '.[faiss]'` in a "
        "clone, or with `pip install 'ssl_pretrain-0.1.0-py3-none-any.whl[faiss]'` where the wheel "
        "is, or use --backend torch"
    )


def test_the_better_random_backbone_is_taken_column_by_column():
    rows = [
        Row("random, as built", {"a": 1.0, "b": 5.0}, {"b": 0.1}),
        Row("random, recalibrated", {"a": 2.0, "b": 4.0}, {"b": 0.2}),
    ]
    better = results.with_better_random_row(rows)[-1]
    assert (better.metrics, better.spread) == ({"a": 2.0, "b": 5.0}, {"b": 0.1})
    assert better.notes == {"a": "recalibrated", "b": "as built"}


def test_a_users_mistake_exits_with_one_line_and_status_2(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["eval/knn.py", str(tmp_path / "none")])
    with pytest.raises(SystemExit) as error:
        command_line.execute(knn.main, "eval.knn")
    assert error.value.code == 2
    assert capsys.readouterr() == (
        "",
        f"eval.knn: {tmp_path / 'none'}: no such run folder; give the `output` of a run's config\n",
    )


def test_the_command_prints_one_table_and_saves_the_protocol_and_all_settings(run_folder, capsys):
    options = "--k 5 --shifts 1 --backend torch --device cpu evaluation.temperature=0.1"
    knn.main([str(run_folder), *options.split()])
    brief = capsys.readouterr().out
    assert brief.startswith("\naccuracy, %             clean  shifted 1\n-----")
    *_, last_row, _, protocol, seconds = brief.splitlines()
    assert last_row.startswith("pretrained  ")
    assert protocol == f"protocol: {run_folder / 'eval/knn.txt'}"
    assert seconds.endswith(f" s; saved to {run_folder / 'eval/knn.json'}")
    text = (run_folder / "eval/knn.txt").read_text()
    assert "  k: 5\n  temperature: 0.1\n  backend: torch\n" in text and last_row in text
    grid = (run_folder / "eval/knn_grid.txt").read_text()
    assert "accuracy, % " in grid and "\nk 20, T 0.1 " in grid  # one row per setting
    table = grid[grid.index("accuracy, %") : grid.index("\nselected hyperparameters")]
    assert max(map(len, table.splitlines())) <= 80
    knn.main([str(run_folder), *options.split(), "--verbose"])
    full = capsys.readouterr().out
    assert full.startswith(f"\n{grid}\n{text[: text.index('accuracy, %')]}")
    assert full.splitlines()[-2:-1] == [protocol]


@pytest.mark.parametrize("offset", [(2, 0), (-2, 0), (0, 3), (0, -3), (1, -2)])
def test_a_shift_moves_every_pixel_and_fills_with_black(offset):
    images = torch.randint(1, 256, (2, 3, 8, 8), dtype=torch.uint8)
    shifted = features.shift(images, *offset)
    dx, dy = offset
    black = torch.zeros(2, 3, dtype=torch.uint8)
    for y in range(8):
        for x in range(8):
            inside = 0 <= y - dy < 8 and 0 <= x - dx < 8
            expected = images[:, :, y - dy, x - dx] if inside else black
            assert torch.equal(shifted[:, :, y, x], expected)
