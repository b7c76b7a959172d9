"""A function in R fresh processes that share a gloo group, for checks and tests on one machine."""

from __future__ import annotations

import multiprocessing
import socket
from collections.abc import Callable
from datetime import timedelta
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch
import torch.distributed as td
from torch.multiprocessing.spawn import spawn as spawn_processes

P = ParamSpec("P")
T = TypeVar("T")


def spawn(
    fn: Callable[Concatenate[int, P], T], num_processes: int, *args: P.args, **kwargs: P.kwargs
) -> list[T]:
    """Return `fn(rank, *args, **kwargs)` of each rank, run in a process of its own.

    The processes are fresh, have one torch thread each, and share a gloo group on loopback.
    `fn` must be importable and its result picklable. Raises what `fn` raised.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    results = multiprocessing.get_context("spawn").SimpleQueue()
    ranks = spawn_processes(  # type: ignore[no-untyped-call]
        _run_rank, (fn, num_processes, port, results, args, kwargs), num_processes, join=False
    )
    result_of_rank: dict[int, T] = {}
    finished = False
    while not finished:  # drained while they run: a pipe holds 64 KiB, and a rank waits until read
        finished = ranks.join(timeout=0.05)
        while not results.empty():
            index, result = results.get()
            result_of_rank[index] = result
    return [result_of_rank[r] for r in range(num_processes)]


def _run_rank(
    index: int,
    fn: Callable[..., Any],
    num_processes: int,
    port: int,
    results: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> None:
    torch.set_num_threads(1)
    store = td.TCPStore(  # type: ignore[attr-defined] # public, but exported at run time
        "127.0.0.1", port, num_processes, index == 0, timedelta(seconds=120)
    )
    td.init_process_group(
        "gloo", store=store, rank=index, world_size=num_processes, timeout=timedelta(seconds=120)
    )
    try:
        results.put((index, fn(index, *args, **kwargs)))
        td.barrier()
    finally:
        td.destroy_process_group()
