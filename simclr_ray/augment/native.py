"""`native.c`, built where it runs: the same bytes as the torch form, several times faster on CPU.

The source is compiled once per machine type with the compiler that is there, into the user's
cache, and loaded with ctypes, which gives the interpreter lock back while it works. Where there is
no compiler nothing is lost but speed.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

SOURCE = Path(__file__).with_name("native.c")
# No contraction: a fused multiply-add rounds differently. The others change no result.
EXACT = ("-O3", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math")
SHARED = ("-shared", "-fPIC", "-lm")
COMPILE_TIMEOUT_S = 120
Pixels = NDArray[np.uint8]

log = logging.getLogger(__name__)


def available() -> bool:
    """Return whether the compiled form can be used; the first call may compile, about 2 s."""
    return _library() is not None


def crop_views(
    images: Sequence[Pixels], boxes: NDArray[np.int64], flip: NDArray[np.bool_], size: int
) -> Tensor:
    """Return images cropped, resized and flipped: uint8 [k, 3, size, size].

    Args:
        images: n images, uint8 [H, W, 3] each.
        boxes: [k, 4] of top, left, height, width in pixels, k a multiple of n; row i crops
            image i mod n.
        flip: [k].
        size: Side of a crop.

    Raises:
        ValueError: An image is not uint8 [H, W, 3], or a crop lies outside of it.
    """
    _check_images(images)
    whole = [np.ascontiguousarray(p) for p in images]
    times = len(boxes) // max(1, len(whole))
    if not len(flip) == len(boxes) == times * len(whole):
        raise ValueError(f"{len(boxes)} boxes and {len(flip)} flips for {len(whole)} images")
    pointers = np.array([p.__array_interface__["data"][0] for p in whole] * times, np.uintp)
    widths = np.array([p.shape[1] for p in whole] * times, np.int64)
    heights = np.array([p.shape[0] for p in whole] * times, np.int64)
    _check_boxes(boxes, heights, widths)
    out = torch.empty(len(boxes), 3, size, size, dtype=torch.uint8)
    _call(
        "crop_views",
        ctypes.c_int64(len(boxes)),
        _pointer(pointers),
        _pointer(widths),
        _pointer(boxes.astype(np.int64, order="C")),
        _pointer(flip.astype(np.uint8)),
        ctypes.c_int32(size),
        ctypes.c_void_p(out.data_ptr()),
    )
    return out


def distort_color(
    crops: Tensor,
    factors: NDArray[np.float32],
    order: NDArray[np.int64],
    jitter: NDArray[np.bool_],
    gray: NDArray[np.bool_],
    blur: NDArray[np.bool_],
    kernels: NDArray[np.float32],
) -> Tensor:
    """Return crops after jitter, grayscale and blur: uint8 [n, 3, S, S].

    Args:
        crops: uint8 [n, 3, S, S] on CPU.
        factors: [n, 4], as in `color.JitterParams`.
        order: [n, 4] likewise.
        jitter: [n], whether an image is jittered.
        gray: [n], whether it loses its color.
        blur: [n], whether it is blurred.
        kernels: [n, taps], integers over `resample.UNIT`, of odd length.
    """
    source = crops.contiguous()
    out = torch.empty_like(source)
    _call(
        "distort_color",
        ctypes.c_int64(len(source)),
        ctypes.c_int32(source.shape[-1]),
        ctypes.c_void_p(source.data_ptr()),
        _pointer(factors.astype(np.float32, order="C")),
        _pointer(order.astype(np.int64, order="C")),
        _pointer(jitter.astype(np.uint8)),
        _pointer(gray.astype(np.uint8)),
        _pointer(blur.astype(np.uint8)),
        _pointer(kernels.astype(np.float32, order="C")),
        ctypes.c_int32(kernels.shape[1]),
        ctypes.c_void_p(out.data_ptr()),
    )
    return out


def _check_images(images: Sequence[Pixels]) -> None:
    """Raise `ValueError` for what is no image: C would read past its end."""
    for p in images:
        if p.dtype != np.uint8 or p.ndim != 3 or p.shape[2] != 3:
            raise ValueError(f"an image is uint8 [H, W, 3], not {p.dtype} {[*p.shape]}")


def _check_boxes(
    boxes: NDArray[np.int64], heights: NDArray[np.int64], widths: NDArray[np.int64]
) -> None:
    """Raise `ValueError` for a crop outside its image: C would read what is not there."""
    top, left, height, width = boxes.T
    inside = (top >= 0) & (left >= 0) & (height > 0) & (width > 0)
    if not (inside & (top + height <= heights) & (left + width <= widths)).all():
        raise ValueError("a crop lies outside its image")


def _pointer(array: NDArray[Any]) -> Any:  # ctypes'; it keeps the array alive
    return array.ctypes.data_as(ctypes.c_void_p)


def _call(name: str, *arguments: Any) -> None:
    library = _library()
    if library is None:
        raise RuntimeError("native.c is not built here; ask available() first")
    if getattr(library, name)(*arguments):
        raise MemoryError(f"no memory for {name}")


@functools.cache
def _library() -> ctypes.CDLL | None:
    """Return the compiled library, built if need be, or None where that cannot be done."""
    names = (os.environ.get("CC", "cc"), "gcc", "clang")
    compiler = next(filter(None, map(shutil.which, names)), None)
    if compiler is None or not sys.platform.startswith(("linux", "darwin")):
        log.info("no C compiler: views are made with torch, several times slower on CPU")
        return None
    try:
        return ctypes.CDLL(str(_built(compiler)))
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        detail = getattr(error, "stderr", "") or str(error)
        log.warning("views are made with torch: native.c cannot be used: %s", detail[-300:])
        return None


def _built(compiler: str) -> Path:
    """Return the shared library for this machine, compiling it unless it is in the cache."""
    identity = "\n".join([SOURCE.read_text(), compiler, " ".join(EXACT), _processor()])
    target = _cache() / f"views-{hashlib.sha256(identity.encode()).hexdigest()[:16]}.so"
    if target.exists():
        return target
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        made = Path(scratch) / target.name
        try:
            _compile(compiler, "-march=native", made)
        except subprocess.CalledProcessError:  # some compilers know no native
            _compile(compiler, "-O3", made)
        made.replace(target)  # whole or not at all: several actors start at once
    return target


def _compile(compiler: str, tuning: str, made: Path) -> None:
    subprocess.run(
        [compiler, *EXACT, tuning, str(SOURCE), *SHARED, "-o", str(made)],
        check=True,
        capture_output=True,
        text=True,
        timeout=COMPILE_TIMEOUT_S,
    )


def _cache() -> Path:
    """Return a folder that only this user can write: what lies there is loaded as code."""
    places: list[Path] = []
    with suppress(RuntimeError):  # a user may have no home
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        places.append(base / "simclr-ray")
    places.append(Path(tempfile.gettempdir()) / f"simclr-ray-{os.getuid()}")
    for folder in places:
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            about = folder.lstat()  # a link could be pointed elsewhere after this look
        except OSError:
            continue
        mine = stat.S_ISDIR(about.st_mode) and about.st_uid == os.getuid()
        if mine and not about.st_mode & 0o022 and os.access(folder, os.W_OK):
            return folder
    raise OSError("no folder of this user's to keep the compiled library in")


def _processor() -> str:
    """Return what tells processors apart: a home may be shared by machines of several kinds."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine() + platform.processor()
    named = (line for line in lines if line.startswith(("flags", "Features")))
    return platform.machine() + next(named, "")
