"""The fields of an experiment."""

from musicgenre.config.base import (
    base_config,
    check_config,
    clip_layout,
    completed,
    dataset_options,
    differences,
    feature_spec,
    flatten,
    from_plain,
    store_path,
    to_plain,
)

__all__ = [
    "base_config",
    "check_config",
    "clip_layout",
    "completed",
    "dataset_options",
    "differences",
    "feature_spec",
    "flatten",
    "from_plain",
    "store_path",
    "to_plain",
]
