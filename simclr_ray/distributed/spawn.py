"""A function in R fresh processes that share a gloo group, for checks and tests on one machine."""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Callable
from datetime import timedelta
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch
import torch.distributed as td
from torch.multiprocessing.spawn import start_processes

# Off Linux a fork is not safe once system libraries were used.
START_METHOD = "forkserver" if sys.platform == "linux" else "spawn"

P = ParamSpec("P")
T = TypeVar("T")


def spawn(
    fn: Callable[Concatenate[int, P], T], num_processes: int, *args: P.args, **kwargs: P.kwargs
) -> list[T]:
    """Return `fn(rank, *args, **kwargs)` of each rank, run in a process of its own.

    The processes have one torch thread each and share a gloo group on loopback. They are fresh but
    for torch, which takes 2 s to import: a fork server imports it once. `fn` must be importable
    and its result picklable. Raises what `fn` raised.
    """
    context = multiprocessing.get_context(START_METHOD)
    context.set_forkserver_preload(["torch"])  # ignored where there is no such server
    # held here, so that no other program can take the port between its choice and its use
    store = td.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # type: ignore[attr-defined] # public, but exported at run time
    results = context.SimpleQueue()
    ranks = start_processes(  # type: ignore[no-untyped-call] # torch's
        _run_rank,
        (fn, num_processes, store.port, results, dict(os.environ), args, kwargs),
        num_processes,
        join=False,
        start_method=START_METHOD,
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
    environment: dict[str, str],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> None:
    os.environ.clear()  # the fork server has that of its start
    os.environ.update(environment)
    torch.set_num_threads(1)
    store = td.TCPStore("127.0.0.1", port, timeout=timedelta(seconds=120))  # type: ignore[attr-defined] # as above
    td.init_process_group(
        "gloo", store=store, rank=index, world_size=num_processes, timeout=timedelta(seconds=120)
    )
    try:
        results.put((index, fn(index, *args, **kwargs)))
        td.barrier()
    finally:
        td.destroy_process_group()
