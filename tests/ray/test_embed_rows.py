"""Embeddings of a dataset are those of its images one by one, whatever ends the work midway."""

from __future__ import annotations

import io
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from simclr_ray.errors import ConfigError, DataError
from simclr_ray.inference import embed_rows as module
from simclr_ray.inference.embed import load_encoder
from simclr_ray.inference.embed_rows import Embedded, embed_rows
from tests.formats.test_formats import HERE as FORMATS

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.usefixtures("ray_cluster")]

MODEL = str(FORMATS / "format_2")
ROWS = 300


def image(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (20, 20, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


def write_rows(path: Path, num: int = ROWS, group: int = 120, **more: Any) -> list[bytes]:
    images = [image(seed) for seed in range(num)]
    images[7] = b"no image"
    table = pa.table({"id": [3 * i for i in range(num)], "image": images, **more})
    pq.write_table(table, path, row_group_size=group)
    return images


def expected(images: list[bytes]) -> Any:
    return load_encoder(MODEL).embed(images, on_bad=lambda *_: None)


def stored(path: Path) -> tuple[pa.Table, Any]:
    """Return the table, and its embeddings as an array."""
    table = pq.read_table(path)
    return table, np.array(table["embedding"].to_pylist(), np.float32)


def test_a_parquet_has_a_row_an_image_in_order(tmp_path: Path) -> None:
    more: dict[str, Any] = {"shop": [f"s{i}" for i in range(ROWS)], "row": list(range(ROWS))}
    images = write_rows(tmp_path / "in.parquet", **more)
    told: list[tuple[int, int]] = []
    out = tmp_path / "out.parquet"
    made = embed_rows(
        MODEL, str(tmp_path / "in.parquet"), str(out), keep=["shop", "row"], batch_size=50,
        on_progress=lambda done, total: told.append((done, total)),
    )  # fmt: skip
    assert made == Embedded(ROWS, 1, [("21", "not an image")])
    table, embeddings = stored(out)
    assert table.column_names == ["id", "shop", "row", "embedding", "error"]
    assert table["id"].to_pylist() == [3 * i for i in range(ROWS)]
    assert table["shop"].to_pylist() == more["shop"]
    assert table["row"].to_pylist() == more["row"]
    assert [i for i, e in enumerate(table["error"].to_pylist()) if e] == [7]
    assert table.schema.field("embedding").type == pa.list_(pa.float32(), embeddings.shape[1])
    np.testing.assert_allclose(embeddings, expected(images), rtol=1e-5, atol=1e-6)
    assert told[0] == (0, ROWS)
    assert told[1] == (module.FIRST_ROWS, ROWS)  # some rows come early
    assert told[-1] == (ROWS, ROWS)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.parquet", "out.parquet"]


def test_half_the_bytes_are_the_same_numbers_rounded(tmp_path: Path) -> None:
    images = write_rows(tmp_path / "in.parquet", 40)
    out = tmp_path / "out.parquet"
    embed_rows(MODEL, str(tmp_path / "in.parquet"), str(out), dtype="float16")
    table, embeddings = stored(out)
    assert table.schema.field("embedding").type.value_type == pa.float16()
    np.testing.assert_allclose(embeddings, expected(images), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("listed", [False, True])
def test_files_have_their_paths(tmp_path: Path, listed: bool) -> None:
    (tmp_path / "photos" / "cats").mkdir(parents=True)
    names = ["b 1.png", "cats/a.png", "cats/c.png"]
    for seed, name in enumerate(names):
        (tmp_path / "photos" / name).write_bytes(image(seed))
    (tmp_path / "photos" / "cats" / "c.png").write_bytes(b"no image")
    where: Any = str(tmp_path / "photos")
    paths = names
    if listed:
        where = paths = [f"{tmp_path}/photos/{n}" for n in [*names[::-1], "none.png"]]
    out = tmp_path / "photos" / "out.parquet"  # beside the images
    made = embed_rows(MODEL, where, str(out))
    table, embeddings = stored(out)
    assert table["path"].to_pylist() == paths
    errors = dict(zip(paths, table["error"].to_pylist(), strict=True))
    assert errors[paths[names[::-1].index(names[0]) if listed else 0]] is None
    assert made.num_bad == 1 + listed
    place = paths.index(next(p for p in paths if p.endswith("b 1.png")))
    np.testing.assert_allclose(embeddings[place], expected([image(0)])[0], rtol=1e-5, atol=1e-6)
    assert {p.name for p in (tmp_path / "photos").iterdir()} == {"b 1.png", "cats", "out.parquet"}


KILLED = """
import sys
import ray
from simclr_ray.inference.embed_rows import embed_rows
ray.init(address=sys.argv[4], log_to_driver=False, logging_level="ERROR")
embed_rows(sys.argv[1], sys.argv[2], sys.argv[3], batch_size=50,
           on_progress=lambda done, total: print("rows", done, flush=True))
"""


def test_a_killed_run_goes_on_and_ends_as_an_undisturbed_one(
    tmp_path: Path, ray_cluster: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_rows(tmp_path / "in.parquet", 900)
    where, out = str(tmp_path / "in.parquet"), tmp_path / "out.parquet"
    root = Path(__file__).parents[2]
    run = subprocess.Popen(
        [sys.executable, "-c", KILLED, MODEL, where, str(out), ray_cluster],
        stdout=subprocess.PIPE, text=True, cwd=root,
        env=os.environ | {"PYTHONPATH": str(root)},
    )  # fmt: skip
    assert run.stdout is not None
    for line in run.stdout:
        if int(line.split()[1]) > 150:
            break
    run.send_signal(signal.SIGKILL)
    run.stdout.close()
    assert run.wait() == -signal.SIGKILL
    assert not out.exists()
    (parts,) = tmp_path.glob("out.parquet.parts-*")
    finished = {p.name: p.stat().st_mtime_ns for p in parts.glob("part-*")}
    assert 2 <= len(finished) < len(module.cut_pieces(module.open_rows(where, str(out))))
    told: list[int] = []
    joined = module._join

    def seen(fs: Any, names: Any, *rest: Any) -> None:
        assert {p.name: p.stat().st_mtime_ns for p in parts.glob("part-*")}.items() >= (
            finished.items()
        )
        joined(fs, names, *rest)

    monkeypatch.setattr(module, "_join", seen)
    embed_rows(MODEL, where, str(out), batch_size=50, on_progress=lambda d, _: told.append(d))
    monkeypatch.undo()
    assert told[0] > 150
    embed_rows(MODEL, where, str(tmp_path / "other.parquet"), batch_size=50)
    (one, numbers), (other, others) = stored(out), stored(tmp_path / "other.parquet")
    assert one.drop_columns(["embedding"]).equals(other.drop_columns(["embedding"]))
    np.testing.assert_array_equal(numbers, others)  # to the last bit


def test_what_is_finished_is_not_made_again_and_what_is_other_is_not_lost(tmp_path: Path) -> None:
    write_rows(tmp_path / "in.parquet", 40)
    where, out = str(tmp_path / "in.parquet"), str(tmp_path / "out.parquet")
    first = embed_rows(MODEL, where, out)
    before = (tmp_path / "out.parquet").stat().st_mtime_ns
    assert embed_rows(MODEL, where, out) == first
    assert (tmp_path / "out.parquet").stat().st_mtime_ns == before
    write_rows(tmp_path / "more.parquet", 41)
    for change in ({"where": str(tmp_path / "more.parquet")}, {"dtype": "float16"}):
        given: dict[str, Any] = {"model": MODEL, "where": where, "out": out} | change
        with pytest.raises(DataError, match="holds embeddings by another model or settings"):
            embed_rows(**given)
    assert (tmp_path / "out.parquet").stat().st_mtime_ns == before
    assert embed_rows(MODEL, str(tmp_path / "more.parquet"), out, overwrite=True).num_rows == 41
    with pytest.raises(DataError, match="holds other data"):
        embed_rows(MODEL, where, where)
    (tmp_path / "folder").mkdir()
    with pytest.raises(DataError, match="is a folder"):
        embed_rows(MODEL, where, str(tmp_path / "folder"))


def test_what_cannot_be_is_said_before_anything_is_written(tmp_path: Path) -> None:
    write_rows(tmp_path / "in.parquet", 20)
    where, out = str(tmp_path / "in.parquet"), str(tmp_path / "out.parquet")
    with pytest.raises(ConfigError, match="--keep: there is no column 'shop'; the columns: id"):
        embed_rows(MODEL, where, out, keep=["shop"])
    with pytest.raises(ConfigError, match="--keep: 'id' is written anyway"):
        embed_rows(MODEL, where, out, keep=["id"])
    with pytest.raises(ConfigError, match="holds no encoder"):
        embed_rows(str(tmp_path), where, out)
    with pytest.raises(DataError, match="no such"):
        embed_rows(MODEL, str(tmp_path / "none"), out)
    assert [p.name for p in tmp_path.iterdir()] == ["in.parquet"]


def test_no_image_at_all_leaves_no_numbers(tmp_path: Path) -> None:
    pq.write_table(pa.table({"image": [b"x", b"y", None]}), tmp_path / "in.parquet")
    made = embed_rows(MODEL, str(tmp_path / "in.parquet"), str(tmp_path / "out.parquet"))
    assert made.num_bad == 3
    table, embeddings = stored(tmp_path / "out.parquet")
    assert np.isnan(embeddings).all()
    assert table["error"].to_pylist() == ["not an image", "not an image", "null"]


def test_a_file_that_breaks_midway_is_named_and_what_is_done_stays(tmp_path: Path) -> None:
    write_rows(tmp_path / "in.parquet", 300, group=64)
    where, out = tmp_path / "in.parquet", str(tmp_path / "out.parquet")
    whole = where.read_bytes()
    shutil.copy(where, tmp_path / "kept")
    column = pq.ParquetFile(where).metadata.row_group(3).column(1)
    at = column.data_page_offset
    where.write_bytes(whole[:at] + b"\0" * 400 + whole[at + 400 :])
    with pytest.raises(DataError, match="row group 3 cannot be read"):
        embed_rows(MODEL, str(where), out)
    (parts,) = tmp_path.glob("out.parquet.parts-*")
    assert list(parts.glob("part-*"))
    where.write_bytes(whole)
    assert embed_rows(MODEL, str(where), out).num_rows == 300
