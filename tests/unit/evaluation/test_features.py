"""Splits as they are read, and features as an encoder gives them."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torch import nn

from simclr_ray.data.source import Source
from simclr_ray.errors import DataError
from simclr_ray.evaluation.features import (
    CPU_BATCH,
    Features,
    extract_features,
    load_split,
    split_halves,
)
from simclr_ray.nn.batchnorm import GlobalBatchNorm

SIDE = 8


def png(value: int) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (SIDE, SIDE), (value, 255 - value, 7)).save(out, "PNG")
    return out.getvalue()


def write(folder: Path, images: list[bytes | None], labels: list[int | None]) -> Source:
    """Write two files of several row groups each, ids descending, and open them."""
    ids = np.arange(len(images))[::-1] * 10
    table = pa.table(
        {"id": ids, "image": pa.array(images, pa.binary()), "label": pa.array(labels, pa.int64())}
    )
    half = len(images) // 2
    pq.write_table(table.slice(0, half), folder / "a.parquet", row_group_size=4)
    pq.write_table(table.slice(half), folder / "b.parquet", row_group_size=3)
    return Source.open(str(folder))


def test_a_split_is_ordered_by_id_and_its_rows_belong_together(tmp_path: Path) -> None:
    source = write(tmp_path, [png(i) for i in range(20)], [i % 3 for i in range(20)])
    split = load_split(source, SIDE)
    assert split.ids.tolist() == list(range(0, 200, 10))
    assert split.images.shape == (20, 3, SIDE, SIDE)
    assert split.images.dtype == torch.uint8
    place = 19 - torch.arange(20)  # ids ran against the rows
    assert torch.equal(split.images[:, 0, 0, 0].long(), place)
    assert torch.equal(split.images[:, 2, 3, 5], torch.full((20,), 7, dtype=torch.uint8))
    assert torch.equal(split.labels, place % 3)
    assert split.bad == []


def test_a_limit_takes_rows_from_all_over_the_split_and_always_the_same(tmp_path: Path) -> None:
    source = write(tmp_path, [png(i) for i in range(60)], [i // 6 for i in range(60)])
    split = load_split(source, SIDE, limit=10)
    assert sorted(split.labels.tolist()) == list(range(10))  # a run of rows for each class
    assert torch.equal(split.ids, load_split(source, SIDE, limit=10).ids)
    assert split.ids.tolist() == sorted(split.ids.tolist())
    assert len(load_split(source, SIDE, limit=100).ids) == 60


def test_a_limit_does_not_fall_into_step_with_classes_that_take_turns(tmp_path: Path) -> None:
    source = write(tmp_path, [png(i) for i in range(200)], [i % 2 for i in range(200)])
    counts = torch.bincount(load_split(source, SIDE, limit=50).labels, minlength=2)
    assert counts.min() >= 15


def test_rows_that_are_no_images_are_left_out_and_named(tmp_path: Path) -> None:
    images: list[bytes | None] = [png(i) for i in range(8)]
    images[2], images[5] = None, b"GET / HTTP/1.1"
    labels: list[int | None] = [0, 1, 0, None, 0, 1, 0, 1]
    split = load_split(write(tmp_path, images, labels), SIDE)
    assert [(b.id, b.reason) for b in split.bad] == [(20, "not an image"), (50, "null")]
    assert split.ids.tolist() == [0, 10, 30, 40, 60, 70]
    assert split.labels.tolist() == [1, 0, 0, -1, 1, 0]
    assert split.labelled().ids.tolist() == [0, 10, 30, 60, 70]


def test_a_split_without_one_image_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="none of 4 rows"):
        load_split(write(tmp_path, [b"x", None, b"", b"y"], [0, 0, 0, 0]), SIDE)


def test_labels_are_minus_one_where_the_split_has_none(tmp_path: Path) -> None:
    pq.write_table(pa.table({"image": [png(1), png(2)]}), tmp_path / "a.parquet")
    split = load_split(Source.open(str(tmp_path)), SIDE)
    assert split.labels.tolist() == [-1, -1]
    assert split.ids.tolist() == [0, 1]


class Encoder(nn.Module):
    """Mean color through batch norm, which must not move while features are read."""

    def __init__(self) -> None:
        super().__init__()
        self.dense = nn.Linear(3, 5)
        self.norm = GlobalBatchNorm(5)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.norm(self.dense(images.mean((2, 3))))
        return out


@pytest.fixture
def images_of_noise() -> torch.Tensor:
    rng = np.random.default_rng(1)
    return torch.from_numpy(rng.integers(0, 256, (11, 3, 4, 4), dtype=np.uint8))


def test_features_do_not_depend_on_the_batch_and_see_pixels_in_0_to_1(
    images_of_noise: torch.Tensor,
) -> None:
    torch.manual_seed(0)
    encoder = Encoder()
    whole = extract_features(encoder, images_of_noise, batch_size=100)
    parts = extract_features(encoder, images_of_noise, batch_size=3)
    streamed = extract_features(encoder, iter(torch.split(images_of_noise, 4)), batch_size=3)
    expected = encoder.eval()(images_of_noise.float() / 255)
    assert whole.dtype == torch.float32
    torch.testing.assert_close(whole, expected.detach(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(parts, whole, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(streamed, whole, rtol=1e-6, atol=1e-6)


def test_a_cpu_sees_few_images_at_a_time_and_gives_the_same_features(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten())
    images = torch.randint(0, 256, (300, 3, 8, 8), dtype=torch.uint8)
    sizes: list[int] = []
    encoder[0].register_forward_hook(lambda _module, _inputs, out: sizes.append(len(out)))
    features = extract_features(encoder, images, batch_size=512)
    assert sum(sizes) == len(images)
    assert max(sizes) <= CPU_BATCH * torch.get_num_threads()
    monkeypatch.setattr("simclr_ray.evaluation.features.CPU_BATCH", 512)
    torch.testing.assert_close(
        features, extract_features(encoder, images, batch_size=512), rtol=0, atol=0
    )


def test_reading_features_leaves_modes_statistics_and_gradients_as_they_were(
    images_of_noise: torch.Tensor,
) -> None:
    encoder = Encoder().train()
    encoder.dense.eval()
    before = {k: v.clone() for k, v in encoder.state_dict().items()}
    features = extract_features(encoder, images_of_noise, batch_size=4)
    assert not features.requires_grad
    assert (encoder.training, encoder.dense.training, encoder.norm.training) == (True, False, True)
    assert all(torch.equal(v, before[k]) for k, v in encoder.state_dict().items())


def test_modes_come_back_when_the_encoder_fails(images_of_noise: torch.Tensor) -> None:
    encoder = Encoder().train()
    with pytest.raises(RuntimeError):
        extract_features(encoder, images_of_noise[:, :2])
    assert encoder.norm.training


def test_float64_weights_and_bf16_autocast_are_both_read_as_float32(
    images_of_noise: torch.Tensor,
) -> None:
    torch.manual_seed(0)
    encoder = Encoder()
    plain = extract_features(encoder, images_of_noise)
    half = extract_features(encoder, images_of_noise, precision="bf16")
    double = extract_features(encoder.double(), images_of_noise, precision="float64")
    assert half.dtype == double.dtype == torch.float32
    torch.testing.assert_close(double, plain, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(half, plain, rtol=0.05, atol=0.02)  # bf16 has 8 bits
    assert not torch.equal(half, plain)


def test_no_images_at_all_is_refused_and_an_empty_share_is_not() -> None:
    with pytest.raises(ValueError, match="no images"):
        extract_features(Encoder(), iter([]))
    empty = extract_features(Encoder(), torch.empty(0, 3, 4, 4, dtype=torch.uint8))
    assert empty.shape == (0, 5)


def test_halves_are_of_all_labelled_rows_and_the_same_each_time() -> None:
    labels = torch.tensor([0, 1] * 50 + [-1] * 3)
    rows = torch.arange(103.0)[:, None]
    one, other = split_halves(Features(rows, labels))
    assert sorted(torch.cat([one.rows[:], other.rows[:]]).flatten().tolist()) == list(range(100))
    assert (len(one.labels), len(other.labels)) == (50, 50)
    for part in (one, other):  # classes that take turns are in both halves
        assert 15 < int(part.labels.sum()) < 35
        assert part.labels.tolist() == [int(row) % 2 for row in part.rows[:]]
    assert torch.equal(split_halves(Features(rows, labels))[0].rows[:], one.rows[:])
    with pytest.raises(DataError, match="1 labelled image cannot be halved"):
        split_halves(Features(rows[:1], labels[:1]))
