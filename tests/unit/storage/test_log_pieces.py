"""A log in a bucket lies in pieces: what an upload costs, and what is read of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from pyarrow import fs

from simclr_ray.storage import log_pieces
from simclr_ray.storage.filesystem import write_whole
from simclr_ray.storage.log_pieces import FOLDER, MOST_SMALL, PIECE_BYTES, BucketLog, LogPiece
from simclr_ray.storage.metrics_log import append_record, read_records
from simclr_ray.storage.run_folder import OTHER_METRICS, RunFolder

LOG = f"r-1/{OTHER_METRICS}"


class Bucket:
    """A bucket, and what was written into it."""

    def __init__(self, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.place = place
        self.files = fs.SubTreeFileSystem(str(place), fs.LocalFileSystem())
        self.written: list[int] = []
        write = write_whole

        def counted(files: fs.FileSystem, path: str, data: bytes) -> None:
            self.written.append(len(data))
            write(files, path, data)

        monkeypatch.setattr(log_pieces, "write_whole", counted)

    @property
    def log(self) -> BucketLog:
        """The log, as a process that has just started has it."""
        return BucketLog(self.files, LOG)

    @property
    def pieces(self) -> list[str]:
        """Names of all pieces but the first."""
        return sorted(path.name for path in (self.place / f"{LOG}{FOLDER}").glob("*"))


@pytest.fixture
def bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bucket:
    (tmp_path / "b").mkdir()
    return Bucket(tmp_path / "b", monkeypatch)


@pytest.fixture
def local(tmp_path: Path) -> Path:
    return tmp_path / OTHER_METRICS


def grow(local: Path, size: int) -> None:
    """Append a record of `size` bytes."""
    with local.open("ab") as file:
        at = file.tell()
        line = json.dumps({"at": at})
        file.write(f"{line[:-1]}{' ' * (size - len(line) - 1)}}}\n".encode())


@pytest.mark.parametrize(
    ("size", "minutes"),
    [(2184, 24 * 60), (40_000, 100)],  # a machine of 8 GPUs for a day; many records
)
def test_a_log_goes_up_twice_however_long_it_is(
    bucket: Bucket, local: Path, size: int, minutes: int
) -> None:
    log = bucket.log
    for _ in range(minutes):
        grow(local, size)
        log.bring_up(local)
    whole = local.read_bytes()
    assert bucket.log.read() == whole
    assert len(whole) == size * minutes
    assert sum(bucket.written) <= 2.01 * len(whole)
    assert max(bucket.written) <= PIECE_BYTES + size
    assert len(bucket.pieces) <= MOST_SMALL + len(whole) / PIECE_BYTES


def test_of_a_log_that_hardly_grows_no_more_goes_up_again_than_is_said(
    bucket: Bucket, local: Path
) -> None:
    log, uploads = bucket.log, 6 * MOST_SMALL
    for _ in range(uploads):
        grow(local, 100)
        log.bring_up(local)
    assert bucket.log.read() == local.read_bytes()
    again = sum(bucket.written) - local.stat().st_size
    assert again <= uploads * PIECE_BYTES / MOST_SMALL
    log.bring_up(local)  # of nothing new nothing
    before = len(bucket.written)
    log.bring_up(local)
    assert len(bucket.written) == before


def test_a_short_log_is_one_file_in_the_end(bucket: Bucket, local: Path) -> None:
    log = bucket.log
    for _ in range(5):
        grow(local, 300)
        log.bring_up(local)
    assert len(bucket.pieces) == 4
    log.bring_up(local, is_last=True)
    assert bucket.pieces == []
    assert (bucket.place / LOG).read_bytes() == local.read_bytes()


def test_a_start_goes_on_where_a_killed_one_was_between_two_requests(
    bucket: Bucket, local: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The end of some pieces is in a new one, and the driver is killed before they go."""
    log = bucket.log
    for _ in range(3):
        grow(local, PIECE_BYTES + 10)
        log.bring_up(local)
    for _ in range(4):
        grow(local, 500)
        log.bring_up(local)
    before = bucket.pieces
    assert len(before) == 6

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    grow(local, 500)
    with monkeypatch.context() as patch:
        patch.setattr(log_pieces, "remove_file", killed)
        with pytest.raises(KeyboardInterrupt):
            log.bring_up(local, is_last=True)
    assert bucket.pieces == before
    again = bucket.log
    assert again.read() == local.read_bytes()
    bucket.written.clear()
    grow(local, 500)
    again.bring_up(local)
    assert bucket.written == [500]
    assert len(bucket.pieces) == 4  # two large ones, that of the end, the new one
    assert bucket.log.read() == local.read_bytes()


def test_a_piece_that_ends_within_a_line_is_gone_on_from(bucket: Bucket, local: Path) -> None:
    append_record(local, {"step": 1})
    log = bucket.log
    log.bring_up(local)
    append_record(local, {"step": 2})
    local.write_bytes(local.read_bytes()[:-7])  # as a disk that was full has left it
    log.bring_up(local)
    again = bucket.log
    local.write_bytes(again.read() or b"")
    append_record(local, {"step": 3})
    again.bring_up(local)
    records = read_records((bucket.log.read() or b"").decode())
    assert [record["step"] for record in records] == [1, 3]


def test_a_log_of_one_file_is_read_and_gone_on_from(bucket: Bucket, local: Path) -> None:
    for _ in range(40):
        grow(local, 10_000)
    (bucket.place / LOG).parent.mkdir()
    (bucket.place / LOG).write_bytes(local.read_bytes())
    log = bucket.log
    assert log.read() == local.read_bytes()
    grow(local, 1000)
    log.bring_up(local, is_last=True)
    assert bucket.written == [1000]
    assert bucket.log.read() == local.read_bytes()
    folder = RunFolder(bucket.place.as_uri(), "r-1")
    assert (folder.read_text(OTHER_METRICS) or "").encode() == local.read_bytes()
    for last in (1, 999, 1000, 1001, 50_000, 10**7):
        assert folder.read_bytes(OTHER_METRICS, last) == local.read_bytes()[-last:]


def test_what_is_put_together_meanwhile_is_read_whole(
    bucket: Bucket, local: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = bucket.log
    for _ in range(4):
        grow(local, 500)
        log.bring_up(local)
    listed = BucketLog._listed

    def late(self: BucketLog) -> list[LogPiece]:
        pieces = listed(self)
        log.bring_up(local, is_last=True)
        return pieces

    grow(local, 500)
    monkeypatch.setattr(BucketLog, "_listed", late)
    assert bucket.log.read() == local.read_bytes()


def test_a_piece_that_is_lost_is_said_and_the_next_upload_brings_all(
    bucket: Bucket, local: Path, caplog: pytest.LogCaptureFixture
) -> None:
    log = bucket.log
    for _ in range(4):
        grow(local, 500)
        log.bring_up(local)
    (bucket.place / f"{LOG}{FOLDER}" / bucket.pieces[1]).unlink()
    again = bucket.log
    left = again.read() or b""
    assert left == local.read_bytes()[:1000] + local.read_bytes()[1500:]
    assert "lacks a piece" in caplog.text
    local.write_bytes(left)
    grow(local, 500)
    again.bring_up(local)
    assert bucket.pieces == []
    assert bucket.log.read() == local.read_bytes()


def test_pieces_that_cannot_be_removed_are_passed_over(
    bucket: Bucket,
    local: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def refused(*_: object) -> None:
        raise PermissionError("delete: AccessDenied")

    monkeypatch.setattr(log_pieces, "remove_file", refused)
    log = bucket.log
    for _ in range(3 * MOST_SMALL):
        grow(local, 100)
        log.bring_up(local)
    assert bucket.log.read() == local.read_bytes()
    assert caplog.text.count("cannot be removed") == 1
