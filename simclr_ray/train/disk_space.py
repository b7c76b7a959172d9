"""Whether the disks of a run have room for its checkpoints, asked before it starts.

Of a bucket that is not known, nor of a quota: that is met while the run goes on, as a full disk is.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, NamedTuple

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from simclr_ray.config.experiment import Experiment
from simclr_ray.config.imports import imports_in
from simclr_ray.config.wording import counted
from simclr_ray.errors import ConfigError
from simclr_ray.nn.build import build_model
from simclr_ray.optim import state_per_parameter
from simclr_ray.storage import checkpoint
from simclr_ray.storage.run_folder import RunFolder
from simclr_ray.storage.run_status import newest_whole_step
from simclr_ray.storage.space import bytes_in, sized, space_at
from simclr_ray.train.resolve import ResolvedExperiment
from simclr_ray.train.rollback import keeps_good

LEAST: Final = 2  # checkpoints that have to fit, however few are kept
IN_SCRATCH: Final = 1  # written to the temporary folder, and copied from there
FILES: Final = 64  # that a run makes, beside those of its checkpoints
PER_TENSOR: Final = 128  # bytes that name it in the file
RECORD: Final = 16_384  # bytes; 6,000 with the config of a preset


class _Need(NamedTuple):
    """What has to fit on a disk."""

    key: str  # that is wrong where it does not
    place: str
    copies: int
    remedy: str


@contextmanager
def counting_device(experiment: Experiment) -> Iterator[None]:
    """Build where shapes are counted: without memory, but for imported code, which may refuse."""
    if any(imports_in(experiment.encoder)):
        with torch.device("cpu"):
            yield
        return
    with torch.device("meta"), _WithoutValues():
        yield


class _WithoutValues(TorchFunctionMode):
    """Leaves out that weights are drawn, which have no memory to be drawn into.

    Torch would load its compiler for that, sympy and triton included: 1.3 s of a core.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Return what `func` does; of those that draw normal numbers, the tensor as it is."""
        del types  # the protocol's
        options = kwargs or {}
        if func in (nn.init.normal_, torch.Tensor.normal_):
            return args[0] if args else options["tensor"]
        return func(*args, **options)


def checkpoint_bytes(experiment: Experiment) -> int:
    """Return the size of a checkpoint: weights, running statistics, optimizer state, record."""
    element = 8 if experiment.precision == "float64" else 4
    with counting_device(experiment):
        model = build_model(experiment)
    state = model.state_dict().values()
    widths = ((t, element if t.is_floating_point() else t.element_size()) for t in state)
    size: int = sum(t.numel() * width for t, width in widths)
    parameters = [p.numel() for p in model.parameters()]
    kept: int = state_per_parameter(experiment.optimizer)
    names: int = len(state) + (kept + 1) * len(parameters)
    total: int = size + kept * element * sum(parameters) + PER_TENSOR * names + RECORD
    return total


def check_space(resolved: ResolvedExperiment) -> None:
    """Refuse a run whose checkpoints do not fit: two at least, or all that are kept and one more.

    A checkpoint is written before an older one goes. What a killed start has left half written
    goes first of all, and counts as room.

    Raises:
        ConfigError: A disk has too little room; what is asked for, and what to change.
    """
    folder, config = resolved.folder, resolved.config
    # the good one, and one that `CheckpointKeeper` has not looked at
    keep = config.checkpoint.keep + 2 * keeps_good(config)
    if newest_whole_step(folder) >= resolved.total_steps:
        return
    there, left = _checkpoints_in(folder)
    needs = []
    if folder.local is not None:
        remedy = "make room, or set another storage"
        kept = config.checkpoint.keep
        lower = f", or lower checkpoint.keep={kept}" if kept > 1 else ""
        needs.append(_Need("storage", folder.storage, max(LEAST, keep + 1 - there), remedy + lower))
    if _workers_are_here():  # and write their own
        remedy = "make room, or set TMPDIR to another folder"
        needs.append(_Need("TMPDIR", tempfile.gettempdir(), IN_SCRATCH, remedy))
    if not needs:
        return
    size = checkpoint_bytes(config)
    _check(needs, size, left)


def _checkpoints_in(folder: RunFolder) -> tuple[int, int]:
    """Return how many checkpoints a local folder holds, and the bytes of those never finished."""
    if folder.local is None:
        return 0, 0
    paths = [folder.local / name for name in folder.checkpoints()]
    halves = [path for path in paths if not (path / checkpoint.RECORD).exists()]
    return len(paths) - len(halves), sum(map(bytes_in, halves))


def _workers_are_here() -> bool:
    if "RAY_ADDRESS" not in os.environ:
        return True
    # who has started a Ray here has loaded this; 2 s that a dry run need not take
    cluster = sys.modules.get("simclr_ray.distributed.ray_cluster")
    return cluster is not None and cluster.is_local()


def _check(needs: list[_Need], size: int, left: int) -> None:
    """Raise `ConfigError` for the first disk that lacks room; one may have several needs."""
    taken: dict[int, int] = {}  # device -> bytes that an earlier need takes
    for need in needs:
        device, space = _device_of(Path(need.place)), space_at(need.place)
        wanted = need.copies * size + taken.get(device, 0)
        free = space.free + (left if need.key == "storage" else 0)
        if wanted > free:
            what = f"{counted(need.copies, 'checkpoint')} of {sized(size)}"
            also = f" beside {sized(taken[device])} in storage" if taken.get(device) else ""
            problem = (
                f"{need.place} has {sized(free)} free; {what}{also} have to fit: {need.remedy}"
            )
            raise ConfigError.of(need.key, problem)
        if space.files is not None and space.files < FILES:
            problem = f"{need.place} takes {counted(space.files, 'more file')} (df -i): "
            raise ConfigError.of(need.key, problem + need.remedy)
        taken[device] = wanted - (left if need.key == "storage" else 0)


def _device_of(path: Path) -> int:
    return next(p for p in (path, *path.absolute().parents) if p.exists()).stat().st_dev
