"""Pretraining: workers that run the loop, and the driver that watches them.

The driver's side: it checks the experiment against data and cluster, has workers started
(`ray_fit`, `single_worker`), writes what they report to the run's folder and to MLflow, and shows
it. A run has one name, made of the experiment and the images' fingerprint, so the same command
continues it.
"""

from __future__ import annotations

import logging
import sys

from simclr_ray import config as cfg
from simclr_ray.config.experiment import Experiment
from simclr_ray.config.logging import process_named
from simclr_ray.config.uris import hide_passwords
from simclr_ray.distributed.demand import wait_for_room
from simclr_ray.distributed.ray_cluster import (
    check_machine,
    connect,
)
from simclr_ray.errors import CollapseError, RunError, UnhealthyRunError
from simclr_ray.nn.pretrained import INIT_WEIGHTS_KEY, weight_files
from simclr_ray.storage import checkpoint
from simclr_ray.storage.last_error import recorded
from simclr_ray.storage.metrics_log import last_values
from simclr_ray.storage.run_folder import CONFIG_FILE, HELD_S, METRICS, RunFolder
from simclr_ray.storage.space import OF_THE_DISK, writing
from simclr_ray.tracking.store import store_uri
from simclr_ray.train import stop
from simclr_ray.train.advice import advise_before_start
from simclr_ray.train.disk_space import check_space
from simclr_ray.train.frozen import fit_frozen
from simclr_ray.train.health import HealthWatch
from simclr_ray.train.identity import is_new, newest_checkpoint, runs_of_this_name
from simclr_ray.train.in_process import Fit, fit_in_process
from simclr_ray.train.outcome import Run
from simclr_ray.train.recorder import OnProgress
from simclr_ray.train.resolve import ResolvedExperiment, enter, init_line
from simclr_ray.train.rollback import Rollbacks, keeps_good, roll_back
from simclr_ray.train.single_fit import (
    fit_by_single_worker,
    no_worker_left,
    takes_single_worker,
)
from simclr_ray.train.tracked import Tracked, open_tracker, tracked_run

log = logging.getLogger(__name__)


def pretrain(experiment: Experiment, *, on_progress: OnProgress | None = None) -> Run:
    """Train `experiment` to its end on a Ray cluster, and return the run.

    SimCLR (Chen et al. 2020, arXiv:2002.05709) Algorithm 1 on `scaling.num_workers` processes; the
    loop is `train/loop.py`. Connects to the cluster of `RAY_ADDRESS`, else starts a local one.
    Writes config, metrics and checkpoints to `storage`/<run name> and logs to MLflow. The same
    experiment on the same images continues its run after the last checkpoint; a finished run is
    returned without training. Trains only: `run_pipeline` also evaluates and registers.

    Args:
        experiment: The config of the run, not changed.
        on_progress: Called in this process, in a thread, with each record of metrics
            (name -> number) that the workers report. A `SimclrRayError` that it raises ends the
            run and is raised here.

    Raises:
        ConfigError: `storage` lies below a file, holds a run of an older format or has no room
            for the checkpoints, `init.weights` or the loss's teacher is no checkpoint that fits,
            or $SIMCLR_RAY_NATIVE is invalid.
        DataError: The data is missing, broken, without the labels that the loss takes, or smaller
            than one batch.
        CheckpointError: The newest checkpoint does not fit the experiment.
        ClusterError: `RAY_ADDRESS` does not answer, or the cluster cannot hold the workers.
        TrackingError: MLflow refuses, or cannot be reached and the run is new: one that was begun
            goes on, and what MLflow lacks is delivered later.
        TooManyBadImages: More rows than `data.max_bad_fraction` could not be decoded.
        DivergedError: A loss, feature or weight is not finite.
        StorageError: A disk takes no more of the run, which goes on when it does again.
        RunError: Training failed otherwise, with its cause; or another process trains this run.
        KeyboardInterrupt: Ctrl-C; the same call continues the run.

    Examples:
        One epoch of drawn shapes with two workers, about a minute on two cores:

        >>> import tempfile
        >>> import simclr_ray as sr
        >>> folder = tempfile.mkdtemp()
        >>> manifest = sr.prepare("shapes", f"{folder}/train", num_images=512)
        >>> experiment = sr.Experiment.load(
        ...     "shapes_demo", f"data.train={folder}/train", "data.test=", "epochs=1",
        ...     f"storage={folder}/runs", "scaling.num_workers=2",
        ... )
        >>> run = sr.pretrain(experiment)
        >>> run.metrics["step"], run.checkpoint.is_dir()
        (4, True)
        >>> encoder = sr.load_encoder(run.checkpoint)  # [n, 3, H, W] in [0, 1] -> [n, 128]
    """
    return enter(experiment, train_resolved, on_progress=on_progress)


def train_resolved(
    resolved: ResolvedExperiment, *, on_progress: OnProgress | None = None, in_process: bool = False
) -> Run:
    """Train a resolved experiment; otherwise the same as `pretrain`.

    Args:
        resolved: What to train.
        on_progress: As for `pretrain`; in process it is called between two steps, by their thread.
        in_process: In this process, which has what one worker needs; else by workers of Ray's.
    """
    config, folder = resolved.config, resolved.folder
    if config.init.freeze:
        return fit_frozen(resolved)
    if not in_process:
        check_machine(config)
    check_space(resolved)
    with (
        writing(folder.uri, numbers=OF_THE_DISK),
        folder.lock(HELD_S),
        stop.clear_after(folder),
    ):
        for other in runs_of_this_name(resolved) if is_new(folder) else []:
            log.info("a new run, %s: %s", folder.name, other)
        folder.write_text(CONFIG_FILE, cfg.dump_yaml(cfg.to_tree(config)))
        with process_named(folder.name), recorded(folder):
            uri = store_uri(config.tracking.uri, config.storage)
            log.info("opening MLflow at %s", hide_passwords(uri))
            tracker = open_tracker(resolved)  # before the cluster waits
            if not in_process:
                connect(config)
                wait_for_room(config, lambda: stop.is_seen(folder))
            with no_worker_left(), tracked_run(resolved, tracker) as tracked:
                way = _way_of(resolved, in_process=in_process)
                return _trained(resolved, tracked, on_progress, way)


def _way_of(resolved: ResolvedExperiment, *, in_process: bool) -> Fit:
    """Return how a run is trained: in this process, by one of Ray's, or by Ray Train's workers."""
    if in_process:
        return fit_in_process
    if takes_single_worker(resolved):
        return fit_by_single_worker
    from simclr_ray.train.ray_fit import fit_by_ray_train  # 1.4 s, of Ray Train and Ray Data

    return fit_by_ray_train


def _trained(
    resolved: ResolvedExperiment, tracked: Tracked, on_progress: OnProgress | None, fit: Fit
) -> Run:
    """Train what is left of a run; return it."""
    total, folder = resolved.total_steps, resolved.folder
    Rollbacks.read(folder).drop_abandoned(folder)  # a kill may have come between
    newest = newest_checkpoint(resolved)
    # which of them is the good one, `RunMonitor` knows, and removes the rest
    keep = sys.maxsize if keeps_good(resolved.config) else resolved.config.checkpoint.keep
    if not newest:
        folder.check_resumable(resolved.identity)
    if 0 <= checkpoint.step_of(newest) < total:
        log.info("continuing after step %d of %d", checkpoint.step_of(newest), total)
    if checkpoint.step_of(newest) < total:
        folder.prune_checkpoints(keep, newest)
        for name in folder.repair_snapshot():
            # a stop removes some that Ray does not hear of, and so does `RunMonitor`
            log.debug("Ray's snapshot named %s, which is gone; it was set aside", name)
        for advice in advise_before_start(resolved):
            log.warning(advice)
        if not newest and weight_files(resolved.config.init.weights):
            log.info("%s: %s", INIT_WEIGHTS_KEY, init_line(resolved.config))
        with stop.writing_requests(folder):
            _fit_with_rollbacks(resolved, tracked, on_progress, fit)
            is_stopped = _is_stop_requested(folder)
        newest = newest_checkpoint(resolved)
        is_done = checkpoint.step_of(newest) >= total
        folder.prune_checkpoints(resolved.config.checkpoint.keep if is_done else keep, newest)
        if is_stopped and checkpoint.step_of(newest) < total:
            raise KeyboardInterrupt
    else:
        _check_ended_well(resolved, tracked)
    if checkpoint.step_of(newest) < total:
        raise RunError(f"{folder.uri} holds no whole checkpoint of step {total} after training")
    metrics = last_values(folder.read_text(METRICS) or "")
    return Run(folder.name, folder.uri, newest, tracked.run_id, metrics)


def _is_stop_requested(folder: RunFolder) -> bool:
    """Return whether a stop was asked for, as seems so where a bucket does not say just then."""
    try:
        return stop.is_requested(folder)
    except OSError as error:
        log.debug("%s does not say whether a stop was asked for: %s", folder.uri, error)
        return True


def _check_ended_well(resolved: ResolvedExperiment, tracked: Tracked) -> None:
    """Raise again what the last step of a run has ended it by, after its last checkpoint."""
    error = HealthWatch(resolved.config, resolved.warmup_steps).replay(tracked.log.records(METRICS))
    collapsed = isinstance(error, CollapseError)
    if error is not None and not (collapsed and resolved.config.health.on_collapse == "warn"):
        raise error


def _fit_with_rollbacks(
    resolved: ResolvedExperiment, tracked: Tracked, on_progress: OnProgress | None, fit: Fit
) -> None:
    """Train to the end, or until a stop; go back where the run went wrong and is to."""
    rollbacks = Rollbacks.read(resolved.folder)
    health = HealthWatch(resolved.config, resolved.warmup_steps)
    health.replay(tracked.log.records(METRICS))
    while True:
        try:
            fit(resolved, tracked, on_progress, health, rollbacks)
        except UnhealthyRunError as error:
            rollbacks = roll_back(resolved, rollbacks, error, health.last_step)
            tracked.sender.delivery.enqueue("tags", values=rollbacks.tags)
            for name in resolved.folder.repair_snapshot():
                log.debug("Ray's snapshot named %s, which is gone; it was set aside", name)
        else:
            return
