"""What no restart mends is found within what Ray raises: our errors, and those of a full disk."""

from __future__ import annotations

import errno
import os

import pytest
from ray.exceptions import OutOfDiskError

from simclr_ray.errors import StorageError, TrackingError
from simclr_ray.train.failures import final_error, root_failure


class _FailedError(Exception):
    """As Ray Train raises it: the ranks' errors are in an attribute."""

    def __init__(self, *failures: Exception) -> None:
        super().__init__("training failed")
        self.worker_failures = dict(enumerate(failures))


def system_error(number: int) -> OSError:
    return OSError(number, os.strerror(number))


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EMFILE])
def test_a_full_disk_in_a_rank_ends_the_run(number: int) -> None:
    inner = RuntimeError("a stage failed")
    inner.__cause__ = system_error(number)
    assert isinstance(final_error(_FailedError(inner)), StorageError)


def test_an_error_of_ours_comes_before_the_disk_s() -> None:
    own = TrackingError("refused")
    own.__cause__ = system_error(errno.ENOSPC)
    assert final_error(_FailedError(own)) is own


def test_a_disk_that_is_full_of_ray_s_objects_is_named() -> None:
    found = final_error(_FailedError(OutOfDiskError("Local disk is full")))
    assert isinstance(found, StorageError)
    assert "Ray keeps there" in str(found)


@pytest.mark.parametrize(
    "other", [ValueError("x"), system_error(errno.ENOENT), system_error(errno.EACCES)]
)
def test_other_errors_are_left_to_a_restart(other: Exception) -> None:
    assert final_error(_FailedError(other)) is None


def test_a_training_fails_by_its_first_rank_else_by_what_ray_itself_met() -> None:
    first, second = ValueError("of rank 0"), ValueError("of rank 1")
    assert root_failure(_FailedError(first, second)) is first
    of_ray = _FailedError()
    of_ray.controller_failure = RuntimeError("no room")  # type: ignore[attr-defined] # as Ray's error has it
    assert str(root_failure(of_ray)) == "no room"
    assert root_failure(first) is first
