"""Find the tensors of a backbone among published weights.

Every key of the network must be present with the right shape, under one common prefix. Other
networks, classifiers and decoders in the file are left out and reported. timm's models come with
converters, which rename the tensors of other code bases and resample the position embeddings of
other image sizes.
"""

import inspect
import math
import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from ssl_pretrain.models import torchvision_names
from ssl_pretrain.models.weights_file import Weights, named_tensors

# Words of a prefix, most preferred first, for files with several networks that fit.
PREFERRED_WORDS = (
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
PRETRAINING_ONLY = ("mask_token", "masked_embed", "decoder")  # in MAE, iBOT and DINOv2
# Functions in timm's modules that convert weights.
CONVERTERS = ("checkpoint_filter_fn", "_filter_fn", "_filter_torchvision_pretrained")
MAX_PREFIX_WORDS = 4  # as in module.teacher.backbone.model


@dataclass
class Match:
    """The tensors of a network under its own names, and notes on what was left out or converted."""

    weights: Weights
    notes: list[str]


@dataclass
class Mismatch:
    """Description and number of the tensors under a prefix that do not fit a network."""

    description: str
    num_problems: float = math.inf


def match_weights(model: nn.Module, weights: Weights, prefix: str | None = None) -> Match | str:
    """Find the model's tensors in `weights`, or return a description of why they do not fit.

    Args:
        model: A timm model, whose state dict has the keys to find.
        weights: Tensors under any names.
        prefix: Prefix of the model's keys, or None to search for it.
    """
    candidates = [prefix] if prefix is not None else candidate_prefixes(weights, model)
    mismatches = [Mismatch("none of its tensors were found")]
    for convert in (False, True):
        results = {
            candidate: _match_prefix(model, weights, candidate, convert) for candidate in candidates
        }
        matches = {key: result for key, result in results.items() if isinstance(result, Match)}
        if matches:
            return _choose(matches)
        mismatches += [result for result in results.values() if isinstance(result, Mismatch)]
    return min(mismatches, key=lambda mismatch: mismatch.num_problems).description


def candidate_prefixes(weights: Iterable[str], model: nn.Module) -> list[str]:
    """Return prefixes with at least half as many keys as the model has, preferred ones first."""
    counts: Counter[str] = Counter()
    for key in weights:
        *words, _ = key.split(".")
        for depth in range(min(MAX_PREFIX_WORDS, len(words)) + 1):
            counts["".join(f"{word}." for word in words[:depth])] += 1
    min_count = len(model.state_dict()) / 2
    return sorted(
        (prefix for prefix, count in counts.items() if count >= min_count or not prefix),
        key=_preference,
    )


def _preference(prefix: str) -> tuple[int, str]:
    """Return the sort key of a prefix. Prefixes with an unknown word are last."""
    words = [word for word in prefix.split(".") if word]
    if not all(word in PREFERRED_WORDS for word in words):
        return len(PREFERRED_WORDS), prefix
    specific_words = [word for word in words if word not in ("backbone", "model", "module")]
    return min(map(PREFERRED_WORDS.index, specific_words), default=0), prefix


def _choose(matches: dict[str, Match]) -> Match | str:
    best, *others = sorted(matches, key=_preference)
    if (
        others
        and _preference(others[0])[0] == _preference(best)[0]
        and not _equal(matches[best].weights, matches[others[0]].weights)
    ):
        return (
            f"several networks fit this backbone, under {', '.join(map(repr, (best, *others)))}; "
            "choose one with backbone.init_prefix"
        )
    notes = [f"another network under {other!r} left out" for other in others]
    return Match(matches[best].weights, matches[best].notes + notes)


def _equal(weights: Weights, others: Weights) -> bool:
    return all(torch.equal(w, others[key]) for key, w in weights.items() if not w.is_meta)


def _match_prefix(
    model: nn.Module, weights: Weights, prefix: str, convert: bool
) -> Match | Mismatch:
    model_state = model.state_dict()
    tensors = {
        key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)
    }
    notes = [f"prefix {prefix!r}"] if prefix else []
    if num_outside := len(weights) - len(tensors):
        notes.append(f"{num_outside} tensors outside it left out")
    if convert:
        converted_tensors = _convert_by_timm(model, tensors)
        if converted_tensors is None:
            return Mismatch("timm has no converter for it")
        notes += _describe_changes(tensors, converted_tensors)
        tensors = converted_tensors
    present = [key for key in model_state if key in tensors]
    absent = [key for key in model_state if key not in tensors]
    missing = [key for key in absent if not key.endswith("num_batches_tracked")]
    reshaped = [
        f"{key} {tuple(tensors[key].shape)} for {tuple(model_state[key].shape)}"
        for key in present
        if tensors[key].shape != model_state[key].shape
    ]
    extra = [key for key in tensors if key not in model_state]
    ignorable = [key for key in extra if tensors[key].ndim == 0 or _is_ignorable(model, key)]
    unexpected = [key for key in extra if key not in ignorable]
    if missing or unexpected or reshaped:
        text = describe_mismatched_keys(sorted(missing), sorted(unexpected), sorted(reshaped))
        return Mismatch(text, len(missing) + len(unexpected) + len(reshaped))
    unusable = [
        key
        for key in present
        if model_state[key].is_floating_point()
        and not (tensors[key].is_floating_point() and tensors[key].isfinite().all())
    ]
    if unusable:
        text = (
            "invalid values (not finite, or integers instead of floating-point numbers) in "
            f"{_names_or_number(sorted(unusable))}"
        )
        return Mismatch(text, len(unusable))
    if ignorable:
        notes.append(f"left out {_names_or_number(sorted(ignorable))}")
    return Match(
        {key: tensors[key] for key in present} | {key: model_state[key] for key in absent}, notes
    )


def _is_ignorable(model: nn.Module, key: str) -> bool:
    """Return True for a key of a classifier, a decoder, or a module that the model lacks."""
    names = (getattr(model, "pretrained_cfg", None) or {}).get("classifier") or ()
    names = (names,) if isinstance(names, str) else tuple(names)
    first, dot, _ = key.partition(".")
    if first.startswith(PRETRAINING_ONLY) or any(f"{key}.".startswith(f"{n}.") for n in names):
        return True
    if first in CLASSIFIERS:
        return not any(name.startswith(f"{first}.") for name in model.state_dict())
    return bool(dot) and getattr(model, first, None) is None


def _convert_by_timm(model: nn.Module, weights: Weights) -> Weights | None:
    """Apply timm's converter for this model, which renames keys and resamples positions."""
    module = sys.modules[type(model).__module__]
    convert = next((getattr(module, name) for name in CONVERTERS if hasattr(module, name)), None)
    if convert is None:
        return None
    renamed_weights = torchvision_names.rename(weights)
    try:
        with torch.device("cpu"):
            arguments = (dict(renamed_weights), model)[: len(inspect.signature(convert).parameters)]
            return named_tensors(convert(*arguments))
    except Exception:  # a converter may fail in any way on files that timm does not know
        return None


def _describe_changes(before: Weights, after: Weights) -> list[str]:
    resized = [
        f"{key} resampled from {tuple(before[key].shape)} to {tuple(value.shape)}"
        for key, value in after.items()
        if key in before and before[key].shape != value.shape
    ]
    num_renamed = sum(key not in before for key in after)
    notes = resized[:3] + ([f"and {len(resized) - 3} more"] if len(resized) > 3 else [])
    return notes + ([f"{num_renamed} names converted"] if num_renamed else [])


def describe_mismatched_keys(missing: list[str], unexpected: list[str], reshaped: list[str]) -> str:
    """Describe keys that do not fit, such as `2 missing (a, b); 1 of another shape (...)`."""
    groups = {"missing": missing, "unexpected": unexpected, "of another shape": reshaped}
    return "; ".join(
        f"{len(keys)} {problem} ({_first_names(keys)})" for problem, keys in groups.items() if keys
    )


def _first_names(keys: list[str]) -> str:
    return ", ".join(keys[:3]) + (", ..." if len(keys) > 3 else "")


def _names_or_number(keys: list[str]) -> str:
    names = _first_names(keys)
    return names if len(keys) <= 3 else f"{len(keys)} tensors ({names})"
