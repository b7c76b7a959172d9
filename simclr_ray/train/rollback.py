"""A run that went wrong goes back to a good checkpoint, and on with half the rate.

Which one is good: after a divergence the newest that is whole and finite; after a collapse the
newest of a step at which there was no sign of it yet (`HealthWatch.good_until`). If the run fails
again no later than before, that one was not good either, and the next older one is taken; the start
serves where none is left.

`rollbacks.json` in the run's folder is written first, whole and durably, so that a kill in between
changes nothing; what the branch that was left has written is removed then, or at the next start. A
rate is a function of its step, with the steps from which on it was halved: the same on all ranks,
and from whichever checkpoint the run goes on.
"""

from __future__ import annotations

import json
import logging
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

from simclr_ray.config.wording import counted
from simclr_ray.errors import (
    CheckpointError,
    CollapseError,
    ConfigError,
    UnhealthyRunError,
)
from simclr_ray.storage import checkpoint
from simclr_ray.storage.checkpoint import Identity
from simclr_ray.storage.run_folder import RunFolder
from simclr_ray.storage.run_record import RunRecord
from simclr_ray.storage.run_status import newest_whole_step

if TYPE_CHECKING:
    from simclr_ray.config.experiment import Experiment
    from simclr_ray.train.health import HealthWatch
    from simclr_ray.train.resolve import ResolvedExperiment

STATE: Final = "rollbacks.json"
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Rollbacks:
    """How often a run was rolled back; it pickles.

    Attributes:
        halved_at: Of each, the step from which on the rate is half of what it was.
        failed_after: Of the last, the step until which the run had come.
    """

    halved_at: tuple[int, ...] = ()
    failed_after: int = 0

    @property
    def count(self) -> int:
        """How often."""
        return len(self.halved_at)

    @property
    def rate_multiplier(self) -> float:
        """What the rate of the newest steps is multiplied by."""
        return float(0.5**self.count)

    @property
    def named(self) -> dict[str, Any]:
        """What names such a run: `rollbacks` and `rate_multiplier`; empty where there was none."""
        named = {"rollbacks": self.count, "rate_multiplier": self.rate_multiplier}
        return named if self.count else {}

    @property
    def tags(self) -> dict[str, str]:
        """The same as MLflow has it."""
        return {key: str(value) for key, value in self.named.items()}

    @property
    def record(self) -> dict[str, Any]:
        """What a checkpoint's record says of it; empty where there was none."""
        return {**self.named, "halved_at": [*self.halved_at]} if self.count else {}

    @classmethod
    def read(cls, folder: RunFolder) -> Rollbacks:
        """Return the state of a run; where its file is lost, as a checkpoint's record has it.

        Raises:
            CheckpointError: The run was rolled back and no one says to which steps.
        """
        tree, record = folder.read_json(STATE, dict) or {}, RunRecord.find(folder)
        count = record.rollbacks if record is not None else 0
        with suppress(LookupError, TypeError, ValueError):  # altered: the same as lost
            state = cls(_steps(tree), int(tree["history"][-1]["failed_after"]))
            if state.count >= count:
                return state
        if not count:
            return cls()
        for name in folder.checkpoints():
            with suppress(TypeError, ValueError):
                steps = _steps(folder.read_json(f"{name}/{checkpoint.RECORD}", dict) or {})
                if len(steps) >= count:
                    return cls(steps)
        raise CheckpointError(
            f"{folder.uri}: the run was rolled back {counted(count, 'time')}, and "
            f"{STATE}, which says at which rate it goes on, is lost; --restart begins anew"
        )

    def drop_abandoned(self, folder: RunFolder) -> None:
        """Remove the checkpoints that a rollback has left behind, of steps after its own."""
        for name in folder.checkpoints() if self.count else []:
            record = folder.read_json(f"{name}/{checkpoint.RECORD}", dict)
            if record is None:  # unfinished, or not to be read now: nothing goes on from it
                continue
            made_after = record.get("rollbacks", 0)
            later = self.halved_at[made_after:] if isinstance(made_after, int) else ()
            if later and checkpoint.step_of(name) > min(later):
                folder.remove_checkpoint(name)


def _steps(tree: dict[str, Any]) -> tuple[int, ...]:
    return tuple(int(step) for step in tree.get("halved_at", []))


def first_save(resolved: ResolvedExperiment) -> int:
    """Return the step of the first checkpoint that is due, and of the next so many."""
    saved = resolved.config.checkpoint
    within_epoch = saved.every_steps or resolved.total_steps
    return min(within_epoch, saved.every_epochs * resolved.steps_per_epoch)


def check_policy(resolved: ResolvedExperiment) -> None:
    """Raise `ConfigError` where a run is to go back to checkpoints and writes none before its end.

    That is so where the first one that is due is that of the end.
    """
    config, total = resolved.config, resolved.total_steps
    if not config.health.rolls_back:
        return
    first = first_save(resolved)
    if first >= total:
        problem = (
            f"rollback needs a checkpoint before the end, and the first of {total:,} steps is due "
            f"after {first:,}: set checkpoint.every_steps, or every_epochs lower"
        )
        raise ConfigError.of("health", problem)


def roll_back(
    resolved: ResolvedExperiment, before: Rollbacks, error: UnhealthyRunError, last_step: int
) -> Rollbacks:
    """Bring a run's folder back to a good checkpoint, and return the new state.

    Args:
        resolved: The run; nobody writes to its folder now.
        before: Its state.
        error: What ended it.
        last_step: Until which it had come, by what it has logged.

    Raises:
        UnhealthyRunError: It is to end: `error`, with why.
    """
    health, folder = resolved.config.health, resolved.folder
    collapsed = isinstance(error, CollapseError)
    policy = health.on_collapse if collapsed else health.on_divergence
    if policy != "rollback":
        raise error
    if not error.rate_may_help:
        raise type(error)(f"{error}; not rolled back: a lower rate does not mend that")
    if before.count >= health.max_rollbacks:
        raise type(error)(
            f"{error}; rolled back {counted(before.count, 'time')} before "
            f"(health.max_rollbacks={health.max_rollbacks}), to a rate of "
            f"{before.rate_multiplier:g} times the planned one"
        )
    if not collapsed:  # a checkpoint is finite, and the last record may be older
        last_step = max(last_step, newest_whole_step(folder))
    again = before.count > 0 and last_step <= before.failed_after
    good_until = last_step if error.good_until is None else error.good_until
    if again:
        good_until = min(good_until, before.halved_at[-1] - 1)
    name = newest_good(folder, resolved.identity, good_until)
    step = max(0, checkpoint.step_of(name))
    after = Rollbacks((*(min(step, s) for s in before.halved_at), step), last_step)
    _write(folder, after, name, str(error))
    after.drop_abandoned(folder)
    note_in_record(folder, after)
    log.warning(
        "%s; going back to %s, and on at %g times the planned rate (rollback %d of %d)",
        error, f"the checkpoint of step {step:,}" if name else "the start", after.rate_multiplier,
        after.count, health.max_rollbacks,
    )  # fmt: skip
    return after


def newest_good(folder: RunFolder, identity: Identity, good_until: int) -> str:
    """Return the newest checkpoint that verifies and is of no later step; empty: the start."""
    for name in folder.checkpoints():
        if checkpoint.step_of(name) > good_until:
            continue
        with folder.fetched(name) as local:
            flaw = checkpoint.flaw(local, identity)
            if not flaw:
                return name
            log.warning("passing over checkpoint %s: %s", name, flaw)
    return ""


def note_in_record(folder: RunFolder, rollbacks: Rollbacks) -> None:
    """Have run.json say how often the run was rolled back."""
    record = RunRecord.find(folder)
    if record is not None and record.rollbacks != rollbacks.count:
        replace(record, **rollbacks.named).write(folder)


def keeps_good(experiment: Experiment) -> bool:
    """Return whether a good checkpoint is kept beside the newest: a collapse is seen late."""
    return experiment.health.on_collapse == "rollback"


def kept_by_ray(experiment: Experiment) -> int | None:
    """Return how many checkpoints Ray keeps; None: all, and `CheckpointKeeper` removes some."""
    return None if keeps_good(experiment) else experiment.checkpoint.keep


class CheckpointKeeper:
    """Removes checkpoints that are not needed, in place of Ray, while a run goes on.

    The `checkpoint.keep` newest stay, and the newest of a step without any sign of a collapse.
    """

    def __init__(self, resolved: ResolvedExperiment) -> None:
        self._folder, self._keep = resolved.folder, resolved.config.checkpoint.keep
        self._every = first_save(resolved)
        self._looked_at = 0

    def keep(self, health: HealthWatch) -> None:
        """Look once for each checkpoint that has come."""
        at = health.last_step // self._every
        if at == self._looked_at:
            return
        self._looked_at = at
        folder = self._folder
        names = list(folder.finished_checkpoints())
        good = next((n for n in names if checkpoint.step_of(n) <= health.well_until), "")
        for name in names[self._keep :]:
            if name != good:
                folder.remove_checkpoint(name)


def _write(folder: RunFolder, state: Rollbacks, name: str, reason: str) -> None:
    tree = folder.read_json(STATE, dict) or {}
    entry = {"to": name, "failed_after": state.failed_after, "reason": reason}
    history = [*tree.get("history", []), {**entry, "rate_multiplier": state.rate_multiplier}]
    folder.write_text(STATE, json.dumps({**state.record, "history": history}, indent=1))
