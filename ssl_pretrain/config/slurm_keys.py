"""Settings that only a submission to SLURM uses."""

from collections.abc import Sequence

from ssl_pretrain.config.loading import ConfigError
from ssl_pretrain.config.run_config import LaunchConfig, RunConfig

SLURM_KEYS = (  # names within the section `launch`
    *("nodes", "gpus_per_node", "cpus_per_rank", "memory_gb", "hours", "signal_seconds"),
    *("requeue", "chain", "partition", "account", "qos", "constraint"),
)


def check_slurm_keys(
    config: RunConfig, overrides: Sequence[str], reason: str, remedy: str, *, overrides_only: bool
) -> None:
    """Refuse SLURM keys if nothing is submitted to SLURM.

    Args:
        config: The configuration.
        overrides: The `key=value` arguments of the command line.
        reason: Reason why nothing is submitted, for the message.
        remedy: Remedy, for the message.
        overrides_only: Refuse the keys on the command line only, because a YAML that was written
            for a cluster may have them.

    Raises:
        ConfigError: If there are any. The message names each key and its value.
    """
    default, override_keys = LaunchConfig(), {text.partition("=")[0] for text in overrides}
    values = {
        f"launch.{key}": getattr(config.launch, key)
        for key in SLURM_KEYS
        if getattr(config.launch, key) != getattr(default, key)
    }
    if overrides_only:
        values = {key: value for key, value in values.items() if key in override_keys}
    if values:
        keys = ", ".join(f"{key}: {value}" for key, value in values.items())
        verb = "this is" if len(values) == 1 else "these are"
        raise ConfigError(f"{keys}: {verb} for SLURM, and {reason}; {remedy}")
