"""Typed settings: dataclass fields with help, range and resume policy, read from YAML."""

from ssl_pretrain.schema.former_keys import RENAMED, present_key, rename_keys
from ssl_pretrain.schema.settings import (
    BELOW_ONE,
    COSINE,
    COUNT,
    FROM_ZERO,
    NOT_NEGATIVE,
    PERCENT,
    PORT,
    POSITIVE,
    QUALITY,
    SHARE,
    THREADS,
    Policy,
    check,
    hints,
    metadata,
    setting,
)
from ssl_pretrain.schema.typed_values import build, declared_type, override
from ssl_pretrain.schema.yaml_tree import Scalar, flatten, merge, parse_yaml, value_at

__all__ = [
    "BELOW_ONE",
    "COSINE",
    "COUNT",
    "FROM_ZERO",
    "NOT_NEGATIVE",
    "PERCENT",
    "PORT",
    "POSITIVE",
    "QUALITY",
    "RENAMED",
    "SHARE",
    "THREADS",
    "Policy",
    "Scalar",
    "build",
    "check",
    "declared_type",
    "flatten",
    "hints",
    "merge",
    "metadata",
    "override",
    "parse_yaml",
    "present_key",
    "rename_keys",
    "setting",
    "value_at",
]
