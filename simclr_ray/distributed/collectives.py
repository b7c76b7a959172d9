"""The one door to `torch.distributed`: without an initialised process group there is one process.

Every function that is a collective says so; all ranks must reach it, on every path.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as td
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.nn.parallel import DistributedDataParallel

from simclr_ray.distributed import shared_memory

# torch renamed the option and warns of the old name; older releases know only that one.
_ddp_options = inspect.signature(DistributedDataParallel.__init__).parameters
BUFFER_OPTION = next(
    name for name in ("forward_sync_buffers", "broadcast_buffers") if name in _ddp_options
)

# Renamed in torch 2.14, which warns of the old name.
_all_gather: Callable[[Tensor, Tensor], object] = getattr(
    td, "all_gather_single", td.all_gather_into_tensor
)


def is_distributed() -> bool:
    """Return whether a process group of more than one rank is up."""
    return td.is_available() and td.is_initialized() and td.get_world_size() > 1


def rank() -> int:
    """Return this process's rank, 0 when alone."""
    return td.get_rank() if is_distributed() else 0


def world_size() -> int:
    """Return the number of ranks R, 1 when alone."""
    return td.get_world_size() if is_distributed() else 1


def backend() -> str:
    """Return what carries the group's collectives, `gloo` or `nccl`; empty when alone."""
    return str(td.get_backend()) if is_distributed() else ""


def world_group() -> td.ProcessGroup | None:
    """Return the group of all ranks, for torch functions that ask for one."""
    return td.group.WORLD


def partition(total: int, index: int, parts: int) -> tuple[int, int]:
    """Return [first, last) of part `index`: shares of `total` differ by at most one."""
    return index * total // parts, (index + 1) * total // parts


def row_counts(num_rows: int, device: torch.device) -> list[int]:
    """Return the number of rows that each rank holds. A collective."""
    if not is_distributed():
        return [num_rows]
    mine = torch.tensor([num_rows], dtype=torch.int64, device=device)
    counts: list[int] = all_gather_vector(mine).flatten().tolist()
    return counts


def all_gather_rows(rows: Tensor, counts: list[int] | None = None) -> Tensor:
    """Return the rows of all ranks, rank by rank. A collective, and not differentiable.

    Args:
        rows: [n, ...], n may differ between ranks.
        counts: n of each rank where known; otherwise it is exchanged first.

    Returns:
        [sum of n, ...]; gathers are padded to the largest n and cut again.
    """
    if not is_distributed():
        return rows.detach()
    rows = rows.detach().contiguous()
    counts = counts or row_counts(len(rows), rows.device)
    largest = max(counts)
    if len(rows) < largest:
        padding = rows.new_zeros((largest - len(rows), *rows.shape[1:]))
        rows = torch.cat([rows, padding])
    out = rows.new_empty((largest * world_size(), *rows.shape[1:]))
    _all_gather(out, rows)
    if min(counts) == largest:
        return out
    return torch.cat([out[r * largest : r * largest + c] for r, c in enumerate(counts)])


def all_gather_vector(vector: Tensor) -> Tensor:
    """Return [R, len(vector)]: each rank's vector of the same length. A collective."""
    if not is_distributed():
        return vector[None]
    vector = vector.detach().contiguous()
    mailbox = _mailbox(vector)
    if mailbox:
        return mailbox.all_gather(vector)
    out = vector.new_empty((world_size() * len(vector),))
    _all_gather(out, vector)
    return out.view(world_size(), -1)


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """Return the sum over ranks, in place. A collective."""
    if is_distributed():
        mailbox = _mailbox(tensor)
        if mailbox:
            gathered = mailbox.all_gather(tensor.contiguous().view(-1))
            tensor.copy_(gathered.sum(0).view_as(tensor))
        else:
            td.all_reduce(tensor)
    return tensor


class _Mail(NamedTuple):
    group: weakref.ref[td.ProcessGroup] | None
    mailbox: shared_memory.SharedVectors | None


_mail = _Mail(None, None)
_shared_memory_allowed = True


def allow_shared_memory(*, allowed: bool) -> None:
    """Choose whether small CPU vectors may travel through shared memory; they do by default.

    All ranks choose alike, before their first collective. The numbers are the same either way, but
    for the order in which three ranks or more are summed.
    """
    global _shared_memory_allowed
    _shared_memory_allowed = allowed


def _mailbox(vector: Tensor) -> shared_memory.SharedVectors | None:
    """Return what carries `vector` between ranks of one machine; None: the process group does.

    The first call of a group is a collective. Whatever decides is the same on all ranks.
    """
    global _mail
    if not _shared_memory_allowed or vector.device.type != "cpu":
        return None
    if vector.nbytes > shared_memory.SLOT_BYTES:
        return None
    group = td.group.WORLD
    assert group is not None
    if _mail.group is None or _mail.group() is not group:
        _mail = _Mail(weakref.ref(group), _open_mailbox(group))
    return _mail.mailbox


def _open_mailbox(group: td.ProcessGroup) -> shared_memory.SharedVectors | None:
    """Return a mailbox if every rank can open the file that rank 0 makes. A collective.

    Whatever fails on one rank, all reach both exchanges; then the process group carries.
    """
    mine, mailbox = "", None
    if rank() == 0 and shared_memory.is_supported():
        with suppress(OSError):
            mine = str(shared_memory.create(world_size()))
    try:
        path = Path(broadcast_text(mine))
        if shared_memory.is_supported() and path.is_file():
            with suppress(OSError):
                mailbox = shared_memory.SharedVectors(path, rank(), world_size(), _timeout_s(group))
        gathered: list[bool] = [False] * world_size()
        td.all_gather_object(gathered, mailbox is not None)
    finally:
        if mine:  # what is mapped stays
            Path(mine).unlink()
    return mailbox if all(gathered) else None


def _timeout_s(group: td.ProcessGroup) -> float:
    """Return the time limit of the group's CPU collectives."""
    backend: Any = group._get_backend(torch.device("cpu"))
    limit: timedelta = backend.options._timeout
    return limit.total_seconds()


def broadcast_text(text: str) -> str:
    """Return rank 0's `text` on every rank. A collective."""
    if not is_distributed():
        return text
    box = [text]
    td.broadcast_object_list(box)
    return box[0]


class RankZeroSignal:
    """A number that rank 0 says after each step, and that all ranks know one step later.

    Nobody waits for it: it travels while the next step is computed, by CPU, whatever the gradients
    go by. Alone, it is known at once.

    Args:
        timeout_s: How long it may take before the ranks are given up.
    """

    def __init__(self, timeout_s: float) -> None:
        limit = timedelta(seconds=timeout_s)
        self._group: Any = None
        if is_distributed():
            self._group = td.new_group(backend="gloo", timeout=limit)
        self._number = torch.zeros(1, dtype=torch.int64)
        self._sent: Any = None

    def say(self, number: int) -> int:
        """Send rank 0's number; return the one that it sent last, 0 at first. A collective."""
        if self._group is None:
            return number
        heard = 0
        if self._sent is not None:
            self._sent.wait()
            heard = int(self._number)
        self._number.fill_(number)
        self._sent = td.broadcast(self._number, 0, group=self._group, async_op=True)
        return heard

    def close(self) -> None:
        """Let the last number arrive. A collective."""
        if self._sent is not None:
            self._sent.wait()
            self._sent = None


def data_parallel(module: nn.Module, *, compressed: bool = False) -> nn.Module:
    """Return `module` with gradients averaged over ranks during backward. A collective.

    Buffers are not broadcast: global batch norm gives every rank the same running statistics.
    Alone, the module itself is returned.

    Args:
        module: Whose gradients are averaged.
        compressed: Send them as bf16: half the traffic, rounded to 8 bits.
    """
    if not is_distributed():
        return module
    buffers: dict[str, Any] = {BUFFER_OPTION: False}
    parallel = DistributedDataParallel(module, gradient_as_bucket_view=True, **buffers)
    if compressed:
        parallel.register_comm_hook(None, bf16_compress_hook)
    return parallel
