"""`shapes`: images drawn from numbers, whose class is their form and nothing else.

Color, texture, background, position, scale, rotation and reflection are drawn independently of
the class, and all forms have the same area at the same scale, so neither a color histogram nor
the share of foreground tells the class. An image is a pure function of (seed, index, size): a
counter-based generator is keyed by the first two, so any worker can draw any image.

Forms are outlines. Their signed distance is tabulated once per process; an image looks it up at
its own pose, which gives anti-aliased edges from one sample per pixel.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Final, NamedTuple

import numpy as np

from simclr_ray.augment.decode import Pixels
from simclr_ray.data.arrays import Float64s

Outline = list[Float64s]  # closed loops [V, 2], x right, y up; holes run the other way round

# Radius of the disk of the same area, as a share of the side: forms then span 0.34-0.9 of it.
RADIUS: Final = (0.17, 0.27)
SHIFT: Final = 0.17  # centre of gravity to centre of the image, at most, as a share of the side
TURN: Final = np.deg2rad(25.0)
# Luminance gap of form and ground: visible in gray, as a fifth of SimCLR's views are.
GAP: Final = (0.30, 0.65)
CHROMA: Final = 0.22
GRADIENT: Final = 0.12
TEXTURE: Final = 0.08

_TABLE_HALF: Final = 1.9  # half the side of the distance table; the farthest tips are at 1.7
_TABLE_NODES: Final = 153
_LUMA: Final = np.array([0.299, 0.587, 0.114])  # ITU-R BT.601
_NUM_DRAWS: Final = 18


class Drawn(NamedTuple):
    """An image, uint8 [size, size, 3], and its class in `[0, len(CLASS_NAMES))`."""

    pixels: Pixels
    label: int


def render(index: int, seed: int, size: int = 32) -> Drawn:
    """Return image `index` of the set `seed`; the class is `index % 10`, so sets are balanced.

    Args:
        index: which image, >= 0; sets have no end.
        seed: which set, >= 0; a test set is a set of another seed.
        size: side in pixels, >= 8.

    Raises:
        ValueError: an argument is out of range.
    """
    if index < 0 or seed < 0 or size < 8:
        raise ValueError(f"index >= 0, seed >= 0, size >= 8; got {index}, {seed}, {size}")
    label = index % len(CLASS_NAMES)
    key = np.array([seed, index], dtype=np.uint64)
    draws = np.random.Generator(np.random.Philox(key=key)).random(_NUM_DRAWS)
    x = (np.arange(size) + 0.5) / size - 0.5  # [size], to the right
    y = -x[:, None]  # [size, 1], upwards
    cover = _cover(label, draws[:5], x, y, size)[..., None]  # [size, size, 1]
    form, ground = _paint(draws[5:], x, y)
    mixed: Float64s = ground + cover * (form - ground)  # [size, size, 3]
    return Drawn((mixed.clip(0.0, 1.0) * 255.0 + 0.5).astype(np.uint8), label)


def _cover(label: int, draws: Float64s, x: Float64s, y: Float64s, size: int) -> Float64s:
    """Return how much of each pixel the form covers, float64 [size, size] in [0, 1]."""
    radius = RADIUS[0] + draws[0] * (RADIUS[1] - RADIUS[0])
    turn = (2 * draws[1] - 1) * TURN
    shift_x, shift_y = (2 * draws[2:4] - 1) * SHIFT
    mirror = -1.0 if draws[4] < 0.5 else 1.0
    across, up = (x - shift_x) / radius, (y - shift_y) / radius
    cos, sin = np.cos(turn), np.sin(turn)
    along, aloft = mirror * (cos * across + sin * up), cos * up - sin * across
    covered: Float64s = 0.5 - _look_up(_distances()[label], along, aloft) * (radius * size)
    return covered.clip(0.0, 1.0)


def _paint(draws: Float64s, x: Float64s, y: Float64s) -> tuple[Float64s, Float64s]:
    """Return the colors of form and ground at each pixel, float64 [size, size, 3].

    Texture and gradient change brightness only: little by which one view could know its twin.
    """
    gap = GAP[0] + draws[0] * (GAP[1] - GAP[0])
    dark = 0.1 + draws[1] * (0.8 - gap)
    levels = (dark, dark + gap) if draws[2] < 0.5 else (dark + gap, dark)
    form, ground = (
        _color(level, draws[i : i + 2]) for level, i in zip(levels, (3, 5), strict=True)
    )
    angle = 2 * np.pi * draws[7]
    slope = 2 * GRADIENT * draws[8] * (x * np.cos(angle) + y * np.sin(angle))
    texture = TEXTURE * _texture(draws[9:], x, y)
    return form + texture[..., None], ground + slope[..., None]


def _color(level: float, draws: Float64s) -> Float64s:
    """Return an RGB color [3] of luminance `level`: hue uniform, chroma up to `CHROMA`."""
    angle, chroma = 2 * np.pi * draws[0], CHROMA * np.sqrt(draws[1])
    hue = np.cos(angle - np.array([0.0, 2.0, 4.0]) * np.pi / 3)
    color: Float64s = level + chroma * (hue - hue @ _LUMA)
    return color


def _texture(draws: Float64s, x: Float64s, y: Float64s) -> Float64s:
    """Return plain ([1, 1]), stripes or dots ([size, size]), a third of the time each."""
    kind, turn, phase, waves = draws[:4]
    if kind < 1 / 3:
        return np.zeros((1, 1))
    step = 2 * np.pi * (5 + 4 * waves)  # 5-9 waves over the side
    cos, sin = step * np.cos(np.pi * turn), step * np.sin(np.pi * turn)
    stripes = _waves(cos, sin, 2 * np.pi * phase, x, y)
    return stripes if kind < 2 / 3 else stripes * _waves(-sin, cos, 0.0, x, y)


def _waves(along: float, aloft: float, phase: float, x: Float64s, y: Float64s) -> Float64s:
    """Return sin(along * x + aloft * y + phase), [size, size], from sines of rows and columns."""
    result: Float64s = np.sin(along * x + phase) * np.cos(aloft * y)
    result += np.cos(along * x + phase) * np.sin(aloft * y)
    return result


def _look_up(table: Float64s, x: Float64s, y: Float64s) -> Float64s:
    """Return `table` at the points (x, y), between its nodes by bilinear interpolation."""
    per_unit = (_TABLE_NODES - 1) / (2 * _TABLE_HALF)
    column = ((x + _TABLE_HALF) * per_unit).clip(0, _TABLE_NODES - 1.001)
    row = ((y + _TABLE_HALF) * per_unit).clip(0, _TABLE_NODES - 1.001)
    left, low = column.astype(np.intp), row.astype(np.intp)
    right_fraction, high_fraction = column - left, row - low
    at = low * _TABLE_NODES + left
    flat = table.ravel()
    below = flat[at] + right_fraction * (flat[at + 1] - flat[at])
    at += _TABLE_NODES
    above = flat[at] + right_fraction * (flat[at + 1] - flat[at])
    result: Float64s = below + high_fraction * (above - below)
    return result


@functools.cache
def _distances() -> Float64s:
    """Return the signed distance to every form, negative inside, [K, nodes, nodes]; 0.2 s once."""
    steps = np.linspace(-_TABLE_HALF, _TABLE_HALF, _TABLE_NODES)
    points = np.stack(np.meshgrid(steps, steps), axis=-1).reshape(-1, 2)
    tables = [_signed_distance(_normalised(outline()), points) for outline in _OUTLINES.values()]
    return np.stack(tables).reshape(len(tables), _TABLE_NODES, _TABLE_NODES)


def _normalised(outline: Outline) -> Outline:
    """Return the outline with its centre of gravity at 0 and the area of the unit disk."""
    area, moment = 0.0, np.zeros(2)
    for loop in outline:
        ahead = np.roll(loop, -1, axis=0)
        cross = loop[:, 0] * ahead[:, 1] - ahead[:, 0] * loop[:, 1]
        area += cross.sum() / 2
        moment += ((loop + ahead) * cross[:, None]).sum(axis=0) / 6
    scale = np.sqrt(np.pi / area)
    return [(loop - moment / area) * scale for loop in outline]


def _signed_distance(outline: Outline, points: Float64s) -> Float64s:
    """Return the distance of each point [P, 2] to the outline, negative inside (even-odd rule)."""
    nearest = np.full(len(points), np.inf)
    inside = np.zeros(len(points), dtype=bool)
    for loop in outline:
        for start, end in zip(loop, np.roll(loop, -1, axis=0), strict=True):
            edge, offset = end - start, points - start
            along = np.clip(offset @ edge / (edge @ edge), 0.0, 1.0)
            nearest = np.minimum(nearest, ((offset - along[:, None] * edge) ** 2).sum(axis=1))
            spans = (start[1] > points[:, 1]) != (end[1] > points[:, 1])
            left_of = (offset[:, 0] * edge[1] < edge[0] * offset[:, 1]) == (edge[1] > 0)
            inside ^= spans & left_of
    distance: Float64s = np.sqrt(nearest) * np.where(inside, -1.0, 1.0)
    return distance


def _circle(radius: float = 1.0) -> Float64s:
    angles = np.linspace(0, 2 * np.pi, 72, endpoint=False)
    return radius * np.stack([np.cos(angles), np.sin(angles)], axis=1)


def _box(left: float, low: float, right: float, high: float) -> Float64s:
    return np.array([[left, low], [right, low], [right, high], [left, high]])


def _star() -> Outline:
    angles = np.pi / 2 + np.arange(10) * np.pi / 5
    radii = np.where(np.arange(10) % 2, 0.45, 1.0)
    return [radii[:, None] * np.stack([np.cos(angles), np.sin(angles)], axis=1)]


def _plus() -> Outline:
    a, b = 1.0, 0.33
    corners = [(b, -a), (b, -b), (a, -b), (a, b), (b, b), (b, a)]
    return [np.array(corners + [(-x, -y) for x, y in corners])]


def _crescent() -> Outline:
    """A disk less another of radius 0.75 whose centre is 0.5 to the right."""
    meet_x = 0.5 + (1 - 0.75**2 - 0.5**2) / (2 * 0.5)
    meet_y = np.sqrt(1 - meet_x**2)
    outer_end, inner_end = np.arctan2(meet_y, meet_x), np.arctan2(meet_y, meet_x - 0.5)
    outer = np.linspace(outer_end, 2 * np.pi - outer_end, 48)
    inner = np.linspace(2 * np.pi - inner_end, inner_end, 40)[1:-1]
    arcs = [
        np.stack([np.cos(outer), np.sin(outer)], axis=1),
        np.stack([0.5 + 0.75 * np.cos(inner), 0.75 * np.sin(inner)], axis=1),
    ]
    return [np.concatenate(arcs)]


def _heart() -> Outline:
    t = np.linspace(2 * np.pi, 0, 72, endpoint=False)
    y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
    return [np.stack([16 * np.sin(t) ** 3, y], axis=1)]


def _arrow() -> Outline:
    half = [(0.34, -1.0), (0.34, 0.05), (0.9, 0.05), (0.0, 1.0)]
    return [np.array(half + [(-x, y) for x, y in reversed(half[:-1])])]


_OUTLINES: Final[dict[str, Callable[[], Outline]]] = {
    "disk": lambda: [_circle()],
    "ring": lambda: [_circle(), _circle(0.55)[::-1]],
    "triangle": lambda: [_circle()[[18, 42, 66]]],
    "square": lambda: [_box(-1, -1, 1, 1)],
    "plus": _plus,
    "star": _star,
    "crescent": _crescent,
    "heart": _heart,
    "arrow": _arrow,
    "bars": lambda: [_box(-1, 0.25, 1, 0.9), _box(-1, -0.9, 1, -0.25)],
}
CLASS_NAMES: Final = tuple(_OUTLINES)
