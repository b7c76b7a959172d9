"""The folder of a study: its definition, and what became of each trial.

<storage>/studies/<name>/
    study.yaml   base.yaml      the definition, whole: nothing outside of here is needed to go on
    study.json                  digest, images, the MLflow run of the study
    outcomes/<trial>.json       written last by each trial, whole or not at all
    runs/<run>/                 the run folders of the trials
    report/                     figure, table, page
    baselines.json              what points are held against, if somebody wrote it
    stop                        there when somebody asked it to stop
    lock                        held by the driver; in a bucket lock/ with its claim
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, NamedTuple

from simclr_ray import config as cfg
from simclr_ray.config.experiment import Experiment
from simclr_ray.config.metrics import EPOCH_METRICS
from simclr_ray.errors import ConfigError
from simclr_ray.storage.filesystem import split_address
from simclr_ray.storage.metrics_log import read_records
from simclr_ray.storage.run_folder import RunFolder
from simclr_ray.storage.scratch import scratch_folder
from simclr_ray.storage.tracking_place import read_uri, stored_uri
from simclr_ray.studies.definition import Study
from simclr_ray.studies.plan import RUNS

DEFINITION, BASE, STATE, STOP = "study.yaml", "base.yaml", "study.json", "stop"
BASELINES = "baselines.json"
NEVER = datetime.min.replace(tzinfo=UTC)
OUTCOMES, REPORT = "outcomes", "report"

OutcomeStatus = Literal["finished", "collapsed", "stopped", "failed"]
FINAL: tuple[OutcomeStatus, ...] = ("finished", "collapsed", "stopped")  # not to be run again
Curve = dict[int, dict[str, float]]  # epoch -> metric -> value
Baselines = dict[str, dict[str, float]]  # name, such as "untrained encoder" -> metric -> value


class TrialOutcome(NamedTuple):
    """What became of a trial. `metrics` and `curve` repeat bit for bit; `cost` and `run` do not."""

    trial: str
    status: OutcomeStatus
    reason: str
    cells: list[dict[str, Any]]  # point and epoch
    seed: int
    metrics: dict[str, float]
    curve: Curve
    cost: dict[str, float]  # images, seconds, device_seconds, and the epochs that they are of
    run: dict[str, str]  # folder, checkpoint, mlflow_run_id, digest
    last_good: int = 0  # the last epoch whose evaluation did not end the run; 0: none, or not said


RESUME = " study resume "  # which begins nothing, and repeats nothing from the start


class StudyFolder:
    """Where one study lies, on a local disk or any `pyarrow.fs` URI."""

    def __init__(self, storage: str, name: str) -> None:
        self.files = RunFolder.of(storage, name)

    @classmethod
    def at(cls, where: str) -> StudyFolder:
        """Return the study's folder at a path or URI.

        Raises:
            ConfigError: There is none.
        """
        files = RunFolder.at(where)
        folder = cls(files.storage, files.name)
        if folder.files.read_text(DEFINITION) is None:
            raise ConfigError.of(where, f"is no folder of a study: it has no {DEFINITION}")
        return folder

    @property
    def uri(self) -> str:
        """The folder's path or URI."""
        return self.files.uri

    def check(self, digest: str) -> None:
        """Raise `ConfigError` where the name is taken by another definition."""
        state = self.state()
        if state and state["digest"] != digest:
            problem = (
                f"{self.uri} holds a study of this name with another definition; give this one "
                "another name (study.name=...), or remove that folder"
            )
            raise ConfigError.of("name", problem)

    def write_definition(
        self, study: Study, base: Experiment, digest: str, command: str = ""
    ) -> None:
        """Store the definition, and the command that begins the study: what resumes it is none.

        Raises:
            ConfigError: The name is taken by another definition.
        """
        self.check(digest)
        tree = cfg.to_tree(study) | {"base": BASE, "set": {}}
        tree["space"] = {
            name: {next(iter(dim.model_fields_set)): tree["space"][name][key]}
            for name, dim in study.space.items()
            for key in dim.model_fields_set
        }
        self.files.write_text(BASE, cfg.dump_yaml(cfg.to_tree(base)))
        self.files.write_text(DEFINITION, cfg.dump_yaml(tree))
        state = self.state()
        begun = state.get("command") or ("" if RESUME in command else command)
        self.update_state(**{"digest": digest, **state, "command": begun})

    def definition(self) -> tuple[Study, dict[str, Any]]:
        """Return the study and the whole tree of its base experiment."""
        study = cfg.validate(Study, cfg.parse_yaml(self.files.read_text(DEFINITION) or ""))
        return study, cfg.parse_yaml(self.files.read_text(BASE) or "")

    def state(self) -> dict[str, Any]:
        """Return what is stored of the study as a whole, or nothing before it began."""
        return self._with_uri(self.files.read_json(STATE, dict) or {})

    def update_state(self, **values: Any) -> None:
        """Store values of the study as a whole; the MLflow store's address where it lies now."""
        state = self.state() | values
        if "tracking_uri" in state:
            state["tracking_uri"] = stored_uri(state["tracking_uri"], self.files)
        self.files.write_text(STATE, json.dumps(state, indent=1))

    def _with_uri(self, tree: dict[str, Any]) -> dict[str, Any]:
        """Return what a file holds, the MLflow store's address where that lies now."""
        if not tree.get("tracking_uri"):
            return tree
        return tree | {"tracking_uri": read_uri(tree["tracking_uri"], self.files, BASE, RUNS)}

    def outcome(self, trial: str) -> TrialOutcome | None:
        """Return what became of a trial, or None while it is open."""
        tree = self.files.read_json(f"{OUTCOMES}/{trial}.json", dict)
        return self._read(tree) if tree else None

    def outcomes(self) -> list[TrialOutcome]:
        """Return what became of all trials that have ended, by name."""
        names = self.files.names(OUTCOMES)
        trees = (self.files.read_json(f"{OUTCOMES}/{name}", dict) for name in names)
        return [self._read(tree) for tree in trees if tree]

    def write_outcome(self, outcome: TrialOutcome) -> None:
        """Store what became of a trial; its run is named relative to the study's folder."""
        run = dict(outcome.run)
        name = split_address(run.get("folder", ""))[1]
        if name and run["folder"] == self.run(name).uri:
            run["folder"] = f"{RUNS}/{name}"
        if run.get("tracking_uri"):
            run["tracking_uri"] = stored_uri(run["tracking_uri"], self.files)
        text = json.dumps(outcome._replace(run=run)._asdict(), indent=1, sort_keys=True)
        RunFolder(self.uri, OUTCOMES).write_text(f"{outcome.trial}.json", text)

    def remove_outcome(self, trial: str) -> None:
        """Remove what became of a trial, if anything has, since it is run again."""
        self.files.remove(f"{OUTCOMES}/{trial}.json")

    def _read(self, tree: dict[str, Any]) -> TrialOutcome:
        """Return an outcome, its run where the study lies now; earlier releases wrote paths."""
        curve = {int(epoch): values for epoch, values in tree["curve"].items()}
        run = self._with_uri(tree["run"])
        if run.get("folder"):
            run["folder"] = self.run(split_address(run["folder"])[1]).uri
        return TrialOutcome(**tree | {"run": run, "curve": curve})

    def baselines(self) -> Baselines:
        """Return what the points are held against: of each baseline the metrics that it has.

        `baselines.json` holds it, such as `{"raw pixels": {"final/linear_top1": 0.37}}`, values in
        the metric's own unit; without that file there are none.

        Raises:
            ConfigError: The file holds something else.
        """
        tree = self.files.read_json(BASELINES, dict) or {}
        for name, values in tree.items():
            if not isinstance(values, dict) or not all(
                isinstance(v, int | float) and not isinstance(v, bool) for v in values.values()
            ):
                problem = f"{name!r} must have metrics and numbers, got {json.dumps(values)}"
                raise ConfigError.of(self.files.below(BASELINES), problem)
        return {name: {m: float(v) for m, v in values.items()} for name, values in tree.items()}

    def write_baselines(self, baselines: Baselines) -> None:
        """Store what `baselines` returns."""
        self.files.write_text(BASELINES, json.dumps(baselines, indent=1))

    def run(self, name: str) -> RunFolder:
        """Return the run folder of a trial's run."""
        return RunFolder(self.files.below(RUNS), name)

    def runs(self) -> dict[str, RunFolder]:
        """Return the run folder of each trial, whose name is the trial's and eight hex digits.

        A trial has two where code or weights that it names were changed before it was resumed; the
        one that was last written is returned.
        """
        newest: dict[str, RunFolder] = {}
        for name in self.files.folders(RUNS):
            trial, run = name.rpartition("-")[0], self.run(name)
            other = newest.get(trial)
            if other is None or (run.written_at() or NEVER) > (other.written_at() or NEVER):
                newest[trial] = run
        return newest

    def run_of(self, trial: str) -> RunFolder | None:
        """Return the run folder of a trial, if it has one."""
        return self.runs().get(trial)

    def request_stop(self) -> None:
        """Ask the driver, wherever it runs, to stop; the trials keep their checkpoints."""
        self.files.write_text(STOP, "")

    def withdraw_stop(self) -> None:
        """Let the study go on."""
        self.files.remove(STOP)

    def stop_requested(self) -> bool:
        """Return whether somebody asked."""
        return self.files.read_text(STOP) is not None

    def may_be_running(self) -> bool:
        """Return whether a driver holds the study."""
        return bool(self.files.holder())

    @contextmanager
    def report_folder(self) -> Iterator[Path]:
        """Give a local folder for the report; of a remote study it is copied there at the end."""
        if self.files.local is not None:
            folder = self.files.local / REPORT
            folder.mkdir(parents=True, exist_ok=True)
            yield folder
            return
        with scratch_folder() as scratch:
            folder = scratch / REPORT
            folder.mkdir()
            yield folder
            self.files.put_folder(folder, REPORT)

    @property
    def report(self) -> str:
        """Path or URI of the report's folder."""
        return self.files.below(REPORT)


def curve_of(lines: str, last_epoch: int = 0) -> Curve:
    """Return the values at epoch ends from a run's `metrics.jsonl`, up to `last_epoch` (0: all).

    An epoch counts where the encoder was evaluated; with it goes the last training record before.
    """
    curve: Curve = {}
    training: dict[str, float] = {}
    for record in read_records(lines):
        values = {key: float(record[key]) for key in EPOCH_METRICS if key in record}
        if any(key.startswith("eval/") for key in values):
            epoch = round(record["epoch"])
            if not last_epoch or epoch <= last_epoch:
                curve[epoch] = training | values
        else:
            training |= values
    return dict(sorted(curve.items()))
