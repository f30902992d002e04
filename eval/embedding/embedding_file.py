"""Write and read vectors of images with their names, labels and origin.

| ending | content |
|---|---|
| `.npz` | arrays `features`, `names`, `labels` and `classes`, and `metadata`, a JSON text |
| `.npy` | the array; `FILE.npy.json` beside it has the names, labels, classes and metadata |
| `.parquet` | columns `name`, `label`, `class` and `features`; the metadata are in the schema |
| `.safetensors` | tensors `features` and `labels`, and `names`, a JSON text as bytes |

Files are written block by block, so that the vectors need not fit into memory. Labels are only
there if some image has one. An image without a label has -1, or null in a table. The same vectors
give the same bytes.
"""

import json
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ssl_pretrain.data.formats.stored_array import write_npy_header
from ssl_pretrain.system import durable_files, optional_packages

SUFFIXES = (".npz", ".npy", ".parquet", ".safetensors")
METADATA_KEY = "ssl_pretrain"  # key in the metadata of a table's schema and of a .safetensors


@dataclass
class Entries:
    """Names, labels and origin of the vectors in a file.

    Attributes:
        names: Name of each image.
        labels: Index of each image's class, int64 (n,), or -1.
        classes: Names of the classes.
        metadata: Network, weights, feature, transform and images.
    """

    names: list[str]
    labels: np.ndarray
    classes: list[str] = field(default_factory=list)
    metadata: dict[str, Any] = field(default_factory=dict)

    @property
    def has_labels(self) -> bool:
        """True if some image has a label."""
        return bool((self.labels >= 0).any())

    def class_names(self) -> list[str | None]:
        """Return the name of each image's class, or None."""
        return [self.classes[label] if label >= 0 else None for label in self.labels.tolist()]


@dataclass(frozen=True)
class _Content:
    """Content of a file to write: the vectors, a few rows at a time, and what belongs to them."""

    blocks: Iterable[np.ndarray]
    shape: tuple[int, ...]  # of all vectors together
    dtype: np.dtype[Any]
    entries: Entries


@dataclass
class Embeddings:
    """Vectors of images, (n, dim) or (n, patches, dim), and what belongs to them."""

    vectors: np.ndarray
    entries: Entries


def check_path(path: Path) -> None:
    """Raise ValueError unless the ending of the path is that of a format which can be written."""
    if path.suffix not in SUFFIXES:
        raise ValueError(
            f"OUT: {path} ends in none of {', '.join(SUFFIXES)}; give a name that does, such as "
            "features.npz"
        )
    if path.suffix == ".parquet":
        optional_packages.require(str(path), "pyarrow", "data", "write an .npz")


def sidecar_path(path: Path) -> Path:
    """Return the path of the JSON file that belongs to a .npy."""
    return path.with_name(f"{path.name}.json")


def write(
    path: Path,
    blocks: Callable[[], Iterable[np.ndarray]],
    row_shape: tuple[int, ...],
    dtype: np.dtype[Any],
    entries: Entries,
) -> None:
    """Write a file of embeddings atomically.

    Args:
        path: File to write.
        blocks: Function that yields the vectors, a few rows at a time.
        row_shape: Shape of the vectors of one image.
        dtype: float32 or float16.
        entries: Names, labels and metadata.

    Raises:
        OSError: If the file cannot be written. An older file is then unchanged.
    """
    shape = (len(entries.names), *row_shape)
    if path.suffix == ".npy":
        content = {
            "names": entries.names,
            "labels": entries.labels.tolist() if entries.has_labels else None,
            "classes": entries.classes,
            "metadata": entries.metadata,
        }
        durable_files.replace(sidecar_path(path), f"{json.dumps(content, indent=1)}\n")
    writer = {
        ".npz": _write_npz,
        ".npy": _write_npy,
        ".parquet": _write_parquet,
        ".safetensors": _write_safetensors,
    }[path.suffix]
    durable_files.replace_by_writing(
        path, lambda file: writer(file, _Content(blocks(), shape, dtype, entries))
    )


def read(path: str | Path) -> Embeddings:
    """Read a file of embeddings.

    Raises:
        ValueError: If the file is none.
    """
    path = Path(path)
    _check_readable(path)
    if path.suffix == ".npz":
        with np.load(path) as file:
            labels = file.get("labels")
            classes = file["classes"].tolist() if "classes" in file else []
            metadata = json.loads(str(file["metadata"])) if "metadata" in file else {}
            names = file["names"].tolist()
            return Embeddings(file["features"], _entries(names, labels, classes, metadata))
    if path.suffix == ".npy":
        content = json.loads(sidecar_path(path).read_text(encoding="utf-8"))
        vectors = np.load(path, mmap_mode="r")
        return Embeddings(
            vectors,
            _entries(content["names"], content["labels"], content["classes"], content["metadata"]),
        )
    return _read_parquet(path) if path.suffix == ".parquet" else _read_safetensors(path)


def read_metadata(path: Path) -> dict[str, Any]:
    """Return the metadata of a file of embeddings, or an empty dict if it has none."""
    try:
        if path.suffix == ".npz":
            with np.load(path) as file:
                return dict(json.loads(str(file["metadata"])))
        if path.suffix == ".npy":
            content = json.loads(sidecar_path(path).read_text(encoding="utf-8"))
            return dict(content["metadata"])
        if path.suffix == ".parquet":
            import pyarrow.parquet as pq

            text = (pq.read_schema(path).metadata or {})[METADATA_KEY.encode()]
            return dict(json.loads(text)["metadata"])
        return dict(json.loads(_safetensors_header(path)["__metadata__"][METADATA_KEY])["metadata"])
    except (KeyError, ValueError, OSError, zipfile.BadZipFile):
        return {}


def _check_readable(path: Path) -> None:
    if not path.is_file():
        raise ValueError(f"{path}: no such file; give one that `ssl-pretrain embed` wrote")
    if path.suffix not in SUFFIXES:
        raise ValueError(
            f"{path}: ends in none of {', '.join(SUFFIXES)}; give a file that `ssl-pretrain embed` "
            "wrote"
        )
    if path.suffix == ".npy" and not sidecar_path(path).is_file():
        raise ValueError(
            f"{path}: {sidecar_path(path).name} is missing, which has the names; copy it beside "
            "the file"
        )


def _entries(
    names: list[str], labels: Any, classes: list[str], metadata: dict[str, Any]
) -> Entries:
    if labels is None:
        labels = np.full(len(names), -1)
    return Entries(list(names), np.asarray(labels, np.int64), list(classes), metadata)


def _write_npz(file: BinaryIO, content: _Content) -> None:
    entries = content.entries
    arrays = {"names": np.array(entries.names), "metadata": np.array(json.dumps(entries.metadata))}
    if entries.has_labels:
        arrays |= {"labels": entries.labels, "classes": np.array(entries.classes)}
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, array, allow_pickle=False)
        with archive.open("features.npy", "w", force_zip64=True) as member:
            _write_npy(member, content)


def _write_npy(file: Any, content: _Content) -> None:
    write_npy_header(file, content.shape, content.dtype)
    for block in content.blocks:
        file.write(np.ascontiguousarray(block).data)


def _write_parquet(file: BinaryIO, content: _Content) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    entries = content.entries
    value_type = pa.float16() if content.dtype == np.float16 else pa.float32()
    for length in reversed(content.shape[1:]):
        value_type = pa.list_(value_type, length)
    fields = [pa.field("name", pa.string())]
    if entries.has_labels:
        fields += [pa.field("label", pa.int64()), pa.field("class", pa.string())]
    fields.append(pa.field("features", value_type))
    saved = {"metadata": entries.metadata, "classes": entries.classes}
    schema = pa.schema(fields, metadata={METADATA_KEY: json.dumps(saved)})
    class_names, start = entries.class_names() if entries.has_labels else [], 0
    with pq.ParquetWriter(file, schema) as writer:
        for block in content.blocks:
            rows = slice(start, start + len(block))
            start += len(block)
            values = pa.array(np.ascontiguousarray(block).reshape(-1))
            for length in reversed(content.shape[1:]):
                values = pa.FixedSizeListArray.from_arrays(values, length)
            columns = [pa.array(entries.names[rows], pa.string())]
            if entries.has_labels:
                labels = entries.labels[rows]
                columns.append(pa.array(labels, pa.int64(), mask=labels < 0))
                columns.append(pa.array(class_names[rows], pa.string()))
            writer.write_table(pa.Table.from_arrays([*columns, values], schema=schema))


def _read_parquet(path: Path) -> Embeddings:
    import pyarrow.parquet as pq

    optional_packages.require(str(path), "pyarrow", "data", "write an .npz")
    table = pq.read_table(path)
    saved = json.loads((table.schema.metadata or {}).get(METADATA_KEY.encode(), b"{}"))
    values, lengths = table["features"].combine_chunks(), []
    while hasattr(values.type, "list_size"):
        lengths.append(values.type.list_size)
        values = values.flatten()
    vectors = values.to_numpy(zero_copy_only=False).reshape(len(table), *lengths)
    labels = None
    if "label" in table.column_names:
        labels = table["label"].fill_null(-1).to_numpy()
    names = table["name"].to_pylist()
    return Embeddings(
        vectors, _entries(names, labels, saved.get("classes", []), saved.get("metadata", {}))
    )


def _write_safetensors(file: BinaryIO, content: _Content) -> None:
    """Write the header of the format, and then the tensors one after the other."""
    entries = content.entries
    names = np.frombuffer(json.dumps(entries.names).encode(), np.uint8)
    small = {"labels": entries.labels, "names": names} if entries.has_labels else {"names": names}
    saved = {"metadata": entries.metadata, "classes": entries.classes}
    header: dict[str, Any] = {"__metadata__": {METADATA_KEY: json.dumps(saved)}}
    types = {"labels": "I64", "names": "U8"}
    sizes = {"features": int(np.prod(content.shape)) * content.dtype.itemsize}
    sizes |= {name: array.nbytes for name, array in small.items()}
    offset = 0
    for name in ("labels", "features", "names"):  # so that every tensor is aligned
        if name not in sizes:
            continue
        kind, dims = (
            ("F16" if content.dtype == np.float16 else "F32", content.shape)
            if name == "features"
            else (types[name], small[name].shape)
        )
        end = offset + sizes[name]
        header[name] = {"dtype": kind, "shape": list(dims), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    if "labels" in small:
        file.write(small["labels"].tobytes())
    for block in content.blocks:
        file.write(np.ascontiguousarray(block).data)
    file.write(names.tobytes())


def _read_safetensors(path: Path) -> Embeddings:
    from safetensors import safe_open

    with safe_open(path, "np") as file:
        saved = json.loads((file.metadata() or {}).get(METADATA_KEY, "{}"))
        keys = set(file.keys())
        names = json.loads(file.get_tensor("names").tobytes())
        labels = file.get_tensor("labels") if "labels" in keys else None
        vectors = file.get_tensor("features")
    return Embeddings(
        vectors, _entries(names, labels, saved.get("classes", []), saved.get("metadata", {}))
    )


def _safetensors_header(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        return dict(json.loads(file.read(length)))
