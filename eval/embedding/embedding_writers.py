"""The formats of files of embeddings, written block by block."""

import json
import zipfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, BinaryIO

import numpy as np

from ssl_pretrain.data.formats.stored_array import write_npy_header

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
class Content:
    """Content of a file to write: the vectors, a few rows at a time, and what belongs to them."""

    blocks: Iterable[np.ndarray]
    shape: tuple[int, ...]  # of all vectors together
    dtype: np.dtype[Any]
    entries: Entries


def _write_npz(file: BinaryIO, content: Content) -> None:
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


def _write_npy(file: Any, content: Content) -> None:
    write_npy_header(file, content.shape, content.dtype)
    for block in content.blocks:
        file.write(np.ascontiguousarray(block).data)


def _write_parquet(file: BinaryIO, content: Content) -> None:
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


def _write_safetensors(file: BinaryIO, content: Content) -> None:
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


WRITERS: Mapping[str, Callable[[BinaryIO, Content], None]] = {
    ".npz": _write_npz,
    ".npy": _write_npy,
    ".parquet": _write_parquet,
    ".safetensors": _write_safetensors,
}
