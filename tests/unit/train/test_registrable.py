"""What is asked of a registered model is refused where there is none to do it to."""

from __future__ import annotations

import pytest

from simclr_ray.config.experiment import RegistryConfig
from simclr_ray.errors import ConfigError
from simclr_ray.train.registrable import check_registry


@pytest.mark.parametrize(
    ("given", "keys"),
    [
        ({"require": "knn_top1 > 0"}, ["registry.require"]),
        ({"alias": "best"}, ["registry.alias"]),
        ({"alias": "best", "require": "knn_top1 > 0"}, ["registry.alias", "registry.require"]),
        ({"name": "e", "require": "knn_top2 > 0"}, ["registry.require"]),
        ({"name": "e", "alias": "latest"}, ["registry.alias"]),
    ],
)
def test_what_would_be_passed_over_is_refused_by_its_key(
    given: dict[str, str], keys: list[str]
) -> None:
    with pytest.raises(ConfigError) as refused:
        check_registry(RegistryConfig(**given))
    assert [issue.path for issue in refused.value.issues] == keys


def test_a_model_with_a_rule_and_no_model_at_all_are_taken() -> None:
    check_registry(RegistryConfig())
    check_registry(RegistryConfig(name="e", alias="best", require="knn_top1 > 0"))
