"""What the evaluation of a run needs besides its encoder, made while its workers train.

The driver has nothing to do then: it decodes the splits, where they are small, and draws views.
Begun with the first report, so that no start waits for it. An error here is only logged: the
evaluation does the same work where it is missing, and raises.
"""

from __future__ import annotations

import logging
import tempfile
import threading
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Final

from simclr_ray.evaluation.decoded import DECODED
from simclr_ray.evaluation.encoded_splits import decode_splits, evaluated_rows
from simclr_ray.train.figures import draw_views
from simclr_ray.train.recorder import OnProgress, Record
from simclr_ray.train.resolve import ResolvedExperiment

MOST_BYTES: Final = 256 * 2**20  # of decoded views, which stay in memory until they are scored
log = logging.getLogger(__name__)


class EvaluationAhead(AbstractContextManager["EvaluationAhead"]):
    """Decodes and draws in a thread, from the first report of a run on.

    Args:
        resolved: The run.
        on_progress: Gets each report, after it was seen here.
    """

    def __init__(self, resolved: ResolvedExperiment, on_progress: OnProgress | None) -> None:
        self._resolved, self._on_progress = resolved, on_progress
        self._stack = ExitStack()
        self._views: Path | None = None
        self._kept = DECODED.most
        self._lock, self._is_over = threading.Lock(), False
        self._thread = threading.Thread(target=self._make, name="evaluation-ahead", daemon=True)

    def __exit__(self, *_: object) -> None:
        """Delete what was made; what the thread still makes is deleted with the process."""
        with self._lock:
            self._is_over = True
            DECODED.keep(self._kept)
        if not self._thread.is_alive():
            self._stack.close()

    def report(self, record: Record) -> None:
        """Take a report of the run."""
        if self._thread.ident is None:
            self._thread.start()
        if self._on_progress is not None:
            self._on_progress(record)

    def views(self) -> Path | None:
        """Return the drawn views, when all is made; None: there was no report, or no image."""
        if self._thread.ident is not None:
            self._thread.join()
        return self._views

    def _make(self) -> None:
        config = self._resolved.config
        try:
            rows = evaluated_rows(config)
            size = config.data.channels * config.evaluation_size**2
            if not rows.by_actors and rows.num * size <= MOST_BYTES:
                with self._lock:
                    if self._is_over:  # training has failed meanwhile
                        return
                    DECODED.keep(max(self._kept, MOST_BYTES))
                decode_splits(config)
            folder = self._stack.enter_context(tempfile.TemporaryDirectory())
            views = Path(folder) / "views.png"
            draw_views(config, self._resolved.source, views)
            self._views = views
        except Exception as error:  # noqa: BLE001 - the evaluation does this again, and raises
            log.debug("not ready for the evaluation: %s", error)
