"""Folders as `datasets.save_to_disk` writes them are read by pyarrow alone."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from simclr_ray.config.experiment import ColumnsConfig
from simclr_ray.data.arrow_input import ArrowInput
from simclr_ray.data.inputs import open_input
from simclr_ray.data.items import Item
from simclr_ray.data.source import Source
from simclr_ray.errors import DataError

NAMES = ["zebra", "ant", "fox"]


def save(
    folder: Path, files: list[list[int | None]], *, image: str = "image", in_schema: bool = True
) -> Path:
    """Write labels by file, in batches of two; the image of row n is its number."""
    folder.mkdir(parents=True)
    features = {
        image: {"_type": "Image"},
        "label": {"names": NAMES, "_type": "ClassLabel"},
    }
    entries, number = [], 0
    for at, labels in enumerate(files):
        name = f"data-{at:05}-of-{len(files):05}.arrow"
        entries.append({"filename": name})
        here = range(number, number + len(labels))
        table = pa.table(
            {
                image: [{"bytes": str(n).encode(), "path": f"{n}.png"} for n in here],
                "label": pa.array(labels, pa.int64()),
            }
        )
        about = {"huggingface": json.dumps({"info": {"features": features}})}
        table = table.replace_schema_metadata(about if in_schema else None)
        with pa.ipc.new_stream(folder / name, table.schema) as writer:
            writer.write_table(table, max_chunksize=2)
        number += len(labels)
    (folder / "state.json").write_text(json.dumps({"_data_files": entries, "_fingerprint": "x"}))
    (folder / "dataset_info.json").write_text(json.dumps({"features": features}))
    return folder


def opened(what: object, split: str = "", limit: int = 0, **columns: str) -> ArrowInput:
    options: dict[str, Any] = {"root": "", "num_images": limit, "seed": 0}
    given = open_input(str(what), columns=ColumnsConfig(**columns), split=split, **options)
    assert isinstance(given, ArrowInput)
    return given


def items_of(given: ArrowInput, rows: int = 3) -> list[Item]:
    parts = pickle.loads(pickle.dumps(given.parts(rows, 0)))  # noqa: S301 - our own
    assert all(len(part.rows) <= rows for part in parts)
    return sorted(item for part in parts for item in part.read())


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("in_schema", [True, False])
def test_every_row_keeps_its_bytes_label_and_name(
    seed: int, in_schema: bool, tmp_path: Path
) -> None:
    rng = np.random.default_rng(seed)
    files: list[list[int | None]] = [
        [None if rng.random() < 0.2 else int(rng.integers(3)) for _ in range(rng.integers(1, 9))]
        for _ in range(rng.integers(1, 4))
    ]
    files[0][0] = 1
    given = opened(save(tmp_path / "set", files, in_schema=in_schema))
    labels = [label for file in files for label in file]
    assert given.class_names == tuple(NAMES)
    items = items_of(given, int(rng.integers(1, 7)))
    assert [item.id for item in items] == list(range(len(labels)))
    for item, label in zip(items, labels, strict=True):
        assert item.encoded == str(item.id).encode()
        assert item.path == f"{item.id}.png"
        assert item.label == (-1 if label is None else label)
    assert opened(f"file://{tmp_path}/set").identity == given.identity


def test_a_dict_is_asked_for_a_split(tmp_path: Path) -> None:
    for split, label in (("train", 0), ("test", 1)):
        save(tmp_path / "dict" / split, [[label, label]])
    (tmp_path / "dict/dataset_dict.json").write_text(json.dumps({"splits": ["train", "test"]}))
    with pytest.raises(DataError, match=r"splits test, train side by side: .*dict#train$"):
        opened(tmp_path / "dict")
    assert [item.label for item in items_of(opened(f"{tmp_path}/dict#train"))] == [0, 0]
    assert [item.label for item in items_of(opened(tmp_path / "dict", "test"))] == [1, 1]
    with pytest.raises(DataError, match="no split val; there are train, test"):
        opened(tmp_path / "dict", "val")
    with pytest.raises(DataError, match="without splits: split=test has no meaning"):
        opened(tmp_path / "dict/train", "test")
    for name, what in (("dict/train", "dict/train"), ("dict", "dict#SPLIT")):
        with pytest.raises(DataError, match=f"`datasets` saved, .* prepare .*/{what} OUT"):
            Source.open(f"{tmp_path}/{name}")
    (tmp_path / "dict/dataset_dict.json").write_text(json.dumps({"splits": ["test"]}))
    assert [item.label for item in items_of(opened(tmp_path / "dict"))] == [1, 1]


def test_the_only_image_column_is_taken_and_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = save(tmp_path / "set", [[0, 1, 2]], image="img")
    assert len(items_of(opened(folder))) == 3
    assert "images are of column 'img', the only one of them" in caplog.text
    assert len(items_of(opened(folder, limit=2, image="img", label=""))) == 2


def test_a_broken_or_missing_file_is_one_line(tmp_path: Path) -> None:
    folder = save(tmp_path / "set", [[0, 1], [2]])
    path = folder / "data-00001-of-00002.arrow"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(DataError, match=r"data-00001-of-00002\.arrow cannot be read"):
        opened(folder)
    path.unlink()
    with pytest.raises(DataError, match=r"data-00001-of-00002\.arrow cannot be read"):
        opened(folder)
