"""The commands `index` and `search`: answers by name, and no queries of another network."""

import json

import numpy as np
import pytest
from untrained_run import load_in_float32, make_run, write_images

from ssl_pretrain.eval import embed, index, search
from ssl_pretrain.eval.embedding.vector_index import VectorIndex
from ssl_pretrain.eval.embedding.weights_digest import digest_of_network

NAMES = [f"{label}/{number}.png" for label in ("cat", "dog") for number in range(5)]
SETTINGS = ["--device=cpu", "parallel.precision=float32"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a run, images, one of which is unreadable, their features and an index."""
    folder = tmp_path_factory.mktemp("search")
    make_run(folder / "run", "backbone.name=test_vit", "data.subset=200")
    write_images(folder / "images", NAMES)
    (folder / "images/dog/4.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    paths = [str(folder / name) for name in ("run", "images", "features.npz")]
    embed.main([*paths, *SETTINGS, "--feature=cls_mean", "data.max_replaced=0.1"])
    index.main([paths[2], str(folder / "index")])
    return folder


def find(folder, *arguments):
    search.main([str(folder / "index"), *arguments])


def test_an_image_is_its_own_nearest_neighbor_with_the_feature_of_the_index(folder, capsys):
    queries = [str(folder / "images/cat/1.png"), str(folder / "images/dog/2.png")]
    find(folder, *queries, "--model", str(folder / "run"), "--k=2", "--json", *SETTINGS)
    answers = json.loads(capsys.readouterr().out)
    assert [answer["query"] for answer in answers] == queries
    for answer, query, label in zip(answers, queries, ("cat", "dog")):
        assert answer["neighbors"][0] == {"id": query, "score": 1.0, "class": label}
        assert len(answer["neighbors"]) == 2


def test_a_folder_and_its_file_of_features_get_the_same_answer(folder, capsys):
    options = ["--k=3", "--json"]
    arguments = ["--model", str(folder / "run"), "data.max_replaced=0.1", *SETTINGS]
    find(folder, str(folder / "images"), *arguments, *options)
    from_images = json.loads(capsys.readouterr().out)
    find(folder, "--vectors", str(folder / "features.npz"), *options)
    from_vectors = json.loads(capsys.readouterr().out)
    assert len(from_images) == 9  # without the unreadable one
    for ours, theirs in zip(from_images, from_vectors):
        assert [each["id"] for each in ours["neighbors"]] == [
            each["id"] for each in theirs["neighbors"]
        ]


def test_the_table_has_one_line_per_neighbor(folder, capsys):
    query = str(folder / "images/cat/1.png")
    find(folder, query, "--model", str(folder / "run"), "--k=1", *SETTINGS)
    lines = capsys.readouterr().out.splitlines()
    assert lines == [query, "   cosine  class  image", f"1  1.0000  cat    {query}", ""]


def test_unreadable_images_are_left_out_of_the_index(folder, tmp_path, capsys):
    index.main([str(folder / "features.npz"), str(tmp_path / "index")])
    output = capsys.readouterr()
    assert output.out.splitlines() == [
        f"{tmp_path / 'index'}: 9 vectors of 128 numbers, cosine, flat",
        "exact",
    ]
    assert output.err == (
        "left out: 1 of 10 images have features that are not finite, such as"
        f" {folder / 'images/dog/4.png'}\n"
    )
    assert str(folder / "images/dog/4.png") not in VectorIndex.load(tmp_path / "index").ids


def test_another_network_is_refused_by_its_weights(folder, tmp_path):
    other = make_run(tmp_path / "other", "backbone.name=test_vit", weights_seed=2)
    digests = [
        digest_of_network(load_in_float32(run).backbone)[:12] for run in (other, folder / "run")
    ]
    with pytest.raises(ValueError) as error:
        find(folder, str(folder / "images/cat/1.png"), "--model", str(other), *SETTINGS)
    origin = VectorIndex.load(folder / "index").facts.provenance["origin"]
    assert str(error.value) == (
        f"--model {other}: has the weights {digests[0]}, and the index was made with {digests[1]}"
        f" (test_vit of {origin}); give that network, or index the images again with this one"
    )


def test_another_transform_is_refused(folder):
    arguments = ["--model", str(folder / "run"), "evaluation.crop_ratio=0.5", *SETTINGS]
    with pytest.raises(ValueError, match=r"has the transform .*'crop_ratio': 0\.5"):
        find(folder, str(folder / "images/cat/1.png"), *arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "QUERY: give images, or --vectors with a file that `embed` wrote"),
        (
            ["cat.png"],
            "--model: is missing; name the network that the index was made with, to compute the"
            " features of the queries",
        ),
    ],
)
def test_missing_arguments_are_named(folder, arguments, message):
    with pytest.raises(ValueError) as error:
        find(folder, *arguments)
    assert str(error.value) == message


def test_an_older_index_is_only_replaced_on_request(folder, tmp_path):
    arguments = [str(folder / "features.npz"), str(tmp_path / "index")]
    index.main(arguments)
    with pytest.raises(ValueError) as error:
        index.main(arguments)
    assert str(error.value) == (
        f"INDEX: {tmp_path / 'index'} contains an index; give another folder, or --overwrite to"
        " replace it"
    )
    index.main([*arguments, "--overwrite", "--metric=l2"])
    assert VectorIndex.load(tmp_path / "index").facts.metric == "l2"
    with pytest.raises(ValueError) as error:
        index.main([arguments[0], str(tmp_path), "--overwrite"])
    assert str(error.value) == f"INDEX: {tmp_path} exists and is no index; give a new folder"


def test_several_vectors_per_image_are_refused(tmp_path):
    np.savez(tmp_path / "patches.npz", features=np.zeros((2, 4, 8), np.float32), names=["a", "b"])
    with pytest.raises(ValueError) as error:
        index.main([str(tmp_path / "patches.npz"), str(tmp_path / "index")])
    assert str(error.value) == (
        f"{tmp_path / 'patches.npz'}: has 4 vectors per image, and an index takes one; embed the"
        " images with --feature pooled or patch_mean"
    )
