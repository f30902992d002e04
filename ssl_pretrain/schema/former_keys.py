"""Accept former names of keys in YAML files, overrides and runs."""

import warnings
from collections.abc import Mapping
from copy import deepcopy
from typing import Any

from ssl_pretrain.schema.yaml_tree import Scalar, value_at

RENAMED_KEYS = {  # current key by former key, both in the same section
    "local_batch_size": "micro_batch_size",
    "method.centre_momentum": "method.center_momentum",
}
# Keys whose value no longer has an effect. None stands for every value of the key.
REMOVED_KEYS = {"plan.calibration": None, "plan.gpu": "here"}


def rename_keys(values: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Return the tree with the current names of its keys, and warn about former names.

    Args:
        values: The tree of a YAML file, or the values of a manifest.
        source: Name of the file, for the warning.

    Raises:
        ValueError: If a key is given under both names.
    """
    tree, notices = deepcopy(dict(values)), []
    for key in (*RENAMED_KEYS, *REMOVED_KEYS):
        section, _, name = key.rpartition(".")
        siblings = value_at(tree, section) if section else tree
        if not isinstance(siblings, dict) or name not in siblings:
            continue
        value = siblings[name].text if isinstance(siblings[name], Scalar) else siblings[name]
        if key in RENAMED_KEYS:
            new_name = RENAMED_KEYS[key].rpartition(".")[2]
            if new_name in siblings:
                raise ValueError(
                    f"{key} is the former name of {RENAMED_KEYS[key]}; give only the latter"
                )
            siblings[new_name] = siblings.pop(name)
            notices.append(f"{key} is now {RENAMED_KEYS[key]}")
        elif REMOVED_KEYS[key] in (None, value):
            del siblings[name]
            notices.append(f"{key}: {value} no longer has an effect")
    if notices:
        warnings.warn(f"{source}: {'; '.join(notices)}", stacklevel=3)
    return tree


def rename_key(key: str, value: str) -> str | None:
    """Return the current name of a command-line key, or None if it no longer has an effect.

    A former name is accepted with a warning.
    """
    if key in REMOVED_KEYS and REMOVED_KEYS[key] in (None, value):
        warnings.warn(f"{key}={value} no longer has an effect", stacklevel=3)
        return None
    if key in RENAMED_KEYS:
        warnings.warn(f"{key} is now {RENAMED_KEYS[key]}", stacklevel=3)
    return RENAMED_KEYS.get(key, key)
