"""What no restart mends is found within what Ray raises: our errors, and those of a full disk."""

from __future__ import annotations

import errno
import os

import pytest
import torch
from ray.exceptions import OutOfDiskError, RayActorError, RayTaskError
from torch.distributed import DistNetworkError

from simclr_ray.errors import StorageError, TrackingError
from simclr_ray.train.failures import cause_of, final_error, root_failure, will_recur


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


def of_a_task(cause: Exception) -> Exception:
    error: Exception = RayTaskError("train", "its traceback", cause)  # type: ignore[no-untyped-call] # Ray's
    return error


GPU = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. Of the allocated 70")


@pytest.mark.parametrize(
    ("error", "recurs"),
    [
        (GPU, True),
        (TypeError("forward() takes 2 arguments"), True),
        (of_a_task(ValueError("x")), True),
        (of_a_task(ConnectionResetError("peer")), False),
        (RayActorError(), False),
        (MemoryError("a page"), False),
        (system_error(errno.EIO), False),
        (DistNetworkError("the store is gone"), False),
        (RuntimeError("[../gloo/transport/tcp/pair.cc:525] Read error"), False),
        (RuntimeError("NCCL communicator was aborted on rank 3"), False),
        (torch.AcceleratorError("an ECC error"), False),
        (RuntimeError("HIP error: an illegal memory access"), False),
        (RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"), False),
        (RuntimeError("unspecified launch failure"), False),
        (EOFError("Ran out of input"), False),
    ],
)
def test_what_code_raises_comes_again_and_what_has_befallen_it_may_not(
    error: Exception, recurs: bool
) -> None:
    assert will_recur(error) is recurs


def test_where_a_gpu_is_full_it_is_said_what_takes_less() -> None:
    assert cause_of(GPU) == (
        "CUDA out of memory. Tried to allocate 2.00 GiB; batch_norm.group_size below the batch, or "
        "scaling.recompute_activations, takes less"
    )
