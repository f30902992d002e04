"""Files of embeddings: what was written is read, and everything else is refused by name."""

import json
import sys

import numpy as np
import pytest

from ssl_pretrain.eval.embedding import embedding_file, embedding_writers
from ssl_pretrain.eval.embedding.embedding_writers import Entries


@pytest.mark.parametrize("suffix", embedding_file.SUFFIXES)
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_file_gives_back_what_was_written(tmp_path, suffix, dtype):
    vectors = np.arange(5 * 3 * 2, dtype=dtype).reshape(5, 3, 2) / 7
    vectors[2] = np.nan
    names = ["a", "b\n", "c\\udc80", "ä", "e"]
    written = Entries(names, np.array([0, 1, -1, 0, 1]), ["x", "y"], {"feature": "patches"})
    path = tmp_path / f"file{suffix}"
    embedding_file.write(path, lambda: [vectors[:4], vectors[4:]], (3, 2), vectors.dtype, written)
    read = embedding_file.read(path)
    assert read.vectors.dtype == dtype
    np.testing.assert_array_equal(read.vectors, vectors)
    assert (read.entries.names, read.entries.classes) == (names, ["x", "y"])
    assert read.entries.labels.tolist() == [0, 1, -1, 0, 1]
    assert read.entries.class_names() == ["x", "y", None, "x", "y"]
    assert read.entries.metadata == {"feature": "patches"}


def test_other_programs_read_the_files(tmp_path):
    import pyarrow.parquet as pq
    from safetensors.numpy import load_file

    vectors = np.arange(6, dtype=np.float32).reshape(3, 2)
    written = Entries(["a", "b", "c"], np.array([0, -1, 1]), ["x", "y"], {})
    for suffix in embedding_file.SUFFIXES:
        path = tmp_path / f"file{suffix}"
        embedding_file.write(path, lambda: [vectors], (2,), vectors.dtype, written)
    np.testing.assert_array_equal(np.load(tmp_path / "file.npy"), vectors)
    with np.load(tmp_path / "file.npz") as file:
        np.testing.assert_array_equal(file["features"], vectors)
        assert file["names"].tolist() == ["a", "b", "c"]
    tensors = load_file(tmp_path / "file.safetensors")
    np.testing.assert_array_equal(tensors["features"], vectors)
    assert tensors["labels"].tolist() == [0, -1, 1]
    table = pq.read_table(tmp_path / "file.parquet").to_pydict()
    assert table["features"] == vectors.tolist()
    assert (table["label"], table["class"]) == ([0, None, 1], ["x", None, "y"])


def test_an_interrupted_overwrite_leaves_no_old_vectors_under_new_names(tmp_path):
    path, old = tmp_path / "file.npy", np.zeros((1, 2), np.float32)
    entries = [Entries([name], np.array([-1]), [], {"step": name}) for name in ("old", "new")]

    def stop():
        raise KeyboardInterrupt

    embedding_file.write(path, lambda: [old], (2,), old.dtype, entries[0])
    with pytest.raises(KeyboardInterrupt):
        embedding_file.write(path, stop, (2,), old.dtype, entries[1])
    assert embedding_file.read_metadata(path) == {"step": "new"}
    assert not path.exists()


def damaged_files(folder):
    """Write files that are not files of embeddings and return their problems by path."""
    features, names = np.zeros((2, 3), np.float32), np.array(["a", "b"])
    header = json.dumps({"__metadata__": {embedding_writers.METADATA_KEY: "[]"}}).encode()
    problems = {
        "empty.npz": "cannot be read as embeddings: EOFError: No data left in file",
        "empty.safetensors": "cannot be read as embeddings: SafetensorError: Error while",
        "long.safetensors": "cannot be read as embeddings: SafetensorError: Error while",
        "list.safetensors": "cannot be read as embeddings: ",
        "empty.parquet": "cannot be read as embeddings: ArrowInvalid: ",
        "foreign.npz": "cannot be read as embeddings: KeyError: ",
        "one_name.npz": "has 2 vectors, 1 names and 1 labels",
        "numbers.npz": "has names that are not texts",
        "integers.npz": "has int64 features of shape (2, 3), and not float vectors",
        "classless.npz": "has the label 1, and 0 classes",
        "sidecar.npy": "cannot be read as embeddings: TypeError: ",
        "list.npy": "has metadata that are not a JSON object",
    }
    for name in ("empty.npz", "empty.safetensors", "empty.parquet"):
        (folder / name).write_bytes(b"")
    (folder / "long.safetensors").write_bytes((2**62).to_bytes(8, "little"))
    (folder / "list.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    np.savez(folder / "foreign.npz", images=features)
    np.savez(folder / "one_name.npz", features=features, names=names[:1])
    np.savez(folder / "numbers.npz", features=features, names=np.arange(2))
    np.savez(folder / "integers.npz", features=features.astype(np.int64), names=names)
    np.savez(folder / "classless.npz", features=features, names=names, labels=np.arange(2))
    for name, content in {
        "sidecar.npy": [],
        "list.npy": {"names": ["a", "b"], "labels": None, "classes": [], "metadata": []},
    }.items():
        np.save(folder / name, features)
        (folder / f"{name}.json").write_text(json.dumps(content))
    return {folder / name: problem for name, problem in problems.items()}


def test_foreign_and_damaged_files_are_named(tmp_path):
    for path, problem in damaged_files(tmp_path).items():
        with pytest.raises(ValueError) as error:
            embedding_file.read(path)
        assert str(error.value).startswith(f"{path}: {problem}")
        assert str(error.value).endswith("; give one that `ssl-pretrain embed` wrote")
        assert embedding_file.read_metadata(path) == {}


def test_a_table_without_pyarrow_is_refused_with_the_package(tmp_path, monkeypatch):
    (tmp_path / "file.parquet").write_bytes(b"")
    monkeypatch.setattr(
        embedding_file.optional_packages, "is_installed", lambda module: module != "pyarrow"
    )
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(ValueError, match=r"file\.parquet: pyarrow is not installed; install it"):
        embedding_file.read(tmp_path / "file.parquet")
