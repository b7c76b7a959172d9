"""What the workers of a planned run compute and exchange, found by starting them for some seconds.

They are started as those of a run are: by Ray Train, with its process group, on its nodes and
devices. Together they take the three steps of `gradient_parity`, which one process has taken
before, and time what a step exchanges.
"""

from __future__ import annotations

import _thread
import contextlib
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from typing import Any, Final, NamedTuple

import ray.train
import ray.train.torch
import ray.train.v2.api.config as ray_config
import torch

from simclr_ray.config.experiment import ScalingConfig
from simclr_ray.config.wording import counted
from simclr_ray.distributed import collectives
from simclr_ray.distributed.demand import LEFT_S, no_group_left
from simclr_ray.distributed.ray_cluster import PickledQueue, driver_queue
from simclr_ray.errors import ClusterError, last_line
from simclr_ray.nn.resnet import RESNET50_PARAMETERS
from simclr_ray.storage.run_folder import RunFolder
from simclr_ray.train.elastic import Trainer, interrupts_kept
from simclr_ray.train.failures import root_failure
from simclr_ray.train.gradient_parity import (
    IMAGES,
    StepResult,
    Worst,
    take_steps,
    worst_difference,
)
from simclr_ray.train.ray_settings import scaling_config, torch_config

GATHERED: Final = 2**20  # bytes of a rank: z of both views of 1,024 images, 128 float32 each
GRADIENT: Final = 4 * RESNET50_PARAMETERS  # bytes, in float32
REDUCED: Final = 32 * 2**20  # of which so many are summed here, and the rest reckoned by them
REPEATS: Final = 5
ENOUGH_S: Final = 5.0  # of repeats
ABORT_S: Final = 2.0  # until workers that wait for room are given up


class RankReport(NamedTuple):
    """What a rank found.

    Attributes:
        rank: Its number.
        host: Of its node.
        backend: Of its process group; empty: it is alone.
        device: Where it computes.
        difference: The largest relative difference from one process, in float64.
        gather_s: Seconds to gather `GATHERED` bytes of each rank, the median.
        reduce_s: Seconds to sum `REDUCED` bytes over the ranks, the median.
    """

    rank: int
    host: str
    backend: str
    device: str
    difference: Worst
    gather_s: float
    reduce_s: float


class CheckInput(NamedTuple):
    """What a worker is given."""

    inbox: PickledQueue
    reference: StepResult
    images: int


def check_workers(scaling: ScalingConfig, storage: str, timeout_s: float) -> list[RankReport]:
    """Start the workers of a run, and return what they report, rank by rank.

    Args:
        scaling: Of the run.
        storage: Folder or URI that all nodes see; Ray Train writes a marker there.
        timeout_s: Until all have reported.

    Raises:
        ClusterError: A worker did not start or failed, or not all reported in time.
    """
    late = f"{counted(scaling.min_workers, 'worker')} did not report within {timeout_s:.0f} s"
    is_late = threading.Event()
    try:
        with (
            no_group_left(),
            _inbox() as inbox,
            _interrupted_after(max(0.0, timeout_s - ABORT_S - LEFT_S), is_late),
            interrupts_kept(),
        ):
            _train(scaling, storage, timeout_s, inbox)
            reports = _reported(inbox)
    except KeyboardInterrupt:
        if not is_late.is_set():
            raise
        raise ClusterError(late) from None
    except ray.train.TrainingFailedError as error:
        raise ClusterError(last_line(root_failure(error))) from error
    except ray.exceptions.RayError as error:  # Ray Train's own process is gone, or the inbox
        raise ClusterError(last_line(error)) from error
    if len(reports) < scaling.min_workers:
        raise ClusterError(late)
    return sorted(reports)


def _train(scaling: ScalingConfig, storage: str, timeout_s: float, inbox: PickledQueue) -> None:
    """Start the fewest workers of a run, which report to the inbox and end; leave nothing."""
    num, folder = scaling.min_workers, RunFolder.of(storage, f".doctor-{uuid.uuid4().hex}")
    images = max(IMAGES, num)
    trainer = Trainer(
        _report,
        scaling=scaling.model_copy(update={"num_workers": num}),
        folder=folder,
        inbox=inbox,
        abort_s=ABORT_S,
        train_loop_config={
            "input": CheckInput(inbox, take_steps("float64", images=images), images)
        },
        scaling_config=scaling_config(scaling, num),
        torch_config=torch_config(scaling, timeout_s),
        run_config=ray_config.RunConfig(
            name=folder.name,
            storage_path=folder.storage,
            failure_config=ray_config.FailureConfig(max_failures=0),
            logging_config=ray_config.LoggingConfig(log_level="ERROR"),
        ),
    )
    try:
        trainer.fit()
    finally:
        with contextlib.suppress(OSError):  # it has come to nothing before
            folder.remove_all()  # Ray Train has its own records there


@contextlib.contextmanager
def _inbox() -> Iterator[PickledQueue]:
    """Give a queue on this node, and end it."""
    inbox = driver_queue()
    try:
        yield inbox
    finally:
        inbox.shutdown(force=True)


def _reported(inbox: PickledQueue) -> list[RankReport]:
    """Return the reports in the queue, where causes of failures may lie as well."""
    messages = (inbox.get() for _ in range(inbox.qsize()))
    return [message for message in messages if isinstance(message, RankReport)]


@contextlib.contextmanager
def _interrupted_after(seconds: float, is_late: threading.Event) -> Iterator[None]:
    """Interrupt the main thread after so long; the event says that it was this. Main thread only.

    Ray Train has no limit for the start of its workers, and ends them where it is interrupted.
    """

    def end() -> None:
        is_late.set()
        _thread.interrupt_main()  # a signal would not come through: Ray blocks it in its jobs

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        timer.join()  # it may be in the middle of it


def _report(config: dict[str, Any]) -> None:
    """Take the steps, time what is exchanged, and report. A collective."""
    check_input: CheckInput = config["input"]
    device = ray.train.torch.get_device()
    if device.type == "cuda":
        # else convolutions of float64 may sum in another order each time
        torch.backends.cudnn.deterministic = True
    own = take_steps("float64", device, check_input.images)
    report = RankReport(
        collectives.rank(),
        socket.gethostname(),
        collectives.backend(),
        str(device),
        worst_difference(own, check_input.reference),
        _seconds(_gather, device, GATHERED),
        _seconds(_reduce, device, REDUCED),
    )
    check_input.inbox.put(report)


def _gather(tensor: torch.Tensor) -> None:
    collectives.all_gather_rows(tensor[None], [1] * collectives.world_size())


def _reduce(tensor: torch.Tensor) -> None:
    collectives.all_reduce_sum(tensor)


def _seconds(exchange: Any, device: torch.device, num_bytes: int) -> float:
    """Return the median time of an exchange of a float32 tensor of so many bytes. A collective."""
    tensor = torch.zeros(num_bytes // 4, device=device)
    exchange(tensor)  # connections are made
    times: list[float] = []
    # all ranks stop together: by what the slowest has taken
    while len(times) < REPEATS and not _is_enough(sum(times), device):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        began = time.perf_counter()
        exchange(tensor)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - began)
    return sorted(times)[len(times) // 2]


def _is_enough(seconds: float, device: torch.device) -> bool:
    total = collectives.all_reduce_sum(torch.tensor([seconds], device=device))
    return bool(total.item() / collectives.world_size() > ENOUGH_S)
