"""Tar shards of any layout: no image is lost unnamed, no label is another sample's."""

from __future__ import annotations

import gzip
import io
import json
import pickle
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from PIL import Image

from simclr_ray.config.experiment import ColumnsConfig
from simclr_ray.config.sections.data import PreparationConfig
from simclr_ray.data import tar_input
from simclr_ray.data.folder_input import FolderInput
from simclr_ray.data.inputs import open_input
from simclr_ray.data.items import Item
from simclr_ray.data.tar_index import read_index
from simclr_ray.data.tar_input import TarInput, expand_braces
from simclr_ray.errors import ConfigError, DataError

FEW = range(40)
MANY = [pytest.param(seed, marks=pytest.mark.long) for seed in range(40, 240)]
FOLDERS = ("", "deep/er/", "été/", "x" * 120 + "/")
NAMES = ("img", "Ünï", "日本", "a b", "n" * 110, "q-1_2")
FORMATS = (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)


class Member(NamedTuple):
    name: str
    content: bytes
    kind: bytes = tarfile.REGTYPE
    link: str = ""


def image(number: int) -> bytes:
    """A PNG whose pixels tell its number."""
    out = io.BytesIO()
    pixels = np.full((4, 4, 3), (number // 65536, number // 256 % 256, number % 256), np.uint8)
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


def write(path: Path, members: Sequence[Member], kind: int = tarfile.PAX_FORMAT) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz" if path.name.endswith("gz") else "w", format=kind) as tar:
        for member in members:
            about = tarfile.TarInfo(member.name)
            about.size, about.type, about.linkname = len(member.content), member.kind, member.link
            tar.addfile(about, io.BytesIO(member.content))
    return path


def opened(what: str | Path, limit: int = 0, **columns: str) -> TarInput:
    given = open_input(
        str(what),
        columns=ColumnsConfig(**columns),
        split="",
        root="",
        num_images=limit,
        seed=0,
    )
    assert isinstance(given, TarInput)
    return given


def items_of(given: TarInput, rows: int = 5, seed: int = 0) -> list[Item]:
    parts = pickle.loads(pickle.dumps(given.parts(rows, seed)))  # noqa: S301 - our own
    return [item for part in parts for item in part.read()]


def sample(key: str, number: int, label: object = None, ending: str = "png") -> list[Member]:
    members = [Member(f"{key}.{ending}", image(number))]
    return members + ([] if label is None else [Member(f"{key}.cls", str(label).encode())])


class Layout:
    """Random shards, and what must come of them."""

    def __init__(self, seed: int, root: Path) -> None:
        self.rng = rng = np.random.default_rng(seed)
        self.root, self.number = root, 0
        self.truth: dict[str, tuple[bytes, Any]] = {}  # path -> content, label
        self.left_out = 0
        self.text = bool(rng.random() < 0.5)
        self.by_json = bool(rng.random() < 0.4)
        for shard in range(int(rng.integers(1, 4))):
            name = f"s{shard}{rng.choice(['.tar', '.tar.gz', '.tgz'])}"
            samples = [self.sample(name, at) for at in range(int(rng.integers(0, 7)))]
            write(root / name, self.ordered(samples), FORMATS[int(rng.integers(2))])

    def ordered(self, samples: list[list[Member]]) -> list[Member]:
        """Members of a sample together, in their own order; or all in any order."""
        rng = self.rng
        whole = [[run[i] for i in rng.permutation(len(run))] for run in samples]
        members = [member for run in whole for member in run]
        if rng.random() < 0.3:
            members = [members[i] for i in rng.permutation(len(members))]
        return members

    def sample(self, shard: str, at: int) -> list[Member]:
        rng = self.rng
        key = f"{rng.choice(FOLDERS)}{at}{rng.choice(NAMES)}"
        label: Any = None if rng.random() < 0.2 else int(rng.integers(0, 5))
        label = f"k{label}é" if self.text and label is not None else label
        members = []
        images = ["jpg", "JPG", "left.png", "", "weird"][: int(rng.integers(0, 4))]
        for ending in images:
            name = f"{key}.{ending}" if ending else key
            members.append(Member(name, image(self.number)))
            self.truth[f"{shard}/{name}"] = (members[-1].content, label)
            self.number += 1
        if label is not None:
            said = json.dumps({"label": label, "other": [1]}) if self.by_json else str(label)
            members.append(Member(f"{key}.{'json' if self.by_json else 'cls'}", said.encode()))
            self.left_out += not images
        for name, content in ((f"{key}.txt", b"a caption"), (f"{key}.pyd", b"")):
            if rng.random() < 0.3:
                members.append(Member(name, content))
                self.left_out += 1
        if rng.random() < 0.2:
            members.append(Member(f"{key}.ln.jpg", b"", tarfile.SYMTYPE, "/etc/passwd"))
            members.append(Member(f"../{key}.jpg", image(0)))
            members.append(Member(f"._{at}.jpg", image(0)))
            self.left_out += 3
        if rng.random() < 0.2:
            members.append(Member(f"folder{at}", b"", tarfile.DIRTYPE))
        return members


@pytest.mark.parametrize("seed", [*FEW, *MANY])
def test_no_image_of_a_tar_is_lost_unnamed_and_no_label_is_another_samples(
    seed: int, tmp_path: Path
) -> None:
    layout = Layout(seed, tmp_path)
    shards = tar_input.find_tars(str(tmp_path))
    indices = [read_index(s.base, s.path, s.name, ColumnsConfig()) for s in shards]
    assert sum(index.left_out.total() for index in indices) == layout.left_out
    if not layout.truth:
        with pytest.raises(DataError, match="without images"):
            opened(tmp_path)
        return
    given = opened(tmp_path)
    items = items_of(given, int(layout.rng.integers(1, 9)), seed)
    assert sorted(item.path for item in items) == sorted(layout.truth)
    assert sorted(item.id for item in items) == list(range(given.num_rows))
    for item in items:
        content, label = layout.truth[item.path]
        assert item.encoded == content
        said = given.class_names[item.label] if given.class_names else item.label
        assert (None if item.label == -1 else said) == label
    in_order = [
        f"{s.name}/{row.name}" for s, i in zip(shards, indices, strict=True) for row in i.rows
    ]
    assert [item.path for item in sorted(items)] == in_order
    assert items_of(given, 3, seed) == items_of(opened(tmp_path), 3, seed)


def test_braces_name_shards_and_one_that_is_not_there_is_said(tmp_path: Path) -> None:
    assert expand_braces("a{08..11}b{x,y}")[:3] == ["a08bx", "a08by", "a09bx"]
    assert expand_braces("{8..11}") == ["8", "9", "10", "11"]
    assert expand_braces("{2..0}") == ["2", "1", "0"]
    for i in range(3):
        write(tmp_path / f"t-{i:03}.tar", sample("a", i, i))
    given = opened(f"{tmp_path}/t-{{000..002}}.tar")
    assert [item.path for item in sorted(items_of(given))] == [
        f"t-00{i}.tar/a.png" for i in range(3)
    ]
    assert opened(f"file://{tmp_path}/t-{{000..002}}.tar").identity == given.identity
    assert opened(tmp_path).identity == given.identity
    assert opened(tmp_path / "t-001.tar").num_rows == 1
    with pytest.raises(DataError, match=r"1 of 4 files not there; the first: .*t-003\.tar"):
        opened(f"{tmp_path}/t-{{000..003}}.tar")
    with pytest.raises(DataError, match="stands for more than"):
        expand_braces("{0..99999999}")


def cut(content: bytes, members: list[Member]) -> bytes:
    return content[:900]


def scratch(content: bytes, members: list[Member]) -> bytes:
    at = content.index(b"b.png") + 20
    return content[:at] + b"\xff" * 40 + content[at + 40 :]


@pytest.mark.parametrize("damage", [cut, scratch])
@pytest.mark.parametrize("packed", [False, True])
def test_a_broken_tar_is_named_with_its_last_whole_member(
    damage: Any, packed: bool, tmp_path: Path
) -> None:
    members = [*sample("a", 1, 1), *sample("b", 2, 2), *sample("c", 3, 3)]
    content = damage(write(tmp_path / "x.tar", members).read_bytes(), members)
    (tmp_path / "x.tar").write_bytes(gzip.compress(content) if packed else content)
    with pytest.raises(DataError, match=r"x\.tar is broken after member 'a\.(png|cls)': \w+"):
        opened(tmp_path / "x.tar")


def test_a_gzip_that_is_cut_short_and_what_is_no_tar_are_named(tmp_path: Path) -> None:
    path = write(tmp_path / "x.tar.gz", [*sample("a", 1), *sample("b", 2)])
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(DataError, match=r"x\.tar\.gz is broken"):
        opened(path)
    (tmp_path / "y.tar").write_bytes(b"no tar" * 500)
    (tmp_path / "z.tar").write_bytes(b"")
    for name in ("y.tar", "z.tar"):
        with pytest.raises(DataError, match=rf"{name} is broken: "):
            opened(tmp_path / name)


def test_tars_put_together_are_read_to_the_last_and_no_end_mark_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    one = write(tmp_path / "one.tar", sample("a", 1, 1)).read_bytes()
    two = write(tmp_path / "two.tar", sample("b", 2, 2)).read_bytes()
    (tmp_path / "both.tar").write_bytes(one + two)
    assert [item.label for item in sorted(items_of(opened(tmp_path / "both.tar")))] == [1, 2]
    assert not caplog.records
    (tmp_path / "one.tar").write_bytes(one.rstrip(b"\0").ljust(2048, b"\0"))
    assert opened(tmp_path / "one.tar").num_rows == 1
    assert "1 tar has no end mark and may be cut short; the first: one.tar" in caplog.text


def test_keys_that_begin_anew_are_samples_of_their_own_and_torn_ones_are_refused(
    tmp_path: Path,
) -> None:
    a, b = sample("0", 1, 1), sample("1", 2, 2)
    again = [*sample("0", 3, 3), *sample("1", 4, 4)]
    given = opened(write(tmp_path / "x.tar", [*a, *b, *again]))
    assert [item.label for item in sorted(items_of(given))] == [1, 2, 3, 4]
    torn = [*a, *b, Member("0.cls", b"4")]
    with pytest.raises(DataError, match=r"names of sample '0' occur more than once"):
        opened(write(tmp_path / "x.tar", torn))
    with pytest.raises(DataError, match=r"names of sample '0' occur more than once"):
        opened(write(tmp_path / "x.tar", [*a, *a]))


def test_labels_are_of_one_key_and_others_are_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    about = {"class": "cat", "kind": 7, "cls": 9, "bad": [1]}
    both = [*sample("a", 1, 3), Member("a.json", json.dumps(about).encode()), *sample("b", 2)]
    path = write(tmp_path / "x.tar", both)
    assert [item.label for item in sorted(items_of(opened(path)))] == [3, -1]
    assert "labels are from .cls; class of .json not used" in caplog.text
    assert "1 image of 2 without a label" in caplog.text
    assert opened(path, label="class").class_names == ("cat",)
    assert [item.label for item in sorted(items_of(opened(path, label="json.kind")))] == [7, -1]
    assert [item.label for item in items_of(opened(path, label=""))] == [-1, -1]
    with pytest.raises(DataError, match=r"no sample has a label by columns\.label=nothing"):
        opened(path, label="nothing")
    with pytest.raises(DataError, match=r"no sample has a label by columns\.label=bad"):
        opened(path, label="bad")


def test_negative_numbers_are_no_labels_among_names_as_among_numbers(tmp_path: Path) -> None:
    for labels, expected, names in (
        ([-1, 0, 2], [-1, 0, 2], ()),
        ([-1, "cat", -100, 3], [-1, 1, -1, 0], ("3", "cat")),
        ([-1, -1], [-1, -1], ()),
    ):
        members = [m for at, label in enumerate(labels) for m in sample(f"{at}", at, label)]
        given = opened(write(tmp_path / "x.tar", members))
        assert [image.label for image in given.images[0]] == expected
        assert given.class_names == names


@pytest.mark.parametrize("about", [{"GNU.sparse.size": "abc"}, {"GNU.sparse.map": "x,y"}])
def test_a_header_that_says_no_number_is_broken(about: dict[str, str], tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "x.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        tar.addfile(tarfile.TarInfo("a.png"))
        second = tarfile.TarInfo("b.png")
        second.pax_headers = about
        tar.addfile(second)
    with pytest.raises(DataError, match=r"x\.tar is broken after member 'a\.png': invalid literal"):
        opened(tmp_path / "x.tar")


def test_one_image_of_a_sample_is_chosen_by_its_ending(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    members = [*sample("a", 1, 3, "left.png"), *sample("a", 2, None, "right.png")]
    path = write(tmp_path / "x.tar", members)
    assert [item.label for item in items_of(opened(path))] == [3, 3]
    assert "1 sample holds several images" in caplog.text
    assert [i.path for i in items_of(opened(path, image="right.png"))] == ["x.tar/a.right.png"]
    assert "left out 1 file: 1 .left.png (columns.image=right.png)" in caplog.text


def test_parts_hold_bounded_bytes_whatever_the_size_of_a_shard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    members = [member for i in range(20) for member in sample(str(i), i, i)]
    given = opened(write(tmp_path / "x.tar", members))
    size = len(image(0))
    monkeypatch.setattr(tar_input, "MAX_PART_BYTES", 4 * size + 8)
    parts = given.parts(5000, 0)
    assert max(len(list(part.read())) for part in parts) <= 5
    assert sorted(i.id for part in parts for i in part.read()) == list(range(20))
    assert opened(tmp_path / "x.tar", 7).num_rows == 7


def test_a_shard_that_changed_is_an_error_with_its_member(tmp_path: Path) -> None:
    path = write(tmp_path / "x.tar", sample("a", 1, 1))
    given = opened(path)
    path.write_bytes(path.read_bytes()[:530])
    with pytest.raises(DataError, match=r"x\.tar: member 'a\.png' cannot be read: cut short"):
        items_of(given)


def test_images_beside_tars_are_taken_and_the_tars_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path / "x.tar", sample("a", 1, 1))
    (tmp_path / "y.png").write_bytes(image(2))
    assert tar_input.find_tars(str(tmp_path)) == []
    assert FolderInput.open(str(tmp_path)).names == ("y.png",)
    assert "1 .tar (of shards, which `prepare` reads by themselves)" in caplog.text


def test_options_of_other_inputs_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "x.tar", sample("a", 1, 1))
    chosen = {"root": "", "num_images": 0, "size": 64, "seed": 0, "split": "train"}
    with pytest.raises(ConfigError, match="tar shards takes columns"):
        open_input(str(path), columns=PreparationConfig().columns, **chosen)  # type: ignore[arg-type]  # of mixed types


@pytest.mark.parametrize("inside", [False, True])
def test_splits_of_tars_are_asked_for(inside: bool, tmp_path: Path) -> None:
    if inside:
        members = [m for s in ("train", "test") for m in sample(f"{s}/{s}", len(s), len(s))]
        write(tmp_path / "x.tar", members)
    else:
        for split in ("train", "test"):
            write(tmp_path / f"{split}-0.tar", sample(split, len(split), len(split)))
    with pytest.raises(
        DataError, match=r"splits test \(1 .*, train \(1 .* name one, as in .*#train"
    ):
        opened(tmp_path)
    assert [item.label for item in items_of(opened(f"{tmp_path}#train"))] == [5]
    assert [item.label for item in items_of(opened(f"{tmp_path}#test"))] == [4]
    with pytest.raises(DataError, match="there is no split val"):
        opened(f"{tmp_path}#val")
