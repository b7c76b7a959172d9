"""What does not answer is a finding after its time, and holds up neither others nor the end."""

from __future__ import annotations

import threading
import time
from functools import partial

import pytest

from simclr_ray.cli.doctor import until_answered
from simclr_ray.cli.time_limit import in_thread, is_waiting, result_until
from simclr_ray.config.findings import Finding


def test_a_call_gives_what_it_returns_or_raises() -> None:
    until = time.monotonic() + 30
    assert result_until(in_thread(lambda: 7), until, 0) == 7

    def fails() -> int:
        raise TimeoutError("of its own")

    with pytest.raises(TimeoutError, match="of its own"):
        result_until(in_thread(fails), until, 0)


def test_what_is_late_is_a_finding_and_others_are_not_held_up() -> None:
    answer = threading.Event()

    def waits() -> list[Finding]:
        answer.wait(30)
        return [Finding("storage", "ok", "at last")]

    def breaks() -> list[Finding]:
        raise RuntimeError("broken")

    began = time.monotonic()
    late, broken, sound = until_answered(
        {
            "storage": waits,
            "mlflow": breaks,
            "other": partial(list, [Finding("other", "ok", "opens")]),
        },
        2.0,
    )
    assert time.monotonic() - began < 20
    assert (late.status, late.detail) == ("fail", "no answer within 2 s")
    assert (broken.check, broken.status) == ("mlflow", "fail")
    assert broken.detail == "RuntimeError: broken"
    assert sound == Finding("other", "ok", "opens")
    assert is_waiting(), "so the process ends without waiting for it"
    answer.set()
    until = time.monotonic() + 10
    while is_waiting() and time.monotonic() < until:
        time.sleep(0.01)
    assert not is_waiting()


def test_a_limit_that_is_over_is_none_that_raises() -> None:
    answer = threading.Event()
    waiting = in_thread(lambda: answer.wait(30))
    assert not result_until(waiting, time.monotonic() - 5, otherwise=False)
    answer.set()
