"""The pauses between Ray Data's rounds: where they are installed, and on which Ray measured."""

from __future__ import annotations

import inspect
import re
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from ray.data import DataContext
from ray.data._internal.execution.execution_callback import ExecutionCallback

from simclr_ray.data.stream import LOOP_PAUSE_S, _configure, _Pace

ROOT = Path(__file__).parents[3]


def test_the_pace_was_measured_on_this_ray() -> None:
    version = ".".join(ray.__version__.split(".")[:2])
    locked = re.search(r"^ray==(\d+\.\d+)", (ROOT / "requirements.lock").read_text(), re.MULTILINE)
    assert locked is not None
    assert locked[1] in _Pace.MEASURED_ON, "the lock has moved on: measure anew (benchmarks/stream)"
    if version not in _Pace.MEASURED_ON:
        # another Ray than the lock's, as `scripts/test-versions` installs the lowest: a choice of
        # speed, not of results, so the next two tests hold it to that Ray's hooks, and only a
        # benchmark can say whether it still pays there
        pytest.skip(
            f"Ray {version}: measured on {', '.join(_Pace.MEASURED_ON)}; run benchmarks/stream.py "
            "with and without `_Pace`, then enter the version in MEASURED_ON or drop the class"
        )


def test_the_pace_has_the_methods_that_this_ray_calls() -> None:
    theirs = {n: m for n, m in vars(ExecutionCallback).items() if inspect.isfunction(m)}
    assert theirs
    for name, method in theirs.items():
        ours = inspect.signature(getattr(_Pace, name)).parameters
        assert list(ours) == list(inspect.signature(method).parameters), name


def test_the_pace_is_installed_once_where_ray_takes_callbacks_and_left_out_elsewhere() -> None:
    context = DataContext()
    for _ in range(2):
        _configure(context)
    installed: list[Any] = context.custom_execution_callback_classes
    assert installed.count(_Pace) == 1
    older: Any = SimpleNamespace(execution_options=SimpleNamespace())
    _configure(older)
    assert older.execution_options.preserve_order


def test_it_pauses_for_half_a_step_while_batches_are_in_time_and_hardly_elsewhere(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = 0.0

    def batches() -> Iterator[int]:
        nonlocal now
        for index, wait in enumerate([0.0, 0.0, 0.05]):
            now += wait
            yield index

    monkeypatch.setattr(time, "perf_counter", lambda: now)
    pauses = []
    for _ in _Pace.observed(batches()):
        pauses.append(_Pace.pause_s)
        now += 0.1  # a step
    assert pauses[1] == pytest.approx(0.05)
    assert LOOP_PAUSE_S[0] < pauses[1] <= LOOP_PAUSE_S[1]
    assert pauses[2] == LOOP_PAUSE_S[0]
