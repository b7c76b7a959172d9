"""Where a rank runs and how its checkpoints are kept: in a worker of Ray Train, or alone.

`TrainWorker` is the same in both. Ray Train's worker is one of R, watched by a driver in another
process. A rank that is alone has its driver in its own process: what it says is taken at once.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

import ray.train
import ray.train.torch
import torch

from simclr_ray.config.experiment import Experiment
from simclr_ray.data.batch import Batch
from simclr_ray.data.batches import local_batches
from simclr_ray.data.source import Source
from simclr_ray.data.stream import stream
from simclr_ray.storage.run_folder import RunFolder
from simclr_ray.train.heartbeat import Inbox, RankStarted

SYNC, ASYNC = ray.train.CheckpointUploadMode.SYNC, ray.train.CheckpointUploadMode.ASYNC
Upload = Callable[[Path, str], None]  # a local folder, and its name in the run's


class TrainContext(Protocol):
    """What a rank knows of where it runs.

    Attributes:
        rank: Its number.
        num_ranks: R.
        local_rank: Its number among those of its node.
        num_local: Ranks of its node.
        device: Where it trains.
    """

    rank: int
    num_ranks: int
    local_rank: int
    num_local: int
    device: torch.device

    def begin(self, inbox: Inbox) -> None:
        """Tell the driver that the rank is up."""
        ...

    def batches(
        self, experiment: Experiment, source: Source, steps: range, run: str
    ) -> Iterator[Batch]:
        """Return this rank's batches of `steps`."""
        ...

    def save(
        self, step: int, written: Path | None, name: str, upload: Upload, *, wait: bool
    ) -> None:
        """Keep a checkpoint that rank 0 has written. A collective.

        Args:
            step: That it is of.
            written: A local folder, which is gone when it is kept; None but on rank 0.
            name: Of the checkpoint.
            upload: Copies it to the run's folder.
            wait: Until it is there; else it may be copied beside the next steps.
        """
        ...

    def nodes_taken(self) -> list[str] | None:
        """Return the nodes that will be taken away; None: none. A collective."""
        ...


class RayContext:
    """A worker of Ray Train, one of R."""

    def __init__(self) -> None:
        context = ray.train.get_context()
        self.rank, self.num_ranks = context.get_world_rank(), context.get_world_size()
        self.local_rank, self.num_local = context.get_local_rank(), context.get_local_world_size()
        self.device = ray.train.torch.get_device()

    def begin(self, inbox: Inbox) -> None:
        """Tell the driver where this process is, and how to end it."""
        inbox.put(RankStarted.here(self.rank))

    def batches(
        self, experiment: Experiment, source: Source, steps: range, run: str
    ) -> Iterator[Batch]:
        """Return the batches that Ray Data's actors make, which start at once."""
        return _started(stream(experiment, source, steps, self.rank, self.num_ranks, run))

    def save(
        self, step: int, written: Path | None, name: str, upload: Upload, *, wait: bool
    ) -> None:
        """Report to Ray Train, which keeps the last ones. A collective: it is a barrier."""

        def put(local: ray.train.Checkpoint, name: str) -> ray.train.Checkpoint:
            upload(Path(local.path), name)
            storage = ray.train.get_context().get_storage()
            return ray.train.Checkpoint(
                f"{storage.experiment_fs_path}/{name}", storage.storage_filesystem
            )

        ray.train.report(
            {"step": step},
            checkpoint=ray.train.Checkpoint.from_directory(written) if written else None,
            checkpoint_dir_name=name,
            checkpoint_upload_mode=SYNC if wait else ASYNC,
            checkpoint_upload_fn=put,
            delete_local_checkpoint_after_upload=True,
        )

    def nodes_taken(self) -> list[str] | None:
        """Return what Ray says of nodes that are preempted. A barrier, of some ms."""
        info = ray.train.get_preemption_info()
        return None if info is None else list(info.preempted_node_ids)


class LoneContext:
    """The one rank of a run, in its driver's process, on CPU.

    It makes its views itself, between the steps: there is no other core that is its own.

    Args:
        folder: Of the run.
        keep: How many checkpoints stay; None: all, and another removes some.
    """

    def __init__(self, folder: RunFolder, keep: int | None) -> None:
        self.rank, self.num_ranks, self.local_rank, self.num_local = 0, 1, 0, 1
        self._folder, self._keep = folder, keep
        self.device = torch.device("cpu")

    def begin(self, inbox: Inbox) -> None:
        """Tell nothing: the driver is this process."""

    def batches(
        self,
        experiment: Experiment,
        source: Source,
        steps: range,
        run: str,  # noqa: ARG002
    ) -> Iterator[Batch]:
        """Return the batches, made by this process."""
        return local_batches(experiment, source, steps)

    def save(
        self,
        step: int,  # noqa: ARG002
        written: Path | None,
        name: str,
        upload: Upload,
        *,
        wait: bool,  # noqa: ARG002
    ) -> None:
        """Copy the checkpoint to the run's folder, and remove those that are too many."""
        assert written is not None
        upload(written, name)
        shutil.rmtree(written, ignore_errors=True)
        if self._keep is not None:
            self._folder.prune_checkpoints(self._keep, name)

    def nodes_taken(self) -> list[str] | None:
        """Return None: whoever has this process knows of its node."""
        return None


def _started(batches: Iterator[Batch]) -> Iterator[Batch]:
    """Return the same stream, its actors already starting while the caller goes on."""
    pool = ThreadPoolExecutor(1, thread_name_prefix="first-batch")
    pending = [pool.submit(next, batches, None)]
    pool.shutdown(wait=False)

    def go_on() -> Iterator[Batch]:
        batch = pending.pop().result()
        if batch is not None:
            yield batch
            del batch  # its memory would be held for the whole run
            yield from batches

    return go_on()
