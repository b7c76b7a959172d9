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
from simclr_ray.inference.embed import load_encoder
from simclr_ray.inference.embed_input import open_rows
from simclr_ray.inference.embed_pieces import FIRST_ROWS, cut_pieces
from simclr_ray.inference.embed_rows import embed_rows
from simclr_ray.inference.embedding_file import EmbeddingFile, EmbedSummary, Origin, digest_of
from simclr_ray.storage.filesystem import filesystem
from simclr_ray.storage.run_folder import CONFIG_FILE
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


def expected(images: list[Any]) -> Any:
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
    assert made == EmbedSummary(ROWS, 1, [("21", "not an image")])
    table, embeddings = stored(out)
    assert table.column_names == ["id", "shop", "row", "embedding", "error"]
    assert table["id"].to_pylist() == [3 * i for i in range(ROWS)]
    assert table["shop"].to_pylist() == more["shop"]
    assert table["row"].to_pylist() == more["row"]
    assert [i for i, e in enumerate(table["error"].to_pylist()) if e] == [7]
    assert table.schema.field("embedding").type == pa.list_(pa.float32(), embeddings.shape[1])
    np.testing.assert_allclose(embeddings, expected(images), rtol=1e-5, atol=1e-6)
    origin = Origin.read(table.schema.metadata)
    assert (origin.encoder, origin.images) == (MODEL, str(tmp_path / "in.parquet"))
    assert origin.weights == load_encoder(MODEL).digest
    assert origin.columns["image"] == "image"
    assert origin.fingerprint
    assert told[0] == (0, ROWS)
    assert told[1] == (FIRST_ROWS, ROWS)  # some rows come early
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
        where = paths = [f"{tmp_path}/photos/{n}" for n in names[::-1]]
    out = tmp_path / "photos" / "out.parquet"  # beside the images
    made = embed_rows(MODEL, where, str(out))
    table, embeddings = stored(out)
    assert table["path"].to_pylist() == paths
    errors = [reason is None for reason in table["error"].to_pylist()]
    assert errors == ([False, True, True] if listed else [True, True, False])
    assert made.num_bad == 1
    with pytest.raises(DataError, match=r"none.png: no such file"):
        embed_rows(MODEL, [f"{tmp_path}/none.png"], str(tmp_path / "other.parquet"))
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
    finished = {p.name: p.stat().st_mtime_ns for p in parts.glob("rows-*")}
    assert 2 <= len(finished) < len(cut_pieces(open_rows(where, EmbeddingFile(str(out)))))
    told: list[int] = []
    write = EmbeddingFile.write

    def seen(*given: Any) -> None:
        assert {p.name: p.stat().st_mtime_ns for p in parts.glob("rows-*")}.items() >= (
            finished.items()
        )
        write(*given)

    monkeypatch.setattr(EmbeddingFile, "write", seen)
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


def test_a_folder_without_an_encoder_is_said_before_ray_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_rows(tmp_path / "in.parquet", 20)
    monkeypatch.setattr("simclr_ray.inference.embed_rows.connect", lambda: pytest.fail("started"))
    for model, files in {"empty": [], "run": [CONFIG_FILE], "other": ["step.txt"]}.items():
        (tmp_path / model).mkdir()
        for name in files:
            (tmp_path / model / name).write_text("name: run\n")
        with pytest.raises(ConfigError, match=f"{model} holds no encoder"):
            embed_rows(str(tmp_path / model), str(tmp_path / "in.parquet"), str(tmp_path / "out"))


def test_no_image_at_all_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    pq.write_table(pa.table({"image": [b"x", b"y", None]}), tmp_path / "in.parquet")
    with pytest.raises(DataError, match="none of 3 rows has an embedding: not an image"):
        embed_rows(MODEL, str(tmp_path / "in.parquet"), str(tmp_path / "out.parquet"))
    assert [p.name for p in tmp_path.iterdir()] == ["in.parquet"]


def test_rows_without_ids_are_numbered_and_ids_of_text_can_be_kept(tmp_path: Path) -> None:
    names = [f"id-{i}" for i in range(20)]
    pq.write_table(
        pa.table({"id": names, "image": [image(i) for i in range(20)]}), tmp_path / "in.parquet"
    )
    out = tmp_path / "out.parquet"
    embed_rows(MODEL, str(tmp_path / "in.parquet"), str(out), keep=["id"])
    table, _ = stored(out)
    assert table.column_names == ["row", "id", "embedding", "error"]
    assert table["row"].to_pylist() == list(range(20))
    assert table["id"].to_pylist() == names


def test_embeddings_among_the_images_are_not_taken_for_a_dataset(tmp_path: Path) -> None:
    for seed in range(3):
        (tmp_path / f"{seed}.png").write_bytes(image(seed))
    where, first = str(tmp_path), tmp_path / "a.parquet"
    embed_rows(MODEL, where, str(first))
    (tmp_path / "b.parquet.parts-0123").mkdir()  # of a run that was killed
    shutil.copy(first, tmp_path / "b.parquet.parts-0123" / "rows-000000000-3.parquet")
    second = embed_rows(MODEL, where, str(tmp_path / "b.parquet"), overwrite=True)
    assert second == embed_rows(MODEL, where, str(first)) == EmbedSummary(3, 0, [])
    names = ["0.png", "1.png", "2.png", "a.parquet", "b.parquet"]
    assert sorted(p.name for p in tmp_path.iterdir()) == names
    (tmp_path / "set").mkdir()
    write_rows(tmp_path / "set" / "in.parquet", 20)
    with pytest.raises(DataError, match="lies in the dataset"):
        embed_rows(MODEL, f"{tmp_path}/set", f"{tmp_path}/set/out.parquet")
    assert embed_rows(MODEL, f"{tmp_path}/set", f"{tmp_path}/set-out.parquet").num_rows == 20


@pytest.mark.parametrize("listed", [False, True])
def test_files_of_the_same_names_and_sizes_are_other_images(tmp_path: Path, listed: bool) -> None:
    folder, out = tmp_path / "frames", str(tmp_path / "out.parquet")
    folder.mkdir()
    frames = [np.full((20, 20, 3), seed, np.uint8) for seed in range(3)]
    for index in range(2):
        np.save(folder / f"{index}.npy", frames[index])
    where: Any = [f"{folder}/0.npy", f"{folder}/1.npy"] if listed else str(folder)
    embed_rows(MODEL, where, out)
    np.save(folder / "1.npy", frames[2])  # as large as it was
    with pytest.raises(DataError, match="or of other images"):
        embed_rows(MODEL, where, out)
    embed_rows(MODEL, where, out, overwrite=True)
    _, rows = stored(tmp_path / "out.parquet")
    np.testing.assert_allclose(rows[1], expected([frames[2]])[0], rtol=1e-5, atol=1e-6)


def test_what_a_run_ended_at_the_end_has_left_goes_and_the_pieces_of_others_stay(
    tmp_path: Path,
) -> None:
    write_rows(tmp_path / "in.parquet", 20)
    where, out = str(tmp_path / "in.parquet"), str(tmp_path / "out.parquet")
    embed_rows(MODEL, where, out)
    digest = digest_of(*filesystem(out))
    names = ["in.parquet", "out.parquet"]
    for other, overwrite, left in (
        (digest, False, []),
        ("0123456789ab", False, ["out.parquet.parts-0123456789ab"]),
        ("ab0123456789", True, []),
    ):
        (tmp_path / f"out.parquet.parts-{other}").mkdir()
        embed_rows(MODEL, where, out, overwrite=overwrite)
        assert sorted(p.name for p in tmp_path.iterdir()) == names + left


def test_a_column_that_a_later_file_lacks_is_refused_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    write_rows(tmp_path / "set" / "a.parquet", 20, shop=["s"] * 20)
    others: list[tuple[dict[str, Any], str]] = [
        ({}, "not there"), ({"shop": list(range(20))}, "int64")
    ]  # fmt: skip
    for more, said in others:
        write_rows(tmp_path / "set" / "b.parquet", 20, **more)
        with pytest.raises(ConfigError, match=f"'shop' is string in .*a.parquet, .* {said}"):
            embed_rows(
                MODEL, f"{tmp_path}/set", str(tmp_path / "new" / "out.parquet"), keep=["shop"]
            )
    assert not (tmp_path / "new").exists()


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
    assert list(parts.glob("rows-*"))
    where.write_bytes(whole)
    assert embed_rows(MODEL, str(where), out).num_rows == 300
