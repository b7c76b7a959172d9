"""Files on their way to MLflow: one at a time, and what fails goes up again.

MLflow sends a file whole, through its server. From 500 MB on it goes in parts to the bucket behind
the server, where the server says that it can (`--serve-artifacts` before S3 or GCS), and parts are
tried again by themselves; `MLFLOW_MULTIPART_UPLOAD_MINIMUM_FILE_SIZE` sets from where on. A file
that arrives twice is the same file, so that nothing is asked before it is sent again.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Final, TypeVar

from simclr_ray.tracking import store

if TYPE_CHECKING:
    from mlflow import MlflowClient

TRIES: Final = 8
FIRST_WAIT_S: Final = 1.0  # doubled each time: about two minutes in all

T = TypeVar("T")
log = logging.getLogger(__name__)


def upload_model(client: MlflowClient, model_id: str, folder: Path) -> None:
    """Upload all files of a folder as those of a logged model.

    Args:
        client: Of the store.
        model_id: Of the logged model.
        folder: Whose files keep their places in it.

    Raises:
        Exception: What MLflow raises for the file that it does not take, the last time.
    """
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        place = file.parent.relative_to(folder).as_posix()
        with_retries(
            lambda file=file, place=place: client.log_model_artifact(  # type: ignore[misc] # defaults bind the loop's values
                model_id, str(file), None if place == "." else place
            ),
            f"upload {file.name}",
        )


def with_retries(call: Callable[[], T], what: str) -> T:
    """Return what a call returns, which may be repeated, made again while a store fails for now.

    Args:
        call: To be made; it has to give the same however often it is made.
        what: It does, for the log.

    Raises:
        Exception: What the call raises, where it would fail again, or the last time.
    """
    for attempt in range(TRIES):
        try:
            with store.few_retries():  # this is the one that tries again
                return call()
        except Exception as error:
            if attempt + 1 == TRIES or not store.is_for_now(error):
                raise
            wait_s = FIRST_WAIT_S * 2**attempt
            log.warning(
                "MLflow could not %s: %s; again in %.0f s", what, store.reason_of(error), wait_s
            )
            time.sleep(wait_s)
    raise AssertionError("unreachable")
