"""`native.c` called from Python: the same bytes as the torch form, several times faster on CPU.

A wheel for Linux brings the compiled library; elsewhere it is compiled once per machine type with
the compiler that is there, into the user's cache (`native_build`). Loaded with ctypes, which gives
the interpreter lock back while it works. Where there is neither, nothing is lost but speed.

$SIMCLR_RAY_NATIVE chooses: `package` or `build` takes that one alone, `off` neither; unset, the
package's is taken, else a built one.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import os
import sys
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from simclr_ray.augment import native_build
from simclr_ray.errors import ConfigError

Pixels = NDArray[np.uint8]
NativeSetting = Literal["", "off", "package", "build"]

log = logging.getLogger(__name__)


class Native(NamedTuple):
    """What makes views on this machine's CPU."""

    library: ctypes.CDLL | None  # None: torch
    detail: str  # where the library is from, or why there is none


def available() -> bool:
    """Return whether the compiled form can be used; the first call may compile, about 2 s."""
    return loaded().library is not None


def check_setting() -> NativeSetting:
    """Return $SIMCLR_RAY_NATIVE; empty where it is not set.

    Raises:
        ConfigError: It is none of the four.
    """
    value = os.environ.get(native_build.SETTING, "")
    for setting in get_args(NativeSetting):
        if value == setting:
            return setting  # type: ignore[no-any-return] # get_args loses the type
    problem = f"{value!r} is none of off, package, build"
    raise ConfigError.of(native_build.SETTING, problem)


def crop_views(
    images: Sequence[Pixels],
    boxes: NDArray[np.int64],
    flip: NDArray[np.bool_],
    size: int,
    channels: int = 3,
) -> Tensor:
    """Return images cropped, resized and flipped: uint8 [k, C, size, size].

    Args:
        images: n images, uint8 [H, W, C] each.
        boxes: [k, 4] of top, left, height, width in pixels, k a multiple of n; row i crops
            image i mod n.
        flip: [k].
        size: Side of a crop.
        channels: C.

    Raises:
        ValueError: An image is not uint8 [H, W, C], or a crop lies outside of it.
    """
    _check_images(images, channels)
    whole = [np.ascontiguousarray(p) for p in images]
    times = len(boxes) // max(1, len(whole))
    if not len(flip) == len(boxes) == times * len(whole):
        raise ValueError(f"{len(boxes)} boxes and {len(flip)} flips for {len(whole)} images")
    pointers = np.array([p.__array_interface__["data"][0] for p in whole] * times, np.uintp)
    widths = np.array([p.shape[1] for p in whole] * times, np.int64)
    heights = np.array([p.shape[0] for p in whole] * times, np.int64)
    _check_boxes(boxes, heights, widths)
    out = torch.empty(len(boxes), channels, size, size, dtype=torch.uint8)
    _call(
        "crop_views",
        ctypes.c_int64(len(boxes)),
        _pointer(pointers),
        _pointer(widths),
        _pointer(boxes.astype(np.int64, order="C")),
        _pointer(flip.astype(np.uint8)),
        ctypes.c_int32(size),
        ctypes.c_int32(channels),
        ctypes.c_void_p(out.data_ptr()),
    )
    return out


def distort_color(
    crops: Tensor,
    factors: NDArray[np.float32],
    order: NDArray[np.int64],
    jitter: NDArray[np.bool_],
    gray: NDArray[np.bool_],
    *,
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

    Raises:
        ValueError: Crops or factors are of another shape: C would read or write past their end.
    """
    if crops.shape[1:2] != (3,) or factors.shape != (len(crops), 4):
        raise ValueError(f"crops {[*crops.shape]} are not [n, 3, S, S] with 4 factors each")
    size = (crops.shape[-1],)
    chosen = (jitter, gray, blur)
    return _distort("distort_color", crops, size, factors, order, chosen, kernels=kernels)


def distort_channels(
    crops: Tensor,
    factors: NDArray[np.float32],
    order: NDArray[np.int64],
    jitter: NDArray[np.bool_],
    *,
    blur: NDArray[np.bool_],
    kernels: NDArray[np.float32],
) -> Tensor:
    """Return crops after jitter of each channel and blur: uint8 [n, C, S, S], for any C.

    Args:
        crops: uint8 [n, C, S, S] on CPU.
        factors: [n, 2·C], as in `color.jitter_channels`.
        order: [n, 2] likewise.
        jitter: [n], whether an image is jittered.
        blur: [n], whether it is blurred.
        kernels: [n, taps], integers over `resample.UNIT`, of odd length.

    Raises:
        ValueError: As of `distort_color`.
    """
    n, channels, size = crops.shape[:3]
    if factors.shape != (n, 2 * channels):
        raise ValueError(f"factors {[*factors.shape]} are not [{n}, {2 * channels}]")
    sizes, chosen = (channels, size), (jitter, blur)
    return _distort("distort_channels", crops, sizes, factors, order, chosen, kernels=kernels)


def _distort(
    name: str,
    crops: Tensor,
    sizes: tuple[int, ...],
    factors: NDArray[np.float32],
    order: NDArray[np.int64],
    chosen: tuple[NDArray[np.bool_], ...],
    *,
    kernels: NDArray[np.float32],
) -> Tensor:
    if crops.dtype != torch.uint8:
        raise ValueError(f"crops are {crops.dtype}, not torch.uint8")
    source = crops.contiguous()
    out = torch.empty_like(source)
    _call(
        name,
        ctypes.c_int64(len(source)),
        *map(ctypes.c_int32, sizes),
        ctypes.c_void_p(source.data_ptr()),
        _pointer(factors.astype(np.float32, order="C")),
        _pointer(order.astype(np.int64, order="C")),
        *(_pointer(images.astype(np.uint8)) for images in chosen),
        _pointer(kernels.astype(np.float32, order="C")),
        ctypes.c_int32(kernels.shape[1]),
        ctypes.c_void_p(out.data_ptr()),
    )
    return out


def _check_images(images: Sequence[Pixels], channels: int) -> None:
    """Raise `ValueError` for what is no image: C would read past its end."""
    for p in images:
        if p.dtype != np.uint8 or p.ndim != 3 or p.shape[2] != channels:
            raise ValueError(f"an image is uint8 [H, W, {channels}], not {p.dtype} {[*p.shape]}")


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
    library = loaded().library
    if library is None:
        raise RuntimeError("native.c is not compiled here; call available() first")
    if getattr(library, name)(*arguments):
        raise MemoryError(f"no memory for {name}")


@functools.cache
def loaded() -> Native:
    """Return what makes views in this process: chosen, loaded and said once.

    Raises:
        ConfigError: $SIMCLR_RAY_NATIVE is invalid.
    """
    setting = check_setting()
    if setting == "off":
        return Native(None, f"{native_build.SETTING}=off")
    reasons: list[str] = []
    if setting in ("", "package"):
        candidate = _load_packaged()
        if candidate.library is not None:
            return candidate
        reasons.append(candidate.detail)
    if setting in ("", "build"):
        candidate = _load_built()
        if candidate.library is not None:
            return candidate
        reasons.append(candidate.detail)
    reason = " and ".join(reasons)
    level = logging.WARNING if setting else logging.INFO
    log.log(level, "views are made with torch, several times slower on CPU: %s", reason)
    return Native(None, reason)


def _load_packaged() -> Native:
    """Load the library that the installed package brought."""
    path = native_build.find_packaged()
    if path is None:
        return Native(None, "the installed package holds no library for this processor")
    try:
        return Native(ctypes.CDLL(str(path)), f"from the package, {native_build.level_of(path)}")
    except OSError as error:  # of another C library, say
        log.warning("the package's library cannot be loaded: %s", error)
        return Native(None, "the package's library cannot be loaded")


def _load_built() -> Native:
    """Load the library compiled on this machine, compiling it if need be."""
    compiler = native_build.find_compiler()
    if compiler is None or not sys.platform.startswith(("linux", "darwin")):
        return Native(None, "there is no C compiler")
    try:
        path = native_build.build_into_cache(compiler)
        return Native(ctypes.CDLL(str(path)), "compiled on this machine")
    except (OSError, native_build.NativeBuildError) as error:
        log.warning("native.c cannot be compiled here: %s", error)
        return Native(None, "native.c cannot be compiled here")
