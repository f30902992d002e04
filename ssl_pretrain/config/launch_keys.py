"""Refuse keys of the section `launch` in commands that do not use them."""

import os
from collections.abc import Sequence

from ssl_pretrain import schema
from ssl_pretrain.config.run_config import LaunchConfig, RunConfig
from ssl_pretrain.schema.config_file import ConfigError
from ssl_pretrain.system import program

SLURM_KEYS = (  # keys that only a submission to SLURM uses
    *("nodes", "gpus_per_node", "cpus_per_rank", "memory_gb", "hours", "signal_seconds"),
    *("requeue", "chain", "partition", "account", "qos", "constraint"),
)
MACHINE_KEYS = ("ranks", "max_restarts", "hosts", "port")  # keys that start ranks without SLURM


def check_slurm_keys(
    config: RunConfig, overrides: Sequence[str], reason: str, remedy: str, *, overrides_only: bool
) -> None:
    """Refuse keys that only a submission to SLURM uses, in a command that submits nothing.

    Args:
        config: The configuration.
        overrides: The `key=value` arguments of the command line.
        reason: Reason why nothing is submitted, for the message.
        remedy: Remedy for the message.
        overrides_only: Refuse the keys only on the command line. A YAML that was written for a
            cluster may have them.

    Raises:
        ConfigError: If such a key does not have its default value.
    """
    changes = _describe_changes(config, SLURM_KEYS, overrides if overrides_only else None)
    if changes:
        keys = "this key" if len(changes) == 1 else "these keys"
        raise ConfigError(
            f"{', '.join(changes)}: only SLURM jobs use {keys}, and {reason}; {remedy}"
        )


def check_training_overrides(config: RunConfig, overrides: Sequence[str]) -> None:
    """Refuse overrides of `launch` in the command that trains in its own process.

    A YAML may have such keys, because the same file is used with the launcher. Launchers and jobs
    pass them on, and a rank of torchrun accepts those that started the ranks.

    Args:
        config: The configuration.
        overrides: The `key=value` arguments of the command line.

    Raises:
        ConfigError: If an override sets such a key to another value than its default.
    """
    if "SLURM_JOB_ID" in os.environ:
        return
    launcher = program.command("pretrain")
    reason, remedy = "this command submits nothing", f"use `{launcher}`, or remove such keys"
    check_slurm_keys(config, overrides, reason, remedy, overrides_only=True)
    if program.is_launched():
        return
    keys = () if "RANK" in os.environ else MACHINE_KEYS
    if config.launch.cluster == "slurm":
        keys = ("cluster", *keys)
    changes = _describe_changes(config, keys, overrides)
    if changes:
        subject = "this key" if len(changes) == 1 else "these keys"
        raise ConfigError(
            f"{', '.join(changes)}: only `{launcher}` uses {subject}, and this command trains in "
            f"its own process; use `{launcher}`, or remove {subject}"
        )


def _describe_changes(
    config: RunConfig, keys: Sequence[str], overrides: Sequence[str] | None
) -> list[str]:
    """Return `launch.KEY: VALUE` for the keys that differ from their default.

    With `overrides`, only the keys that these set are considered.
    """
    default, overridden = LaunchConfig(), None if overrides is None else _launch_keys(overrides)
    return [
        f"launch.{key}: {value}"
        for key in keys
        if (value := getattr(config.launch, key)) != getattr(default, key)
        and (overridden is None or f"launch.{key}" in overridden)
    ]


def _launch_keys(overrides: Sequence[str]) -> set[str]:
    """Return the keys of the section that overrides set, one by one or as a whole section."""
    pairs = [text.partition("=")[::2] for text in overrides if text.startswith("launch")]
    return {
        name
        for key, value in pairs
        for name in schema.flatten(schema.parse_override(RunConfig, key, value, {}))
    }
