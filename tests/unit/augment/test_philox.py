"""Counter-based draws: the published algorithm, and independence from everything but the key."""

from __future__ import annotations

import numpy as np
import pytest

from simclr_ray.augment.philox import integers, permutation, philox, uniforms

# Known answers of Philox4x32-10 in the authors' Random123 distribution (kat_vectors).
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    (
        (0xFFFFFFFF,) * 4,
        (0xFFFFFFFF,) * 2,
        (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
    ),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_philox_gives_the_published_answers(
    counter: tuple[int, ...], key: tuple[int, int], expected: tuple[int, ...]
) -> None:
    assert philox(np.array(counter, np.uint64)[:, None], key)[:, 0].tolist() == list(expected)


def test_a_row_draws_the_same_numbers_in_any_company() -> None:
    ids = np.array([5, -1, 2**40, 7])
    alone = uniforms(ids[2:3], 9, seed=1, epoch=3, sub=1, purpose="views")
    together = uniforms(ids, 9, seed=1, epoch=3, sub=1, purpose="views")
    assert (alone[0] == together[2]).all()


@pytest.mark.parametrize("change", ["seed", "epoch", "sub", "purpose", "id"])
def test_each_part_of_the_key_changes_the_draws(change: str) -> None:
    ids = np.arange(50)
    base = uniforms(ids, 4, seed=1, epoch=1, sub=1, purpose="views")
    other = uniforms(
        ids + (50 if change == "id" else 0),
        4,
        seed=2 if change == "seed" else 1,
        epoch=2 if change == "epoch" else 1,
        sub=2 if change == "sub" else 1,
        purpose="order" if change == "purpose" else "views",
    )
    assert not (base == other).any()


def test_draws_are_uniform() -> None:
    u = uniforms(np.arange(20_000), 5, seed=0, epoch=0, sub=0, purpose="views")
    counts = np.histogram(u, bins=50, range=(0, 1))[0]
    expected = u.size / 50
    chi2 = float(((counts - expected) ** 2 / expected).sum())
    assert chi2 < 85.4  # the 99.9 % point of chi-squared with 49 degrees of freedom
    assert abs(np.corrcoef(u.T) - np.eye(5)).max() < 0.03


def test_permutations_cover_and_repeat() -> None:
    p = permutation(1000, seed=3, epoch=4, sub=0, purpose="order")
    assert sorted(p.tolist()) == list(range(1000))
    assert (p == permutation(1000, seed=3, epoch=4, sub=0, purpose="order")).all()


def test_integers_use_all_64_bits() -> None:
    values = integers(np.arange(2000), seed=0, epoch=0, sub=0, purpose="replacement")
    assert len(np.unique(values >> np.uint64(32))) > 1990
    assert (values >> np.uint64(63)).any()


def test_keys_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match="key out of range"):
        uniforms(np.arange(2), 1, seed=0, epoch=0, sub=2**16, purpose="views")
