"""`native.c` gives the bytes that torch gives, and views are made without where it is not there."""

from __future__ import annotations

import ctypes
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from simclr_ray.augment import native, native_build
from simclr_ray.augment.color import JitterParams
from simclr_ray.augment.views import ORDERS, AugmentParams, TwoViews
from simclr_ray.config.experiment import Experiment
from simclr_ray.errors import ConfigError
from simclr_ray.train.driver import pretrain

Pixels = NDArray[np.uint8]
# not where one is there and cannot build it: that fails
needs_compiler = pytest.mark.skipif(
    native_build.find_compiler() is None and not native.available(), reason="no C compiler here"
)

# In a process of its own: what is built is kept for the life of a process.
PROBE = """
import numpy as np
from simclr_ray.augment import TwoViews, native
pixels = np.arange(40 * 30 * 3, dtype=np.int64).reshape(40, 30, 3) * 7 % 256
pair = TwoViews.simclr(24)([pixels.astype(np.uint8)] * 3, np.arange(3), 0)
print(native.available(), int(pair.a.sum()), int(pair.b.sum()))
"""


def sample_images(*sizes: tuple[int, int], seed: int = 0) -> list[Pixels]:
    rng = np.random.default_rng(seed)
    found = [rng.integers(0, 256, (*size, 3), dtype=np.uint8) for size in sizes]
    found[0][:] = found[0] // 128 * 255  # extremes overshoot the most
    found[-1][:] = 77  # no chroma, no contrast
    return found


@needs_compiler
@pytest.mark.parametrize("size", [8, 20, 33, 96])
@pytest.mark.parametrize("strength", [0.0, 0.5, 1.0, 2.0])
def test_compiled_views_are_those_of_torch_to_the_last_bit(size: int, strength: float) -> None:
    shapes = [(32, 32), (32, 32), (1, 40), (90, 61), (300, 7), (2, 2), (200, 260), (32, 32)]
    images, ids = sample_images(*shapes * 4), np.arange(32) * 7 - 50
    forms = [
        TwoViews(size, strength=strength, blur=0.6, grayscale=0.4, seed=3, compiled=compiled)
        for compiled in (True, False)
    ]
    for first, second in zip(*(views(images, ids, 5) for views in forms), strict=True):
        assert torch.equal(first, second)


@needs_compiler
def test_compiled_color_is_that_of_torch_on_every_color_and_order() -> None:
    rng = np.random.default_rng(0)
    levels = np.array([0, 1, 2, 63, 64, 127, 128, 200, 254, 255], np.uint8)
    grid = np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(-1, 3)
    grid = np.concatenate([grid, rng.integers(0, 256, (1024 - len(grid), 3), dtype=np.uint8)])
    crop = torch.from_numpy(grid.T.reshape(3, 32, 32).copy())
    n = 240
    factors = rng.uniform([0, 0, 0, -0.5], [2.6, 2.6, 2.6, 0.5], (n, 4)).astype(np.float32)
    special = [[1, 1, 1, 0], [0, 0, 0, 0.5], [2, 2, 2, -0.5], [1, 0, 1, 1 / 6]]
    factors[:4] = np.array(special, np.float32)
    draws = AugmentParams(
        crop=np.zeros((n, 4)),
        flip=np.zeros(n, bool),
        jitter=JitterParams(
            torch.from_numpy(factors),
            torch.from_numpy(np.tile(ORDERS, (n // 24, 1))),
            torch.from_numpy(rng.random(n) < 0.9),
        ),
        gray=rng.random(n) < 0.2,
        blur=rng.random(n) < 0.5,
        sigma=rng.uniform(0.1, 2.0, n),
    )
    crops = crop.expand(n, -1, -1, -1)
    ours, plain = (TwoViews(32, compiled=c).distort(crops, draws) for c in (True, False))
    assert torch.equal(ours, plain)
    assert len({tuple(x.flatten().tolist()) for x in ours}) > n // 2


@needs_compiler
def test_pixels_that_are_not_touched_come_out_as_they_went_in() -> None:
    images = sample_images((32, 32), (32, 32))
    views = TwoViews(32, strength=0, blur=0, flip=0, jitter=0, grayscale=0, min_area=1.0)
    for view in views(images, np.arange(2), 0):
        assert torch.equal(view, torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2))


@needs_compiler
def test_a_slice_of_a_larger_array_is_read_as_what_it_is() -> None:
    whole = sample_images((60, 80), (60, 80))[0]
    part = whole[5:45, 10:70]
    views = TwoViews.simclr(24)
    assert torch.equal(views([part], np.array([4]), 0).a, views([part.copy()], np.array([4]), 0).a)


@needs_compiler
@pytest.mark.parametrize("box", [(-1, 0, 4, 4), (0, 7, 4, 4), (0, 0, 11, 4), (0, 0, 0, 4)])
def test_a_crop_outside_its_image_is_refused(box: tuple[int, ...]) -> None:
    image = np.zeros((10, 10, 3), np.uint8)
    with pytest.raises(ValueError, match="outside its image"):
        native.crop_views([image], np.array([box]), np.zeros(1, bool), 8)


@needs_compiler
@pytest.mark.parametrize(
    "wrong",
    [
        np.zeros((10, 10), np.uint8),
        np.zeros((10, 10, 1), np.uint8),
        np.zeros((10, 10, 4), np.uint8),
        np.zeros((10, 10, 3), np.float32),
    ],
)
def test_what_is_no_image_is_refused_and_not_read(wrong: NDArray[np.generic]) -> None:
    with pytest.raises(ValueError, match=r"uint8 \[H, W, 3\]"):
        TwoViews.simclr(8)([wrong], np.zeros(1, np.int64), 0)  # type: ignore[arg-type] # wrong


def test_no_images_give_no_views() -> None:
    pair = TwoViews.simclr(24)([], np.zeros(0, np.int64), 0)
    assert pair.a.shape == (0, 3, 24, 24)


@needs_compiler
@pytest.mark.skipif(platform.machine() != "x86_64", reason="levels are of x86-64")
@pytest.mark.parametrize("level", native_build.X86_LEVELS)
def test_every_level_of_x86_64_gives_the_bytes_of_torch(
    level: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not native_build.runs_here(level):
        # an instruction that it lacks would end the process; `loaded` asks the same before it loads
        pytest.skip(f"this processor is below {level}")
    compiler = native_build.find_compiler()
    assert compiler is not None
    made = tmp_path / native_build.library_name(level)
    native_build.compile_library(compiler, native_build.X86_LEVELS[level], made)
    library = native.Native(ctypes.CDLL(str(made)), level)
    monkeypatch.setattr(native, "loaded", lambda: library)
    images = sample_images((32, 32), (61, 90), (300, 7), (32, 32))
    forms = [TwoViews(33, blur=0.6, grayscale=0.4, compiled=c) for c in (True, False)]
    for first, second in zip(*(views(images, np.arange(4), 5) for views in forms), strict=True):
        assert torch.equal(first, second)


def test_a_processor_without_a_feature_of_a_level_is_given_the_level_below(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "native.c").write_text("int it;")
    monkeypatch.setattr(native_build, "SOURCE", tmp_path / "native.c")
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    for level in native_build.X86_LEVELS:
        (tmp_path / native_build.library_name(level)).touch()
    all_of_it = sorted(native_build.FEATURES["x86-64-v4"])

    def chosen(*without: str) -> str:
        features = " ".join(f for f in all_of_it if f not in without)
        monkeypatch.setattr(native_build, "_processor", lambda: features)
        found = native_build.find_packaged()
        assert found is not None
        return native_build.level_of(found)

    assert chosen() == "x86-64-v4"
    assert chosen("avx512vl") == "x86-64-v3"
    assert chosen("avx512vl", "abm") == "x86-64"


def test_a_library_of_another_source_is_not_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "native.c"
    source.write_text("int old;")
    monkeypatch.setattr(native_build, "SOURCE", source)
    level = "x86-64" if platform.machine() == "x86_64" else platform.machine()
    library = tmp_path / native_build.library_name(level)
    library.touch()
    assert native_build.find_packaged() == library
    source.write_text("int new;")
    assert native_build.find_packaged() is None


@pytest.mark.parametrize("value", ["fast", "OFF", "0"])
def test_an_unknown_setting_is_one_line_of_error(
    value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SIMCLR_RAY_NATIVE", value)
    starts: list[Callable[[], object]] = [
        lambda: TwoViews(8),
        lambda: pretrain(Experiment.load("shapes_demo")),  # before it looks for data
    ]
    for start in starts:
        with pytest.raises(ConfigError) as caught:
            start()
        assert str(caught.value) == f"SIMCLR_RAY_NATIVE: '{value}' is none of off, package, build"


def probe(cache: Path, **environment: str) -> tuple[str, str]:
    """Return what PROBE prints and what it writes to standard error."""
    done = subprocess.run(
        [sys.executable, "-c", PROBE],
        env={
            **os.environ,
            "XDG_CACHE_HOME": str(cache),
            "SIMCLR_RAY_NATIVE": "build",
            **environment,
        },
        check=True,
        capture_output=True,
        text=True,
    )
    return done.stdout.strip(), done.stderr


@needs_compiler
def test_without_a_compiler_or_with_a_broken_one_the_views_are_the_same(tmp_path: Path) -> None:
    broken = tmp_path / "cc"
    broken.write_text("#!/bin/sh\necho no such flag >&2\nexit 1\n")
    broken.chmod(0o755)
    built, _ = probe(tmp_path / "cache")
    (library,) = (tmp_path / "cache" / "simclr_ray" / "native").iterdir()
    first = library.stat().st_mtime_ns
    again, _ = probe(tmp_path / "cache")
    missing, none = probe(tmp_path / "none", PATH=str(tmp_path / "nothing"))
    failing, said = probe(tmp_path / "broken", CC=str(broken))
    off, silent = probe(tmp_path / "off", SIMCLR_RAY_NATIVE="off")
    assert built.startswith("True ")
    assert library.stat().st_mtime_ns == first  # built once
    assert again == built
    assert missing == failing == off == built.replace("True", "False")
    assert "there is no C compiler" in none
    assert "no such flag" in said
    assert not silent
    assert not (tmp_path / "off").exists()


@needs_compiler
def test_a_cache_that_others_can_write_is_not_used(tmp_path: Path) -> None:
    (tmp_path / "simclr_ray" / "native").mkdir(parents=True)
    (tmp_path / "simclr_ray" / "native").chmod(0o777)
    built, _ = probe(tmp_path, TMPDIR=str(tmp_path))
    assert built.startswith("True ")
    assert not list((tmp_path / "simclr_ray" / "native").iterdir())
