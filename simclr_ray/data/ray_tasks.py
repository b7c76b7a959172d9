"""Runs pieces of work as tasks of a Ray Data stream, which bounds how many at a time.

And has Ray Data's own actor started before a dataset needs it.
"""

from __future__ import annotations

import pickle  # nosec B403
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import Any, TypeVar

from simclr_ray.distributed.worker_exit import skip_destructors
from simclr_ray.errors import DataError

T = TypeVar("T")


def run_tasks(work: Sequence[Callable[[], T]]) -> Iterator[T]:
    """Yield what each piece of work returns, as it finishes: one of it, one block, one task.

    Args:
        work: Picklable, without arguments.

    Raises:
        DataError: One raised it; it goes back as text, as Ray would bury it.
    """
    if not work:
        return
    import ray.data

    context = ray.data.DataContext.get_current()
    shown = (context.enable_progress_bars, context.print_on_execution_start)
    context.enable_progress_bars = context.print_on_execution_start = False
    try:
        items = [{"work": pickle.dumps(each)} for each in work]
        done = ray.data.from_items(items, override_num_blocks=len(items)).map(_run)
        for row in done.iter_rows():
            result, error = pickle.loads(row["result"])  # nosec B301 # noqa: S301 - from our own task
            if error:
                raise DataError(error)
            yield result
    finally:
        context.enable_progress_bars, context.print_on_execution_start = shown


def _run(row: dict[str, Any]) -> dict[str, Any]:
    skip_destructors()
    work = pickle.loads(row["work"])  # nosec B301 # noqa: S301 - from our own driver
    try:
        answer = work(), ""
    except DataError as problem:
        answer = None, str(problem)
    return {"result": pickle.dumps(answer)}


def start_stats_actor() -> None:
    """Start the actor that numbers datasets: who makes a first one waits 2 s for it otherwise.

    On this process's node, where it stays: it is for a cluster of this machine alone.
    """
    with suppress(ImportError):  # another Ray has it elsewhere, and starts it when it is asked
        from ray.data._internal.stats import get_or_create_stats_actor

        get_or_create_stats_actor()
