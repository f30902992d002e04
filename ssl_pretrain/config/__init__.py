"""The configuration of a run: its settings, and how they are read, checked and compared."""

from ssl_pretrain.config.channels import describe as describe_channels
from ssl_pretrain.config.feasibility import (
    build_method_on_meta,
    check,
    configured_micro_batch_size,
)
from ssl_pretrain.config.launch_keys import check_slurm_keys, check_training_overrides
from ssl_pretrain.config.loading import (
    NO_METHOD,
    apply_overrides,
    from_dict,
    load,
    to_dict,
    to_yaml,
    without_method,
)
from ssl_pretrain.config.method_assembly import (
    assemble_method,
    check_number_of_texts,
    pairs_images_with_texts,
    takes_images,
    text_lengths,
    text_settings,
)
from ssl_pretrain.config.resume_policy import check_resume_config
from ssl_pretrain.config.run_config import EvaluationConfig, LaunchConfig, PlanConfig, RunConfig
from ssl_pretrain.schema.config_file import ConfigError, read_yaml
from ssl_pretrain.schema.key_help import explain_key

__all__ = [
    "NO_METHOD",
    "ConfigError",
    "EvaluationConfig",
    "LaunchConfig",
    "PlanConfig",
    "RunConfig",
    "apply_overrides",
    "assemble_method",
    "build_method_on_meta",
    "check",
    "check_number_of_texts",
    "check_resume_config",
    "check_slurm_keys",
    "check_training_overrides",
    "configured_micro_batch_size",
    "describe_channels",
    "explain_key",
    "from_dict",
    "load",
    "pairs_images_with_texts",
    "read_yaml",
    "takes_images",
    "text_lengths",
    "text_settings",
    "to_dict",
    "to_yaml",
    "without_method",
]
