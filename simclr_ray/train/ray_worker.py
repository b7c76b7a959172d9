"""A worker of Ray Train, one of R: what it runs, and what it knows of where it runs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import ray.train
import ray.train.torch

from simclr_ray.config.experiment import Experiment
from simclr_ray.data.ahead import started
from simclr_ray.data.batch import Batch
from simclr_ray.data.source import Source
from simclr_ray.data.stream import stream
from simclr_ray.train.context import Upload
from simclr_ray.train.heartbeat import Inbox, RankStarted
from simclr_ray.train.worker import WorkerInput, train_rank

SYNC, ASYNC = ray.train.CheckpointUploadMode.SYNC, ray.train.CheckpointUploadMode.ASYNC


def train_loop_per_worker(config: dict[str, WorkerInput]) -> None:
    """Train on one rank; Ray Train calls it in each worker."""
    train_rank(config["input"], RayContext())


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
        return started(stream(experiment, source, steps, self.rank, self.num_ranks, run))

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
