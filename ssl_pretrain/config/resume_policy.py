"""Compare the configuration of a resumed run with that of its checkpoint."""

import dataclasses
import typing
import warnings
from pathlib import Path
from typing import Any

from ssl_pretrain import schema
from ssl_pretrain.config.loading import from_dict, to_dict
from ssl_pretrain.config.run_config import RunConfig
from ssl_pretrain.schema import ResumePolicy
from ssl_pretrain.schema.config_file import ConfigError
from ssl_pretrain.views.recipe import Crop


def check_resume_config(saved_config: dict[str, Any], config: RunConfig, path: str) -> None:
    """Refuse to resume a checkpoint with a configuration that would change the results.

    The `on_resume` policy of a key decides whether its value may differ. A key that the saved
    configuration lacks, because an older version wrote it, is compared by its default.

    Args:
        saved_config: Configuration in the checkpoint's manifest.
        config: Configuration to resume with.
        path: Folder of the checkpoint, for the error message.

    Raises:
        ConfigError: If a key that must stay the same differs. The message lists all such keys.
    """
    old_values = schema.flatten(schema.rename_keys(saved_config, path))
    new_values = schema.flatten(to_dict(config))
    old_values = _default_values(config, old_values, new_values) | old_values
    differences = {
        key: f"{key} was {old_values.get(key)!r} and is now {new_values.get(key)!r}"
        for key in sorted(old_values.keys() | new_values.keys())
        if old_values.get(key) != new_values.get(key)
    }
    policies = {key: resume_policy(key, type(config.method)) for key in differences}
    conflicts = [text for key, text in differences.items() if policies[key] == "same"]
    if conflicts:
        raise ConfigError(
            f"{path} was saved with a different configuration: {'; '.join(conflicts)}. "
            "Choose a new output, or start a new run from its weights with "
            f"backbone.init={Path(path).parent.parent}"
        )
    for key, text in differences.items():
        if policies[key] == "warn":
            warnings.warn(f"{text}; the schedule changes from this step on", stacklevel=2)


def _default_values(
    config: RunConfig, old_values: dict[str, Any], new_values: dict[str, Any]
) -> dict[str, Any]:
    """Return the defaults of the new configuration's keys.

    They include the options of every crop that the saved run has. A crop that the saved run lacks
    has no defaults, so adding one counts as a difference.
    """
    defaults = schema.flatten(to_dict(from_dict({"method": {"name": config.method.name}})))
    defaults = {key: value for key, value in defaults.items() if key in new_values}
    for name in config.views.crops:
        options = schema.flatten(dataclasses.asdict(Crop()), f"views.crops.{name}.")
        if options.keys() & old_values.keys():
            defaults |= options
    return defaults


def resume_policy(key: str, method_config: type) -> ResumePolicy:
    """Return the policy of a dotted key. A section's policy applies to all of its keys.

    Args:
        key: Dotted key, such as `optim.base_lr`.
        method_config: Config class of the run's method.
    """
    section: Any = RunConfig
    for name in key.split("."):
        if not dataclasses.is_dataclass(section):
            break
        section = typing.cast(type, section)
        policy: ResumePolicy = schema.field_metadata(section, name).get("on_resume", "same")
        if policy != "same":
            return policy
        section = method_config if name == "method" else schema.field_types(section).get(name)
    return "same"
