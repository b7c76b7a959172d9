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
from typing import Any, Final, Literal, Protocol

from simclr_ray.config.logging import warn_once
from simclr_ray.errors import one_line
from simclr_ray.tracking import store

Gpus = Literal["", "NVIDIA", "AMD"]  # that a machine has

VARIABLE = "MLFLOW_SYSTEM_METRICS_"
INTERVAL_S, SAMPLES = 10.0, 6  # a record a minute, the mean of six samples
INSTALL: Final = {
    "NVIDIA": "nvidia-ml-py is not installed; pip install 'simclr-ray[gpu]'",
    "AMD": "pyrsmi is not installed; pip install pyrsmi",
}
log = logging.getLogger(__name__)


class _Probe(Protocol):
    """What MLflow's probes have in common."""

    def collect_metrics(self) -> Any: ...
    def aggregate_metrics(self) -> Mapping[str, float]: ...
    def clear_metrics(self) -> Any: ...


@contextmanager
def system_metrics(
    append: Callable[[dict[str, float]], None],
    first_step: int = 0,
    interval_s: float = INTERVAL_S,
    gpus: Gpus = "",
) -> Iterator[None]:
    """Append this machine's metrics, means of `SAMPLES` samples, while the block runs.

    What it lacks (psutil, or for GPUs nvidia-ml-py) is one line of the log, and the block runs.
    Obeys MLflow's variables $MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL (with it a record is one
    sample), ..._SAMPLES_BEFORE_LOGGING and ..._NODE_ID.

    Args:
        append: Takes a record: `step`, and `system/<name>` -> value. What it raises ends the
            metrics, not the block.
        first_step: Of the first record; one more each.
        interval_s: Between samples, in seconds.
        gpus: That torch sees; where no probe does, that is said.
    """
    ended = threading.Event()
    try:
        sampler = _Sampler(append, first_step, interval_s, ended)
    except Exception as error:  # noqa: BLE001 - psutil, its kernel files, drivers: all optional
        log.warning("no system metrics: %s", error)
        yield
        return
    if gpus and (problem := sampler.gpu_problems.get(gpus)):
        warn_once(log, f"no metrics of this machine's GPUs: {problem}")
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
            self.probes, self.gpu_problems = _probes(), dict[str, str]()
            if gpu_probe := _gpu_probe(self.gpu_problems):
                self.probes.append(gpu_probe)
        self.append, self.step, self.ended = append, first_step, ended
        interval = os.environ.get(f"{VARIABLE}SAMPLING_INTERVAL")
        self.interval_s = float(interval or interval_s)
        samples = os.environ.get(f"{VARIABLE}SAMPLES_BEFORE_LOGGING")
        self.samples = int(samples or (1 if interval else SAMPLES))
        node = os.environ.get(f"{VARIABLE}NODE_ID")
        self.prefix = f"system/{node}/" if node else "system/"

    def run(self) -> None:
        try:
            while True:
                for taken in range(1, self.samples + 1):
                    for probe in self.probes:
                        probe.collect_metrics()
                    if self.ended.wait(self.interval_s):
                        if taken > 1:  # the first one of all knows no use of the CPU
                            self._append()
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


def gpu_metrics_problem(gpus: Gpus) -> str:
    """Return why a machine's GPUs have no metrics, and what to do; empty: they have."""
    problems: dict[str, str] = {}
    with store.quiet():
        _gpu_probe(problems)
    return problems.get(gpus, "")


def _probes() -> list[_Probe]:
    from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
    from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
    from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor

    everywhere: list[Callable[[], _Probe]] = [CPUMonitor, DiskMonitor, NetworkMonitor]
    return [probe() for probe in everywhere]


def _gpu_probe(problems: dict[str, str]) -> _Probe | None:
    """Return the probe of the GPUs that are there; None: none, with the problem of each kind."""
    from mlflow.system_metrics.metrics import gpu_monitor, rocm_monitor

    kinds: dict[Gpus, Callable[[], _Probe]] = {
        "NVIDIA": gpu_monitor.GPUMonitor,
        "AMD": rocm_monitor.ROCMMonitor,
    }
    for kind, probe in kinds.items():
        try:
            return probe()
        except ImportError:
            problems[kind] = INSTALL[kind]
        except Exception as error:  # noqa: BLE001 - no GPU, no driver
            problems[kind] = one_line(error)
    log.debug("no GPU metrics: %s", problems)
    return None
