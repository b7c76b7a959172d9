"""A loaded encoder takes images of any kind, and makes of each what evaluation does of its file."""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from simclr_ray.augment.decode import ImageError, evaluation_view, image_decoder
from simclr_ray.inference.encoder import Classifier, Encoder, EvaluationTransform

SIZE = 40  # above 32, so the view crops and resizes


def pixels(seed: int = 0, height: int = 50, width: int = 70, channels: int = 3) -> Any:
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def turned() -> bytes:
    """Return a JPEG that lies on its side."""
    exif = Image.Exif()
    exif[274] = 6
    return encoded(Image.fromarray(pixels()), "JPEG", exif=exif)


FILES = {
    "rgb": encoded(Image.fromarray(pixels())),
    "jpeg": encoded(Image.fromarray(pixels()), "JPEG"),
    "turned": turned(),
    "clear": encoded(Image.fromarray(pixels(channels=4))),
    "gray": encoded(Image.fromarray(pixels()[..., 0])),
    "gray 16": encoded(Image.fromarray(pixels()[..., 0].astype(np.uint16) * 17)),
    "palette": encoded(Image.fromarray(pixels()).quantize(16)),
    "cmyk": encoded(Image.fromarray(pixels()).convert("CMYK"), "JPEG"),
}


@pytest.mark.parametrize("kind", FILES)
@pytest.mark.parametrize("channels", [1, 3])
def test_bytes_a_path_and_a_pillow_image_are_one_input(
    kind: str, channels: int, tmp_path: Path
) -> None:
    decoder = image_decoder(channels, 4095)
    view = evaluation_view(decoder.decode(FILES[kind]), SIZE)
    want = torch.from_numpy(view.copy()).permute(2, 0, 1) / 255
    (tmp_path / "image").write_bytes(FILES[kind])
    transform = EvaluationTransform(SIZE, decoder)
    with Image.open(io.BytesIO(FILES[kind])) as read:
        read.load()
    for given in (
        FILES[kind],
        bytearray(FILES[kind]),
        memoryview(FILES[kind]),
        tmp_path / "image",
        str(tmp_path / "image"),
        Image.open(io.BytesIO(FILES[kind])),
        read,
    ):
        got = transform(given)
        assert got.dtype == torch.float32
        assert torch.equal(got, want)


def test_an_array_and_a_tensor_are_the_image_of_their_values() -> None:
    transform = EvaluationTransform(SIZE, image_decoder(3, 0))
    rgb = pixels()
    want = transform(encoded(Image.fromarray(rgb)))
    for given in (rgb, rgb.transpose(2, 0, 1), torch.from_numpy(rgb).permute(2, 0, 1)):
        assert torch.equal(transform(given), want)
    gray = transform(encoded(Image.fromarray(rgb[..., 0])))
    for given in (rgb[..., 0], rgb[..., :1], torch.from_numpy(rgb[..., 0])):
        assert torch.equal(transform(given), gray)
    deep = rgb[..., 0].astype(np.uint16) * 257
    assert torch.equal(EvaluationTransform(SIZE, image_decoder(3, 0))(deep), gray)
    bands = pixels(channels=5)
    own = EvaluationTransform(SIZE, image_decoder(5, 0))
    assert torch.equal(own(bands), own(bands.transpose(2, 0, 1).copy()))
    assert own(bands).shape == (5, SIZE, SIZE)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        (b"no image", ImageError, "not an image"),
        (FILES["jpeg"][:900], ImageError, "truncated"),
        (pixels().astype(np.float32), ImageError, "float32 have no known range"),
        (torch.rand(3, 50, 50), ImageError, "float32 have no known range"),
        (np.array([[{}]]), ImageError, "object have no known range"),
        (pixels(channels=4), ImageError, "4 channels, data.channels=3"),
        (pixels()[None], ImageError, "an array of 4 dimensions"),
        (pixels(height=1), ImageError, "too small"),
        (Image.fromarray(pixels(height=1)), ImageError, "too small"),
        ("no/such/file.jpg", FileNotFoundError, "no/such/file.jpg"),
        (3.5, TypeError, "expected an image as bytes, path, Pillow image.*got float"),
        (None, TypeError, "got NoneType"),
    ],
)
def test_what_is_no_image_is_refused(given: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        EvaluationTransform(SIZE, image_decoder(3, 0))(given)


def test_a_transform_pickles_for_a_loader_with_workers() -> None:
    transform = EvaluationTransform(SIZE, image_decoder(3, 4095))
    again = pickle.loads(pickle.dumps(transform))  # noqa: S301 - of its own
    assert torch.equal(again(FILES["gray 16"]), transform(FILES["gray 16"]))
    assert repr(again) == "EvaluationTransform(size=40, channels=3)"


class Means(nn.Module):
    """[N, 3, H, W] -> [N, 3]: the mean of each channel, times a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(2.0))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.mean((2, 3)) * self.weight


def small() -> Encoder:
    return Encoder(Means(), config={"name": "means"}, size=SIZE, feature_dim=3).eval()


def test_embeddings_come_in_order_whatever_the_batch_and_bad_images_are_named() -> None:
    encoder = small()
    images = [pixels(seed) for seed in range(7)]
    want = torch.stack([encoder.transform(i) for i in images]).mean((2, 3)) * 2
    for batch_size in (1, 3, 7, 100):
        got = encoder.embed(images, batch_size=batch_size)
        assert got.dtype == np.float32
        np.testing.assert_allclose(got, want, rtol=1e-6)
    assert encoder.embed([]).shape == (0, 3)
    assert encoder.double().embed(images).dtype == np.float32
    bad: list[tuple[int, str]] = []
    rows = small().embed(
        [images[0], b"", images[1]], batch_size=2, on_bad=lambda at, why: bad.append((at, why))
    )
    assert bad == [(1, "empty")]
    assert np.isnan(rows[1]).all()
    np.testing.assert_allclose(rows[[0, 2]], want[:2], rtol=1e-6)
    with pytest.raises(ImageError, match="image 1: empty"):
        small().embed([images[0], b""])
    assert (encoder.size, encoder.channels, encoder.feature_dim) == (SIZE, 3, 3)
    assert list(encoder.network.state_dict()) == ["weight"]


def test_a_classifier_names_the_class_with_the_highest_score() -> None:
    head = nn.Linear(3, 2)
    with torch.no_grad():
        head.weight.copy_(torch.tensor([[1.0, 0, 0], [0, 0, 1.0]]))
        head.bias.zero_()
    classifier = Classifier(
        small(), head=head, head_config={"name": "classifier"}, class_names=["red", "blue"]
    ).eval()
    red, blue = (np.zeros((40, 40, 3), np.uint8) for _ in range(2))
    red[..., 0], blue[..., 2] = 255, 255
    assert classifier.predict([red, blue, red], batch_size=2) == ["red", "blue", "red"]
    shares = classifier.predict_proba([red, blue])
    np.testing.assert_allclose(shares.sum(1), 1, rtol=1e-6)
    np.testing.assert_allclose(shares[0, 0], 1 / (1 + np.exp(-2)), rtol=1e-6)
    assert classifier.predict([b"", red], on_bad=lambda *_: None) == ["", "red"]
    assert classifier.embed([red]).shape == (1, 3)


class Overflowing(nn.Module):
    """Of a dark image makes a number that is not finite, of others their mean."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        mean = images.mean((1, 2, 3))
        return torch.stack([mean, torch.where(mean < 0.1, torch.inf, mean)], 1)


def test_a_row_that_is_not_finite_is_named_as_an_image_that_cannot_be_read_is() -> None:
    encoder = Encoder(Overflowing(), config={}, size=SIZE, feature_dim=2)
    bright, dark = np.full((50, 50, 3), 255, np.uint8), np.zeros((50, 50, 3), np.uint8)
    named: list[tuple[int, str]] = []
    rows = encoder.embed(
        [bright, dark, b"no image", dark], batch_size=2, on_bad=lambda *bad: named.append(bad)
    )
    assert named == [(1, "not finite"), (2, "not an image"), (3, "not finite")]
    assert np.isnan(rows[1:]).all()
    np.testing.assert_allclose(rows[0], [1, 1])
    head = nn.Linear(2, 3)
    classifier = Classifier(encoder, head=head, head_config={}, class_names=["a", "b", "c"])
    named.clear()
    classifier.predict([bright, dark], on_bad=lambda *bad: named.append(bad))
    assert named == [(1, "not finite")]
