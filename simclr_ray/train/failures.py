"""What has ended a run, found in what Ray makes of it: errors of ours, and those of disks."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator

from ray.exceptions import OutOfDiskError, OutOfMemoryError, RayError, RayTaskError

from simclr_ray.errors import RunError, SimclrRayError, StorageError, last_line
from simclr_ray.storage.space import OF_THE_DISK, error_number, storage_error

MOST_MEMORY = re.compile(
    r"PID\s+MEM\(GB\)\s+COMMAND\s+(\d+)\s+([\d.]+)\s+([^\n]{1,80})"
)  # Ray's table
# By name, as torch is not imported where Ray's controller asks: of a group, a device, Ray Train,
# and of ranks that move.
PASSING = {"DistError", "AcceleratorError", "RayTrainError", "RanksMoved"}
OF_THE_GROUP = re.compile(
    r"gloo|[nr]ccl|(cuda|hip|driver|cudnn|cublas) error|launch failure|connection|timed ?out",
    re.IGNORECASE,
)
TAKES_LESS = "batch_norm.group_size below the batch, or scaling.recompute_activations, takes less"


def unwrap_error(error: BaseException) -> SimclrRayError | None:
    """Return the error of ours that is wrapped in one of Ray's, if there is one."""
    for cause in _causes(error):
        # what a task raised comes back as a class of Ray's that is ours too, its text a traceback
        if isinstance(cause, SimclrRayError) and not isinstance(cause, RayTaskError):
            return cause
    return None


def final_error(error: BaseException) -> SimclrRayError | None:
    """Return the error of ours within one of Ray's, or that of a full disk, if it is one of them.

    No restart mends either.
    """
    return unwrap_error(error) or _of_a_full_disk(error)


def end_of_run(error: BaseException, cause: str, max_failures: int) -> SimclrRayError | None:
    """Return what a run ends by where its only rank fails so; None: the rank starts again.

    Args:
        error: That it failed by.
        cause: The same in words.
        max_failures: `scaling.max_failures`; 0: it does not start again.
    """
    final = final_error(error)
    if final is None and not max_failures:
        return RunError(f"training failed: {cause}")
    return final


def will_recur(error: BaseException) -> bool:
    """Return whether code has raised what it raises again, as where a batch takes too much memory.

    What ends a process, a disk, a device, the network and what a machine has free may do better
    another time.
    """
    return not any(_may_pass(cause) for cause in _causes(error))


def _may_pass(error: BaseException) -> bool:
    if isinstance(error, (OSError, EOFError, MemoryError)):
        return True
    if isinstance(error, RayError):
        return not isinstance(error, RayTaskError)  # that holds what a task raised
    names = {base.__name__ for base in type(error).__mro__}
    return bool(names & PASSING) or bool(OF_THE_GROUP.search(str(error)))


def root_failure(error: BaseException) -> BaseException:
    """Return what a failed training failed by: the first worker's error, or the controller's."""
    failures = getattr(error, "worker_failures", {})
    root: BaseException = next(iter(failures.values()), getattr(error, "controller_failure", error))
    return root


def cause_of(error: BaseException) -> str:
    """Return the last line of an error, without the advice that Ray adds to that of a death."""
    error = getattr(error, "health_check_failure", error)
    if isinstance(error, OutOfMemoryError):
        most = MOST_MEMORY.search(str(error))
        largest = f"; most has process {most[1]}, {most[2]} GB: {most[3].strip()}" if most else ""
        return f"its node has run out of memory, and Ray has ended it{largest}"
    line = last_line(error)
    if type(error).__name__ == "OutOfMemoryError":  # torch's, of a GPU
        return f"{line.partition('. Of the allocated')[0]}; {TAKES_LESS}"
    return line.partition(" Worker exit detail:")[0].partition(" Some common causes")[0]


def _of_a_full_disk(error: BaseException) -> StorageError | None:
    place = tempfile.gettempdir()  # where Ray keeps what does not fit into memory
    for cause in _causes(error):
        if isinstance(cause, OutOfDiskError):
            return StorageError(f"{place}: no space left for what Ray keeps there; make room there")
        is_system = isinstance(cause, OSError) and not isinstance(cause, RayTaskError)
        if is_system and error_number(cause) in OF_THE_DISK:
            return storage_error(cause, place)
    return None


def _causes(error: BaseException) -> Iterator[BaseException]:
    """Yield an error and all that it came from, through what Ray wraps around them."""
    seen: set[int] = set()
    todo: list[BaseException | None] = [error]
    while todo:
        current = todo.pop()
        if current is None or id(current) in seen:
            continue
        seen.add(id(current))
        yield current
        todo += [current.__cause__, current.__context__, getattr(current, "cause", None)]
        todo += list(getattr(current, "worker_failures", {}).values())
