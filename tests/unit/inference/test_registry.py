"""What a registered model is called."""

from __future__ import annotations

import pytest

from simclr_ray.errors import ConfigError
from simclr_ray.inference.registry import model_address


@pytest.mark.parametrize(
    ("where", "parts"),
    [
        ("models:/m@newest", ("m", "newest", "")),
        ("models:/my-model/3", ("my-model", "", "3")),
        ("models:/m/Latest", ("m", "", "latest")),
    ],
)
def test_the_forms_of_a_model_address_are_told_apart(
    where: str, parts: tuple[str, str, str]
) -> None:
    assert model_address(where) == parts


@pytest.mark.parametrize("where", ["models:/m", "models:/m@", "models:/m/3/x", "m@newest"])
def test_another_form_of_address_is_refused_with_the_right_one(where: str) -> None:
    with pytest.raises(ConfigError, match="models:/name@alias"):
        model_address(where)
