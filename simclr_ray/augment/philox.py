"""Counter-based random numbers: uniform draws that are a pure function of their key.

Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"), vectorised over
rows in NumPy. There is no state: resume, number of workers and order of rows cannot change a draw.
`numpy.random.Philox` is the same function for one key: a generator object for each row, where this
is one call for a batch. torch has it for CUDA alone, and with a state (`nn.stochastic` has this
function in torch's integers). The known answers of the
paper's authors are the test.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

ROUNDS = 10
MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
WEYL = (0x9E3779B9, 0xBB67AE85)
LOW = np.uint64(0xFFFFFFFF)
HALF = np.uint64(32)

# What a key is used for: each purpose has its own stream.
Purpose = Literal["views", "order", "window", "replacement", "stages", "layers", "members"]
STREAMS: dict[Purpose, int] = {
    "views": 1,
    "order": 2,
    "window": 3,
    "replacement": 4,
    "stages": 5,
    "layers": 6,  # drawn by nn.stochastic
    "members": 7,
}


def philox(counter: NDArray[np.uint64], key: tuple[int, int]) -> NDArray[np.uint64]:
    """Return four 32-bit words for each counter of four 32-bit words.

    Args:
        counter: uint64 [4, ...], each value below 2³².
        key: Two 32-bit words.

    Returns:
        uint64 [4, ...], each value below 2³².
    """
    c0, c1, c2, c3 = (c.astype(np.uint64, copy=True) for c in counter)
    k0, k1 = key
    for _ in range(ROUNDS):
        p0, p1 = MULTIPLIERS[0] * c0, MULTIPLIERS[1] * c2
        c0, c1, c2, c3 = (
            (p1 >> HALF) ^ c1 ^ np.uint64(k0),
            p1 & LOW,
            (p0 >> HALF) ^ c3 ^ np.uint64(k1),
            p0 & LOW,
        )
        k0, k1 = (k0 + WEYL[0]) & 0xFFFFFFFF, (k1 + WEYL[1]) & 0xFFFFFFFF
    return np.stack([c0, c1, c2, c3])


def uniforms(
    ids: NDArray[np.int64],
    num: int,
    *,
    seed: int,
    epoch: int,
    sub: int | NDArray[np.int64],
    purpose: Purpose,
) -> NDArray[np.float64]:
    """Return `num` uniform draws in [0, 1) for each id, multiples of 2⁻³²: float64 [n, num].

    Args:
        ids: int64 [n], the rows' ids; equal ids draw equal numbers.
        num: Draws a row.
        seed: 32 bits.
        epoch: Below 2³².
        sub: What tells draws of one row and epoch apart (the view, the attempt), below 2¹⁶: one for
            all rows, or int64 [n].
        purpose: The stream.
    """
    words = _words(ids, -(-num // 4), seed=seed, epoch=epoch, sub=sub, purpose=purpose)
    return words[:, :num].astype(np.float64) * 2.0**-32


def integers(
    ids: NDArray[np.int64], *, seed: int, epoch: int, sub: int, purpose: Purpose
) -> NDArray[np.uint64]:
    """Return one 64-bit integer for each id: uint64 [n]. Same arguments as `uniforms`."""
    words = _words(ids, 1, seed=seed, epoch=epoch, sub=sub, purpose=purpose)
    return (words[:, 0] << HALF) | words[:, 1]


def permutation(
    size: int, *, seed: int, epoch: int, sub: int, purpose: Purpose
) -> NDArray[np.int64]:
    """Return a permutation of range(size), a pure function of its key: int64 [size]."""
    keys = integers(np.arange(size), seed=seed, epoch=epoch, sub=sub, purpose=purpose)
    return np.argsort(keys, kind="stable").astype(np.int64)


def _words(
    ids: NDArray[np.int64],
    blocks: int,
    *,
    seed: int,
    epoch: int,
    sub: int | NDArray[np.int64],
    purpose: Purpose,
) -> NDArray[np.uint64]:
    subs = np.asarray(sub, np.int64)
    if ((subs < 0) | (subs >= 2**16)).any() or not 0 <= blocks < 2**16 or not 0 <= epoch < 2**32:
        raise ValueError(f"key out of range: epoch={epoch} sub={sub} blocks={blocks}")
    wide = ids.astype(np.int64).view(np.uint64)[:, None]
    block = np.arange(blocks, dtype=np.uint64) | (subs << 16).astype(np.uint64)[..., None]
    shape = (len(ids), blocks)
    counter = np.stack(
        [
            np.broadcast_to(wide & LOW, shape),
            np.broadcast_to(wide >> HALF, shape),
            np.broadcast_to(block, shape),
            np.full(shape, epoch, dtype=np.uint64),
        ]
    )
    out = philox(counter, (seed, STREAMS[purpose]))  # [4, n, blocks]
    return out.transpose(1, 2, 0).reshape(len(ids), 4 * blocks)
