"""What a registered model is called, and which there are."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final, NamedTuple

from simclr_ray.errors import ConfigError

if TYPE_CHECKING:
    from mlflow import MlflowClient

_MODEL_URI: Final = re.compile(r"models:/+([^/@]+)(?:@([^/@]+)|/(\d+|(?i:latest)))")
MOST_NAMED: Final = 20


class ModelAddress(NamedTuple):
    """A registered model's name, and one of alias and version (`latest` or a number)."""

    name: str
    alias: str
    version: str


def what_there_is(client: MlflowClient, name: str) -> str:
    """Return why a model is not found: which names there are, or which versions of its name."""
    versions = client.search_model_versions(f"name = '{name}'", max_results=MOST_NAMED)
    if versions:
        numbers = ", ".join(str(v.version) for v in versions)
        aliases = client.get_registered_model(name).aliases
        called = f", aliases {', '.join(sorted(aliases))}" if aliases else ""
        return f"there is none; {name} has the versions {numbers}{called}"
    models = client.search_registered_models(max_results=MOST_NAMED)
    names = ", ".join(model.name for model in models) or "none"
    return f"there is no registered model {name!r}; the store has: {names}"


def model_address(where: str) -> ModelAddress:
    """Return the parts of `models:/name@alias`, `models:/name/3` or `models:/name/latest`.

    Raises:
        ConfigError: `where` has another form.
    """
    match = _MODEL_URI.fullmatch(where)
    if match is None:
        problem = "the form is models:/name@alias or models:/name/version"
        raise ConfigError.of(where, problem)
    name, alias, version = match.groups(default="")
    return ModelAddress(name, alias, version.lower())
