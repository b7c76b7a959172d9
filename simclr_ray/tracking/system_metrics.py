"""Metrics of this machine (`system/...`): MLflow's own probes, written to a log of the run.

MLflow's own monitor logs to its store from its thread, and ends for good with the first request
that fails. What is appended to a log is delivered like all else.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

from simclr_ray.tracking import store

VARIABLE = "MLFLOW_SYSTEM_METRICS_"
log = logging.getLogger(__name__)


class _Probe(Protocol):
    """What MLflow's probes have in common."""

    def collect_metrics(self) -> Any: ...
    def aggregate_metrics(self) -> Mapping[str, float]: ...
    def clear_metrics(self) -> Any: ...


@contextmanager
def system_metrics(
    append: Callable[[dict[str, float]], None], first_step: int = 0, interval_s: float = 10.0
) -> Iterator[None]:
    """Append this machine's metrics every `interval_s` while the block runs.

    Needs psutil, and pynvml for GPUs; without psutil one line is logged and the block runs. Obeys
    MLflow's variables $MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL, ..._SAMPLES_BEFORE_LOGGING and
    ..._NODE_ID.

    Args:
        append: Takes a record: `step`, and `system/<name>` -> value. What it raises ends the
            metrics, not the block.
        first_step: Of the first record; one more each.
        interval_s: Between samples, in seconds.
    """
    ended = threading.Event()
    try:
        sampler = _Sampler(append, first_step, interval_s, ended)
    except Exception as error:  # noqa: BLE001 - psutil, its kernel files, drivers: all optional
        log.warning("no system metrics: %s", error)
        yield
        return
    sampler.start()
    try:
        yield
    finally:
        ended.set()
        sampler.join(timeout=10)


class _Sampler(threading.Thread):
    def __init__(
        self,
        append: Callable[[dict[str, float]], None],
        first_step: int,
        interval_s: float,
        ended: threading.Event,
    ) -> None:
        super().__init__(daemon=True, name="system metrics")
        with store.quiet():
            self.probes = _probes()
        self.append, self.step, self.ended = append, first_step, ended
        self.interval_s = float(os.environ.get(f"{VARIABLE}SAMPLING_INTERVAL") or interval_s)
        self.samples = int(os.environ.get(f"{VARIABLE}SAMPLES_BEFORE_LOGGING") or 1)
        node = os.environ.get(f"{VARIABLE}NODE_ID")
        self.prefix = f"system/{node}/" if node else "system/"

    def run(self) -> None:
        try:
            while True:
                for _ in range(self.samples):
                    for probe in self.probes:
                        probe.collect_metrics()
                    if self.ended.wait(self.interval_s):
                        return
                self._append()
        except Exception as error:  # noqa: BLE001 - of the kernel or a driver, and optional
            log.warning("no more system metrics: %s", error)

    def _append(self) -> None:
        record: dict[str, float] = {"step": self.step}
        for probe in self.probes:
            values = probe.aggregate_metrics()
            record |= {f"{self.prefix}{name}": float(value) for name, value in values.items()}
            probe.clear_metrics()
        self.append(record)
        self.step += 1


def _probes() -> list[_Probe]:
    from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
    from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
    from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
    from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor
    from mlflow.system_metrics.metrics.rocm_monitor import ROCMMonitor

    everywhere: list[Callable[[], _Probe]] = [CPUMonitor, DiskMonitor, NetworkMonitor]
    gpus: list[Callable[[], _Probe]] = [GPUMonitor, ROCMMonitor]
    probes = [probe() for probe in everywhere]
    for probe in gpus:
        try:
            probes.append(probe())
        except Exception as error:  # noqa: BLE001 - no GPU, no driver, no package
            log.debug("no GPU metrics: %s", error)
        else:
            break
    return probes
