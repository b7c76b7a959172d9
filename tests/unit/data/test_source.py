"""A dataset opens with its rows in order, or says in one sentence why it cannot."""

from __future__ import annotations

import base64
import io
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
import pytest
from PIL import Image

from simclr_ray.augment.decode import ImageDecoder, ImageError, instead_of_image, stands_for_image
from simclr_ray.config.experiment import ColumnsConfig
from simclr_ray.data import columns as columns_module
from simclr_ray.data.bytes_read import BYTES_READ, stored_bytes
from simclr_ray.data.description import describe
from simclr_ray.data.footer import RowGroup
from simclr_ray.data.source import Source
from simclr_ray.data.tables import take_rows
from simclr_ray.errors import DataError

Write = Callable[..., Path]


def images(first: int, count: int) -> list[bytes]:
    return [f"image {i}".encode() for i in range(first, first + count)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two files below each other: 10 rows in groups of 4, then 6 rows in groups of 4."""
    root = tmp_path / "set"
    (root / "b").mkdir(parents=True)
    for path, first, count in ((root / "a.parquet", 0, 10), (root / "b" / "c.parquet", 10, 6)):
        table = pa.table(
            {
                "image": pa.array(images(first, count), pa.binary()),
                "label": pa.array([None if i == 3 else i % 5 for i in range(first, first + count)]),
            }
        ).replace_schema_metadata({"class_names": "ant, bee,cat,dog,eel"})
        pq.write_table(table, path, row_group_size=4)
    return root


def write(path: Path, columns: dict[str, pa.Array], **metadata: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns).replace_schema_metadata(metadata or None), path)
    return path


def reason(encoded: bytes | None) -> str:
    with pytest.raises(ImageError) as refusal:
        ImageDecoder().decode(encoded or b"")
    with pytest.raises(ImageError) as other:
        ImageDecoder(channels=5).decode(encoded or b"")
    assert str(refusal.value) == str(other.value)
    return str(refusal.value)


def test_row_groups_number_the_rows_over_the_files_sorted_by_path(folder: Path) -> None:
    source = Source.open(str(folder))
    assert [Path(f).name for f in source.files] == ["a.parquet", "c.parquet"]
    assert source.row_groups == (
        RowGroup(0, 0, 0, 4),
        RowGroup(0, 1, 4, 4),
        RowGroup(0, 2, 8, 2),
        RowGroup(1, 0, 10, 4),
        RowGroup(1, 1, 14, 2),
    )
    assert (source.num_rows, source.has_ids, source.has_labels) == (16, False, True)
    assert source.class_names == ("ant", "bee", "cat", "dog", "eel")
    seen = [source.read_group(g) for g in range(5)]
    assert [i for rows in seen for i in rows.images] == images(0, 16)
    np.testing.assert_array_equal(np.concatenate([r.ids for r in seen]), np.arange(16))
    np.testing.assert_array_equal(source.ids(), np.arange(16))
    labels = [-1 if i == 3 else i % 5 for i in range(16)]
    np.testing.assert_array_equal(source.labels(), labels)
    assert source.labels().dtype == source.ids().dtype == np.int64


def test_rows_come_in_the_order_asked_for_and_may_repeat(folder: Path) -> None:
    source = Source.open(str(folder))
    asked = np.array([15, 0, 3, 3, 9, 0])
    rows = source.read_rows(asked)
    np.testing.assert_array_equal(rows.ids, asked)
    assert rows.images == [images(int(i), 1)[0] for i in asked]
    np.testing.assert_array_equal(rows.labels, source.labels()[asked])
    assert source.read_rows(np.array([], dtype=np.int64)).images == []
    with pytest.raises(IndexError):
        source.read_rows(np.array([16]))
    with pytest.raises(IndexError):
        source.read_rows(np.array([-1]))


def test_labels_are_read_only_where_they_are_wanted(folder: Path) -> None:
    source = Source.open(str(folder))
    with_labels, without = source.read_group(1), source.read_group(1, labels=False)
    assert with_labels.labels is not None
    assert without.labels is None
    assert without.images == with_labels.images
    np.testing.assert_array_equal(without.ids, with_labels.ids)


def test_the_bytes_that_were_read_are_those_of_the_columns_and_of_named_files(
    folder: Path, tmp_path: Path
) -> None:
    source = Source.open(str(folder))
    BYTES_READ.take()
    for index in range(len(source.row_groups)):
        source.read_group(index, labels=False)
    of_images, of_both = BYTES_READ.take(), 0
    for file in (folder / "a.parquet", folder / "b" / "c.parquet"):
        groups = pq.read_metadata(file)
        for group in map(groups.row_group, range(groups.num_row_groups)):
            of_both += sum(group.column(i).total_compressed_size for i in range(2))
            of_images -= group.column(0).total_compressed_size
    assert of_images == 0
    for index in range(len(source.row_groups)):
        source.read_group(index)
    assert BYTES_READ.take() == of_both
    (tmp_path / "named.png").write_bytes(bytes(1000))
    listed = write(tmp_path / "list" / "l.parquet", {"image": pa.array(["../named.png"] * 3)})
    named = Source.open(str(listed))
    BYTES_READ.take()
    named.read_group(0)
    assert 3000 < BYTES_READ.take() < 3200


def test_bytes_of_a_column_whose_name_has_a_dot_are_counted(tmp_path: Path) -> None:
    inner = pa.array([{"data": b"x" * 50, "path": "p"}] * 9)
    columns = {"img.data": pa.array([b"y" * 40] * 9), "image": inner, "imag": pa.array(range(9))}
    pq.write_table(pa.table(columns), tmp_path / "f.parquet", compression="none")
    footer = pq.read_metadata(tmp_path / "f.parquet")
    sizes = {
        (chunk := footer.row_group(0).column(i)).path_in_schema: chunk.total_compressed_size
        for i in range(footer.num_columns)
    }
    assert stored_bytes(footer, 0, ["img.data"]) == sizes["img.data"] > 40
    assert stored_bytes(footer, 0, ["imag"]) == sizes["imag"]
    assert stored_bytes(footer, 0, ["image"]) == sizes["image.data"] + sizes["image.path"]


def test_a_limit_keeps_the_first_rows_in_file_order(folder: Path) -> None:
    source = Source.open(str(folder), limit=9)
    assert source.num_rows == 9
    assert source.row_groups[-1] == RowGroup(0, 2, 8, 1)
    assert source.read_group(2).images == images(8, 1)
    assert len(source.labels()) == len(source.ids()) == 9
    assert Source.open(str(folder), limit=99).num_rows == 16


def test_a_source_is_small_and_reads_after_pickling(folder: Path) -> None:
    sent = pickle.dumps(Source.open(str(folder)))
    assert len(sent) < 2000
    assert pickle.loads(sent).read_group(4).images == images(14, 2)  # noqa: S301 - our own bytes


def test_paths_and_uris_name_the_same_set(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    by_path = Source.open(str(folder))
    by_uri = Source.open(f"file://{folder}/")
    monkeypatch.chdir(folder.parent)
    assert by_uri.fingerprint == by_path.fingerprint == Source.open("set").fingerprint
    assert by_uri.read_group(3).images == images(10, 4)


def test_the_fingerprint_follows_the_rows_and_not_the_place(folder: Path, tmp_path: Path) -> None:
    source = Source.open(str(folder))
    shutil.copytree(folder, tmp_path / "elsewhere" / "copy")
    copy = tmp_path / "elsewhere" / "copy"
    assert Source.open(str(copy)).fingerprint == source.fingerprint
    assert len(source.fingerprint) == 16
    others = {
        Source.open(str(folder), limit=9).fingerprint,
        Source.open(str(folder), ColumnsConfig(label="")).fingerprint,
        Source.open(str(folder / "a.parquet")).fingerprint,
    }
    (copy / "a.parquet").rename(copy / "aa.parquet")
    others.add(Source.open(str(copy)).fingerprint)
    changed = images(0, 10)
    changed[7] = b"image X"  # same length, so only the footer's statistics can tell
    write(folder / "a.parquet", {"image": pa.array(changed), "label": pa.array([0] * 10)})
    others.add(Source.open(str(folder)).fingerprint)
    assert len(others | {source.fingerprint}) == 6


def test_ids_are_read_where_there_is_an_id_column(tmp_path: Path) -> None:
    ids = [7, 5, 900, -2]
    path = write(
        tmp_path / "a.parquet",
        {"id": pa.array(ids, pa.int32()), "image": pa.array(images(0, 4))},
    )
    source = Source.open(str(path))
    assert source.has_ids
    assert not source.has_labels
    np.testing.assert_array_equal(source.ids(), ids)
    np.testing.assert_array_equal(source.read_rows(np.array([2, 0])).ids, [900, 7])
    assert source.read_group(0).labels is None
    with pytest.raises(DataError, match="no label column 'label'"):
        source.labels()


def test_an_id_column_of_text_is_used_only_when_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    columns = {"id": pa.array(["x", "y"]), "image": pa.array(images(0, 2))}
    path = write(tmp_path / "a.parquet", columns)
    np.testing.assert_array_equal(Source.open(str(path)).ids(), [0, 1])
    Source.open(str(path))
    assert caplog.text.count("not used as the id") == 1
    write(tmp_path / "a.parquet", {**columns, "key": columns["id"]})
    with pytest.raises(DataError, match="id column 'key' has type string, not an integer"):
        Source.open(str(path), ColumnsConfig(id="key"))
    with pytest.raises(DataError, match=r"no id column 'kee' \(did you mean 'key'\?\)"):
        Source.open(str(path), ColumnsConfig(id="kee"))


@pytest.mark.parametrize(
    ("ids", "why"), [([1, None], "2 rows, 1 of them null"), ([1, 1], "2 rows, 1 distinct ids")]
)
def test_an_id_column_that_is_no_key_is_used_only_when_named_and_then_refused(
    ids: list[int | None], why: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    columns = {"id": pa.array(ids), "key": pa.array(ids), "image": pa.array(images(0, 2))}
    path = write(tmp_path / "a.parquet", columns)
    source = Source.open(str(path))
    assert source.ids().tolist() == source.read_group(0).ids.tolist() == [0, 1]
    assert f"column 'id': {why}: not used, rows are numbered" in caplog.text
    with pytest.raises(DataError, match=f"data.columns.id=key: {why}"):
        Source.open(str(path), ColumnsConfig(id="key"))


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary()])
def test_binary_columns_of_any_width_hold_images(kind: pa.DataType, tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", {"pic": pa.array([b"one", None], kind)})
    assert Source.open(str(path), ColumnsConfig(image="pic")).read_group(0).images == [b"one", None]


def test_a_struct_gives_its_bytes_and_else_the_file_at_its_path(tmp_path: Path) -> None:
    (tmp_path / "in file").write_bytes(b"from the file")
    rows = [
        {"bytes": b"bytes", "path": "in file"},
        {"bytes": None, "path": "in file"},
        {"bytes": None, "path": None},
        None,
        {"bytes": None, "path": "gone"},
    ]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    path = write(tmp_path / "a.parquet", {"image": pa.array(rows, kind)})
    *held, gone = Source.open(str(path)).read_group(0).images
    assert held == [b"bytes", b"from the file", None, None]
    assert reason(gone) == "no such file"
    only_paths = pa.array([{"path": "in file"}], pa.struct([("path", pa.string())]))
    path = write(tmp_path / "b.parquet", {"image": only_paths})
    assert Source.open(str(path)).read_group(0).images == [b"from the file"]


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string()])
def test_strings_are_paths_from_the_parquet_file_or_uris(kind: pa.DataType, tmp_path: Path) -> None:
    (tmp_path / "set" / "pics").mkdir(parents=True)
    here = tmp_path / "set" / "pics" / "a b.png"
    here.write_bytes(b"here")
    uri = f"file://{here}".replace(" ", "%20")
    names = ["pics/a b.png", str(here), uri, "../set/pics/a b.png", "pics/none.png", "pics", None]
    path = write(tmp_path / "set" / "a.parquet", {"image": pa.array(names, kind)})
    found = Source.open(str(path)).read_group(0).images
    assert found[:4] == [b"here"] * 4
    assert [reason(f) for f in found[4:6]] == ["no such file", "a folder, not a file"]
    assert found[6] is None


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
def test_text_that_is_no_path_is_said_to_be_what_it_is(kind: str, tmp_path: Path) -> None:
    out = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (40, 50, 3), np.uint8)
    Image.fromarray(pixels).save(out, kind)
    encoded = base64.b64encode(out.getvalue()).decode()
    texts = {
        encoded: "base64 text, not bytes or a path",
        encoded[:96]: "base64 text, not bytes or a path",
        f"data:image/png;base64,{encoded}": "text that holds an image, not a path",
        "gone.png": "no such file",
        "a.parquet/gone.png": "no such file",
        "": "empty",
        "a cat on a mat": "no such file",
        "word " * 100: "text that is no path",
        "a\0b": "text that is no path",
    }
    path = write(tmp_path / "a.parquet", {"image": pa.array(list(texts))})
    source = Source.open(str(path))
    assert [reason(i) for i in source.read_group(0).images] == list(texts.values())
    seen = describe(str(path))
    assert [row.reason for row in seen.bad] == list(texts.values())


def test_what_stands_for_an_image_holds_no_more_than_a_reason() -> None:
    for bad in (b"\xff\0\n" * 10, b"x" * 10_000, "ü".encode()):
        said = reason(instead_of_image("") + bad)
        assert said.isprintable()
        assert len(said) <= 80


def test_files_named_in_another_parquet_folder_resolve_there(tmp_path: Path) -> None:
    for name in ("x", "y"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "p").write_bytes(name.encode())
        write(tmp_path / name / "a.parquet", {"image": pa.array(["p"])})
    rows = Source.open(str(tmp_path)).read_rows(np.array([1, 0]))
    assert rows.images == [b"y", b"x"]


def test_hidden_and_half_written_files_are_no_part_of_a_set(folder: Path) -> None:
    before = Source.open(str(folder)).fingerprint
    for name in (".part.parquet", "_notes.parquet", "readme.txt"):
        (folder / name).write_text("no parquet at all")
    (folder / ".hidden").mkdir()
    shutil.copy(folder / "a.parquet", folder / ".hidden" / "z.parquet")
    assert Source.open(str(folder)).fingerprint == before


def test_class_names_are_understood_as_json_and_as_hugging_face_writes_them(tmp_path: Path) -> None:
    columns = {"image": pa.array(images(0, 1)), "label": pa.array([0])}
    listed = write(tmp_path / "a.parquet", columns, class_names='["cat, black", "dog"]')
    assert Source.open(str(listed)).class_names == ("cat, black", "dog")
    features = '{"info": {"features": {"label": {"names": ["x", "y"], "_type": "ClassLabel"}}}}'
    hugging = write(tmp_path / "b.parquet", columns, huggingface=features)
    assert Source.open(str(hugging)).class_names == ("x", "y")
    broken = write(tmp_path / "c.parquet", columns, huggingface="{")
    assert Source.open(str(broken)).class_names == ()


def test_each_broken_dataset_is_refused_in_one_sentence(folder: Path, tmp_path: Path) -> None:
    whole = (folder / "a.parquet").read_bytes()
    (tmp_path / "empty").mkdir()
    (tmp_path / "zero.parquet").write_bytes(b"")
    (tmp_path / "text.parquet").write_text("this is plain text, and long enough")
    (tmp_path / "short.parquet").write_bytes(b"PAR1")
    (tmp_path / "cut.parquet").write_bytes(whole[: len(whole) * 2 // 3])
    no_image = {"img": pa.array(images(0, 1)), "label": pa.array([1])}
    write(tmp_path / "none.parquet", no_image)
    write(tmp_path / "numbers.parquet", {"image": pa.array([1.5])})
    write(tmp_path / "norows.parquet", {"image": pa.array([], pa.binary())})
    cases = {
        "nowhere": "no such file or folder",
        "empty": "holds neither images nor parquet",
        "zero.parquet": "is empty: 0 bytes",
        "text.parquet": "is no parquet file",
        "short.parquet": "is no parquet file",
        "cut.parquet": "is truncated",
        "none.parquet": r"no image column 'image' \(did you mean 'img'\?\); its columns: img,",
        "numbers.parquet": "column 'image' has type double",
        "norows.parquet": "holds no rows",
    }
    for name, reason in cases.items():
        with pytest.raises(DataError, match=reason) as refusal:
            Source.open(str(tmp_path / name))
        assert name in str(refusal.value)
        assert "\n" not in str(refusal.value)
    with pytest.raises(DataError, match="cannot be opened: not one of"):
        Source.open("nope://bucket/x")


def test_files_that_disagree_about_a_column_are_refused_by_name(folder: Path) -> None:
    write(folder / "z.parquet", {"image": pa.array(images(0, 1))})
    with pytest.raises(DataError, match=r"z\.parquet has no label column 'label'"):
        Source.open(str(folder))
    assert Source.open(str(folder), ColumnsConfig(label="")).num_rows == 17


@pytest.mark.parametrize("role", ["id", "label"])
def test_numbers_that_do_not_fit_int64_are_left_alone_unless_they_are_named(
    role: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    numbers = pa.array([2**64 - 1, 5], pa.uint64())
    columns = {role: numbers, "key": numbers, "image": pa.array(images(0, 2))}
    source = Source.open(str(write(tmp_path / "a.parquet", columns)))
    assert source.ids().tolist() == source.read_group(0).ids.tolist() == [0, 1]
    assert not source.has_labels
    assert f"column '{role}'" in caplog.text
    assert "does not fit int64" in caplog.text
    with pytest.raises(DataError, match="does not fit int64"):
        Source.open(str(tmp_path / "a.parquet"), ColumnsConfig.model_validate({role: "key"}))
    fitting = {role: pa.array([2**63 - 1, 5], pa.uint64()), "image": columns["image"]}
    source = Source.open(str(write(tmp_path / "b.parquet", fitting)))
    got = source.ids() if role == "id" else source.labels()
    assert got.tolist() == [2**63 - 1, 5]


@pytest.mark.parametrize("labels", [[0, 1], ["cat", "dog"]], ids=["numbers", "text"])
def test_a_file_of_nulls_alone_and_one_without_rows_do_not_decide_a_type(
    labels: list[object], tmp_path: Path
) -> None:
    nothing = {"image": pa.nulls(0), "label": pa.nulls(0)}
    write(tmp_path / "set" / "a.parquet", nothing)
    whole = {"image": pa.array(images(0, 2)), "label": pa.array(labels)}
    write(tmp_path / "set" / "b.parquet", whole, class_names="cat,dog")
    write(tmp_path / "set" / "c.parquet", {"image": pa.array(images(2, 2)), "label": pa.nulls(2)})
    write(tmp_path / "set" / "d.parquet", {"image": pa.nulls(1), "label": pa.array(labels[1:])})
    source = Source.open(str(tmp_path / "set"))
    assert source.class_names == ("cat", "dog")
    assert source.labels().tolist() == [0, 1, -1, -1, 1]
    rows = source.read_rows(np.arange(5))
    assert rows.images == [*images(0, 4), None]
    assert rows.labels is not None
    assert rows.labels.tolist() == [0, 1, -1, -1, 1]


def test_views_of_text_and_bytes_serve_as_text_and_bytes(tmp_path: Path) -> None:
    (tmp_path / "0.png").write_bytes(b"of a file")
    text = pa.array(["b", "a", None], pa.string_view())
    kind = pa.struct([("bytes", pa.binary_view()), ("path", pa.string_view())])
    for image in (
        pa.array([*images(0, 2), None], pa.binary_view()),
        pa.array([{"bytes": i} for i in images(0, 2)] + [None], kind),
        pa.array(["0.png", "0.png", None], pa.string_view()),
        pa.array([{"path": "0.png"}, {"path": "0.png"}, None], kind),
    ):
        path = write(tmp_path / "a.parquet", {"image": image, "label": text, "path": text})
        source = Source.open(str(path))
        assert source.labels().tolist() == [1, 0, -1]
        rows = source.read_rows(np.array([1, 0, 2]))
        assert rows.images in ([*reversed(images(0, 2)), None], [b"of a file"] * 2 + [None])
        assert rows.paths == ["a", "b", None]
        assert source.read_first_images(0, 3) == source.read_group(0).images
        assert source.names_files == (b"of a file" in rows.images)


def test_why_labels_are_not_used_is_said_where_they_stand_elsewhere(tmp_path: Path) -> None:
    columns = {"image": pa.array(images(0, 1))}
    listed = write(tmp_path / "b.parquet", {**columns, "label": pa.array([[1]])})
    with pytest.raises(DataError, match=r"of numbers or names: its type is list<element: int64>"):
        Source.open(str(listed)).labels()


def test_rows_are_taken_chunk_by_chunk() -> None:
    chunks = [pa.table({"image": images(first, 3)}) for first in (0, 3, 6)]
    table = pa.concat_tables(chunks)
    taken = take_rows(table, np.array([1, 1, 4, 8]), "a.parquet")
    assert taken["image"].to_pylist() == [b"image 1", b"image 1", b"image 4", b"image 8"]
    assert taken["image"].num_chunks == 3  # joined, 2 GiB of them would be refused
    assert take_rows(table, np.array([], np.int64), "a").num_rows == 0


def test_a_large_row_group_of_images_is_said_once(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    Source.open(str(folder))
    assert not caplog.text
    monkeypatch.setattr(columns_module, "MAX_GROUP_BYTES", 80)
    for _ in range(2):
        Source.open(str(folder))
    assert caplog.text.count("GiB is read and held whole for any of its images") == 1
    assert "c.parquet: a row group of 0.0 GiB" in caplog.text
    assert "write it with row_group_size=1" in caplog.text


def test_a_row_group_is_not_called_large_for_columns_that_are_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(columns_module, "MAX_GROUP_BYTES", 2000)
    images = {"image": [b"image"] * 9, "label": [0] * 9}
    large = {"masks": [bytes([row]) * 5000 for row in range(9)]}
    pq.write_table(pa.table(images | large), tmp_path / "a.parquet")
    Source.open(str(tmp_path / "a.parquet"))
    assert not caplog.text
    pq.write_table(pa.table({"image": large["masks"]}), tmp_path / "b.parquet")
    Source.open(str(tmp_path / "b.parquet"))
    assert "b.parquet: a row group of" in caplog.text


def test_a_file_that_breaks_after_opening_is_named(folder: Path) -> None:
    source = Source.open(str(folder))
    (folder / "a.parquet").write_bytes(b"PAR1 no longer what it was PAR1")
    with pytest.raises(DataError, match=r"a\.parquet"):
        source.read_group(0)


def test_every_odd_parquet_opens_or_is_refused_for_its_reason(image_root: Path) -> None:
    refused = {
        "missing_image_column": "no image column 'image'; its columns: label, label_name",
        "renamed_image_column": "did you mean 'img'",
        "zero_rows": "no rows",
        "zero_bytes": "0 bytes",
        "truncated": "is truncated",
        "text": "no parquet file",
    }
    for path in sorted((image_root / "odd").glob("*.parquet")):
        if path.stem in refused:
            with pytest.raises(DataError, match=refused[path.stem]):
                Source.open(str(path))
            continue
        source = Source.open(str(path))
        rows = source.read_rows(np.arange(source.num_rows))
        nulls = {"null_images": 10}.get(path.stem, 0)
        assert sum(image is None for image in rows.images) == nulls
        gone = {"string_image_column": 100}.get(path.stem, 0)
        assert sum(stands_for_image(image or b"") for image in rows.images) == gone
    good = Source.open(str(image_root / "odd" / "good.parquet"))
    struct = Source.open(str(image_root / "odd" / "struct_image_column.parquet"))
    every = np.arange(100)
    assert good.read_rows(every).images == struct.read_rows(every).images


def test_real_sets_open_as_they_lie_there(image_root: Path) -> None:
    cifar = Source.open(str(image_root / "cifar10" / "train"), limit=20_000)
    assert (cifar.num_rows, len(cifar.row_groups), cifar.class_names[9]) == (20_000, 20, "truck")
    np.testing.assert_array_equal(np.bincount(cifar.labels()), [2000] * 10)


def test_a_file_system_without_folders_serves_too(folder: Path) -> None:
    """A bucket lists keys and knows no working directory; a sub-tree file system is the nearest."""
    from simclr_ray.data.listing import list_parquet

    bucket = pafs.SubTreeFileSystem(str(folder.parent), pafs.LocalFileSystem())
    assert [f.path for f in list_parquet(bucket, "set", "set").files] == [
        "set/a.parquet",
        "set/b/c.parquet",
    ]
