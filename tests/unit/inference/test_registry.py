"""What a registered model is called, and the image that it shows."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from simclr_ray import config as cfg
from simclr_ray.config.experiment import Experiment
from simclr_ray.errors import ConfigError, DataError
from simclr_ray.inference import registry
from simclr_ray.inference.model_address import model_address
from tests.ray.images import noise_png


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


def test_the_example_of_a_model_is_an_image_that_can_be_decoded(tmp_path: Path) -> None:
    good = noise_png(1, 8)
    pq.write_table(pa.table({"image": [None, b"no image", good]}), tmp_path / "a.parquet")
    tree = {"name": "t", "data": {"train": str(tmp_path)}}
    assert registry._example(cfg.validate(Experiment, tree)) == good
    pq.write_table(pa.table({"image": [None, b"no image"]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="none of its first 64 images can be decoded"):
        registry._example(cfg.validate(Experiment, tree))
