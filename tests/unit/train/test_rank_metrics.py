"""What a rank exports: its own times, what rank 0 logs, and bytes that were read."""

from __future__ import annotations

from typing import Any

import pytest
from ray.util.metrics import Counter

from simclr_ray.data.bytes_read import BYTES_READ
from simclr_ray.distributed.ray_metrics import METRICS, RunMetrics
from simclr_ray.train.rank_metrics import LOGGED, RankMetrics


class Spent:
    """Stands for a rank's heartbeat."""

    def __init__(self) -> None:
        self.spent = {"start": 9.0, "data": 0.0, "step": 0.0, "evaluation": 0.0, "checkpoint": 0.0}

    def spent_s(self) -> dict[str, float]:
        return dict(self.spent)


@pytest.fixture
def exported(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """Give what is handed to Ray, by name."""
    values: dict[str, float] = {}
    monkeypatch.setattr(RunMetrics, "set", lambda _, name, value: values.update({name: value}))
    monkeypatch.setattr(
        RunMetrics, "add", lambda _, name, num: values.update({name: values.get(name, 0) + num})
    )
    return values


def test_times_are_of_the_steps_since_the_report_before(exported: dict[str, float]) -> None:
    spent: Any = Spent()
    BYTES_READ.take()
    rank = RankMetrics("run", 1, spent, start=100)  # a resumed run
    spent.spent |= {"data": 2.0, "step": 8.0}
    BYTES_READ.add(70)
    rank.reported(110)
    assert exported == {
        "simclr_step_seconds": 1.0, "simclr_data_wait_ratio": 0.2, "simclr_read_bytes_total": 70,
    }  # fmt: skip
    spent.spent |= {"data": 3.0, "step": 9.0, "evaluation": 50.0}
    rank.reported(114)
    assert exported == {
        "simclr_step_seconds": 0.5, "simclr_data_wait_ratio": 0.5, "simclr_read_bytes_total": 70,
    }  # fmt: skip


def test_what_rank_0_logs_is_exported_under_its_own_name(exported: dict[str, float]) -> None:
    rank = RankMetrics("run", 0, Spent(), start=0)  # type: ignore[arg-type] # answers as it does
    rank.logged(0, {"start/effective_rank": 50.0, "start/alignment": 1.0})
    rank.logged(1.5, {"train/loss": 4.0, "train/images_per_s": 900.0, "train/grad_norm": 1.0})
    rank.logged(2, {"eval/knn_top1": 0.4, "eval/effective_rank": 20.0})
    assert exported == {
        "simclr_epoch": 2, "simclr_loss": 4.0, "simclr_images_per_second": 900.0,
        "simclr_knn_top1_ratio": 0.4, "simclr_effective_rank": 20.0,
    }  # fmt: skip
    assert set(LOGGED.values()) <= set(METRICS)


def test_without_ray_to_export_them_metrics_cost_nothing_and_raise_nothing() -> None:
    metrics = RunMetrics("run", 0)
    for name, definition in METRICS.items():
        if definition.kind is Counter:
            metrics.add(name, 3)
            metrics.add(name, 0)  # which Ray itself would refuse
        else:
            metrics.set(name, 0.5)
