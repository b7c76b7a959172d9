"""`error.json`: the error that a run last ended by, until it ends well."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Final, NamedTuple

from simclr_ray.storage.run_folder import RunFolder

ERROR: Final = "error.json"
RESTART: Final = "restart"  # kind of what has not ended a run: its ranks started again
MOST_CHARACTERS: Final = 4000


class LastError(NamedTuple):
    """What has ended a run, or made its ranks start again."""

    at: float  # seconds since 1970
    kind: str  # the error's type
    message: str  # on one line
    node: str  # name of the machine of the driver

    @classmethod
    def of(cls, kind: str, message: str) -> LastError:
        """Return an error of now and of this machine."""
        line = " ".join(message.split())[:MOST_CHARACTERS]
        return cls(round(time.time(), 3), kind, line, platform.node())

    @property
    def tree(self) -> dict[str, float | str]:
        """Return it as JSON has it, in the file and in `status --json`."""
        return {"time": self.at, "type": self.kind, "message": self.message, "node": self.node}

    def write(self, folder: RunFolder) -> None:
        """Write it into the folder; a disk that takes nothing may be the error itself."""
        with suppress(OSError):
            folder.write_text(ERROR, json.dumps(self.tree, indent=1))

    @classmethod
    def read(cls, folder: RunFolder) -> LastError | None:
        """Return the error of a run folder; None where there is none, or a broken file."""
        tree = folder.read_json(ERROR, dict)
        if tree is None:
            return None
        try:
            texts = (str(tree[key]) for key in ("type", "message", "node"))
            return cls(float(tree["time"]), *texts)
        except (TypeError, ValueError, KeyError, OverflowError):
            return None


@contextmanager
def recorded(folder: RunFolder) -> Iterator[None]:
    """Record an error that leaves the block; one that ends well removes what an earlier one left.

    A stop is no error, and changes nothing.
    """
    try:
        yield
    except Exception as error:
        LastError.of(type(error).__name__, str(error)).write(folder)
        raise
    with suppress(OSError):
        folder.remove(ERROR)
