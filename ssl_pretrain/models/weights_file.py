"""Read the tensors of a weights file that others published, wherever in the file they are."""

import argparse
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

Weights = dict[str, Tensor]
# Keys under which files keep their weights, in the order of preference. The teacher comes first, as
# its authors evaluate it.
USUAL_KEYS = (
    "teacher",
    "target_encoder",
    "state_dict",
    "model",
    "model_state_dict",
    "student",
    "module",
    "network",
    "encoder",
    "model_ema",
    "state_dict_ema",
    "backbone",
)
MAX_DEPTH = 5  # nested mappings that are searched
MIN_SHARE = 10  # weights have at least 1/10 as many tensors as the largest mapping of the file


def read_file(path: Path, source: str, key: str = "") -> tuple[Weights, list[str]]:
    """Read the tensors of a .safetensors or a torch file, and note where in it they were.

    Args:
        path: The file.
        source: Name of the file in messages, such as `backbone.init: 'dino.pth'`.
        key: Dotted key of the weights in the file. Empty to try the usual keys.

    Raises:
        ValueError: The file cannot be read, holds more than tensors, or has no weights at that key.
    """
    content = load_tensors(path, source)
    mappings = dict(_tensor_mappings(content))
    if key:
        if key not in mappings:
            raise ValueError(
                f"{source}: backbone.init_key: {key!r} holds no tensors; "
                f"{_outline(content, mappings)}"
            )
        return mappings[key], [f"read at {key!r}"]
    usual = {where: weights for where, weights in mappings.items() if _is_usual(where)}
    if not mappings:
        raise ValueError(f"{source}: no named tensors in it; {_outline(content, mappings)}")
    largest = max(len(weights) for weights in (usual or mappings).values())
    if usual:  # a few tensors beside the weights, such as a step count, do not count
        large = [where for where in usual if len(usual[where]) * MIN_SHARE >= largest]
        where = min(large, key=_preference)
    else:
        where, *others = [where for where in mappings if len(mappings[where]) == largest]
        if others:
            raise ValueError(
                f"{source}: several weights in it; {_outline(content, mappings)}. "
                "Choose with backbone.init_key"
            )
    return mappings[where], [f"read at {where!r}"] if where else []


def load_tensors(path: Path, source: str) -> Any:
    """Load the content of a weights file without executing anything in it.

    The first bytes tell the format.

    Raises:
        ValueError: The file is damaged, is no weights file, or is a pickle of more than tensors and
            plain values.
    """
    with path.open("rb") as file:
        head = file.read(32)
    members = _zip_members(path, source) if head[:2] == b"PK" else []
    if any(name.endswith("/constants.pkl") for name in members):
        raise ValueError(
            f"{source} is a TorchScript program. Where you trust the file, save its tensors alone: "
            f'python -c "import torch; torch.save(torch.jit.load({str(path)!r}).state_dict(), '
            "'weights.pth')\", and give weights.pth"
        )
    is_safetensors = head[8:9] == b"{" and not members
    is_numpy = any(name.endswith(".npy") for name in members)
    if is_numpy or not (members or is_safetensors or head[:1] == b"\x80"):
        beginning = f"it begins with {head!r}" if head else "it is empty"
        is_lfs_pointer = head.startswith(b"version https")
        remedy = "fetch it with git lfs pull" if is_lfs_pointer else "get it again"
        raise ValueError(f"{source} is no safetensors or torch file: {beginning}; {remedy}")
    try:
        if is_safetensors:
            return load_file(path)
        with torch.serialization.safe_globals(_harmless_types()), path.open("rb") as file:
            return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # unpickling arbitrary bytes raises anything
        raise ValueError(_describe_failure(error, path, source)) from None


def _harmless_types() -> list[Any]:
    """Return the types of arguments and results that files keep beside their weights."""
    arrays: Any = np._core.multiarray  # type: ignore[attr-defined]
    numbers = [type(np.dtype(kind)) for kind in ("float64", "float32", "int64", "int32", "bool")]
    array_types = [np.dtype, np.ndarray, arrays.scalar, arrays._reconstruct]
    return [argparse.Namespace, *array_types, *numbers]


def _describe_failure(error: Exception, path: Path, source: str) -> str:
    text = str(error)
    if "Unsupported global" in text or "Weights only load failed" in text:
        type_name = text.partition("GLOBAL ")[2].split(" ")[0].rstrip(".,")
        objects = f"Python objects ({type_name})" if type_name else "Python objects"
        return (
            f"{source} holds {objects} beside its tensors, and unpickling those can run any "
            "program. Where you trust the file, keep its tensors alone: python -c "
            f'"import torch; torch.save(torch.load({str(path)!r}, weights_only=False)'
            "['state_dict'], 'weights.pth')\", with the key that it has, or .state_dict() for a "
            "whole network, and give weights.pth"
        )
    reason = f"{type(error).__name__}: {text.splitlines()[0] if text else ''}"
    return f"{source} is not a readable weights file ({reason})"


def _zip_members(path: Path, source: str) -> list[str]:
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.namelist()
    except (zipfile.BadZipFile, OSError, ValueError) as error:
        raise ValueError(f"{source} is cut off or damaged ({error}); get it again") from None


def named_tensors(content: Any) -> Weights:
    """Return the tensors of a mapping by their names, empty for any other object."""
    if not isinstance(content, Mapping):
        return {}
    return {str(key): value for key, value in content.items() if isinstance(value, Tensor)}


def _tensor_mappings(
    content: Any, where: str = "", depth: int = MAX_DEPTH
) -> Iterator[tuple[str, Weights]]:
    """Yield the dotted key and the tensors of every mapping that has some.

    The key of the whole file is empty.
    """
    if weights := named_tensors(content):
        yield where, weights
    if isinstance(content, Mapping) and depth:
        for name, value in content.items():
            yield from _tensor_mappings(value, f"{where}.{name}".lstrip("."), depth - 1)


def _is_usual(where: str) -> bool:
    return not where or all(name in USUAL_KEYS for name in where.split("."))


def _preference(where: str) -> list[int]:
    """Return the sort key of a usual dotted key."""
    return [USUAL_KEYS.index(name) for name in where.split(".")] if where else []


def _outline(content: Any, mappings: dict[str, Weights]) -> str:
    """Describe where a file has tensors, or else what it has."""
    if mappings:
        largest = sorted(mappings, key=lambda where: -len(mappings[where]))[:5]
        places = [f"{where or 'its top'!r} ({len(mappings[where])})" for where in largest]
        return f"it has tensors at {', '.join(places)}"
    if not isinstance(content, Mapping):
        return f"it holds a {type(content).__name__}"
    return f"the file has: {', '.join(map(str, list(content)[:12]))}"
