"""What a foreign error says on one line."""

from __future__ import annotations

import pytest

from simclr_ray.errors import last_line, one_line


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (OSError("no route to\n  the other process \n\n"), "the other process"),
        (RuntimeError("out of memory"), "out of memory"),
        (MemoryError(), "MemoryError"),
        (ValueError(" \n"), "ValueError"),
    ],
)
def test_the_last_line_of_an_error_says_something(error: Exception, line: str) -> None:
    assert last_line(error) == line


def test_an_error_on_one_line_says_something() -> None:
    assert one_line(OSError("no route to\n  the other process")) == "no route to the other process"
    assert one_line(TimeoutError()) == "TimeoutError"
