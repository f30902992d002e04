"""Settings that only a submission to SLURM uses."""

from __future__ import annotations

from collections.abc import Sequence

from ssl_pretrain.config.loading import ConfigError
from ssl_pretrain.config.run_config import LaunchConfig, RunConfig

SLURM_KEYS = (  # of the section `launch`
    *("nodes", "gpus_per_node", "cpus_per_rank", "memory_gb", "hours", "signal_seconds"),
    *("requeue", "chain", "partition", "account", "qos", "constraint"),
)


def check_slurm_keys(
    config: RunConfig, overrides: Sequence[str], reason: str, remedy: str, *, typed_only: bool
) -> None:
    """Refuse the keys of SLURM if nothing is submitted to it.

    Args:
        config: The configuration.
        overrides: The `key=value` of the command line.
        reason: Why nothing is submitted, for the message.
        remedy: What to do instead.
        typed_only: Refuse them on the command line only. A YAML made for a cluster may have them.

    Raises:
        ConfigError: Names each such key and its value.
    """
    default, typed = LaunchConfig(), {override.partition("=")[0] for override in overrides}
    values = {
        f"launch.{key}": getattr(config.launch, key)
        for key in SLURM_KEYS
        if getattr(config.launch, key) != getattr(default, key)
    }
    if typed_only:
        values = {key: value for key, value in values.items() if key in typed}
    if values:
        keys = ", ".join(f"{key}: {value}" for key, value in values.items())
        verb = "this is" if len(values) == 1 else "these are"
        raise ConfigError(f"{keys}: {verb} for SLURM, and {reason}; {remedy}")
