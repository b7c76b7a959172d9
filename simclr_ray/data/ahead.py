"""Items that a thread makes ahead of whoever takes them."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Final, TypeVar

BATCHES_AHEAD: Final = 2  # of training
T = TypeVar("T")


def ahead(items: Iterator[T], count: int) -> Iterator[T]:
    """Yield the items, of which a thread takes `count` ahead."""
    pool = ThreadPoolExecutor(1, thread_name_prefix="ahead")
    pending = deque(pool.submit(next, items, None) for _ in range(count))
    try:
        while (item := pending.popleft().result()) is not None:
            pending.append(pool.submit(next, items, None))
            yield item
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def started(items: Iterator[T]) -> Iterator[T]:
    """Return the same items, the first of them already being made while the caller goes on."""
    pool = ThreadPoolExecutor(1, thread_name_prefix="first-item")
    pending = [pool.submit(next, items, None)]
    pool.shutdown(wait=False)

    def go_on() -> Iterator[T]:
        item = pending.pop().result()
        if item is not None:
            yield item
            del item  # its memory would be held for as long as the rest is taken
            yield from items

    return go_on()
