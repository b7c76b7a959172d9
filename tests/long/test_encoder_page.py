"""The commands and the Python of docs/encoders.md and docs/groups.md run as they are written."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torchvision
from PIL import Image

import simclr_ray as sr
from simclr_ray.data.shapes import render
from tests.long.test_commands import ADDED, Place
from tests.long.test_guides import SMALL
from tests.shell_blocks import blocks

pytestmark = [pytest.mark.long, pytest.mark.timeout(1800)]
NO_ARGUMENTS: dict[str, list[str]] = {
    "model register": [], "model promote": [], "model compare": [], "model rollback": [],
    "model rm": [],
}  # fmt: skip
VERSIONS = 4  # that the page's commands speak of


def drawn(index: int) -> tuple[Image.Image, int]:
    made = render(index, 7)
    return Image.fromarray(made.pixels), made.label


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    folder = tmp_path_factory.mktemp("encoders")
    for name, first in (("photos", 0), ("sorted", 200), ("held_out", 400), ("new", 600)):
        for index in range(first, first + 160):
            image, label = drawn(index)
            kind = f"class {label % 2}" if name in ("sorted", "held_out", "photos") else "."
            path = folder / name / kind / f"{index}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            image.save(path)
            if name == "photos":
                image.save(folder / name / f"{index}.jpg")
    for name in ("cat", "dog", "a"):
        drawn(3)[0].save(folder / f"{name}.jpg")
    rows = [(image_bytes(index), f"p{index // 2}") for index in range(160)]
    table = pa.table({"image": [row[0] for row in rows], "patient": [row[1] for row in rows]})
    pq.write_table(table, folder / "clinic.parquet")
    for index in range(160):
        path = folder / "scenes" / f"scene {index // 4}" / f"{index}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        drawn(index)[0].save(path)
    added = ADDED | NO_ARGUMENTS | {"pretrain": SMALL}
    return Place(folder, added)


def image_bytes(index: int) -> bytes:
    out = io.BytesIO()
    drawn(index)[0].save(out, "JPEG")
    return out.getvalue()


def block_with(page: str, *words: str) -> str:
    (block,) = (b for b in blocks(page) if all(word in b for word in words))
    return block


def test_from_images_to_classes(place: Place) -> None:
    place.run(block_with("docs/encoders.md", "> classes.tsv"))
    lines = (place.folder / "classes.tsv").read_text().splitlines()
    assert len([line for line in lines if ".jpg" in line]) == 160


@pytest.fixture(scope="module")
def run(place: Place) -> str:
    """Return the run that the first block has left."""
    if not list(place.folder.glob("runs/photos-????????")):
        place.run("simclr-ray pretrain photos_cpu data.train=photos name=photos")
    return next(place.folder.glob("runs/photos-????????")).relative_to(place.folder).as_posix()


@pytest.fixture(scope="module")
def registered(place: Place) -> None:
    """Have versions of a model, all scored on the same images, of which the second is champion."""
    for seed in range(VERSIONS):
        place.run(
            "simclr-ray pretrain photos_cpu data.train=sorted data.test=held_out name=enc "
            f"registry.name=enc seed={seed}"
        )
    place.run("simclr-ray model promote models:/enc/1 champion")
    place.run("simclr-ray model promote models:/enc/2 champion")


def test_the_python_of_an_encoder(place: Place, run: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place.folder)
    (text,) = blocks("docs/encoders.md", "python")
    image = drawn(5)[0]
    names: dict[str, Any] = {
        "sr": sr, "torchvision": torchvision, "image_bytes": image_bytes(5),
        "pillow_image": image, "uint8_array": np.asarray(image), "batch": torch.rand(2, 3, 32, 32),
    }  # fmt: skip
    text = text.replace("runs/photos-1a2b3c4d", run).replace('"photos"', '"sorted"')
    first, second = text.split("\n", 2)[:2], text.split("\n", 2)[2]
    exec("\n".join(first), names)  # noqa: S102
    assert names["h"].shape == (4, names["encoder"].feature_dim)
    assert np.allclose(names["h"][1], names["h"][2], atol=0.2)
    exec(second, names)  # noqa: S102
    assert names["h"].shape == (2, names["encoder"].feature_dim)
    assert names["dataset"][0][0].shape[0] == 3


@pytest.mark.usefixtures("registered")
def test_a_whole_dataset(place: Place, run: str) -> None:
    (place.folder / "bucket").mkdir()
    (place.folder / "bucket" / "train").symlink_to(place.folder / "sorted")
    block = block_with("docs/encoders.md", "--keep label")
    place.run(block.replace("runs/photos-1a2b3c4d", run).replace("s3://bucket", "bucket"))
    kept = pq.read_table(place.folder / "bucket" / "train-embedded.parquet")
    assert kept.num_rows == 160
    assert {"label", "embedding", "error"} <= set(kept.column_names)


@pytest.mark.usefixtures("registered")
def test_versions_are_promoted_compared_and_rolled_back(place: Place) -> None:
    block = block_with("docs/encoders.md", "model rollback")
    # of an epoch on 160 images nothing is required
    place.run(block.replace("0.2 * se", "100 * se").replace("> 10", "> 1"))


def test_a_classifier(place: Place, run: str) -> None:
    block = block_with("docs/encoders.md", "--frozen", "new/*.jpg")
    fit, predict = block.strip().splitlines()
    place.run(fit.replace("runs/photos-1a2b3c4d", run))
    (made,) = place.folder.glob("runs/photos-frozen-10each-*")
    said = place.run(predict.replace("photos-frozen-10each-5e6f7a8b", made.name))
    assert said.count(".jpg") == 160


def test_groups(place: Place) -> None:
    place.run(block_with("docs/groups.md", "inspect"))
    assert list((place.folder / "data" / "scenes").glob("*.parquet"))


def test_the_python_of_a_table_of_labels(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (text,) = blocks("docs/images.md", "python")
    (tmp_path / "photos").mkdir()
    monkeypatch.chdir(tmp_path)
    files = sorted((place.folder / "photos").glob("*.jpg"))[:4]
    for file in files:
        (tmp_path / "photos" / file.name).write_bytes(file.read_bytes())
    listed = pd.DataFrame({"file": [f.name for f in files], "class": ["a", "b", "a", "b"]})
    listed.to_csv("photos/labels.csv", index=False)
    exec(text, {})  # noqa: S102
    place.run("simclr-ray inspect photos.parquet", cwd=tmp_path)
