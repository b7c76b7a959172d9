"""Where a rank runs and how its checkpoints are kept: what `TrainWorker` asks, and a single rank.

`TrainWorker` is the same everywhere. Ray Train's worker is one of R (`ray_worker`); the only one of
a run needs nothing of Ray Train: it is its driver's own process (`in_process`), or one of Ray's on
the driver's machine (`single_worker`).
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

import torch

from simclr_ray.config.experiment import Experiment
from simclr_ray.data.batch import Batch
from simclr_ray.data.batches import local_batches
from simclr_ray.data.source import Source
from simclr_ray.storage.run_folder import RunFolder
from simclr_ray.train.heartbeat import Inbox

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


class SingleRankContext:
    """The one rank of a run, on CPU, in its driver's process where no subclass says otherwise.

    It makes its views itself, between the steps, as if no other core were its own.

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
