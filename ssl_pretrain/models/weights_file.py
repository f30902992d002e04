"""Read the tensors of a published weights file, at whichever key they are stored."""

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
# Keys under which files store their weights, in order of preference. The teacher comes first,
# because authors evaluate the teacher.
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
MAX_DEPTH = 5  # number of nested levels of mappings that are searched
MAX_SIZE_RATIO = 10  # the weights have at least 1/10 as many tensors as the largest mapping


def read_weights(path: Path, source: str, key: str = "") -> tuple[Weights, list[str]]:
    """Read the tensors of a .safetensors or torch file and return them with notes on their key.

    Args:
        path: The file.
        source: Name of the file for messages, such as `backbone.init: 'dino.pth'`.
        key: Dotted key of the weights in the file. If it is empty, the usual keys are tried.

    Raises:
        ValueError: If the file cannot be read, contains Python objects, or has no weights at that
            key.
    """
    content = load_tensors(path, source)
    mappings = dict(_tensor_mappings(content))
    outline = _outline(content, mappings)
    if key and key not in mappings:
        raise ValueError(f"{source}: backbone.init_key: {key!r} contains no tensors; {outline}")
    if not mappings:
        raise ValueError(f"{source}: no named tensors were found; {outline}")
    if not key:
        usual_keys = [name for name in mappings if _is_usual(name)]
        max_tensors = max(len(mappings[name]) for name in usual_keys or mappings)
        if usual_keys:  # small mappings contain other tensors, such as a step count
            large_keys = [
                name for name in usual_keys if len(mappings[name]) * MAX_SIZE_RATIO >= max_tensors
            ]
            key = min(large_keys, key=_preference)
        else:
            key, *other_keys = [name for name in mappings if len(mappings[name]) == max_tensors]
            if other_keys:
                raise ValueError(f"{source}: {outline}; choose one with backbone.init_key")
    return mappings[key], [f"read at {key!r}"] if key else []


def load_tensors(path: Path, source: str) -> Any:
    """Load the content of a weights file without executing anything in it.

    The format is recognized by the first bytes.

    Raises:
        ValueError: If the file is damaged, is not a weights file, or is a pickle with Python
            objects other than tensors and plain values.
    """
    with path.open("rb") as file:
        first_bytes = file.read(32)
    members = _zip_members(path, source) if first_bytes[:2] == b"PK" else []
    if any(name.endswith("/constants.pkl") for name in members):
        raise ValueError(
            f"{source} is a TorchScript program. If you trust the file, save its tensors alone: "
            f'python -c "import torch; torch.save(torch.jit.load({str(path)!r}).state_dict(), '
            "'weights.pth')\", and give weights.pth"
        )
    is_safetensors = first_bytes[8:9] == b"{" and not members
    is_numpy = any(name.endswith(".npy") for name in members)
    if is_numpy or not (members or is_safetensors or first_bytes[:1] == b"\x80"):
        beginning = f"it begins with {first_bytes!r}" if first_bytes else "it is empty"
        is_lfs_pointer = first_bytes.startswith(b"version https")
        remedy = "fetch it with git lfs pull" if is_lfs_pointer else "download it again"
        raise ValueError(f"{source} is not a safetensors or torch file: {beginning}; {remedy}")
    try:
        if is_safetensors:
            return load_file(path)
        with torch.serialization.safe_globals(_harmless_types()), path.open("rb") as file:
            return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # unpickling arbitrary bytes can raise any exception
        raise ValueError(_describe_failure(error, path, source)) from None


def _harmless_types() -> list[Any]:
    """Return safe types that files store with weights: command-line arguments and numbers."""
    arrays: Any = np._core.multiarray  # type: ignore[attr-defined]
    numbers = [type(np.dtype(kind)) for kind in ("float64", "float32", "int64", "int32", "bool")]
    return [argparse.Namespace, np.dtype, np.ndarray, arrays.scalar, arrays._reconstruct, *numbers]


def _describe_failure(error: Exception, path: Path, source: str) -> str:
    text = str(error)
    if "Unsupported global" in text or "Weights only load failed" in text:
        type_name = text.partition("GLOBAL ")[2].split(" ")[0].rstrip(".,")
        objects = f"Python objects ({type_name})" if type_name else "Python objects"
        return (
            f"{source} contains {objects} in addition to tensors, and unpickling them can run any "
            "program. If you trust the file, save its tensors alone: python -c "
            f'"import torch; torch.save(torch.load({str(path)!r}, weights_only=False)'
            "['state_dict'], 'weights.pth')\", with the key of its weights, or .state_dict() for a "
            "whole network, and give weights.pth"
        )
    reason = f"{type(error).__name__}: {text.splitlines()[0] if text else ''}"
    return f"{source} is not a readable weights file ({reason})"


def _zip_members(path: Path, source: str) -> list[str]:
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.namelist()
    except (zipfile.BadZipFile, OSError, ValueError) as error:
        raise ValueError(f"{source} is truncated or damaged ({error}); download it again") from None


def named_tensors(content: Any) -> Weights:
    """Return the tensors of a mapping by name. Other objects have none."""
    if not isinstance(content, Mapping):
        return {}
    return {str(key): value for key, value in content.items() if isinstance(value, Tensor)}


def _tensor_mappings(
    content: Any, key: str = "", depth: int = MAX_DEPTH
) -> Iterator[tuple[str, Weights]]:
    """Yield the dotted key and the tensors of every mapping that has tensors.

    The key of the top level is empty.
    """
    if weights := named_tensors(content):
        yield key, weights
    if isinstance(content, Mapping) and depth:
        for name, value in content.items():
            yield from _tensor_mappings(value, f"{key}.{name}".lstrip("."), depth - 1)


def _is_usual(key: str) -> bool:
    return not key or all(name in USUAL_KEYS for name in key.split("."))


def _preference(key: str) -> list[int]:
    """Return the sort key of a usual dotted key."""
    return [USUAL_KEYS.index(name) for name in key.split(".")] if key else []


def _outline(content: Any, mappings: dict[str, Weights]) -> str:
    """List the keys at which a file has tensors, or describe its content if it has none."""
    if mappings:
        largest_keys = sorted(mappings, key=lambda key: -len(mappings[key]))[:5]
        keys = [f"{key or 'the top level'!r} ({len(mappings[key])})" for key in largest_keys]
        return f"the file has tensors at {', '.join(keys)}"
    if not isinstance(content, Mapping):
        return f"the file contains a {type(content).__name__}"
    return f"the file has the keys {', '.join(map(str, list(content)[:12]))}"
