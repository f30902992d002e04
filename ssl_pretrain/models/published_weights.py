"""Find the tensors of a backbone among weights that others published.

All keys of the network have to be there, under one common prefix, in their shapes. Everything
else is left out and reported: other networks of the same file, a classifier, a decoder. The
converter that timm ships with each of its models renames the tensors of other code bases and
resamples positions of another image size.
"""

import inspect
import math
import sys
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from ssl_pretrain.models import torchvision_names
from ssl_pretrain.models.weights_file import Weights, named_tensors

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


def match(model: nn.Module, weights: Weights, prefix: str | None = None) -> Match | str:
    """Find the model's tensors in `weights`, or return a text that says what is wrong with them.

    Args:
        model: A timm model. Its state dict has the keys that are needed.
        weights: Tensors of any names.
        prefix: Prefix of the model's keys. None to search for it.
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
    """Return prefixes with at least half as many keys as the model has, preferred ones first."""
    counts: dict[str, int] = {}
    for key in weights:
        names = key.split(".")
        for depth in range(min(DEPTH, len(names) - 1) + 1):
            prefix = "".join(f"{name}." for name in names[:depth])
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
        return (
            f"several networks in it fit, under {', '.join(map(repr, names))}; "
            "choose one with backbone.init_prefix"
        )
    others = [f"another network under {name!r} left out" for name in names[1:]]
    return Match(fitting[best].weights, [*fitting[best].notes, *others])


def _equal(first: Match, second: Match) -> bool:
    return all(
        torch.equal(value, second.weights[key])
        for key, value in first.weights.items()
        if not value.is_meta
    )


def _under(model: nn.Module, weights: Weights, prefix: str, convert: bool) -> Match | Mismatch:
    expected = model.state_dict()
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
    missing = [
        key for key in expected if key not in inside and not key.endswith("num_batches_tracked")
    ]
    reshaped = [
        key for key in expected if key in inside and inside[key].shape != expected[key].shape
    ]
    extra = [key for key in inside if key not in expected]
    beside = [key for key in extra if inside[key].ndim == 0 or _is_beside(model, key)]
    unexpected = [key for key in extra if key not in beside]
    if missing or unexpected or reshaped:
        shapes = [
            f"{key} {tuple(inside[key].shape)} for {tuple(expected[key].shape)}" for key in reshaped
        ]
        text = listed(sorted(missing), sorted(unexpected), sorted(shapes))
        return Mismatch(text, len(missing) + len(unexpected) + len(shapes))
    quantized = [
        key
        for key in expected
        if key in inside
        and expected[key].is_floating_point()
        and not (inside[key].is_floating_point() and inside[key].isfinite().all())
    ]
    if quantized:
        text = (
            f"{_named(sorted(quantized))}: values that are not finite, or integers where the "
            "network has none"
        )
        return Mismatch(text, len(quantized))
    if beside:
        notes.append(f"left out {_named(sorted(beside))}")
    counters = {key: expected[key] for key in expected if key not in inside}
    return Match({**{key: inside[key] for key in expected if key in inside}, **counters}, notes)


def _is_beside(model: nn.Module, key: str) -> bool:
    """Return True for a key of a classifier, a decoder, or a module that the model lacks."""
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
    """Apply timm's converter for this model, which renames keys and resamples positions."""
    renamed = torchvision_names.rename(weights)
    module = sys.modules[type(model).__module__]
    convert = next((getattr(module, name) for name in CONVERTERS if hasattr(module, name)), None)
    if convert is None:
        return None
    try:
        with torch.device("cpu"):
            arguments = (dict(renamed), model)[: len(inspect.signature(convert).parameters)]
            return named_tensors(convert(*arguments))
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
    """Describe keys that do not fit, such as `2 missing (a, b); 1 of another shape (...)`."""
    groups = (("missing", missing), ("unexpected", unexpected), ("of another shape", reshaped))
    return "; ".join(f"{len(keys)} {what} ({_some(keys)})" for what, keys in groups if keys)


def _some(keys: list[str]) -> str:
    return ", ".join(keys[:3]) + (", ..." if len(keys) > 3 else "")


def _named(keys: list[str]) -> str:
    return _some(keys) if len(keys) <= 3 else f"{len(keys)} tensors ({_some(keys)})"
