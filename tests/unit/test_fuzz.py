"""The fuzzing itself: a case can be drawn again, and the first cases of each target are clean."""

from __future__ import annotations

import random

import pytest

from tests.fuzz.mutate import broken_bytes, broken_tree
from tests.fuzz.run import run_case
from tests.fuzz.targets import TARGETS


def test_a_seed_breaks_the_same_way_again() -> None:
    whole, tree = bytes(range(256)) * 4, {"a": [1, {"b": "c"}], "d": 2.5}
    for seed in range(50):
        once, again = random.Random(seed), random.Random(seed)
        assert broken_bytes(once, whole) == broken_bytes(again, whole)
        assert repr(broken_tree(once, tree)) == repr(broken_tree(again, tree))
    assert tree == {"a": [1, {"b": "c"}], "d": 2.5}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", TARGETS)
def test_the_first_cases_raise_errors_of_ours_or_none(name: str) -> None:
    assert [found for case in range(5) if (found := run_case(name, 0, case))] == []
