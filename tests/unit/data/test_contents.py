"""Images that are made anew in place, with the sizes that they had, are other images."""

from __future__ import annotations

import gzip
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
import pytest
from PIL import Image

from simclr_ray.config.experiment import ColumnsConfig, Experiment
from simclr_ray.data import contents
from simclr_ray.data.contents import NUM_PIECES, PIECE_BYTES, Piece, sample_digest
from simclr_ray.data.files import states_of_files
from simclr_ray.data.folder_input import FolderInput
from simclr_ray.data.source import Source
from simclr_ray.data.tar_input import TarInput, find_tars
from simclr_ray.errors import DataError
from simclr_ray.train.resolve import resolve


def write(folder: Path, ending: str, seed: int, num: int = 40) -> None:
    folder.mkdir(exist_ok=True)
    for index in range(num):
        drawn = np.random.default_rng(seed * 1000 + index)
        pixels = drawn.integers(0, 256, (12, 12, 3), dtype=np.uint8)
        path = folder / f"{index:03}.{ending}"
        if ending == "npy":
            np.save(path, pixels)
        else:
            Image.fromarray(pixels).save(path)


@pytest.mark.parametrize("ending", ["bmp", "ppm", "npy", "tiff"])
def test_a_folder_whose_images_were_made_anew_is_another_run(tmp_path: Path, ending: str) -> None:
    def names() -> tuple[str, str, object]:
        config = Experiment.load(
            "photos_cpu", f"data.train={tmp_path / 'photos'}", f"storage={tmp_path / 'runs'}",
            "batch_size=8",
        )  # fmt: skip
        resolved = resolve(config)
        given = FolderInput.open(str(tmp_path / "photos"))
        return resolved.folder.name, resolved.source.fingerprint, given.identity

    write(tmp_path / "photos", ending, 0)
    sizes = [file.stat().st_size for file in sorted((tmp_path / "photos").iterdir())]
    first = names()
    assert names() == first
    write(tmp_path / "photos", ending, 1)
    assert [file.stat().st_size for file in sorted((tmp_path / "photos").iterdir())] == sizes
    assert not any(a == b for a, b in zip(names(), first, strict=True))
    write(tmp_path / "photos", ending, 0)
    assert names() == first  # a copy is no other: times of files say nothing


def test_a_list_whose_images_were_made_anew_is_another_dataset(tmp_path: Path) -> None:
    write(tmp_path / "photos", "bmp", 0)
    paths = [f"photos/{index:03}.bmp" for index in range(40)]
    pq.write_table(pa.table({"image": [*paths, None]}), tmp_path / "a.parquet", row_group_size=7)
    first = Source.open(str(tmp_path / "a.parquet")).fingerprint
    write(tmp_path / "photos", "bmp", 1, num=1)
    assert Source.open(str(tmp_path / "a.parquet")).fingerprint != first
    write(tmp_path / "photos", "bmp", 0, num=1)
    (tmp_path / "photos" / "005.bmp").unlink()
    assert Source.open(str(tmp_path / "a.parquet")).fingerprint != first


@pytest.mark.parametrize("has_field", [True, False], ids=["bytes null", "no bytes"])
def test_structs_that_hold_paths_alone_name_files(tmp_path: Path, has_field: bool) -> None:
    write(tmp_path / "photos", "bmp", 0)
    kind = pa.struct([("bytes", pa.binary())] * has_field + [("path", pa.string())])

    def source(num_embedded: int = 0) -> Source:
        rows = [{"path": f"photos/{index:03}.bmp"} for index in range(40)]
        for row in rows[:num_embedded]:
            row["bytes"] = (tmp_path / row["path"]).read_bytes()  # type: ignore[assignment] # text until here
        table = pa.table({"image": pa.array(rows, kind), "n": [*range(40)]})
        pq.write_table(table, tmp_path / "a.parquet", row_group_size=7)
        return Source.open(str(tmp_path / "a.parquet"))

    first = source()
    size = (tmp_path / "photos" / "000.bmp").stat().st_size
    assert first.names_files
    assert size < first.row_bytes < 2 * size
    places = list(states_of_files(first.read_columns("image")[0], *local_at(first)))
    assert [place.partition("\0")[0] for place in places] == [
        str(tmp_path / f"photos/{index:03}.bmp") for index in range(7)
    ]
    write(tmp_path / "photos", "bmp", 1)
    assert source().fingerprint != first.fingerprint
    if has_field:
        embedded = source(40)
        assert not embedded.names_files
        write(tmp_path / "photos", "bmp", 0)
        assert Source.open(embedded.uri).fingerprint == embedded.fingerprint
        assert not source(1).names_files  # a small image in an otherwise empty column is one


OPEN_DAMAGED = """
import sys
from simclr_ray.data.footer import RowGroup, names_files, read_footer
from simclr_ray.data.listing import Listed
from simclr_ray.data.tables import DatasetFile, read_table
from simclr_ray.errors import DataError
from simclr_ray.storage.filesystem import filesystem

folder, first = sys.argv[1], int(sys.argv[2])
whole = open(f"{folder}/whole.parquet", "rb").read()
fs, path = filesystem(f"{folder}/damaged.parquet")
num_read = 0
for at in range(first, len(whole) - 8):
    with open(path, "wb") as file:
        file.write(whole[:at] + bytes([0x73]) + whole[at + 1 :])
    try:
        names_files(read_footer(fs, Listed(path, len(whole))), "image")
        file = DatasetFile(path, path, str(at), ())
        read_table(file, RowGroup(0, 0, 0, 3), ["image"])
        num_read += 1
    except DataError:
        pass
print(num_read)
"""


def test_no_damaged_byte_of_the_footer_of_structs_ends_the_process(tmp_path: Path) -> None:
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    rows = pa.array([{"path": f"{index}.png"} for index in range(6)], kind)
    path = tmp_path / "whole.parquet"
    pq.write_table(pa.table({"image": rows, "label": [0] * 6}), path, row_group_size=3)
    length = int.from_bytes(path.read_bytes()[-8:-4], "little")
    first = path.stat().st_size - 8 - length
    done = subprocess.run(  # a process that C++ ends takes the tests with it
        [sys.executable, "-c", OPEN_DAMAGED, str(tmp_path), str(first)],
        capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert 0 < int(done.stdout) < length


def local_at(source: Source) -> tuple[pafs.FileSystem, str]:
    return pafs.LocalFileSystem(), source.files[0]


def test_a_sample_is_spread_over_many_files_and_has_the_middle_of_large_ones(
    tmp_path: Path,
) -> None:
    local = pafs.LocalFileSystem()
    files = [tmp_path / f"{index:04}" for index in range(3 * NUM_PIECES)]
    for file in files:
        file.write_bytes(b"x")
    pieces = [Piece(local, str(file)) for file in files]
    first = sample_digest(pieces)
    changed = []
    for file in files:
        file.write_bytes(b"y")
        changed.append(sample_digest(pieces) != first)
        file.write_bytes(b"x")
        if len(changed) == 30:
            break
    assert 8 <= sum(changed) <= 12
    assert changed[0]
    large = tmp_path / "large"
    held = bytearray(4 * PIECE_BYTES)
    large.write_bytes(held)
    first = sample_digest([Piece(local, str(large))])
    held[2 * PIECE_BYTES] = 1
    large.write_bytes(held)
    assert sample_digest([Piece(local, str(large))]) != first
    assert sample_digest([]) == sample_digest([])


def test_of_a_limited_list_those_files_count_that_are_read(tmp_path: Path) -> None:
    write(tmp_path / "photos", "bmp", 0)
    paths = [f"photos/{index:03}.bmp" for index in range(40)]
    pq.write_table(pa.table({"image": paths}), tmp_path / "a.parquet", row_group_size=8)

    def fingerprints() -> list[str]:
        return [Source.open(str(tmp_path / "a.parquet"), limit=n).fingerprint for n in (10, 0)]

    limited, whole = fingerprints()
    with (tmp_path / "photos" / "030.bmp").open("r+b") as file:
        file.seek(-100, 2)
        file.write(bytes(100))
    after = fingerprints()
    assert after[0] == limited
    assert after[1] != whole


@pytest.mark.parametrize("ending", ["tar", "tar.gz"])
def test_members_of_a_tar_that_were_made_anew_are_another_set(tmp_path: Path, ending: str) -> None:
    place = str(tmp_path / f"a.{ending}")

    def listing(seed: int) -> str:
        write(tmp_path / "photos", "bmp", 0)
        write(tmp_path / "photos", "bmp", seed, num=1)  # the first of forty
        with tarfile.open(tmp_path / "a.tar", "w") as archive:
            for file in sorted((tmp_path / "photos").iterdir()):
                archive.add(file, file.name, filter=_of_no_time)
        if ending == "tar.gz":  # stored: what is made anew in it keeps its size
            content = (tmp_path / "a.tar").read_bytes()
            Path(place).write_bytes(gzip.compress(content, 0, mtime=0))
        return TarInput.open("a", find_tars(place), ColumnsConfig()).listing

    first = listing(0)
    assert listing(0) == first
    assert listing(1) != first


def _of_no_time(about: tarfile.TarInfo) -> tarfile.TarInfo:
    about.mtime = 0
    return about


def test_a_packed_tar_in_a_bucket_is_sampled_within_its_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.fromarray(np.zeros((300, 300, 3), np.uint8)).save(tmp_path / "a.bmp")
    with tarfile.open(tmp_path / "a.tgz", "w:gz") as archive:
        archive.add(tmp_path / "a.bmp", "a.bmp")
        archive.add(tmp_path / "a.bmp", "b.bmp")
    monkeypatch.setattr(contents, "is_local", lambda _: False)  # S3 refuses a seek past the end
    seen: list[Piece] = []
    sampled = contents._middle

    def noted(piece: Piece) -> tuple[bytes, int]:
        seen.append(piece)
        return sampled(piece)

    monkeypatch.setattr(contents, "_middle", noted)
    TarInput.open("a", find_tars(str(tmp_path / "a.tgz")), ColumnsConfig())
    size = (tmp_path / "a.tgz").stat().st_size
    assert seen
    assert all(piece.start + piece.size <= size for piece in seen)


def test_a_bucket_that_does_not_answer_is_no_other_dataset(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a").write_bytes(b"x")
    monkeypatch.setattr(contents, "is_local", lambda _: False)

    class Store:
        answers, opened = True, 0

        def open_input_file(self, path: str) -> pa.NativeFile:
            Store.opened += 1
            if not Store.answers:
                raise OSError("SLOW_DOWN 503")
            return pafs.LocalFileSystem().open_input_file(str(tmp_path / path))

    pieces = [Piece(Store(), name) for name in ("a", "gone")]
    contents._remembered.clear()
    first = sample_digest(pieces)
    assert Store.opened == 2
    assert sample_digest(pieces) == first
    assert Store.opened == 2  # a command that opens a list several times asks once
    contents._remembered.clear()
    Store.answers = False
    with pytest.raises(DataError, match="SLOW_DOWN"):
        sample_digest(pieces)
