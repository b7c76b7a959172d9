"""Broken forms of bytes and trees, each by one generator: a seed breaks them the same way."""

from __future__ import annotations

import copy
import json
import random
from typing import Any

ODD_NUMBERS = (0, 1, -1, 2**31 - 1, 2**31, 2**63, -(2**63), 2**200, 1e308, 0.5)
ODD_TEXTS = ("", " ", "\x00", "a" * 5000, "../../etc/passwd", "é\ud800", "nan", "${HOME}", "***")
ODD: tuple[Any, ...] = (
    *ODD_NUMBERS,
    *ODD_TEXTS,
    None,
    True,
    [],
    {},
    [[]],
    {"": None},
    1e999,
)
BOUNDARIES = (
    b"\x00",
    b"\xff",
    b"\x7f",
    b"\x80",
    b"\xff\xff\xff\xff",
    b"\x00\x00\x00\x00",
    b"\x7f\xff",
)


def broken_bytes(draw: random.Random, whole: bytes) -> bytes:
    """Return bytes with one to eight things wrong: flipped, cut, doubled, moved, overwritten."""
    data = bytearray(whole)
    for _ in range(draw.choice((1, 1, 1, 2, 4, 8))):
        if not data:
            break
        at = draw.randrange(len(data))
        length = min(len(data) - at, draw.choice((1, 2, 4, 16, 256)))
        match draw.randrange(7):
            case 0:
                data[at] ^= 1 << draw.randrange(8)
            case 1:
                data[at : at + length] = draw.randbytes(length)
            case 2:
                del data[at:]
            case 3:
                del data[at : at + length]
            case 4:
                data[at:at] = data[at : at + length] * draw.choice((1, 2, 64))
            case 5:
                some = draw.choice(BOUNDARIES)
                data[at : at + len(some)] = some
            case _:  # the header decides how the rest is read
                near = draw.randrange(min(len(data), 128))
                data[near] = draw.randrange(256)
    return bytes(data)


def broken_tree(draw: random.Random, tree: Any) -> Any:
    """Return a JSON tree in which one to four values are odd, gone, renamed, or of another type."""
    tree = json.loads(json.dumps(tree))
    for _ in range(draw.choice((1, 1, 2, 4))):
        places = [(tree, key) for key in _keys(tree)]
        for node, key in places:
            places += [(node[key], k) for k in _keys(node[key])]
        if not places:
            return odd(draw)
        node, key = draw.choice(places)
        match draw.randrange(5):
            case 0 | 1:
                node[key] = odd(draw)
            case 2:
                del node[key]
            case 3 if isinstance(node, dict):
                node[draw.choice((*node, "strange", ""))] = node.pop(key)
            case _:
                node[key] = draw.choice(([node[key]], {"x": node[key]}, str(node[key])))
    return tree


def odd(draw: random.Random) -> Any:
    """Return an odd value of its own: what is broken next may be within it."""
    return copy.deepcopy(draw.choice(ODD))


def _keys(node: Any) -> list[Any]:
    if isinstance(node, dict):
        return list(node)
    return list(range(len(node))) if isinstance(node, list) else []


def broken_json(draw: random.Random, tree: Any) -> bytes:
    """Return JSON of a broken tree, or broken bytes of a whole one."""
    if draw.random() < 0.7:
        return json.dumps(broken_tree(draw, tree)).encode("utf-8", "surrogatepass")
    return broken_bytes(draw, json.dumps(tree, indent=1).encode())
