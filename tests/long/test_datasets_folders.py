"""Folders and parquet that the real `datasets` writes give its images, labels and class names.

They are written in an environment of its own, which sees the packages of this one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from simclr_ray.augment.decode import decode_image
from simclr_ray.config.experiment import ColumnsConfig
from simclr_ray.data.inputs import open_input
from tests.long.environments import make_environment

pytestmark = [pytest.mark.long, pytest.mark.timeout(900)]

PACKAGES = (
    *("datasets==5.2.0", "dill==0.4.1", "multiprocess==0.70.19", "xxhash==4.1.0"),
    *("huggingface_hub==2.4.0", "fsspec==2026.9.0", "hf_xet==1.8.0", "httpx2==2.16.2"),
    *("httpcore2==2.16.2", "truststore==0.10.5", "anyio==4.16.0", "h11==0.16.0", "idna==3.20"),
    *("tqdm==4.70.1", "pyyaml==6.0.4"),
)
WRITER = """
import sys
import datasets
import numpy as np
from PIL import Image

def images(count, first):
    values = range(first, first + count)
    pixels = [Image.fromarray(np.full((8, 8, 3), value, np.uint8)) for value in values]
    return datasets.Dataset.from_dict(
        {"image": pixels, "label": [value % 3 for value in values]},
        features=datasets.Features(
            {"image": datasets.Image(), "label": datasets.ClassLabel(names=["zebra", "ant", "fox"])}
        ),
    )

folder = sys.argv[1]
images(25, 0).save_to_disk(f"{folder}/one", num_shards=3)
datasets.DatasetDict(train=images(25, 0), test=images(5, 100)).save_to_disk(f"{folder}/dict")
images(25, 0).to_parquet(f"{folder}/clone/data/train-00000-of-00001.parquet")
images(5, 100).to_parquet(f"{folder}/clone/data/test-00000-of-00001.parquet")
"""


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("datasets")
    make_environment(folder, PACKAGES)("-c", WRITER, str(folder))
    return folder


@pytest.mark.parametrize(
    ("name", "split", "first", "count"),
    [
        ("one", "", 0, 25),
        ("dict", "train", 0, 25),
        ("dict", "test", 100, 5),
        ("clone", "train", 0, 25),
        ("clone", "test", 100, 5),
    ],
)
def test_what_datasets_writes_is_read(
    name: str, split: str, first: int, count: int, written: Path
) -> None:
    options: dict[str, Any] = {"root": "", "num_images": 0, "seed": 0}
    given = open_input(str(written / name), columns=ColumnsConfig(), split=split, **options)
    assert given.class_names == ("zebra", "ant", "fox")
    items = sorted(item for part in given.parts(10, 0) for item in part.read())
    assert [item.id for item in items] == list(range(count))
    for item in items:
        assert item.encoded is not None
        assert (np.asarray(decode_image(item.encoded)) == first + item.id).all()
        assert item.label == (first + item.id) % 3
