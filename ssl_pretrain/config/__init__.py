"""The configuration of a run: its settings, and how they are read, checked and compared."""

from ssl_pretrain.config.feasibility import (
    check,
    check_slurm_keys,
    configured_micro_batch_size,
    method_on_meta,
)
from ssl_pretrain.config.key_help import HelpAction, explain
from ssl_pretrain.config.loading import (
    NO_METHOD,
    ConfigError,
    from_dict,
    load,
    override,
    read_yaml,
    to_dict,
    to_yaml,
    without_method,
)
from ssl_pretrain.config.resume_policy import compare_for_resume
from ssl_pretrain.config.run_config import EvaluationConfig, LaunchConfig, PlanConfig, RunConfig

__all__ = [
    "NO_METHOD",
    "ConfigError",
    "EvaluationConfig",
    "HelpAction",
    "LaunchConfig",
    "PlanConfig",
    "RunConfig",
    "check",
    "check_slurm_keys",
    "compare_for_resume",
    "configured_micro_batch_size",
    "explain",
    "from_dict",
    "load",
    "method_on_meta",
    "override",
    "read_yaml",
    "to_dict",
    "to_yaml",
    "without_method",
]
