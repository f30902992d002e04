"""Weights that others published: find the tensors of a file that belong to a network.

All of the network's own keys have to be there, under one common prefix, in their shapes. Everything
beside them is left out and reported: other networks of the same file, a classifier, a decoder. Names
of other code bases are converted, and positions of another image size are resampled, by the
converter that timm ships with each of its models.
"""

from __future__ import annotations

import argparse
import inspect
import math
import sys
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ssl_pretrain.models import torchvision_names

Weights = dict[str, Tensor]
# Keys under which files keep their weights, in the order of preference. The teacher comes first, as
# its authors evaluate it.
NESTED: tuple[str, ...] = (
    "teacher",
    "target_encoder",
    "state_dict",
    "model",
    "model_state_dict",
    "student",
    "module",
    "network",
    "encoder",
)
NESTED += ("model_ema", "state_dict_ema", "backbone")
# Words of a prefix in the order of preference, for files in which several networks fit.
PREFERRED = (
    "",
    "backbone",
    "teacher",
    "encoder_q",
    "base_encoder",
    "online",
    "student",
    "model",
    "module",
)
CLASSIFIERS = ("fc", "head", "head_dist", "classifier", "heads", "linear", "last_linear")
BESIDE = ("mask_token", "masked_embed", "decoder")  # only for pretraining: MAE, iBOT, DINOv2
# timm's names for a module's converter of weights.
CONVERTERS = ("checkpoint_filter_fn", "_filter_fn", "_filter_torchvision_pretrained")
DEPTH = 4  # words of the longest prefix: module.teacher.backbone.model


@dataclass
class Match:
    """The tensors of a network under its own names, and notes on how they were found."""

    weights: Weights
    notes: list[str]


@dataclass
class Mismatch:
    """Why the tensors under a prefix are not a network's, and how many of them do not fit."""

    text: str
    num_problems: float = math.inf


def read_file(path: Path, source: str, key: str = "") -> tuple[Weights, list[str]]:
    """Read the tensors of a .safetensors or a torch file, with a note on where in it they were.

    Args:
        path: The file.
        source: Name of the file in messages, such as `backbone.init: 'dino.pth'`.
        key: Dotted key of the weights in the file. Empty: the usual keys are tried.

    Raises:
        ValueError: The file cannot be read, holds more than tensors, or has no weights at that key.
    """
    content = load_tensors(path, source)
    places = list(_places(content))
    if key:
        at_key = [weights for where, weights in places if where == key]
        if not at_key:
            raise ValueError(
                f"{source}: backbone.init_key: {key!r} holds no tensors; {_outline(content, places)}"
            )
        return at_key[0], [f"read at {key!r}"]
    known = [place for place in places if _preference(place[0]) is not None]
    candidates = known or places
    if not candidates:
        raise ValueError(f"{source}: no named tensors in it; {_outline(content, places)}")
    largest = max(len(weights) for _, weights in candidates)
    if known:  # a few tensors beside the weights, such as a step count, are none
        enough = [place for place in known if len(place[1]) * 10 >= largest]
        where, weights = min(enough, key=lambda place: _preference(place[0]) or [])
    else:
        alike = [place for place in places if len(place[1]) == largest]
        if len(alike) > 1:
            raise ValueError(
                f"{source}: several weights in it; {_outline(content, places)}. Choose with backbone.init_key"
            )
        where, weights = alike[0]
    return weights, [f"read at {where!r}"] if where else []


def load_tensors(path: Path, source: str) -> Any:
    """Load the content of a weights file. Its first bytes say what it is, and nothing in it is executed.

    Raises:
        ValueError: It is damaged, no weights file, or a pickle of more than tensors and plain values.
    """
    with path.open("rb") as file:
        head = file.read(32)
    named = [] if head[:2] != b"PK" else _zip_names(path, source)
    if any(name.endswith("/constants.pkl") for name in named):
        raise ValueError(
            f"{source} is a TorchScript program. Where you trust the file, save its tensors alone: "
            f'python -c "import torch; torch.save(torch.jit.load({str(path)!r}).state_dict(), '
            "'weights.pth')\", and give weights.pth"
        )
    if not (named or head[:1] == b"\x80" or head[8:9] == b"{") or any(
        name.endswith(".npy") for name in named
    ):
        begins = f"it begins with {head!r}" if head else "it is empty"
        remedy = (
            "fetch it with git lfs pull" if head.startswith(b"version https") else "get it again"
        )
        raise ValueError(f"{source} is no safetensors or torch file: {begins}; {remedy}")
    arrays: Any = np._core.multiarray  # type: ignore[attr-defined]
    harmless: list[Any] = [  # arguments and results, which files keep beside the weights
        argparse.Namespace,
        np.dtype,
        np.ndarray,
        arrays.scalar,
        arrays._reconstruct,
    ]
    harmless += [type(np.dtype(kind)) for kind in ("float64", "float32", "int64", "int32", "bool")]
    try:
        if head[8:9] == b"{" and not named:
            return load_file(path)
        with torch.serialization.safe_globals(harmless), path.open("rb") as file:
            return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # unpickling arbitrary bytes raises anything
        text = str(error)
        if "Unsupported global" in text or "Weights only load failed" in text:
            named_type = text.partition("GLOBAL ")[2].split(" ")[0].rstrip(".,")
            holds = f"Python objects ({named_type})" if named_type else "Python objects"
            raise ValueError(
                f"{source} holds {holds} beside its tensors, and unpickling those can run any program. Where you trust the file, "
                f'keep its tensors alone: python -c "import torch; torch.save(torch.load({str(path)!r}, weights_only=False)'
                "['state_dict'], 'weights.pth')\", with the key that it has, or .state_dict() for a whole network, and give "
                "weights.pth"
            ) from None
        raise ValueError(
            f"{source} is not a readable weights file ({type(error).__name__}: {text.splitlines()[0] if text else ''})"
        ) from None


def _zip_names(path: Path, source: str) -> list[str]:
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.namelist()
    except (zipfile.BadZipFile, OSError, ValueError) as error:
        raise ValueError(f"{source} is cut off or damaged ({error}); get it again") from None


def _weights(content: Any) -> Weights:
    if not isinstance(content, Mapping):
        return {}
    return {str(key): value for key, value in content.items() if isinstance(value, Tensor)}


def _places(content: Any, where: str = "", depth: int = 5) -> Iterator[tuple[str, Weights]]:
    """Every mapping with tensors in a file, with its dotted key. The file itself has an empty one."""
    if weights := _weights(content):
        yield where, weights
    if isinstance(content, Mapping) and depth:
        for name, inner in content.items():
            yield from _places(inner, f"{where}.{name}".lstrip("."), depth - 1)


def _preference(where: str) -> list[int] | None:
    """Sort key of a dotted key whose names are all usual ones, None for any other."""
    names = where.split(".") if where else []
    return [NESTED.index(name) for name in names] if all(name in NESTED for name in names) else None


def _outline(content: Any, places: list[tuple[str, Weights]]) -> str:
    """Describe where a file has tensors, else what it has."""
    if places:
        most = sorted(places, key=lambda place: -len(place[1]))[:5]
        return "it has tensors at " + ", ".join(
            f"{where or 'its top'!r} ({len(weights)})" for where, weights in most
        )
    if not isinstance(content, Mapping):
        return f"it holds a {type(content).__name__}"
    return f"the file has: {', '.join(map(str, list(content)[:12]))}"


def match(model: nn.Module, weights: Weights, prefix: str | None = None) -> Match | str:
    """Find the model's tensors in `weights`. Returns what is wrong, as text, if they are not there.

    Args:
        model: A timm model. Its state dict says which keys are wanted.
        weights: Tensors of any names.
        prefix: Prefix of the model's keys. None: it is searched.
    """
    candidates = [prefix] if prefix is not None else prefixes(weights, model)
    mismatches: list[Mismatch] = []
    for convert in (False, True):
        fitting: dict[str, Match] = {}
        for each in candidates:
            result = _under(model, weights, each, convert)
            if isinstance(result, Match):
                fitting[each] = result
            else:
                mismatches.append(result)
        if fitting:
            return _choose(fitting)
    nothing = Mismatch("none of its tensors")
    return min(mismatches, key=lambda mismatch: mismatch.num_problems, default=nothing).text


def prefixes(weights: Iterable[str], model: nn.Module) -> list[str]:
    """Prefixes with at least half as many keys as the model has, the preferred ones first."""
    counts: dict[str, int] = {}
    for key in weights:
        parts = key.split(".")
        for depth in range(min(DEPTH, len(parts) - 1) + 1):
            prefix = "".join(f"{part}." for part in parts[:depth])
            counts[prefix] = counts.get(prefix, 0) + 1
    enough = len(model.state_dict()) / 2
    return sorted(
        (prefix for prefix, count in counts.items() if count >= enough or not prefix), key=_rank
    )


def _rank(prefix: str) -> tuple[int, str]:
    words = [word for word in prefix.split(".") if word]
    ranks = [PREFERRED.index(word) for word in words if word in PREFERRED]
    known = len(ranks) == len(words)
    decisive = [rank for rank in ranks if PREFERRED[rank] not in ("backbone", "model", "module")]
    return (min(decisive, default=0) if known else len(PREFERRED), prefix)


def _choose(fitting: dict[str, Match]) -> Match | str:
    names = sorted(fitting, key=_rank)
    best = names[0]
    if (
        len(names) > 1
        and _rank(names[1])[0] == _rank(best)[0]
        and not _equal(fitting[best], fitting[names[1]])
    ):
        return f"several networks in it fit, under {', '.join(map(repr, names))}; choose one with backbone.init_prefix"
    others = [f"another network under {name!r} left out" for name in names[1:]]
    return Match(fitting[best].weights, [*fitting[best].notes, *others])


def _equal(first: Match, second: Match) -> bool:
    return all(
        torch.equal(value, second.weights[key])
        for key, value in first.weights.items()
        if not value.is_meta
    )


def _under(model: nn.Module, weights: Weights, prefix: str, convert: bool) -> Match | Mismatch:
    own = model.state_dict()
    inside = {
        key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)
    }
    notes = [f"prefix {prefix!r}"] if prefix else []
    outside = len(weights) - len(inside)
    if outside:
        notes.append(f"{outside} tensors outside it left out")
    if convert:
        converted = _converted(model, inside)
        if converted is None:
            return Mismatch("timm has no converter for it")
        notes += _changes(inside, converted)
        inside = converted
    missing = [key for key in own if key not in inside and not key.endswith("num_batches_tracked")]
    reshaped = [key for key in own if key in inside and inside[key].shape != own[key].shape]
    extra = [key for key in inside if key not in own]
    beside = [key for key in extra if inside[key].ndim == 0 or _is_beside(model, key)]
    unexpected = [key for key in extra if key not in beside]
    if missing or unexpected or reshaped:
        shapes = [
            f"{key} {tuple(inside[key].shape)} for {tuple(own[key].shape)}" for key in reshaped
        ]
        text = listed(sorted(missing), sorted(unexpected), sorted(shapes))
        return Mismatch(text, len(missing) + len(unexpected) + len(shapes))
    quantized = [
        key
        for key in own
        if key in inside
        and own[key].is_floating_point()
        and not (inside[key].is_floating_point() and inside[key].isfinite().all())
    ]
    if quantized:
        text = f"{_named(sorted(quantized))}: values that are not finite, or integers where the network has none"
        return Mismatch(text, len(quantized))
    if beside:
        notes.append(f"left out {_named(sorted(beside))}")
    counters = {key: own[key] for key in own if key not in inside}
    return Match({**{key: inside[key] for key in own if key in inside}, **counters}, notes)


def _is_beside(model: nn.Module, key: str) -> bool:
    """Return True for a key of a classifier, of a decoder, or of a module that the model does not have."""
    cfg = getattr(model, "pretrained_cfg", None) or {}
    names = cfg.get("classifier") or ()
    names = (names,) if isinstance(names, str) else tuple(names)
    if any(key == name or key.startswith(f"{name}.") for name in names):
        return True
    first, dot, _ = key.partition(".")
    if first.startswith(BESIDE):
        return True
    if first in CLASSIFIERS:
        return not any(own.startswith(f"{first}.") for own in model.state_dict())
    return bool(dot) and getattr(model, first, None) is None


def _converted(model: nn.Module, weights: Weights) -> Weights | None:
    """The weights after timm's converter for this model, which renames keys and resamples positions."""
    renamed = torchvision_names.rename(weights)
    module = sys.modules[type(model).__module__]
    convert = next((getattr(module, name) for name in CONVERTERS if hasattr(module, name)), None)
    if convert is None:
        return None
    try:
        with torch.device("cpu"):
            arguments = (dict(renamed), model)[: len(inspect.signature(convert).parameters)]
            return _weights(convert(*arguments))
    except Exception:  # a converter may fail in any way on files that timm does not know
        return None


def _changes(before: Weights, after: Weights) -> list[str]:
    resized = [
        f"{key} resampled from {tuple(before[key].shape)} to {tuple(value.shape)}"
        for key, value in after.items()
        if key in before and before[key].shape != value.shape
    ]
    renamed = sum(key not in before for key in after)
    notes = resized[:3] + ([f"and {len(resized) - 3} more"] if len(resized) > 3 else [])
    return notes + ([f"{renamed} names converted"] if renamed else [])


def listed(missing: list[str], unexpected: list[str], reshaped: list[str]) -> str:
    """`2 missing (a, b); 1 of another shape (...)`."""
    groups = (("missing", missing), ("unexpected", unexpected), ("of another shape", reshaped))
    return "; ".join(f"{len(keys)} {what} ({_some(keys)})" for what, keys in groups if keys)


def _some(keys: list[str]) -> str:
    return ", ".join(keys[:3]) + (", ..." if len(keys) > 3 else "")


def _named(keys: list[str]) -> str:
    return _some(keys) if len(keys) <= 3 else f"{len(keys)} tensors ({_some(keys)})"
