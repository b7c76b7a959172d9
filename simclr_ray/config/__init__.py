"""What a run is: typed, frozen, checked whole. Imports neither torch nor ray."""

from simclr_ray.config.loader import (
    YAML_SUFFIXES,
    apply_overrides,
    differences,
    digest_of,
    dump_yaml,
    leaves,
    parse_overrides,
    parse_yaml,
    preset_names,
    read_tree,
    to_tree,
    validate,
)
from simclr_ray.config.schema import (
    Config,
    Field,
    PathOrURI,
    Scalar,
    Tree,
    absolute_path,
    identity,
    model_validator,
)
from simclr_ray.config.validation import nearest

__all__ = [
    "YAML_SUFFIXES",
    "Config",
    "Field",
    "PathOrURI",
    "Scalar",
    "Tree",
    "absolute_path",
    "apply_overrides",
    "differences",
    "digest_of",
    "dump_yaml",
    "identity",
    "leaves",
    "model_validator",
    "nearest",
    "parse_overrides",
    "parse_yaml",
    "preset_names",
    "read_tree",
    "to_tree",
    "validate",
]
