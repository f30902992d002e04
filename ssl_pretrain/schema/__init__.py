"""Typed settings: dataclass fields with help, range and resume policy, read from YAML."""

from ssl_pretrain.schema.former_keys import RENAMED_KEYS, rename_key, rename_keys
from ssl_pretrain.schema.settings import (
    COSINE,
    DIMENSIONLESS,
    FRACTION,
    FRACTION_BELOW_ONE,
    JPEG_QUALITY,
    NON_NEGATIVE_FLOAT,
    NON_NEGATIVE_INT,
    NUM_THREADS,
    PERCENT,
    PORT,
    POSITIVE_FLOAT,
    POSITIVE_INT,
    ResumePolicy,
    check,
    field_metadata,
    field_types,
    setting,
)
from ssl_pretrain.schema.typed_values import build, declared_type, parse_override
from ssl_pretrain.schema.value_checks import check_choices, check_range
from ssl_pretrain.schema.yaml_tree import Scalar, flatten, merge, nest, parse_yaml, value_at

__all__ = [
    "COSINE",
    "DIMENSIONLESS",
    "FRACTION",
    "FRACTION_BELOW_ONE",
    "JPEG_QUALITY",
    "NON_NEGATIVE_FLOAT",
    "NON_NEGATIVE_INT",
    "NUM_THREADS",
    "PERCENT",
    "PORT",
    "POSITIVE_FLOAT",
    "POSITIVE_INT",
    "RENAMED_KEYS",
    "ResumePolicy",
    "Scalar",
    "build",
    "check",
    "check_choices",
    "check_range",
    "declared_type",
    "field_metadata",
    "field_types",
    "flatten",
    "merge",
    "nest",
    "parse_override",
    "parse_yaml",
    "rename_key",
    "rename_keys",
    "setting",
    "value_at",
]
