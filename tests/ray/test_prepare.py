"""`prepare` writes whole shards of shuffled images, says what it left out, and can be killed."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.fs as pafs
import pyarrow.parquet as pq
import pytest
from PIL import Image

from simclr_ray.augment.decode import decode_image
from simclr_ray.data import prepare as prepare_module
from simclr_ray.data.footer import INDEX, MANIFEST
from simclr_ray.data.manifest import Manifest
from simclr_ray.data.prepare import prepare
from simclr_ray.data.shapes import CLASS_NAMES, render
from simclr_ray.data.shards import Rejected, SizeRange
from simclr_ray.data.source import Source
from simclr_ray.errors import DataError, TooManyBadImages
from simclr_ray.storage.filesystem import filesystem, remove_file

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]

# Prints a line when a shard is finished, so that the test knows when to kill it.
KILLED_RUN = """
import sys
from simclr_ray.data.prepare import prepare
import ray
ray.init(address=sys.argv[2], log_to_driver=False, logging_level="ERROR")
prepare("shapes", sys.argv[1], num_images=2400, rows_per_shard=100,
        on_progress=lambda done, total: print("images", done, total, flush=True))
"""


def shards(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.parquet"))}


def read_back(out: Path) -> Manifest:
    """Return the manifest as it is stored."""
    tree = json.loads((out / MANIFEST).read_text())
    rejected = tuple(Rejected(**row) for row in tree.pop("rejected"))
    tree["sizes"] = SizeRange(*tree["sizes"])
    return Manifest(**tree | {"class_names": tuple(tree["class_names"])}, rejected=rejected)


def shapes(out: Path, **options: object) -> Manifest:
    return prepare("shapes", str(out), num_images=60, rows_per_shard=25, **options)  # type: ignore[arg-type]  # any option of prepare


def test_shapes_become_shuffled_shards_with_a_manifest(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    manifest = shapes(tmp_path, on_progress=lambda done, total: seen.append((done, total)))
    assert [total for _, total in seen] == [60] * 4
    done = [done for done, _ in seen]
    assert (done[0], done[-1]) == (0, 60)
    assert sorted(np.diff(done).tolist()) == [10, 25, 25]
    assert manifest.sizes == (32, 32, 32, 32)
    assert manifest == read_back(tmp_path)
    assert manifest == shapes(tmp_path)  # since all is there
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        INDEX,
        MANIFEST,
        *(f"part-0000{i}.parquet" for i in range(3)),
    ]
    assert len(pd.read_parquet(tmp_path)) == 60  # notes of ours are no data to other readers
    source = Source.open(str(tmp_path))
    assert manifest.has_index
    assert source.index == str(tmp_path / INDEX)
    for path in tmp_path.glob("part-*"):  # ids and labels of all rows stand in one file
        path.chmod(0)
        path.rename(path.with_suffix(".away"))
    assert sorted(source.ids()) == list(range(60))
    np.testing.assert_array_equal(source.labels(), source.ids() % 10)
    for path in tmp_path.glob("*.away"):
        path.chmod(0o644)
        path.rename(path.with_suffix(".parquet"))
    assert (manifest.num_rows, manifest.class_names) == (60, CLASS_NAMES)
    assert manifest.fingerprint == source.fingerprint
    assert (source.has_ids, source.has_labels, source.class_names) == (True, True, CLASS_NAMES)
    ids = source.ids()
    assert sorted(ids) == list(range(60))
    assert not (np.diff(ids) > 0).all()
    np.testing.assert_array_equal(source.labels(), ids % 10)
    rows = source.read_group(1)
    assert rows.images[0] is not None
    np.testing.assert_array_equal(
        decode_image(rows.images[0]), render(int(rows.ids[0]), seed=0).pixels
    )


def test_the_stored_schema_is_the_one_that_readers_are_promised(tmp_path: Path) -> None:
    shapes(tmp_path)
    file = pq.ParquetFile(tmp_path / "part-00000.parquet")
    schema = file.schema_arrow
    assert [(f.name, str(f.type)) for f in schema] == [
        ("id", "int64"),
        ("image", "binary"),
        ("label", "int64"),
        ("path", "string"),
    ]
    assert schema.metadata[b"schema_version"] == b"2"
    assert json.loads(schema.metadata[b"class_names"]) == list(CLASS_NAMES)
    assert file.metadata.row_group(0).column(1).compression == "UNCOMPRESSED"


def test_the_same_arguments_give_the_same_bytes_and_another_seed_others(tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        shapes(tmp_path / name, seed=seed)
    assert shards(tmp_path / "a") == shards(tmp_path / "b")
    assert shards(tmp_path / "a").keys() == shards(tmp_path / "c").keys()
    assert shards(tmp_path / "a") != shards(tmp_path / "c")


def test_a_killed_run_leaves_whole_shards_that_the_next_run_keeps(
    tmp_path: Path, ray_cluster: str
) -> None:
    out = tmp_path / "out"
    root = Path(__file__).parents[2]
    run = subprocess.Popen(
        [sys.executable, "-c", KILLED_RUN, str(out), ray_cluster],
        stdout=subprocess.PIPE,
        text=True,
        cwd=root,
        env=os.environ | {"PYTHONPATH": str(root)},
    )
    assert run.stdout is not None
    for line in run.stdout:
        if line.startswith("images 300"):
            break
    run.send_signal(signal.SIGKILL)
    run.stdout.close()
    assert run.wait() == -signal.SIGKILL
    finished = {path.name: path.stat().st_mtime_ns for path in out.glob("*.parquet")}
    assert 3 <= len(finished) < 24
    assert not (out / MANIFEST).exists()

    told: list[int] = []
    again = prepare(
        "shapes",
        str(out),
        num_images=2400,
        rows_per_shard=100,
        on_progress=lambda done, _total: told.append(done),
    )
    assert told[0] >= 100 * len(finished)
    assert {n: (out / n).stat().st_mtime_ns for n in finished} == finished
    undisturbed = prepare("shapes", str(tmp_path / "other"), num_images=2400, rows_per_shard=100)
    assert again == undisturbed
    assert shards(out) == shards(tmp_path / "other")
    assert (out / MANIFEST).read_bytes() == (tmp_path / "other" / MANIFEST).read_bytes()


def test_a_finished_set_is_not_written_again_and_a_lost_shard_is(tmp_path: Path) -> None:
    first = shapes(tmp_path)
    before = {p.name: p.stat().st_mtime_ns for p in tmp_path.iterdir()}
    assert shapes(tmp_path) == first
    assert {p.name: p.stat().st_mtime_ns for p in tmp_path.iterdir()} == before
    (tmp_path / "part-00001.parquet").unlink()
    (tmp_path / ".part-00001.parquet.abc.tmp").write_bytes(b"half")
    told: list[int] = []
    assert shapes(tmp_path, on_progress=lambda done, _total: told.append(done)) == first
    assert told == [35, 60]  # of shards of 25, 25 and 10 the second was lost
    assert {p.name for p in tmp_path.iterdir()} == set(before)
    assert (tmp_path / "part-00000.parquet").stat().st_mtime_ns == before["part-00000.parquet"]


def test_a_half_file_that_goes_before_it_is_removed_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # as where a task of a driver that was killed clears up after itself between look and removal
    first = shapes(tmp_path)
    half = tmp_path / ".part-00001.parquet.abc.tmp"
    half.write_bytes(b"half")

    def too_late(fs: pafs.FileSystem, path: str) -> None:
        Path(path).unlink()
        remove_file(fs, path)

    monkeypatch.setattr(prepare_module, "remove_file", too_late)
    assert shapes(tmp_path) == first
    assert not half.exists()


def test_other_settings_are_refused_unless_told_to_start_over(tmp_path: Path) -> None:
    shapes(tmp_path)
    before = shards(tmp_path)
    with pytest.raises(DataError, match=r"of another dataset or of other settings.*overwrite"):
        shapes(tmp_path, seed=1)
    assert shards(tmp_path) == before
    fresh = shapes(tmp_path, seed=1, overwrite=True)
    assert fresh.fingerprint == Source.open(str(tmp_path)).fingerprint
    assert shards(tmp_path) != before
    (tmp_path / "mine.parquet").write_bytes(b"a file of the user's")
    with pytest.raises(DataError, match=r"holds mine\.parquet"):
        shapes(tmp_path, seed=2, overwrite=True)
    assert (tmp_path / "mine.parquet").exists()


def test_an_output_inside_its_input_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="lies inside"):
        prepare(str(tmp_path), str(tmp_path / "out"))
    with pytest.raises(DataError, match="is the input"):
        prepare(str(tmp_path), str(tmp_path))


def test_a_second_command_into_the_same_folder_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    fs, folder = filesystem("out")
    with prepare_module._only_one(fs, folder, "out"), ThreadPoolExecutor(1) as pool:
        again = pool.submit(shapes, tmp_path / "out")  # a thread may nest
        with pytest.raises(DataError, match=r"out is being prepared by process \d+"):
            again.result()
        pool.submit(shapes, tmp_path / "other").result()
    shapes(tmp_path / "out")
    assert not (tmp_path / "cache" / "simclr_ray" / "prepare").exists()
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    shapes(tmp_path / "third")  # without a cache there is no lock


def test_bad_images_are_named_in_the_manifest_or_stop_the_run(tmp_path: Path) -> None:
    given = tmp_path / "given"
    given.mkdir()
    for i in range(20):
        (given / f"{i:02d}.png").write_bytes(_png(i))
    (given / "03.png").write_bytes(b"<html>")
    (given / "11.png").write_bytes(_png(11)[:-30])
    with pytest.raises(TooManyBadImages, match=r"2 of 20 images.*5\.00%") as refusal:
        prepare(str(given), str(tmp_path / "out"), max_bad_fraction=0.05)
    assert "03.png: not an image" in str(refusal.value)
    assert not (tmp_path / "out" / MANIFEST).exists()
    manifest = prepare(str(given), str(tmp_path / "out"), max_bad_fraction=0.1)
    assert [tuple(r) for r in manifest.rejected] == [
        (3, "03.png", "not an image"),
        (11, "11.png", "truncated"),
    ]
    assert read_back(tmp_path / "out") == manifest
    assert prepare(str(given), str(tmp_path / "out"), max_bad_fraction=0.1) == manifest
    source = Source.open(str(tmp_path / "out"))
    assert sorted(source.ids()) == [i for i in range(20) if i not in (3, 11)]
    assert not source.has_labels
    rows = source.read_group(0)
    files = sorted(given.glob("*.png"))
    assert rows.images == [files[int(i)].read_bytes() for i in rows.ids]


def test_real_photographs_keep_their_bytes(tmp_path: Path, image_root: Path) -> None:
    given = Source.open(str(image_root / "caltech101" / "test"))
    prepare(given.uri, str(tmp_path), rows_per_shard=300)
    stored = Source.open(str(tmp_path))
    assert (stored.num_rows, stored.class_names) == (given.num_rows, given.class_names)
    some = np.arange(0, stored.num_rows, 50)
    rows = stored.read_rows(some)
    original = given.read_rows(rows.ids)
    assert rows.images == original.images
    np.testing.assert_array_equal(rows.labels, original.labels)


def test_every_odd_row_is_stored_or_named(tmp_path: Path, image_root: Path) -> None:
    odd = image_root / "odd"
    bad = prepare(
        str(odd / "some_bad_images.parquet"), str(tmp_path / "bad"), max_bad_fraction=0.05
    )
    assert [r.id for r in bad.rejected] == [10, 20, 50]
    nulls = prepare(str(odd / "null_images.parquet"), str(tmp_path / "nulls"), max_bad_fraction=0.1)
    assert {r.reason for r in nulls.rejected} == {"no image"}
    bomb = prepare(str(odd / "bomb_inside.parquet"), str(tmp_path / "bomb"))
    assert bomb.rejected[0].reason == "too many pixels: 30000x30000"
    with pytest.raises(TooManyBadImages, match="100 of 100"):
        prepare(str(odd / "all_bad_images.parquet"), str(tmp_path / "all"), max_bad_fraction=1.0)


def _png(seed: int) -> bytes:
    out = io.BytesIO()
    Image.fromarray(render(seed, 0).pixels).save(out, "PNG")
    return out.getvalue()


def test_tar_shards_are_prepared_and_go_on_where_they_were_interrupted(tmp_path: Path) -> None:
    (tmp_path / "tars").mkdir()
    for shard in range(3):
        with tarfile.open(tmp_path / "tars" / f"s{shard}.tar", "w") as tar:
            for at in range(20):
                content = io.BytesIO()
                Image.new("RGB", (8, 8), (shard, at, 0)).save(content, "PNG")
                bad = (shard, at) == (2, 19)
                for ending, data in (
                    ("png", b"no image" if bad else content.getvalue()),
                    ("cls", f"class {at % 3}".encode()),
                    ("txt", b"a caption"),
                ):
                    member = tarfile.TarInfo(f"{at:03}.{ending}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))

    def stop(done: int, _total: int) -> None:
        if done >= 20:
            raise InterruptedError

    def run(out: str, on_progress: Any = None) -> Manifest:
        what = f"file://{tmp_path}/tars/s{{0..2}}.tar"
        return prepare(
            what, str(tmp_path / out), rows_per_shard=10, max_bad_fraction=0.1,
            on_progress=on_progress,
        )  # fmt: skip

    with pytest.raises(InterruptedError):
        run("out", stop)
    finished = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "out").glob("part-*")}
    assert finished
    told: list[int] = []
    manifest = run("out", lambda done, _total: told.append(done))
    assert told[0] >= 10 * len(finished)
    assert all((tmp_path / "out" / n).stat().st_mtime_ns == t for n, t in finished.items())
    assert [r.name for r in manifest.rejected] == ["s2.tar/019.png"]
    assert manifest.class_names == ("class 0", "class 1", "class 2")
    assert run("whole").fingerprint == manifest.fingerprint
    assert shards(tmp_path / "out") == shards(tmp_path / "whole")
    source = Source.open(str(tmp_path / "out"))
    assert sorted(source.ids()) == list(range(59))
    rows = source.read_rows(np.arange(59))
    assert rows.paths is not None
    assert rows.labels is not None
    for row_id, encoded, label, path in zip(
        rows.ids.tolist(), rows.images, rows.labels.tolist(), rows.paths, strict=True
    ):
        assert path == f"s{row_id // 20}.tar/{row_id % 20:03}.png"
        assert label == row_id % 20 % 3
        assert encoded is not None
        assert decode_image(encoded)[0, 0].tolist() == [row_id // 20, row_id % 20, 0]
