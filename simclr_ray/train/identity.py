"""Which run a command is: one that goes on, one that begins, or one that begins anew."""

from __future__ import annotations

import logging
import re
from datetime import UTC, datetime
from typing import NamedTuple

from simclr_ray import config as cfg
from simclr_ray.config.experiment import Experiment
from simclr_ray.config.moves import stored_tree
from simclr_ray.errors import ConfigError
from simclr_ray.storage.run_folder import CONFIG_FILE, RunFolder
from simclr_ray.storage.run_record import RunRecord
from simclr_ray.storage.run_status import newest_whole_step
from simclr_ray.train.resolve import ResolvedExperiment

MOST_RUNS = 3  # runs of the same name
MOST_FIELDS = 6  # that they differ in
NEVER = datetime.min.replace(tzinfo=UTC)

log = logging.getLogger(__name__)


class OtherRun(NamedTuple):
    """A run of the same name in the same storage, and what makes it another one."""

    folder: RunFolder
    step: int  # of its newest checkpoint, 0 without
    differences: list[str]  # `path: theirs -> ours`

    def __str__(self) -> str:
        """Return `RUN (at step 32) differs in ...`, the line a user sees."""
        more = len(self.differences) - MOST_FIELDS
        fields = ", ".join(self.differences[:MOST_FIELDS]) + (f", {more} more" if more > 0 else "")
        return f"{self.folder.uri} (at step {self.step:,}) is another; it differs in {fields}"


def is_new(folder: RunFolder) -> bool:
    """Return whether no run has begun in a folder."""
    return folder.read_text(CONFIG_FILE) is None


def runs_of_this_name(resolved: ResolvedExperiment) -> list[OtherRun]:
    """Return other runs of the experiment's name in its storage, the last written first.

    What one cannot read of them, as of another format, is passed over.
    """
    storage = RunFolder.at(resolved.folder.storage)
    pattern = re.compile(rf"{re.escape(resolved.config.name)}-[0-9a-f]{{8}}")
    names = [name for name in storage.folders("") if pattern.fullmatch(name)]
    folders = [RunFolder(resolved.folder.storage, n) for n in names if n != resolved.run_name]
    newest = sorted(folders, key=lambda folder: folder.written_at() or NEVER, reverse=True)
    others = [_compared(folder, resolved) for folder in newest[:MOST_RUNS]]
    return [other for other in others if other is not None]


def _compared(folder: RunFolder, resolved: ResolvedExperiment) -> OtherRun | None:
    try:
        record = RunRecord.find(folder)
        text = folder.read_text(CONFIG_FILE)
        if record is None or text is None:
            return None
        theirs = cfg.validate(Experiment, stored_tree(cfg.parse_yaml(text)))
    except ConfigError:
        return None
    differences = cfg.differences(cfg.identity(theirs), cfg.identity(resolved.config))
    if record.fingerprint != resolved.source.fingerprint:
        differences.insert(0, f"the images: {record.fingerprint} -> {resolved.source.fingerprint}")
    return OtherRun(folder, newest_whole_step(folder), differences)


def check_is_there(resolved: ResolvedExperiment) -> None:
    """Raise `ConfigError` where the run of an experiment has not begun, with what is there."""
    if not is_new(resolved.folder):
        return
    others = [f"; {other}" for other in runs_of_this_name(resolved)]
    problem = f"no run of this experiment is in {resolved.folder.storage}{''.join(others)}"
    problem += "; without --resume it is begun"
    raise ConfigError.of("--resume", problem)


def begin_anew(resolved: ResolvedExperiment) -> None:
    """Set aside what there is of a run, so that it begins at step 0."""
    if not is_new(resolved.folder) or resolved.folder.checkpoints():
        other = resolved.folder.set_aside()
        log.info("what there was of this run is now %s", other.uri)


def newest_checkpoint(resolved: ResolvedExperiment) -> str:
    """Return the name of the newest checkpoint that verifies, or nothing."""
    with resolved.folder.newest_checkpoint(resolved.identity) as path:
        return path.name if path else ""
