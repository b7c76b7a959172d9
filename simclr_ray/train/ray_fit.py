"""Training by workers of Ray Train: a run's trainer, and what its end means."""

from __future__ import annotations

import logging

import ray
import ray.train
import ray.train.torch
import ray.train.v2.api.config as ray_config
from ray.exceptions import OutOfMemoryError

from simclr_ray.config.uris import remembered
from simclr_ray.config.wording import counted
from simclr_ray.distributed.malloc import one_arena
from simclr_ray.distributed.placement import staying_nodes, store_problem
from simclr_ray.distributed.ray_cluster import PickledQueue, driver_queue
from simclr_ray.errors import RestartsError, RunError, one_line
from simclr_ray.storage import run_lock
from simclr_ray.train import stop
from simclr_ray.train.elastic import RESIZE_S, Trainer, interrupts_kept
from simclr_ray.train.failures import cause_of, final_error, root_failure
from simclr_ray.train.health import HealthWatch
from simclr_ray.train.monitor import RunMonitor
from simclr_ray.train.ray_settings import scaling_config, torch_config
from simclr_ray.train.ray_worker import train_loop_per_worker
from simclr_ray.train.recorder import OnProgress
from simclr_ray.train.resolve import ResolvedExperiment
from simclr_ray.train.restarts import FailureReport
from simclr_ray.train.rollback import Rollbacks, kept_by_ray
from simclr_ray.train.tracked import Tracked
from simclr_ray.train.worker import WorkerInput

log = logging.getLogger(__name__)


def fit_by_ray_train(
    resolved: ResolvedExperiment,
    tracked: Tracked,
    on_progress: OnProgress | None,
    health: HealthWatch,
    rollbacks: Rollbacks,
) -> None:
    """Train by workers of Ray Train."""
    stop.workers_are_gone()
    scaling, inbox = resolved.config.scaling, driver_queue()
    trainer = _trainer(resolved, inbox, rollbacks)
    least = f"{scaling.min_workers} to " if scaling.is_elastic else ""
    log.info("starting %s%s", least, counted(scaling.max_workers, "worker"))
    if problem := store_problem(resolved.config, staying_nodes()):
        log.warning("%s", problem)
    watcher = RunMonitor(inbox, tracked, on_progress, resolved, health)
    try:
        with interrupts_kept(), watcher:
            trainer.fit()
    except KeyboardInterrupt:
        if watcher.fatal is None:
            raise
    except ray.train.TrainingFailedError as error:
        final = watcher.fatal or final_error(error)
        raise final or RunError(f"training failed: {_root_message(error)}") from error
    except ray.exceptions.RayError as error:  # Ray Train's own process is gone
        message = f"Ray has ended the run: {cause_of(error)}; the same command goes on"
        raise watcher.fatal or RestartsError(message) from error
    if watcher.fatal is not None:
        raise watcher.fatal
    watcher.say_bad_rows()


def _trainer(resolved: ResolvedExperiment, inbox: PickledQueue, rollbacks: Rollbacks) -> Trainer:
    """Return Ray's trainer of a run, as the run's config has it."""
    experiment, folder = resolved.config, resolved.folder
    scaling = experiment.scaling
    driver = run_lock.text_of(folder.local) if folder.local is not None else ""
    return Trainer(
        train_loop_per_worker,
        scaling=scaling,
        folder=folder,
        inbox=inbox,
        train_loop_config={"input": WorkerInput(resolved, inbox, rollbacks, remembered(), driver)},
        scaling_config=scaling_config(
            scaling,
            (scaling.min_workers, scaling.max_workers)
            if scaling.is_elastic
            else scaling.max_workers,
            elastic_resize_monitor_interval_s=RESIZE_S,
        ),
        torch_config=torch_config(scaling, scaling.collective_timeout_s),
        run_config=ray_config.RunConfig(
            name=folder.name,
            storage_path=folder.storage,
            worker_runtime_env={"env_vars": one_arena()},
            # counted by `RunMonitor`, anew after each checkpoint
            failure_config=ray_config.FailureConfig(
                max_failures=-1 if scaling.max_failures else 0, max_preemption_failures=-1
            ),
            callbacks=[FailureReport(inbox)],
            checkpoint_config=ray_config.CheckpointConfig(num_to_keep=kept_by_ray(experiment)),
            logging_config=ray_config.LoggingConfig(log_level="ERROR"),
        ),
    )


def _root_message(error: BaseException) -> str:
    root = root_failure(error)
    if isinstance(root, OutOfMemoryError):
        return cause_of(root)
    return one_line(root)[-2000:]
