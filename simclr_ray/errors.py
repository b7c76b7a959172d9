"""Every exception we raise, with its exit code.

    SimclrRayError
    ├── ConfigError          a key or value of a config or override is wrong       (exit code 2)
    ├── DataError            a dataset cannot be used as it is                     (exit code 2)
    │   ├── TooManyBadImages more rows are unusable than `data.max_bad_fraction` allows    (exit 2)
    │   └── HubError         the Hugging Face hub refused or cannot be asked; an `OSError`  (exit 2)
    ├── CheckpointError      a checkpoint is not whole, or is another experiment's (exit code 1)
    ├── ClusterError         the Ray cluster cannot hold what was asked for        (exit code 2)
    ├── TrackingError        MLflow refused or cannot be reached                    (exit code 1)
    │   └── TrackingUnavailableError  it did not answer, and may later             (exit code 1)
    ├── NotPromotedError     a model does not show what an alias asks for          (exit code 1)
    └── RunError             the training run itself failed                        (exit code 1)
        ├── RestartsError        workers fail again and again: try another time   (exit code 75)
        ├── StorageError         a disk takes no more of the run; an `OSError`    (exit code 75)
        │   └── StorageDeniedError   nobody may write there                       (exit code 2)
        └── UnhealthyRunError    it learns nothing more, so that going on is not worth it
            ├── DivergedError    a loss, feature or weight is not finite
            └── CollapseError    the encoder learns nothing: all images look alike to it

`simclr_ray.augment.decode.ImageError` stands apart: that folder travels alone with exported models.
Everything else that escapes is a defect.
"""

from __future__ import annotations

from typing import NamedTuple, Self


class SimclrRayError(Exception):
    """The root of the tree; `exit_code` is what the command line returns for it."""

    exit_code = 1


class ConfigIssue(NamedTuple):
    """One thing wrong in a config: the dotted path, what was given, and what would be right."""

    path: str
    problem: str

    def __str__(self) -> str:
        """Return `path: problem`, the line a user sees."""
        return f"{self.path}: {self.problem}" if self.path else self.problem


class ConfigError(SimclrRayError):
    """A config that cannot be run; `issues` holds every one of them, not the first only."""

    exit_code = 2

    def __init__(self, issues: list[ConfigIssue]) -> None:
        super().__init__("\n".join(str(m) for m in issues))
        self.issues = issues

    @classmethod
    def of(cls, path: str, problem: str) -> Self:
        """Return the error of a single issue: the dotted path, and what is wrong there."""
        return cls([ConfigIssue(path, problem)])

    def __reduce__(self) -> tuple[type[ConfigError], tuple[list[ConfigIssue]]]:
        """Survive pickling through Ray, which rebuilds an exception from its arguments."""
        return (type(self), (self.issues,))


class DataError(SimclrRayError):
    """A dataset cannot be used; the message names the file and what it has instead."""

    exit_code = 2


class TooManyBadImages(DataError):  # noqa: N818 - reads as the sentence that it is
    """More rows than `data.max_bad_fraction` could not be decoded."""


class HubError(DataError, OSError):
    """The hub refused, or cannot be asked: an `OSError` as other file systems raise it."""


class CheckpointError(SimclrRayError):
    """A checkpoint is incomplete, altered, of an unknown format, or of another experiment."""


class ClusterError(SimclrRayError):
    """The cluster cannot hold what `scaling` asks for; the message does the arithmetic."""

    exit_code = 2


class TrackingError(SimclrRayError):
    """MLflow refused, or cannot be reached."""


class TrackingUnavailableError(TrackingError):
    """MLflow did not answer, or could not for now: the same may work later."""


class RunError(SimclrRayError):
    """The training run failed; the message holds the worker's own error."""


class RestartsError(RunError):
    """Workers fail again and again without a further checkpoint, or Ray does; later may do (75)."""

    exit_code = 75


class StorageError(RunError, OSError):
    """A disk takes no more of a run, which goes on by the same command when it does again (75).

    An `OSError` as the system raises it, so that who expects those need not know this one.
    """

    exit_code = 75


class StorageDeniedError(StorageError):
    """The user may not write there: no waiting mends that."""

    exit_code = 2


class UnhealthyRunError(RunError):
    """A run whose weights, features or loss show that it learns nothing more.

    Attributes:
        good_until: The last step at which nothing was wrong yet, where that is known.
        rate_may_help: Whether the same from there on might do better with a lower learning rate.
    """

    good_until: int | None = None
    rate_may_help: bool = True


class DivergedError(UnhealthyRunError):
    """A loss, feature or weight is not finite."""


class CollapseError(UnhealthyRunError):
    """The encoder learns nothing: images look alike to it, or their views tell it nothing."""


class NotPromotedError(SimclrRayError):
    """A model does not show what an alias asks for; the alias stays where it was."""


def last_line(error: object) -> str:
    """Return the last line of an error or text that says something, or its type where none does.

    Ray and Arrow put the cause there.
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


def one_line(error: BaseException) -> str:
    """Return the message of a foreign error on one line, or its type's name where there is none."""
    return " ".join(str(error).split()) or type(error).__name__
