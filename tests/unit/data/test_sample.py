"""What a run cannot use of its images is told before it starts, by a sample that is read once."""

from __future__ import annotations

import io
import logging
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from simclr_ray import config as cfg
from simclr_ray.augment.decode import ImageDecoder
from simclr_ray.config.experiment import DataConfig, Experiment
from simclr_ray.data.decoding import resolve_white
from simclr_ray.data.sample import CHECK_SECONDS, Sample, check_sample
from simclr_ray.data.source import Source
from simclr_ray.errors import DataError
from simclr_ray.train.resolve import resolve

Images = list[bytes | None]


def npy(channels: int) -> bytes:
    out = io.BytesIO()
    np.save(out, np.zeros((8, 9, channels), np.uint8))
    return out.getvalue()


def png(side: int = 8) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (side, side)).save(out, "PNG")
    return out.getvalue()


def write(path: Path, images: list[Any], group_rows: int = 8) -> Source:
    kind = pa.string() if isinstance(images[0], str) else pa.binary()
    pq.write_table(pa.table({"image": pa.array(images, kind)}), path, row_group_size=group_rows)
    return Source.open(str(path))


def floats() -> bytes:
    out = io.BytesIO()
    Image.new("F", (8, 8)).save(out, "TIFF")
    return out.getvalue()


@pytest.mark.parametrize(
    ("images", "decoder", "told"),
    [
        ([npy(4)] * 9, ImageDecoder(), "4 channels, data.channels=3 (data.channels=4 takes them)"),
        ([npy(2)] * 9, ImageDecoder(channels=5), "(data.channels=2 takes them)"),
        ([png()] * 9, ImageDecoder(channels=5), "(data.channels=3 takes them)"),
        (["gone/a.png"] * 9, ImageDecoder(), "no such file (paths begin at the folder of"),
        ([png()] * 9, ImageDecoder(63), "too many pixels: 8x8 (a larger data.max_pixels takes"),
        ([floats()] * 9, ImageDecoder(), "values of float32 have no known range (unsigned"),
        ([b"<html>", b"<html>", None], ImageDecoder(), "3 images of a sample can be used: not an"),
        ([None] * 9, ImageDecoder(), "null image"),
    ],
)
def test_images_none_of_which_decodes_are_refused_with_reason_and_remedy(
    images: list[Any], decoder: ImageDecoder, told: str, tmp_path: Path
) -> None:
    source = write(tmp_path / "a.parquet", images)
    with pytest.raises(DataError) as refusal:
        check_sample(Sample(source), decoder)
    text = str(refusal.value)
    assert text.startswith(f"{source.uri}: none of ")
    assert told in text
    assert refusal.value.exit_code == 2


def test_some_that_do_not_decode_are_counted_in_one_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    images: Images = [npy(3 + (i % 5 == 0)) for i in range(40)]
    sample = Sample(write(tmp_path / "a.parquet", [None, *images[1:]], group_rows=10))
    with caplog.at_level(logging.WARNING):
        check_sample(sample, ImageDecoder(), max_bad_fraction=0.5)
        check_sample(sample, ImageDecoder(), max_bad_fraction=0.1)
    first, second = caplog.messages
    assert first.endswith(
        "8 of 40 images of a sample cannot be used: 7 x 4 channels, data.channels=3; 1 x null image"
    )
    assert second == f"{first}; more than data.max_bad_fraction=0.1 of all stop the run"
    caplog.clear()
    check_sample(Sample(write(tmp_path / "b.parquet", [png()] * 9)), ImageDecoder())
    assert not caplog.messages


def test_pages_that_are_left_out_are_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def pages(num: int, mode: str) -> bytes:
        out = io.BytesIO()
        first, *rest = (Image.new(mode, (8, 8), 9 * at) for at in range(num))
        first.save(out, "TIFF", save_all=True, append_images=rest)
        return out.getvalue()

    images: Images = [pages(3, "L"), pages(1, "L"), pages(2, "L"), pages(4, "RGB"), png()]
    check_sample(Sample(write(tmp_path / "a.parquet", images)), ImageDecoder())
    (said,) = caplog.messages
    assert said.endswith("2 of 5 images of a sample have several pages, of which the first is used")


def test_a_run_reads_its_sample_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.BytesIO()
    Image.fromarray(np.full((8, 8), 4000, np.uint16)).save(out, "PNG")
    source = write(tmp_path / "a.parquet", [out.getvalue()] * 90)
    read: list[int] = []
    first_images = Source.read_first_images

    def counted(self: Source, index: int, num: int) -> Images:
        read.append(index)
        return first_images(self, index, num)

    monkeypatch.setattr(Source, "read_first_images", counted)
    sample = Sample(source)
    data = resolve_white(DataConfig(train=source.uri, white="auto"), sample)
    check_sample(sample, ImageDecoder(white=float(str(data.white))))
    assert read == sample.places == [0, 4, 7, 11]


def test_large_images_cost_a_start_no_more_than_its_time(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (1500, 1500, 3), np.uint8)
    out = io.BytesIO()
    Image.fromarray(noise).save(out, "PNG", compress_level=1)
    sample = Sample(write(tmp_path / "a.parquet", [out.getvalue()] * 64, group_rows=16))
    list(sample)
    begin = time.monotonic()
    check_sample(sample, ImageDecoder())
    assert time.monotonic() - begin < 5 * CHECK_SECONDS  # a busy machine; all of them take longer


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_run_is_refused_before_it_starts(split: str, tmp_path: Path) -> None:
    good = write(tmp_path / "good.parquet", [png()] * 9).uri
    bad = write(tmp_path / "bad.parquet", [npy(4)] * 9).uri
    tree = {"name": "t", "data": {"train": good, split: bad}, "batch_size": 2,
            "storage": str(tmp_path / "runs")}  # fmt: skip
    with pytest.raises(DataError, match=r"bad\.parquet: none of 9 images .*data\.channels=4"):
        resolve(cfg.validate(Experiment, tree))
