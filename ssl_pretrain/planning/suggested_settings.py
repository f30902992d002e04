"""Settings that were chosen for a data set and a machine, with a reason for each choice."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ssl_pretrain import config as configuration
from ssl_pretrain import schema
from ssl_pretrain.config import RunConfig


@dataclass
class Suggestion:
    """A suggested configuration.

    Attributes:
        tree: The settings, as a YAML has them.
        reasons: One sentence per setting that was chosen, by dotted key.
        expected_seconds: Expected time of the training on this machine.
    """

    tree: dict[str, Any]
    reasons: dict[str, str] = field(default_factory=dict)
    expected_seconds: float = 0.0

    def set(self, key: str, value: Any, reason: str = "") -> None:
        """Set a dotted key, with the reason for its value."""
        *sections, name = key.split(".")
        tree = self.tree
        for section in sections:
            tree = tree.setdefault(section, {})
        tree[name] = value
        if reason:
            self.reasons[key] = reason

    def get(self, key: str, default: Any = None) -> Any:
        """Return the value of a dotted key, or the default."""
        value = schema.value_at(self.tree, key)
        return default if value is None else value

    def cap(self, key: str, maximum: float, reason: str) -> None:
        """Lower a number to a maximum, with the reason. Do nothing if the key is absent."""
        value = self.get(key)
        if value is not None and value > maximum:
            self.set(key, type(value)(maximum), reason)

    def replace(self, settings: Mapping[str, Any]) -> None:
        """Replace choices by the settings of the caller, which are given as a tree."""
        self.tree = schema.merge(self.tree, settings)
        for key in self.reasons:
            if schema.value_at(settings, key) is not None:
                self.reasons[key] = "as given"

    def build(self) -> RunConfig:
        """Return the configuration of these settings."""
        return configuration.from_dict(self.tree, "the suggestion")

    def to_yaml(self) -> str:
        """Return the settings as YAML, with the reasons as comments."""
        return "\n".join(_yaml_lines(self.tree, self.reasons))


def describe_time(seconds: float) -> str:
    """Describe an expected time, without digits that mean nothing."""
    if seconds < 60:
        return f"about {max(1, round(seconds))} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"about {hours} h {minutes} min" if hours else f"about {minutes} min"


def _yaml_lines(tree: Mapping[str, Any], reasons: Mapping[str, str], key: str = "") -> list[str]:
    """Return the lines of a YAML, with the reasons as comments."""
    lines = []
    indent = "  " * (key.count(".") + bool(key))
    for name, value in tree.items():
        full_key = f"{key}.{name}".lstrip(".")
        if isinstance(value, Mapping) and value and full_key != "backbone.args":
            lines += [f"{indent}{name}:", *_yaml_lines(value, reasons, full_key)]
            continue
        comment = f"    # {reasons[full_key]}" if full_key in reasons else ""
        lines.append(f"{indent}{name}: {json.dumps(value)}{comment}")
    return lines
