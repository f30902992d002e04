"""Indexes of vectors: exact answers, measured recall, and files that belong together."""

import json

import numpy as np
import pytest

from ssl_pretrain import rng
from ssl_pretrain.eval.embedding import vector_index
from ssl_pretrain.eval.embedding.vector_index import VectorIndex, build_index


def random_vectors(num_vectors, dim=16, seed=0):
    uniform = rng.uniform(seed, 0, np.arange(num_vectors), 0, rng.Purpose.SUBSET, dim)
    return (uniform - 0.5).astype(np.float32)


def names(num_vectors):
    return [f"{number}.jpg" for number in range(num_vectors)]


@pytest.mark.parametrize("metric", vector_index.METRICS)
def test_a_flat_index_answers_like_a_loop_over_all_vectors(tmp_path, metric):
    vectors, queries = random_vectors(200), random_vectors(7, seed=1)
    build_index(vectors, names(200), metric=metric).save(tmp_path / "index")
    ids, scores = VectorIndex.load(tmp_path / "index").search(queries, 5)
    for query, found_ids, found_scores in zip(queries.astype(np.float64), ids, scores):
        expected = []
        for number, vector in enumerate(vectors.astype(np.float64)):
            if metric == "l2":
                expected.append((((query - vector) ** 2).sum(), number))
            else:
                length = np.linalg.norm(query) * np.linalg.norm(vector) if metric == "cosine" else 1
                expected.append((-(query @ vector) / length, number))
        expected.sort()
        assert found_ids == [f"{number}.jpg" for _, number in expected[:5]]
        sign = 1 if metric == "l2" else -1
        assert found_scores == pytest.approx([sign * score for score, _ in expected[:5]], abs=1e-5)


def test_orthogonal_vectors_have_the_cosine_that_is_known():
    index = build_index(3 * np.eye(4, dtype=np.float32), names(4))
    ids, scores = index.search(np.array([[2.0, 1, 0, 0]], np.float32), 3)
    assert ids[0][:2] == ["0.jpg", "1.jpg"]
    assert scores[0] == pytest.approx([2 / 5**0.5, 1 / 5**0.5, 0], abs=1e-6)


@pytest.mark.parametrize("kind", ["ivf", "hnsw"])
def test_the_saved_recall_is_the_share_of_exact_neighbors(tmp_path, kind):
    vectors = random_vectors(1500)
    build_index(vectors, names(1500), kind=kind).save(tmp_path / "index")
    index = VectorIndex.load(tmp_path / "index")
    rows, _ = index.search_rows(vectors, 11)
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    shares = []
    queries = rng.permutation(0, 0, 1500, rng.Purpose.SUBSET)[:1000]
    for query in queries:
        nearest = set(np.argsort(-(unit @ unit[query]), kind="stable")[:11].tolist()) - {query}
        shares.append(len(nearest & set(rows[query].tolist())) / 10)
    assert index.facts.recall == pytest.approx(np.mean(shares), abs=1e-3)
    assert 0.5 < index.facts.recall < 1 if kind == "ivf" else index.facts.recall > 0.95


def test_an_exact_index_has_recall_1_and_keeps_its_facts(tmp_path):
    vectors, facts = random_vectors(30), {"network": "resnet50"}
    classes = ["cat"] * 30
    build_index(vectors, names(30), classes=classes, provenance=facts).save(tmp_path / "index")
    index = VectorIndex.load(tmp_path / "index")
    assert (index.facts.recall, index.facts.provenance) == (1.0, facts)
    assert (index.ids, index.classes, len(index)) == (names(30), classes, 30)


def test_more_neighbors_than_vectors_are_all_vectors():
    ids, scores = build_index(random_vectors(3), names(3)).search(random_vectors(1, seed=2), 10)
    assert sorted(ids[0]) == names(3)
    assert len(scores[0]) == 3


def test_queries_of_another_width_are_refused():
    with pytest.raises(ValueError) as error:
        build_index(random_vectors(3), names(3)).search(random_vectors(1, dim=8), 1)
    assert str(error.value) == (
        "the queries have shape (1, 8), and the index has vectors of 16 numbers; give queries of"
        " the network and feature of the index"
    )


def test_the_vector_of_an_unreadable_image_is_refused():
    vectors = random_vectors(3)
    vectors[1] = np.nan
    with pytest.raises(ValueError) as error:
        build_index(vectors, names(3))
    assert str(error.value) == (
        "vector 1 has a value that is not finite, as an unreadable image has; remove that"
        " vector, or index the file with `ssl-pretrain index`, which leaves such vectors out"
    )


def test_several_vectors_per_image_are_refused():
    with pytest.raises(ValueError) as error:
        build_index(np.zeros((3, 4, 16), np.float32), names(3))
    assert str(error.value) == (
        "the embeddings have shape (3, 4, 16) and 3 names, and an index takes one vector (n, dim)"
        " and one name per image; embed the images with --feature pooled or patch_mean"
    )


@pytest.mark.parametrize(
    ("file", "content", "error"),
    [
        ("index.faiss", "not of faiss", "RuntimeError"),
        ("index.json", "{", "JSONDecodeError"),
        ("index.json", '{"other": 1}', "TypeError"),
        ("ids.json", "{}", "KeyError"),
    ],
)
def test_a_damaged_index_is_named(tmp_path, file, content, error):
    build_index(random_vectors(3), names(3)).save(tmp_path / "index")
    (tmp_path / "index" / file).write_text(content)
    with pytest.raises(ValueError) as raised:
        VectorIndex.load(tmp_path / "index")
    assert str(raised.value) == (
        f"{tmp_path / 'index' / file}: is damaged or not of an index ({error}); copy the folder"
        " again, or index the embeddings again with `ssl-pretrain index`"
    )


def test_a_folder_without_an_index_is_refused(tmp_path):
    with pytest.raises(ValueError) as error:
        VectorIndex.load(tmp_path)
    assert str(error.value) == (
        f"{tmp_path}: index.faiss, ids.json, index.json is missing; give a folder that"
        " `ssl-pretrain index` wrote"
    )


def test_files_of_different_indexes_are_refused(tmp_path):
    build_index(random_vectors(3), names(3)).save(tmp_path / "index")
    ids = {"ids": names(2), "classes": []}
    (tmp_path / "index" / "ids.json").write_text(json.dumps(ids))
    with pytest.raises(ValueError) as error:
        VectorIndex.load(tmp_path / "index")
    assert str(error.value) == (
        f"{tmp_path / 'index'}: index.faiss has 3 vectors of 16 numbers, ids.json 2 names, and"
        " index.json says 3 vectors of 16; the files are of different indexes, so write it again"
    )
