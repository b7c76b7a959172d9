"""Which value is white: found in the images, or said by the config; and what decodes them."""

from __future__ import annotations

import importlib
import io
import logging
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from simclr_ray import config as cfg
from simclr_ray.config.experiment import DataConfig, Experiment
from simclr_ray.data.batches import local_batches
from simclr_ray.data.decoding import (
    check_decoder,
    evaluation_decoder,
    read_value_range,
    resolve_decoder,
    resolve_white,
    training_decoder,
)
from simclr_ray.data.sample import Sample
from simclr_ray.data.source import Source
from simclr_ray.errors import ConfigError, DataError
from simclr_ray.train.resolve import resolve
from tests.unit.augment.test_deep_images import color, gray, png, tiff


def write(folder: Path, images: list[bytes | None], group_rows: int = 8) -> Source:
    table = pa.table({"image": pa.array(images, pa.binary())})
    pq.write_table(table, folder / "set.parquet", row_group_size=group_rows)
    return Source.open(str(folder / "set.parquet"))


def deep(most: int, seed: int, dtype: str = "uint16") -> bytes:
    values = np.random.default_rng(seed).integers(0, most + 1, (20, 30)).astype(dtype)
    out = io.BytesIO()
    Image.fromarray(values).save(out, "PNG")
    return out.getvalue()


def test_white_is_found_by_a_percentile_and_is_the_same_each_time(tmp_path: Path) -> None:
    images: list[bytes | None] = [deep(3000, i) for i in range(40)]
    source = write(tmp_path, images)
    data = DataConfig(train=source.uri, white="auto")
    sampled = [np.asarray(Image.open(io.BytesIO(i or b""))) for i in images[:8]]  # of four groups
    found = read_value_range(Sample(source), data.max_pixels)
    assert found is not None
    assert (found.least, found.most, found.top) == (0, 3000, 65535)
    assert found.white == pytest.approx(np.percentile(np.concatenate(sampled), 99.9), abs=3)
    once = resolve_white(data, Sample(source)).white
    assert once == resolve_white(data, Sample(source)).white == found.white
    hot = np.full((20, 30), 100, np.uint16)
    hot[3, 4] = 60_000  # one pixel of a broken sensor is not white
    out = io.BytesIO()
    Image.fromarray(hot).save(out, "PNG")
    (tmp_path / "hot").mkdir()
    source = write(tmp_path / "hot", [*images[:30], out.getvalue()])
    white = resolve_white(data, Sample(source)).white
    assert isinstance(white, float)
    assert 2900 < white <= 3000


def test_a_run_is_of_the_white_that_was_found(tmp_path: Path) -> None:
    source = write(tmp_path, [deep(4095, i) for i in range(16)])
    tree = {"name": "t", "data": {"train": source.uri, "white": "auto"}, "batch_size": 2,
            "storage": str(tmp_path / "runs")}  # fmt: skip
    found = resolve(cfg.validate(Experiment, tree))
    white = found.config.data.white
    assert isinstance(white, float)
    assert 4000 < white <= 4095
    tree["data"] = {"train": source.uri, "white": white}
    assert resolve(cfg.validate(Experiment, tree)).run_name == found.run_name
    tree["data"] = {"train": source.uri, "white": 2000}
    assert resolve(cfg.validate(Experiment, tree)).run_name != found.run_name


def test_a_fraction_of_the_range_is_said_with_what_mends_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = write(tmp_path, [deep(3000, i) for i in range(20)])
    with caplog.at_level(logging.WARNING):
        data = resolve_white(DataConfig(train=source.uri), Sample(source))
    assert data.white == 0
    (line,) = caplog.messages
    assert "20 images of 16 bits with values of 0 to 3,000 of 65,535" in line
    assert "data.white=3000, or data.white=auto" in line
    decoded = evaluation_decoder(DataConfig(train="x", white=3000)).decode(deep(3000, 1))
    assert decoded.max() == 255


@pytest.mark.parametrize("kind", ["all of 16 bits", "8 bits", "broken", "12 bits by their own"])
def test_nothing_is_said_of_images_that_use_their_bits(
    kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    kinds: dict[str, list[bytes | None]] = {
        "all of 16 bits": [deep(65535, 1)] * 9,
        "8 bits": [deep(100, 1, "uint8")] * 9,
        "broken": [b"\x89PNG\r\n\x1a\n" + b"x" * 90, None, b""],
        "12 bits by their own": [b"P5\n34 21\n4095\n" + gray(12).astype(">u2").tobytes()] * 9,
    }
    source = write(tmp_path, kinds[kind])
    with caplog.at_level(logging.WARNING):
        assert resolve_white(DataConfig(train=source.uri), Sample(source)).white == 0
    assert not caplog.messages


def test_auto_leaves_images_of_8_bits_as_they_are(tmp_path: Path) -> None:
    source = write(tmp_path, [deep(100, 1, "uint8")] * 9)
    assert resolve_white(DataConfig(train=source.uri, white="auto"), Sample(source)).white == 0


@pytest.mark.parametrize("kind", ["png", "tiff"])
def test_color_of_16_bits_has_a_white_as_well(kind: str, tmp_path: Path) -> None:
    values = color(12)
    encoded = png(values) if kind == "png" else tiff(values)
    found = read_value_range(Sample(write(tmp_path, [encoded] * 3)), 10**6)
    assert found is not None
    assert found.most == values.max()
    pixels = evaluation_decoder(DataConfig(train="x", white=4095)).decode(encoded)
    np.testing.assert_array_equal(pixels, np.rint(values / (4095 / 255)).astype(np.uint8))


def test_only_training_takes_the_faster_decoder() -> None:
    data = DataConfig(train="x", decoder="turbo", max_pixels=77, white=9)
    assert training_decoder(data).library == "turbo"
    assert evaluation_decoder(data) == training_decoder(data)._replace(library="pillow")
    assert evaluation_decoder(data).max_pixels == 77


def test_a_node_that_decodes_otherwise_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    data = resolve_decoder(DataConfig(train="x", decoder="turbo"))
    assert data.decoder_sha256
    check_decoder(data)
    check_decoder(DataConfig(train="x"))  # never resolved: nothing to compare with
    simplejpeg = importlib.import_module("simplejpeg")
    decode = simplejpeg.decode_jpeg
    monkeypatch.setattr(simplejpeg, "decode_jpeg", lambda *a: decode(*a) ^ 1)
    with pytest.raises(DataError, match=r"by simplejpeg .* to other pixels"):
        check_decoder(data)
    monkeypatch.setitem(sys.modules, "simplejpeg", None)
    with pytest.raises(DataError, match=r"not at all here: .*simclr-ray\[turbo\]"):
        check_decoder(data)
    with pytest.raises(ConfigError, match=r"data.decoder: .*simclr-ray\[turbo\]"):
        resolve_decoder(DataConfig(train="x", decoder="turbo"))


def photograph(seed: int, exif: Image.Exif | None = None) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    out = io.BytesIO()
    large = Image.fromarray(pixels).resize((800, 600), Image.Resampling.BICUBIC)
    large.save(out, "JPEG", quality=90, exif=exif or Image.Exif())
    return out.getvalue()


def test_an_image_is_decoded_small_where_no_crop_is_enlarged_by_it() -> None:
    decoder, encoded = (
        training_decoder(DataConfig(train="x", decoder="turbo_scaled")),
        photograph(1),
    )
    sides = {
        (300, 400): (300, 400),
        (301, 10): (600, 800),
        (150, 200): (150, 200),
        (1, 1): (75, 100),
    }
    for least, shape in sides.items():
        assert decoder.decode(encoded, least).shape == (*shape, 3)
    assert decoder.decode(encoded).shape == (600, 800, 3)
    turned = Image.Exif()
    turned[274] = 6
    assert decoder.decode(photograph(1, turned), (400, 300)).shape == (400, 300, 3)
    assert decoder.decode(photograph(1, turned), (300, 400)).shape == (800, 600, 3)
    whole = decoder.decode(encoded).reshape(300, 2, 400, 2, 3).mean((1, 3))
    assert np.abs(decoder.decode(encoded, (300, 400)) - whole).mean() < 1.5


def test_views_of_small_decoded_images_are_those_of_whole_ones_but_for_rounding(
    tmp_path: Path,
) -> None:
    source = write(tmp_path, [photograph(i) for i in range(12)])
    tree: dict[str, Any] = {
        "name": "t", "data": {"train": source.uri}, "augment": {"size": 48}, "batch_size": 4
    }  # fmt: skip
    made = {}
    for decoder in ("turbo", "turbo_scaled"):
        tree["data"] = {"train": source.uri, "decoder": decoder}
        made[decoder] = list(local_batches(cfg.validate(Experiment, tree), source, range(6)))
    for whole, small in zip(made["turbo"], made["turbo_scaled"], strict=True):
        assert torch.equal(whole.ids, small.ids)
        for a, b in ((whole.a, small.a), (whole.b, small.b)):
            assert (a.float() - b.float()).abs().mean() < 3
    assert any(not torch.equal(w.a, s.a) for w, s in zip(*made.values(), strict=True))
    tree["batch_size"] = 4
    experiment = cfg.validate(Experiment, tree)
    halves = [
        list(local_batches(experiment, source, range(6), rank, 2)) for rank in range(2)
    ]  # whoever makes a view, it is the same
    for step, whole in enumerate(made["turbo_scaled"]):
        assert torch.equal(torch.cat([half[step].a for half in halves]), whole.a)


def test_small_decoding_is_for_crops_alone() -> None:
    tree = {"name": "t", "data": {"train": "x", "decoder": "turbo_scaled"}}
    with pytest.raises(ConfigError, match=r"turbo_scaled is for augment\.name=simclr"):
        cfg.validate(Experiment, tree | {"augment": {"name": "pipeline"}})
