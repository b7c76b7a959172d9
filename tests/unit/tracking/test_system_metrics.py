"""Metrics of the machine: probes of MLflow's, one of them a stand-in for that of GPUs."""

from __future__ import annotations

import inspect
import logging
import statistics
import threading
import time

import pytest
from mlflow.system_metrics.metrics import gpu_monitor

from simclr_ray.cli.doctor import check_gpu_metrics
from simclr_ray.config.logging import warn_once
from simclr_ray.tracking.system_metrics import Gpus, _Sampler, system_metrics


def test_watching_the_system_never_stops_what_is_watched(
    caplog: pytest.LogCaptureFixture,
) -> None:
    records: list[dict[str, float]] = []
    with system_metrics(records.append, 7, interval_s=0.01):
        deadline = time.monotonic() + 20
        while len(records) < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
    assert [record["step"] for record in records[:2]] == [7, 8]
    assert records[0].keys() >= {"system/cpu_utilization_percentage"}

    def full(_: object) -> None:
        raise OSError("no space left")

    with caplog.at_level(logging.WARNING), system_metrics(full, interval_s=0.01):
        deadline = time.monotonic() + 20
        while not caplog.text and time.monotonic() < deadline:
            time.sleep(0.01)
    with pytest.raises(ZeroDivisionError), system_metrics(records.append):
        raise ZeroDivisionError
    assert "no more system metrics: no space left" in caplog.text


class FakeGpus:
    """Stands for MLflow's probe of a machine with a GPU; its samples ascend."""

    def __init__(self) -> None:
        self.taken: list[float] = []

    def collect_metrics(self) -> None:
        self.taken.append(len(self.taken) + 1.0)

    def aggregate_metrics(self) -> dict[str, float]:
        return {"gpu_0_utilization_percentage": statistics.mean(self.taken)}

    def clear_metrics(self) -> None:
        self.taken.clear()


def test_a_record_is_the_mean_of_six_samples_a_minute_and_what_is_left_at_the_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(gpu_monitor, "GPUMonitor", FakeGpus)
    assert inspect.signature(system_metrics).parameters["interval_s"].default == 10.0
    records: list[dict[str, float]] = []
    waits = iter([False] * 9 + [True])
    ended = threading.Event()
    monkeypatch.setattr(ended, "wait", lambda *_: next(waits, True))
    _Sampler(records.append, 0, 10.0, ended).run()
    assert [record["step"] for record in records] == [0, 1]
    key = "system/gpu_0_utilization_percentage"
    assert [record[key] for record in records] == [3.5, 2.5]  # of six samples, of four
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "2")
    assert _Sampler(records.append, 0, 10.0, ended).samples == 1


@pytest.mark.parametrize(
    ("gpus", "error", "said"),
    [
        ("NVIDIA", ImportError("run `pip install nvidia-ml-py`"), "install 'simclr-ray[gpu]'"),
        ("NVIDIA", RuntimeError("Failed to initialize\nNVML"), "GPUs: Failed to initialize NVML"),
        ("AMD", ImportError("run `pip install nvidia-ml-py`"), "pip install pyrsmi"),
        ("", ImportError("run `pip install nvidia-ml-py`"), ""),
        ("NVIDIA", None, ""),
    ],
)
def test_that_gpus_of_the_machine_are_not_measured_is_one_line(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    gpus: Gpus,
    error: Exception | None,
    said: str,
) -> None:
    def probe() -> FakeGpus:
        if error is not None:
            raise error
        return FakeGpus()

    monkeypatch.setattr(gpu_monitor, "GPUMonitor", probe)
    warn_once.cache_clear()
    with caplog.at_level(logging.INFO), system_metrics(lambda _: None, gpus=gpus):
        pass
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == bool(said)
    assert said in caplog.text
    findings = check_gpu_metrics(gpus)
    assert [f.status for f in findings] == ([] if not gpus else ["warn" if said else "ok"])
    assert all(f.advice in caplog.text or f.advice == "look at the driver" for f in findings)
