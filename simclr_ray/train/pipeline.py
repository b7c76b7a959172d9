"""From a config to a registered encoder: train, evaluate, publish, register."""

from __future__ import annotations

import json
import logging
import shlex
import shutil
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path

import ray

from simclr_ray.config.experiment import Experiment, RegistryConfig
from simclr_ray.config.uris import hide_passwords
from simclr_ray.data.source import Source
from simclr_ray.distributed.ray_cluster import is_local
from simclr_ray.errors import NotPromotedError, TrackingUnavailableError
from simclr_ray.evaluation.baselines import score_run
from simclr_ray.evaluation.classification import Classification
from simclr_ray.evaluation.encoded_splits import evaluated_rows
from simclr_ray.evaluation.evaluate import score_classifier
from simclr_ray.evaluation.scores import Score, format_table
from simclr_ray.inference.promotion import promote
from simclr_ray.inference.registry import register_run
from simclr_ray.storage.last_error import recorded
from simclr_ray.storage.lease import is_lost
from simclr_ray.storage.run_folder import HELD_S, METRICS, RunFolder
from simclr_ray.storage.run_record import RunRecord
from simclr_ray.storage.run_status import CLASSIFIER_SCORES, SCORES
from simclr_ray.storage.space import OF_THE_DISK, writing
from simclr_ray.tracking.store import RegisteredEncoder
from simclr_ray.train import stop
from simclr_ray.train.driver import train_resolved
from simclr_ray.train.evaluation_ahead import EvaluationAhead
from simclr_ray.train.figures import draw_curves, draw_views
from simclr_ray.train.identity import begin_anew
from simclr_ray.train.outcome import PretrainOutcome, Run, store_outcome, stored_outcome
from simclr_ray.train.recorder import OnProgress
from simclr_ray.train.resolve import ResolvedExperiment, enter
from simclr_ray.train.tracked import late_writes

ENDED_S = 10.0  # until Ray has ended
log = logging.getLogger(__name__)


def run_pipeline(
    experiment: Experiment, *, restart: bool = False, on_progress: OnProgress | None = None
) -> PretrainOutcome:
    """Train, evaluate, publish to MLflow and, where `registry.name` is set, register.

    Of a run that is finished, evaluated and registered, what is stored is returned.

    Args:
        experiment: What to run.
        restart: Begin anew, and set aside what there is of the run.
        on_progress: As for `pretrain`.
    """

    def answer(resolved: ResolvedExperiment) -> PretrainOutcome:
        stored = None if restart else stored_outcome(resolved)
        if stored is not None:
            return stored
        with resolved.folder.lock(HELD_S):
            if restart:
                begin_anew(resolved)
            return stored_outcome(resolved) or train_and_evaluate(resolved, on_progress=on_progress)

    return enter(experiment, answer)


def train_and_evaluate(
    resolved: ResolvedExperiment, *, on_progress: OnProgress | None = None, is_last: bool = False
) -> PretrainOutcome:
    """Train, evaluate, publish and register a resolved experiment; nothing stored is returned.

    One driver at a time: a second one waits, or is refused, until all of that is done.

    Args:
        resolved: What to do.
        on_progress: As for `pretrain`.
        is_last: Nobody needs the Ray that was started here after the training.
    """
    folder = resolved.folder
    with (
        writing(folder.uri, numbers=OF_THE_DISK),
        folder.lock(HELD_S),
        EvaluationAhead(resolved, on_progress) as ahead,
    ):
        run = train_resolved(resolved, on_progress=ahead.report)
        try:
            with recorded(folder), _without_ray(resolved) if is_last else nullcontext():
                outcome = _evaluated(run, resolved, ahead.views())
        # the training itself had set it to FINISHED; an interrupt within an import comes out of it
        # as an ImportError, or as whatever that code makes of it
        except BaseException as error:
            is_stopped = isinstance(error, KeyboardInterrupt | ImportError)
            if (is_stopped or stop.was_interrupted()) and not is_lost(folder.uri):
                with late_writes(folder) as writes:
                    writes.status("KILLED")
            raise
        store_outcome(resolved, outcome)
        return outcome


@contextmanager
def _without_ray(resolved: ResolvedExperiment) -> Iterator[None]:
    """End a Ray that was started here beside the block, which needs none: it takes a second."""
    if not is_local() or evaluated_rows(resolved.config).by_actors:
        yield
        return
    ending = threading.Thread(target=ray.shutdown, name="ray-shutdown", daemon=True)
    ending.start()
    try:
        yield
    finally:  # after an error too: an end of Ray at the exit would meet this one
        ending.join(ENDED_S)


def _evaluated(
    run: Run, resolved: ResolvedExperiment, views: Path | None = None
) -> PretrainOutcome:
    config = resolved.config
    log.info("evaluating %s, the untrained encoder and raw pixels", run.checkpoint_name)
    with RunFolder.at(run.folder).fetched(run.checkpoint_name) as checkpoint:
        scores = score_run(config, checkpoint)
        publish(run, resolved, scores, views)
        classifier = _test_classifier(run, config, checkpoint)
    registered = None
    if config.registry.name:
        log.info("registering %s", config.registry.name)
        registered = _registered(run, config)
    return PretrainOutcome(run, scores, registered, classifier)


def _registered(run: Run, config: Experiment) -> RegisteredEncoder:
    """Register the run's encoder; where MLflow is gone, name the command that does it later."""
    registry = config.registry
    try:
        made = register_run(run.folder, registry.name, None if registry.require else registry.alias)
    except TrackingUnavailableError as error:
        words = ["model", "register", run.folder, registry.name, "--alias", registry.alias]
        later = shlex.join(["simclr-ray", *words])
        if registry.require:  # which `model register` knows nothing of
            later = "run it again, which registers it and moves the alias by registry.require"
        text = f"{error}; trained and evaluated, but not registered: {later}"
        raise TrackingUnavailableError(text) from error
    return _promoted(made, run, registry) if registry.require else made


def _promoted(made: RegisteredEncoder, run: Run, registry: RegistryConfig) -> RegisteredEncoder:
    """Return the version with the alias that moved to it, or with why that stays."""
    uri, rule = RunRecord.read(RunFolder.at(run.folder)).tracking_uri, registry.require
    try:
        # whether it has learned anything, `register_run` has just asked
        promote(made.uri, registry.alias, require=rule, force=True, tracking_uri=uri)
    except NotPromotedError as error:
        log.warning("%s", error)
        return made._replace(refusal=str(error))
    except TrackingUnavailableError as error:
        words = ["model", "promote", made.uri, registry.alias, "--require", rule]
        later = shlex.join(["simclr-ray", *words, "--tracking-uri", hide_passwords(uri)])
        text = f"{error}; trained, evaluated and registered, but not promoted: {later}"
        raise TrackingUnavailableError(text) from error
    return made._replace(alias=registry.alias)


def _test_classifier(run: Run, experiment: Experiment, checkpoint: Path) -> Classification | None:
    """Return and log how a supervised run's own classifier does, if there is a labelled test."""
    data = experiment.data
    if experiment.classifier is None or not data.test:
        return None
    if not Source.open(data.test, data.columns).has_labels:
        return None
    scores = score_classifier(checkpoint, experiment)
    named = {f"final/classifier/{key}": value for key, value in scores.measures().items()}
    folder = RunFolder.at(run.folder)
    folder.write_text(CLASSIFIER_SCORES, json.dumps(scores._asdict(), indent=1))
    with late_writes(folder) as writes:
        writes.metrics(named, int(run.metrics.get("step", 0)))
    return scores


def publish(
    run: Run, resolved: ResolvedExperiment, scores: Sequence[Score], drawn: Path | None = None
) -> None:
    """Store config, view pairs, curves and the score table as artifacts of the MLflow run.

    Where MLflow does not take them now, they are delivered later.

    Args:
        run: What was trained.
        resolved: Its experiment.
        scores: Its table.
        drawn: The view pairs, where they are drawn already.
    """
    folder = RunFolder.at(run.folder)
    folder.write_text(SCORES, json.dumps([s.as_tree() for s in scores], indent=1))
    with tempfile.TemporaryDirectory() as scratch, late_writes(folder) as writes:
        views, curves = Path(scratch) / "views.png", Path(scratch) / "curves.png"
        if drawn is None:
            draw_views(resolved.config, resolved.source, views)
        else:
            shutil.copyfile(drawn, views)
        draw_curves(folder.read_text(METRICS) or "", curves)
        writes.file(views)
        writes.file(curves)
        writes.config(resolved.config)
        writes.text(format_table(scores), "scores.md")
        writes.metrics(score_metrics(scores), int(run.metrics.get("step", 0)))


def score_metrics(scores: Sequence[Score]) -> dict[str, float]:
    """Return `final/<row>/<column>` -> value for every score there is."""
    return {
        f"final/{score.name.replace(' ', '_')}/{column}": value
        for score in scores
        for column, value in score.numbers().items()
    }
