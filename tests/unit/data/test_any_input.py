"""Random folders, schemas, ids and classes: no image is lost unnamed, no label is another row's."""

from __future__ import annotations

import errno
import io
import os
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
import pytest
from PIL import Image

from simclr_ray.config.column_keys import column_keys
from simclr_ray.config.experiment import ColumnsConfig
from simclr_ray.config.uris import recall, remember
from simclr_ray.data.aligned import align_labels, labels_for_classifier, map_to_classifier
from simclr_ray.data.description import class_name, count_labels
from simclr_ray.data.folder_input import FolderInput, index_folder
from simclr_ray.data.listing import list_images
from simclr_ray.data.source import Source
from simclr_ray.errors import DataError
from simclr_ray.train.image_folders import LISTS

FEW = range(40)
MANY = [pytest.param(seed, marks=pytest.mark.long) for seed in range(40, 240)]
SEEDS = [*FEW, *MANY]
CLASSES = ("ant", "bee", "cat", "dog", "eel", "fox")
KINDS = ("text", "dictionary", "int8", "int64", "uint16", "float")
ENDINGS = (".jpg", ".JPG", ".jfif", ".JPE", ".jpe", "", ".pnm", ".avif", ".heic", ".jp2", ".dat")


def image(number: int) -> bytes:
    """A JPEG whose pixels tell its number."""
    out = io.BytesIO()
    Image.new("L", (8, 8), number % 256).save(out, "JPEG", quality=95)
    return out.getvalue()


def numbers(rng: np.random.Generator, low: int, high: int) -> int:
    return int(rng.integers(low, high))


def hide_images(folder: Path) -> int:
    """Write images that are hidden, and what is no image beside them; return how many."""
    (folder / ".kept").mkdir()
    (folder / ".kept" / "x.JPG").write_bytes(image(0))
    (folder / ".kept" / "notes.txt").write_text("of no image")
    (folder / ".y.png").write_bytes(image(0))
    return 2


@pytest.mark.parametrize("seed", SEEDS)
def test_no_image_of_a_folder_is_lost_unnamed(seed: int, tmp_path: Path) -> None:
    rng = np.random.default_rng(seed)
    root, elsewhere = tmp_path / "images", tmp_path / "elsewhere"
    expected: dict[str, str] = {}
    others = 0
    for name in rng.permutation(CLASSES)[: numbers(rng, 1, 5)]:
        linked = rng.random() < 0.3
        folder = (elsewhere if linked else root) / name
        folder.mkdir(parents=True)
        root.mkdir(exist_ok=True)
        if linked:
            (root / name).symlink_to(folder)
        deep = folder / "deep" if rng.random() < 0.3 else folder
        deep.mkdir(exist_ok=True)
        for i in range(numbers(rng, 1, 6)):
            file = f"{i}{rng.choice(ENDINGS)}"
            (deep / file).write_bytes(image(i))
            expected[(root / name / deep.relative_to(folder) / file).as_posix()] = str(name)
        if rng.random() < 0.3:
            (folder / "notes.txt").write_text("not an image")
            others += 1
        others += hide_images(folder) if rng.random() < 0.3 else 0
        if rng.random() < 0.3:
            (folder / "loop").symlink_to(root)
            others += 1
        if rng.random() < 0.2:
            (folder / "gone.jpg").symlink_to(folder / "nothing")
            others += 1
    loose = numbers(rng, 0, 3)
    for i in range(loose):
        (root / f"loose{i}.png").write_bytes(image(i))
        expected[(root / f"loose{i}.png").as_posix()] = ""
    (root / ".cache").mkdir()
    (root / ".cache" / "x.parquet").write_bytes(b"nothing of ours")
    (root / ".git").mkdir()
    for litter in (".cache/x.png", ".git/x.png", "._loose0.png", ".loose0.png.tmp"):
        (root / litter).write_bytes(image(0))
    listing = list_images(pafs.LocalFileSystem(), str(root), str(root))
    assert {f.path for f in listing.files} == set(expected)
    assert listing.left_out.total() == others
    given = FolderInput.open(str(root))
    labels = dict(zip(given.names, given.labels(), strict=True))
    for path, name in expected.items():
        label = labels[Path(path).relative_to(root).as_posix()]
        assert (given.class_names[label] if label >= 0 else "") == name
    items = [item for part in given.parts(7, seed) for item in part.read()]
    assert sorted(item.path for item in items) == sorted(labels)
    assert all(item.encoded == (root / item.path).read_bytes() for item in items)


def label_table(
    rng: np.random.Generator, kind: str, wanted: list[str | None], names: list[str]
) -> tuple[pa.Array, dict[str, str]]:
    """Return the column that says `wanted`, in the numbering of this file, and its metadata."""
    if kind == "text":
        return pa.array(wanted, pa.string()), {}
    if kind == "dictionary":
        return pa.array(wanted, pa.string()).dictionary_encode(), {}
    numbered = [None if name is None else names.index(name) for name in wanted]
    types = {"int8": pa.int8(), "int64": pa.int64(), "uint16": pa.uint16(), "float": pa.float64()}
    return pa.array(numbered, types[kind]), {"class_names": ",".join(names)}


def dataset(
    rng: np.random.Generator, folder: Path, kind: str, classes: list[str], first: int
) -> dict[int, str | None]:
    """Write a dataset of some files, each with a numbering of its own; return classes by image."""
    folder.mkdir()
    truth: dict[int, str | None] = {}
    names = list(classes)
    id_kind = rng.choice(["none", "unique", "restarting", "null"])
    number = first
    for file in range(numbers(rng, 1, 4)):
        if rng.random() < 0.5:
            names = [str(name) for name in rng.permutation(names)]
        rows = numbers(rng, 3, 9)
        wanted: list[str | None] = [
            None if rng.random() < 0.1 else str(rng.choice(classes)) for _ in range(rows)
        ]
        here = range(number, number + rows)
        truth |= dict(zip(here, wanted, strict=True))
        labels, metadata = label_table(rng, kind, wanted, names)
        columns: dict[str, Any] = {"image": [str(i).encode() for i in here], "label": labels}
        ids = {"unique": list(here), "restarting": list(range(rows)), "null": [None] * rows}
        if id_kind in ids:
            columns["id"] = pa.array(ids[id_kind], pa.int64())
        table = pa.table(columns).replace_schema_metadata(metadata)
        ending = rng.choice([".parquet", ".PARQUET", ".parq", ".pq"])
        pq.write_table(table, folder / f"{file}{ending}", row_group_size=numbers(rng, 2, 6))
        number += rows
    return truth


@pytest.mark.parametrize("seed", SEEDS)
def test_no_label_is_another_rows_whatever_numbers_types_and_ids(seed: int, tmp_path: Path) -> None:
    rng = np.random.default_rng(seed)
    kinds = [str(kind) for kind in rng.choice(KINDS, 2)]
    classes = [str(c) for c in rng.permutation(CLASSES)[: numbers(rng, 2, 6)]]
    fewer = classes[numbers(rng, 0, 2) :]
    truths = [
        dataset(rng, tmp_path / "train", kinds[0], classes, 0),
        dataset(rng, tmp_path / "test", kinds[1], fewer, 1000),
    ]
    sources = [Source.open(str(tmp_path / name)) for name in ("train", "test")]
    if not all(source.has_labels for source in sources):  # all null, by chance
        return
    for one in (sources, list(align_labels(*sources))):
        for source, truth in zip(one, truths, strict=True):
            assert source.num_rows == len(truth)
            assert len(set(source.ids().tolist())) == source.num_rows
            said = [source.class_names[k] if k >= 0 else None for k in source.labels()]
            label_of = source.label_of()
            rows = source.read_rows(rng.permutation(source.num_rows))
            assert rows.labels is not None
            assert label_of(rows.ids).tolist() == rows.labels.tolist()
            for label, encoded in zip(rows.labels, rows.images, strict=True):
                assert encoded is not None
                name = source.class_names[label] if label >= 0 else None
                assert name == truth[int(encoded)]
            assert said == list(truth.values())
    aligned = align_labels(*sources)
    assert aligned[0].class_names == aligned[1].class_names


def table(path: Path, about: dict[str, str] | None = None, **columns: Any) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    num = len(next(iter(columns.values())))
    columns = {"image": [b"x"] * num, **columns}
    pq.write_table(pa.table(columns).replace_schema_metadata(about), path)
    return str(path)


def test_only_the_classes_that_occur_are_counted(tmp_path: Path) -> None:
    train = Source.open(table(tmp_path / "a.parquet", label=[0, 5, 20_000, 5]))
    test = Source.open(table(tmp_path / "b.parquet", label=[20_000, 7]))
    one, other = align_labels(train, test)
    assert one.labels().tolist() == [0, 1, 2, 1]
    assert other.labels().tolist() == [2, 3]
    assert one.class_names == ("0", "5", "20000", "7")


def test_dense_numbers_stay_what_they_are(tmp_path: Path) -> None:
    source = Source.open(table(tmp_path / "a.parquet", label=[2, 0, 1]))
    (aligned,) = align_labels(source)
    assert aligned == source
    assert aligned.class_names == ()


def test_numbers_are_compared_as_numbers_where_a_side_has_no_names(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    text = Source.open(table(tmp_path / "t.parquet", label=["x", "y", "x"]))
    named = Source.open(
        table(tmp_path / "a.parquet", label=[0, 1, 0], about={"class_names": "x,y"})
    )
    plain = Source.open(table(tmp_path / "b.parquet", label=[1, 0, 1]))
    one, other = align_labels(named, plain)
    assert one.labels().tolist() == [0, 1, 0]
    assert other.labels().tolist() == [1, 0, 1]
    assert "b.parquet has no names of classes: labels are compared as numbers" in caplog.text
    with pytest.raises(DataError, match="which is which is not known"):
        align_labels(text, plain)


def test_what_one_side_lacks_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    train = Source.open(table(tmp_path / "train.parquet", label=["ant", "bee", "cat"]))
    test = Source.open(table(tmp_path / "test.parquet", label=["cat", "bee", "dog"]))
    _, other = align_labels(train, test)
    assert other.labels().tolist() == [2, 1, 3]
    assert f"{test.uri} has no class ant" in caplog.text
    assert f"{train.uri} has no class dog, which {test.uri} has" in caplog.text


def test_all_null_labels_and_other_reasons_are_said(tmp_path: Path) -> None:
    null = Source.open(table(tmp_path / "a.parquet", label=pa.nulls(6, pa.int64())))
    with pytest.raises(DataError, match=r"all 6 of column 'label' are null"):
        null.labels()
    none = Source.open(table(tmp_path / "b.parquet", other=[1]))
    with pytest.raises(DataError, match="no label column 'label'"):
        none.labels()
    broken = Source.open(table(tmp_path / "c.parquet", label=[0.5, 1.0]))
    with pytest.raises(DataError, match="does not hold integers"):
        broken.labels()
    with pytest.raises(DataError, match="does not hold integers"):
        Source.open(table(tmp_path / "d.parquet", y=[0.5, 1.0]), ColumnsConfig(label="y"))


def test_a_folder_that_cannot_be_listed_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.jpg").write_bytes(image(0))
    scan = os.scandir

    def guarded(path: str) -> Any:  # the tests may run as root, who may read everything
        if str(path).endswith("/b"):
            raise PermissionError(13, "Permission denied", path)
        return scan(path)

    monkeypatch.setattr(os, "scandir", guarded)
    with pytest.raises(DataError, match=r"/b cannot be listed: .*Permission denied"):
        FolderInput.open(str(tmp_path))


def test_loose_images_beside_class_folders_get_no_label_and_that_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("a/1.jpg", "b/2.jpg", "montage.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(image(0))
    assert FolderInput.open(str(tmp_path)).labels() == [0, 1, -1]
    assert "1 image lies beside 2 class folders (montage.jpg)" in caplog.text
    assert f"`simclr-ray prepare {tmp_path} OUT`, with labels=folders if" in caplog.text
    caplog.clear()
    assert FolderInput.open(str(tmp_path), labels="folders").labels() == [0, 1, -1]
    assert FolderInput.open(str(tmp_path), labels="none").labels() == [-1, -1, -1]
    assert not caplog.text
    with pytest.raises(DataError, match="labels=folders, but all 1 images lie loose"):
        FolderInput.open(str(tmp_path / "a"), labels="folders")


def test_a_folder_of_images_is_read_where_it_lies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for i, name in enumerate(("a/1.jpg", "a/2 .JPE", "b/3", "b/4.png")):
        (tmp_path / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "images" / name).write_bytes(image(i))
    uri = index_folder(str(tmp_path / "images"), str(tmp_path / "runs" / "lists"))
    for source in (Source.open(uri), Source.open(str(tmp_path / "images"))):
        rows = source.read_group(0)
        assert rows.images == [image(i) for i in range(4)]
        assert rows.paths == ["a/1.jpg", "a/2 .JPE", "b/3", "b/4.png"]
        assert source.labels().tolist() == [0, 0, 1, 1]
        assert source.class_names == ("a", "b")
        # windows of the shuffle are bounded by the images' bytes, not by those of their names
        assert source.row_bytes > sum(len(image(i)) for i in range(4)) / 4
    assert index_folder(str(tmp_path / "images"), str(tmp_path / "runs" / "lists")) == uri
    moved = tmp_path / "moved"
    moved.mkdir()
    (tmp_path / "images").rename(moved / "images")
    (tmp_path / "runs").rename(moved / "runs")
    again = Source.open(str(moved / "runs" / "lists" / Path(uri).name))
    assert again.read_group(0).images == [image(i) for i in range(4)]
    assert index_folder(str(moved / "images"), str(moved / "runs" / "lists")) == again.uri


@pytest.mark.parametrize("name", ["zw\udce9", "file:///zw\udce9/a.parquet"])
def test_a_name_that_is_not_utf8_is_refused_in_one_line(name: str) -> None:
    for door in (Source.open, FolderInput.open):
        with pytest.raises(DataError, match=r"zw\\udce9.*: the name is not UTF-8; give"):
            door(name)


def test_lists_of_several_folders_are_no_one_dataset(tmp_path: Path) -> None:
    for at, name in enumerate(("first", "second")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "1.png").write_bytes(image(at))
        uri = index_folder(str(tmp_path / name), str(tmp_path / "lists"))
        assert Source.open(uri).read_group(0).images == [image(at)]
    with pytest.raises(DataError, match=r"/lists holds lists of images that lie in several places"):
        Source.open(str(tmp_path / "lists"))


def test_a_folder_in_a_bucket_is_joined_before_its_options_and_its_list_has_no_password(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = "s3://KEY:p1anted@b/set?region=x&endpoint_override=h"
    (tmp_path / "b" / "set" / "train" / "a b").mkdir(parents=True)
    (tmp_path / "b" / "set" / "train" / "a b" / "1.png").write_bytes(image(0))
    bucket = pafs.SubTreeFileSystem(str(tmp_path), pafs.LocalFileSystem())
    opened = []

    def stand_in(uri: str) -> tuple[pafs.FileSystem, str]:
        uri = recall(remember(uri))
        if "://" not in uri:
            return pafs.LocalFileSystem(), uri
        opened.append(uri)
        return bucket, urlsplit(unquote(uri)).netloc.rpartition("@")[2] + urlsplit(uri).path

    for module in ("folder_input", "source", "files", "footer", "tables"):
        monkeypatch.setattr(f"simclr_ray.data.{module}.filesystem", stand_in)
    uri = index_folder(given, str(tmp_path / "lists"))
    assert opened[-1] == "s3://KEY:p1anted@b/set/train?region=x&endpoint_override=h"
    assert b"p1anted" not in Path(uri).read_bytes()
    listed = Source.open(uri)
    assert listed.read_group(0).images == [image(0)]
    assert listed.image_root == opened[-1]  # as it goes to other processes
    assert "p1anted" not in listed.shown_uri


@pytest.mark.parametrize(
    ("trained", "asked", "expected"),
    [
        ([0, 5, 20_000], [20_000, 0], [2, 0]),  # numbers with gaps
        ([0, 1, 2], [2, 0], [2, 0]),
        (["x", "z", "y"], ["z", "x"], [2, 0]),  # by name, in the order of names
    ],
)
def test_a_classifier_is_asked_by_its_own_classes(
    trained: list[Any], asked: list[Any], expected: list[int], tmp_path: Path
) -> None:
    (train,) = align_labels(Source.open(table(tmp_path / "a.parquet", label=trained)))
    test = Source.open(table(tmp_path / "b.parquet", label=asked))
    assert map_to_classifier(test, train.class_names, 3).labels().tolist() == expected


@pytest.mark.parametrize(
    ("trained", "asked"),
    [([1, 2, 3], [0, 1, 2]), ([0, 1, 2], [3]), (["x", "y"], ["z"]), ([0, 1], ["x"])],
)
def test_classes_that_a_classifier_does_not_know_are_refused(
    trained: list[Any], asked: list[Any], tmp_path: Path
) -> None:
    (train,) = align_labels(Source.open(table(tmp_path / "a.parquet", label=trained)))
    test = Source.open(table(tmp_path / "b.parquet", label=asked))
    with pytest.raises(DataError, match="the classifier"):
        map_to_classifier(test, train.class_names, len(trained))


def test_numbers_are_places_among_the_names_of_a_classifier(tmp_path: Path) -> None:
    test = Source.open(table(tmp_path / "b.parquet", label=[1, 0]))
    assert map_to_classifier(test, ("x", "y"), 2).labels().tolist() == [1, 0]


@pytest.mark.parametrize(
    ("names", "asked", "expected", "missing"),
    [
        (("x", "z", "y"), ["y", "q", None, "x"], [2, -1, -1, 0], ["q"]),
        (("x", "y"), [1, 0, 2, None], [1, 0, -1, -1], ["2"]),  # places among the names
        (("0", "5", "20000"), [20_000, 7, 0], [2, -1, 0], ["7"]),  # numbers with gaps
        (("0", "1"), ["x", "y"], [-1, -1], ["x", "y"]),  # which is which is not said
    ],
)
def test_classes_that_a_classifier_does_not_have_can_be_left_out(
    names: tuple[str, ...],
    asked: list[Any],
    expected: list[int],
    missing: list[str],
    tmp_path: Path,
) -> None:
    test = Source.open(table(tmp_path / "b.parquet", label=asked))
    labels, absent = labels_for_classifier(test, names)
    assert labels.tolist() == expected
    assert absent == missing


def test_names_are_compared_as_numbers_only_with_a_classifier_of_numbers(tmp_path: Path) -> None:
    about = {"class_names": "x,y,z"}
    test = Source.open(table(tmp_path / "b.parquet", about, label=[2, 0, 1]))
    assert labels_for_classifier(test, ("z", "y"))[0].tolist() == [0, -1, 1]
    assert labels_for_classifier(test, ("a", "b", "c"))[0].tolist() == [-1, -1, -1]
    assert labels_for_classifier(test, ("0", "1", "2"))[0].tolist() == [2, 0, 1]


def test_a_label_without_a_name_is_refused_and_not_lost(tmp_path: Path) -> None:
    about = {"class_names": "x,y,z"}
    source = Source.open(table(tmp_path / "a.parquet", about, label=[0, 1, 5]))
    with pytest.raises(DataError, match="label 5, which is none of the 3 classes"):
        source.labels()
    minus = Source.open(table(tmp_path / "b.parquet", about, label=[0, -100, 2]))
    (aligned,) = align_labels(minus)
    assert [label >= 0 for label in aligned.labels()] == [True, False, True]


def test_a_negative_label_is_none_in_files_that_number_differently(tmp_path: Path) -> None:
    table(tmp_path / "set" / "a.parquet", {"class_names": "x,y"}, label=[0, -100])
    table(tmp_path / "set" / "b.parquet", {"class_names": "y,x"}, label=[0, 1])
    assert Source.open(str(tmp_path / "set")).labels().tolist() == [0, -1, 1, 0]


def test_where_a_list_of_images_lies_changes_neither_images_nor_fingerprint(
    tmp_path: Path,
) -> None:
    for i, name in enumerate(("a/1 ä#%.jpg", "b/2.jpg")):
        (tmp_path / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "images" / name).write_bytes(image(i))
    (tmp_path / "real" / "deep").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "real" / "deep")  # `..` of it is not that of its name
    places = [str(tmp_path / "one"), str(tmp_path / "link" / "lists"), "file://" + str(tmp_path)]
    sources = [Source.open(index_folder(str(tmp_path / "images"), out)) for out in places]
    sources.append(Source.open(index_folder((tmp_path / "images").as_uri() + "/", places[0])))
    for source in sources:
        assert source.read_group(0).images == [image(0), image(1)]
    assert len({source.fingerprint for source in sources}) == 1


def test_a_list_within_a_folder_is_no_part_of_it(tmp_path: Path) -> None:
    (tmp_path / "1.jpg").write_bytes(image(1))
    first = index_folder(str(tmp_path), str(tmp_path / "runs" / LISTS))
    assert Source.open(str(tmp_path)).num_rows == 1
    (tmp_path / "2.jpg").write_bytes(image(2))
    assert index_folder(str(tmp_path), str(tmp_path / "runs" / LISTS)) != first
    assert Source.open(str(tmp_path)).num_rows == 2


def test_what_cannot_be_looked_at_is_an_error_and_no_link(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "x.jpg").write_bytes(image(0))
    scan = os.scandir

    class Stale:
        name, path = "x.jpg", str(tmp_path / "x.jpg")

        def stat(self) -> Any:
            raise OSError(errno.ESTALE, "Stale file handle")

    class Entries:
        def __enter__(self) -> Any:
            return [Stale()]

        def __exit__(self, *_: object) -> None:
            pass

    monkeypatch.setattr(os, "scandir", lambda path: Entries() if path else scan(path))
    with pytest.raises(DataError, match=r"x\.jpg cannot be looked at: .*Stale"):
        FolderInput.open(str(tmp_path))


def test_hidden_images_are_counted_by_their_folders(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("v/1.png", ".h/a/1.png", ".h/2.png", "v/.3.png", ".ipynb_checkpoints/4.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(image(0))
    listing = list_images(pafs.LocalFileSystem(), str(tmp_path), str(tmp_path))
    assert listing.left_out.line() == (
        "left out 3 files: 2 in hidden folders (.h), 1 hidden (v/.3.png)"
    )
    assert FolderInput.open(str(tmp_path)).names == ("v/1.png",)
    assert "2 in hidden folders (.h)" in caplog.text
    shown = pafs.SubTreeFileSystem(str(tmp_path), pafs.LocalFileSystem())
    assert list_images(shown, "", "").left_out.counts == listing.left_out.counts


def test_what_is_left_out_is_named_and_lists_have_a_remedy(tmp_path: Path) -> None:
    (tmp_path / "1.png").write_bytes(image(0))
    for name in ("a.csv", "b.json", "c.jsonl", "d.txt", "e.doc"):
        (tmp_path / name).write_text("file_name,label")
    listing = list_images(pafs.LocalFileSystem(), str(tmp_path), str(tmp_path))
    assert listing.left_out.line() == (
        "left out 5 files: 4 lists, whose labels are not read (a.csv, b.json, c.jsonl, …), "
        "1 not images (e.doc); labels of a list are read from parquet, with the columns image "
        "(paths) and label"
    )


def test_labels_of_a_list_are_read_as_the_page_says(tmp_path: Path) -> None:
    pandas = pytest.importorskip("pandas")
    for i in range(3):
        (tmp_path / f"{i}.jpg").write_bytes(image(i))
    rows = "".join(f"{i}.jpg,{'ab'[i % 2]}\n" for i in range(3))
    (tmp_path / "labels.csv").write_text(f"file,class\n{rows}")
    listed = pandas.read_csv(tmp_path / "labels.csv")
    listed = listed.rename(columns={"file": "image", "class": "label"})
    listed.to_parquet(tmp_path / "labels.parquet")
    source = Source.open(str(tmp_path / "labels.parquet"))
    assert source.read_group(0).images == [image(i) for i in range(3)]
    assert source.labels().tolist() == [0, 1, 0]
    assert source.class_names == ("a", "b")


@pytest.mark.parametrize(
    ("name", "content", "what"),
    [
        (
            "1.jpg",
            image(0),
            r"no parquet file but one image \(JPEG\): give the folder .*",
        ),
        ("noending", image(0), r"is no parquet file but one image \(JPEG\)"),
        ("x.csv", b"a,b", r"but a list \(\.csv\): .* written as parquet"),
        ("x.jsonl", b"{}", r"but a list \(\.jsonl\)"),
        ("x.tar", b"\0" * 1024, r"but a tar: simclr-ray prepare .*/x\.tar OUT"),
        ("x.zip", b"PK\x03\x04", "but an archive: unpack it"),
        ("x.arrow", b"ARROW1", "but an Arrow file: give `prepare` the folder"),
        ("x.dat", b"what", "but none that is read; give parquet, or a folder of images"),
    ],
)
def test_a_single_file_of_another_kind_is_told_what_takes_it(
    name: str, content: bytes, what: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=what):
        Source.open(str(tmp_path / name))


@pytest.mark.parametrize(
    "kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int8(), pa.string())]
)
def test_blank_text_is_no_label_and_is_counted(
    kind: pa.DataType, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    texts = pa.array(["b", "", "a", " \t", None, "b "], pa.string()).cast(kind)
    source = Source.open(table(tmp_path / "a.parquet", label=texts))
    assert source.class_names == ("a", "b", "b ")
    assert source.labels().tolist() == [1, -1, 0, -1, -1, 2]
    assert "column 'label': 2 of 6 labels are blank text: no label" in caplog.text
    (aligned,) = align_labels(source)
    assert aligned.labels().tolist() == [1, -1, 0, -1, -1, 2]


@pytest.mark.parametrize("about", [None, {"class_names": "ant,bee"}], ids=["numbers", "names"])
def test_every_label_below_0_is_none(about: dict[str, str] | None, tmp_path: Path) -> None:
    path = table(tmp_path / "a.parquet", about, label=[1, -100, 0, -2, -1, None])
    source = Source.open(path)
    labels = [1, -1, 0, -1, -1, -1]
    assert source.labels().tolist() == labels
    assert source.read_rows(np.arange(6)).labels.tolist() == labels  # type: ignore[union-attr] # it has labels
    assert count_labels(source) == {-1: 4, 0: 1, 1: 1}
    first, second = ("ant", "bee") if about else ("0", "1")
    names = [class_name(source, label) for label in labels]
    assert names == [second, "no label", first, *["no label"] * 3]


def test_labels_that_are_all_blank_are_none(tmp_path: Path) -> None:
    source = Source.open(table(tmp_path / "a.parquet", label=["", " ", None]))
    assert not source.has_labels
    with pytest.raises(DataError, match=r"all 3 of column 'label' are null or blank"):
        source.labels()


def test_a_problem_with_the_labels_of_many_files_has_no_empty_name(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    Source.open(table(tmp_path / "a.parquet", label=[0.5, 1.0]))
    assert f"labels are not used: {tmp_path}/a.parquet: column 'label' does not" in caplog.text


def test_messages_name_columns_as_the_verb_takes_them(tmp_path: Path) -> None:
    path = table(tmp_path / "a.parquet", other=[1])
    for prefix in ("data.columns.", "columns.", ""):
        with (
            pytest.raises(DataError, match=f"the right one with {prefix}image=") as error,
            column_keys(prefix),
        ):
            Source.open(path, ColumnsConfig(image="photo"))
        assert str(error.value).count("columns.") == prefix.count("columns.")
