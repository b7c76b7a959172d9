"""No image takes more memory than is stated, whatever header, chunks, strips and tiles claim."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import simclr_ray
from simclr_ray.augment.decode import BYTES_PER_PIXEL
from simclr_ray.augment.decode.tiff import check_tile
from tests.reference.bombs import BOMBS, MIB, PIXELS

BESIDE = 32 * MIB  # what is said about the pixels, and decoders' own
REFUSED = {  # by the header, before anything is decoded
    "png": "too many pixels: 50000x5000", "gif": "too many pixels: 50000x50000",
    "webp": "too many pixels: 16383x16383", "jpeg": "too many pixels: 50000x50000",
    "bmp": "too many pixels: 50000x50000", "ppm": "too many pixels: 50000x50000",
    "tiff": "too many pixels: 50000x50000", "tiff_tile": "too many pixels: 30000x30000",
    "tiff_tile_of_12_bits": "too many pixels: 30000x30000", "npy": "too many pixels: 50000x50000",
    "dicom": "too many pixels: 50000x50000", "dicom_deflated": "inflates to more than 7 MiB",
    "dicom_deflated_said_late": "inflates to more than 7 MiB",
    "dicom_deflated_misplaced": "inflates to more than 7 MiB",
}  # fmt: skip


class Decoded(NamedTuple):
    """What a decode in a process of its own has come to."""

    text: str
    taken: int  # bytes


@pytest.fixture(scope="module")
def decoded() -> dict[tuple[str, int], Decoded]:
    """Decode all of them, each in a fork of a process that has imported the decoder alone."""
    root = Path(simclr_ray.__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-m", "tests.reference.bombs"], cwd=root, check=True, text=True,
        env=os.environ | {"PYTHONPATH": str(root)},
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    rows = map(json.loads, done.stdout.splitlines())
    return {(name, channels): Decoded(text, taken) for name, channels, text, taken in rows}


def test_no_image_takes_more_than_is_stated(decoded: dict[tuple[str, int], Decoded]) -> None:
    most = BYTES_PER_PIXEL * PIXELS + BESIDE
    above = {key: got for key, got in decoded.items() if not 0 <= got.taken <= most}
    assert not above
    assert {name for name, _ in decoded} >= set(BOMBS)


@pytest.mark.parametrize("name", REFUSED)
def test_what_claims_too_much_is_refused_with_the_reason(
    name: str, decoded: dict[tuple[str, int], Decoded]
) -> None:
    if name.startswith("dicom"):
        pytest.importorskip("pydicom")
    assert decoded[name, 3].text == REFUSED[name]


@pytest.mark.parametrize(
    "name", ["png_text", "png_profile", "png_data", "gif_animated", "tiff_strip"]
)
def test_what_is_beside_or_behind_the_pixels_costs_them_nothing(
    name: str, decoded: dict[tuple[str, int], Decoded]
) -> None:
    assert decoded[name, 3].text.endswith(", 3)")


@pytest.mark.parametrize("value", [math.inf, math.nan, "wide", (3, math.inf), None])
def test_a_tile_whose_width_is_no_number_is_left_to_who_decodes(value: Any) -> None:
    check_tile(lambda _key, _default: value, 100)
