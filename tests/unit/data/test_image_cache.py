"""Decoded images are kept within a budget, and once for all processes of a node."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import tempfile
import uuid
from multiprocessing.queues import Queue
from pathlib import Path

import numpy as np
import pytest

from simclr_ray.data.image_cache import ALIGNMENT, ENTRY, DecodedImage, ImageCache

NUM_ROWS = 400


def image(row: int, side: int = 8) -> DecodedImage:
    rng = np.random.default_rng(row)
    return DecodedImage(
        10_000 + row, rng.integers(0, 256, (side, side + row % 5, 3), dtype=np.uint8)
    )


def assert_is(found: DecodedImage | None, row: int) -> None:
    wanted = image(row)
    assert found is not None
    assert found.id == wanted.id
    np.testing.assert_array_equal(found.pixels, wanted.pixels)


@pytest.fixture
def name() -> str:
    return uuid.uuid4().hex  # of no other cache on this machine


def test_what_is_kept_is_found_and_nothing_else() -> None:
    cache = ImageCache("", NUM_ROWS, 10**6)
    cache.keep({row: image(row) for row in (3, 0, 399)})
    found = cache.find([0, 1, 399, 3, 0])
    assert found[1] is None
    for place, row in ((0, 0), (2, 399), (3, 3), (4, 0)):
        assert_is(found[place], row)
    assert np.flatnonzero(cache.holds(0, NUM_ROWS)).tolist() == [0, 3, 399]
    assert cache.holds(2, 5).tolist() == [False, True, False]


def test_the_budget_holds_and_what_was_kept_stays() -> None:
    entry = -(-(8 * 8 * 3 + ENTRY.size) // ALIGNMENT) * ALIGNMENT
    cache = ImageCache("", NUM_ROWS, 10 * entry)
    for row in range(0, 100, 5):  # all of one size
        cache.keep({row: image(row)})
    assert cache.full
    assert np.flatnonzero(cache.holds(0, NUM_ROWS)).tolist() == list(range(0, 50, 5))
    for row in range(0, 50, 5):
        assert_is(cache.find([row])[0], row)


def test_a_budget_of_nothing_keeps_nothing() -> None:
    cache = ImageCache("shared", NUM_ROWS, 0)
    cache.keep({0: image(0)})
    assert cache.full
    assert cache.find([0]) == [None]


def test_caches_of_one_name_share_and_others_do_not(name: str) -> None:
    one, same = ImageCache(name, NUM_ROWS, 10**6), ImageCache(name, NUM_ROWS, 10**6)
    others = [
        ImageCache(name + "x", NUM_ROWS, 10**6),
        ImageCache(name, NUM_ROWS, 10**6 + 1),
        ImageCache("", NUM_ROWS, 10**6),
    ]
    one.keep({7: image(7)})
    assert_is(same.find([7])[0], 7)
    same.keep({8: image(8), 7: image(7)})
    assert_is(one.find([8])[0], 8)
    assert [other.find([7]) for other in others] == [[None]] * 3


def keep_all(name: str, rows: list[int], done: Queue[int]) -> None:
    cache = ImageCache(name, NUM_ROWS, 10**6)
    for row in rows:
        cache.keep({row: image(row)})
        wrong = [r for r, p in zip(rows, cache.find(rows), strict=True) if p and p.id != 10_000 + r]
        assert not wrong
    done.put(os.getpid())
    done.get()  # until the others have read, as a decode actor lives on


def test_processes_that_write_at_once_find_whole_images_of_each_other(name: str) -> None:
    context = multiprocessing.get_context("spawn")
    done: Queue[int] = context.Queue()
    halves = [list(range(0, 300)), list(range(100, 400))]  # 200 rows are decoded by both
    processes = [context.Process(target=keep_all, args=(name, half, done)) for half in halves]
    cache = ImageCache(name, NUM_ROWS, 10**6)
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=0.01)
    while not cache.holds(0, NUM_ROWS).all():
        assert all(p.exitcode in (None, 0) for p in processes)
    for row, found in enumerate(cache.find(range(NUM_ROWS))):
        assert_is(found, row)
    assert int(cache._used[0]) <= 10**6 + 64 + 8 * NUM_ROWS
    for process in processes:
        process.terminate()
        process.join()


def die_with_a_cache(name: str) -> None:
    ImageCache(name, NUM_ROWS, 10**6).keep({5: image(5)})
    os._exit(9)


def test_a_process_that_is_killed_leaves_nothing_that_hinders_the_next(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    process = multiprocessing.get_context("spawn").Process(target=die_with_a_cache, args=(name,))
    process.start()
    process.join()
    (register,) = tmp_path.glob("simclr_ray-images-*/*")
    assert register.read_text().startswith(f"{process.pid}/fd/")
    shutil.copy(register, register.with_name("0" * 24))  # of images that nobody has any more
    cache = ImageCache(name, NUM_ROWS, 10**6)  # the memory went with its last process
    assert cache.find([5]) == [None]
    cache.keep({5: image(5)})
    assert_is(ImageCache(name, NUM_ROWS, 10**6).find([5])[0], 5)
    assert f"{process.pid}/" not in register.read_text()
    other = ImageCache(f"{name} other", NUM_ROWS, 10**6)  # those that are in use stay
    assert other.find([5]) == [None]
    assert register.exists()
    assert not register.with_name("0" * 24).exists()


def test_a_link_in_the_place_of_the_registers_is_not_followed(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "letter.txt").write_text("of the user")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    (tmp_path / f"simclr_ray-images-{os.getuid()}").symlink_to(mine)
    cache = ImageCache(name, NUM_ROWS, 10**6)
    cache.keep({7: image(7)})
    assert_is(cache.find([7])[0], 7)
    assert [path.name for path in mine.iterdir()] == ["letter.txt"]


def test_what_is_no_register_is_left_alone(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    folder = tmp_path / f"simclr_ray-images-{os.getuid()}"
    folder.mkdir()
    (folder / "letter.txt").write_text("of the user")
    (folder / ("a" * 24)).write_bytes(b"\xff\xfe no text")
    cache = ImageCache(name, NUM_ROWS, 10**6)
    cache.keep({7: image(7)})
    assert_is(ImageCache(name, NUM_ROWS, 10**6).find([7])[0], 7)
    assert (folder / "letter.txt").exists()


def test_where_nothing_can_be_shared_a_process_keeps_its_own(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "file"))
    one, other = ImageCache(name, NUM_ROWS, 10**6), ImageCache(name, NUM_ROWS, 10**6)
    one.keep({7: image(7)})
    assert_is(one.find([7])[0], 7)
    assert other.find([7]) == [None]
