"""One rank of a run: model, stream, loop, checkpoints.

Workers know no MLflow. What the driver is to know goes into its inbox, a Ray queue: records of
metrics, rows that had to be replaced, and errors that no restart can mend.
"""

from __future__ import annotations

import glob
import hashlib
import platform
import shutil
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from simclr_ray import config as cfg
from simclr_ray.config.experiment import Experiment
from simclr_ray.config.logging import name_process
from simclr_ray.config.uris import remember
from simclr_ray.data.batch import Batch
from simclr_ray.distributed import collectives
from simclr_ray.distributed.machine import cores
from simclr_ray.distributed.malloc import keep_freed_memory
from simclr_ray.errors import ConfigError, DivergedError
from simclr_ray.evaluation.online import OnlineEvaluation
from simclr_ray.nn.build import SimCLRModel, build_loss, build_model
from simclr_ray.nn.encoders import set_recompute
from simclr_ray.nn.heads import LearnableTemperature
from simclr_ray.nn.precision import prepare_model
from simclr_ray.nn.pretrained import load_init
from simclr_ray.optim import build_optimizer
from simclr_ray.storage import checkpoint, run_lock
from simclr_ray.storage.metrics_log import FIRST_BATCH
from simclr_ray.storage.retries import with_retries
from simclr_ray.storage.run_folder import RunFolder
from simclr_ray.train import loop
from simclr_ray.train.context import TrainContext
from simclr_ray.train.failures import final_error
from simclr_ray.train.heartbeat import Heartbeat, Inbox, RanksMove
from simclr_ray.train.meter import ReportInterval, StepMeter
from simclr_ray.train.rank_metrics import RankMetrics
from simclr_ray.train.recorder import WorkerReady
from simclr_ray.train.requests import RanksMoved, Requests
from simclr_ray.train.resolve import ResolvedExperiment
from simclr_ray.train.rollback import Rollbacks
from simclr_ray.train.step_schedule import schedule_of
from simclr_ray.train.worker_batches import finish_batches

STORAGE_S = 30.0  # clients of NFS have looked again by then
SLOW_S = 1.0  # an upload that takes longer goes on beside the next steps
BAD_START = "{} is not finite before the first step: it is so in init.weights, or in own code"


class WorkerInput(NamedTuple):
    """What a worker is given; all of it pickles.

    Attributes:
        experiment: What to train.
        inbox: Where it says what comes.
        rollbacks: That the run has behind it.
        passwords: As `uris.remembered` returns them: in files that a worker opens, the list of a
            folder among them, URIs have none.
        driver: As `run_lock.text_of` has it of a local run folder, for a worker that may be on
            another machine; empty: this one is on the driver's.
    """

    experiment: ResolvedExperiment
    inbox: Inbox
    rollbacks: Rollbacks = Rollbacks()
    passwords: Mapping[str, str] = {}
    driver: str = ""


def train_rank(worker_input: WorkerInput, context: TrainContext) -> None:
    """Train on one rank; an error that no restart can mend is sent to the driver first."""
    try:
        worker = TrainWorker(worker_input, context)
        worker.run()
        worker.heartbeat.stop()
    except Exception as error:
        tell_final(worker_input.inbox, error)
        raise


def tell_final(inbox: Inbox, error: BaseException) -> None:
    """Send the driver an error that no restart mends; others it hears of by Ray."""
    final = final_error(error)
    if final is not None:
        inbox.put(final)


class TrainWorker:
    """One rank's state, and the callbacks that the loop calls."""

    def __init__(self, worker_input: WorkerInput, context: TrainContext) -> None:
        for uri in worker_input.passwords.values():
            remember(uri)
        self.resolved, self.inbox = worker_input.experiment, worker_input.inbox
        self.experiment, self.source = self.resolved.config, self.resolved.source
        self.rollbacks, self.driver = worker_input.rollbacks, worker_input.driver
        self.folder, self.total = self.resolved.folder, self.resolved.total_steps
        self.context, self.device = context, context.device
        self.rank, self.num_ranks = context.rank, context.num_ranks
        name_process(self.folder.name, self.rank)
        self.saved = -1  # step of the last checkpoint
        self.uploaded = threading.Event()
        self.uploaded.set()
        self.upload_s = 0.0 if self.folder.local else SLOW_S + 1  # the last one
        context.begin(self.inbox)
        self.heartbeat = Heartbeat(self.inbox, self.rank, self.experiment.scaling)
        prepare_process(self.experiment, context.num_local)

    def run(self) -> None:
        """Train from the newest whole checkpoint to the end. A collective.

        Raises:
            ConfigError: The run's folder is not the driver's, which another machine has.
        """
        # others wait for this rank meanwhile, and not for longer than that
        wait_s = min(STORAGE_S, self.experiment.scaling.collective_timeout_s / 2)
        check_storage(self.folder, self.driver, wait_s)
        if self.context.local_rank == 0:
            self._clear_scratch()
        experiment, newest = self.experiment, self._newest()
        start = newest.step if newest else 0
        if start >= self.total:
            return
        # first of all: its actors take seconds to start, and start behind the rest of this
        steps = range(start, self.total)
        batches = self.context.batches(experiment, self.source, steps, self.folder.name)
        self._build(newest)
        newest = newest._replace(tensors={}) if newest else None  # they keep their file's space
        self.loss = build_loss(experiment)
        self.evaluation = OnlineEvaluation(
            experiment, self.source, self.rank, self.num_ranks, self.device
        )
        with Requests(self.folder, self.context, experiment.scaling) as self.requests:
            self._train(newest, batches)
            moves = self.saved < self.total and self.requests.reason in {"resize", "taken"}
            if moves and self.rank == 0:  # before all end: with the first of them Ray ends the rest
                self.inbox.put(RanksMove(self.saved, self.num_ranks, self.requests.taken))
            self.requests.close()
        if moves:  # all have saved
            raise RanksMoved(f"after step {self.saved}")

    def _train(self, newest: checkpoint.Checkpoint | None, batches: Iterator[Batch]) -> None:
        """Train from where a checkpoint stands, all being built."""
        experiment, start = self.experiment, newest.step if newest else 0
        self.exported = RankMetrics(self.folder.name, self.rank, self.heartbeat, start)
        if newest is None:
            self._check_finite(0, self.model.state_dict())
            before = self.evaluation.before_training(self.model)
            if before:
                self._send(0, 0, before)
        self.inbox.put(WorkerReady(self.rank, self.num_ranks))
        model = collectives.data_parallel(self.model, compressed=experiment.compress_gradients)
        schedule = schedule_of(self.resolved, self.rollbacks.halved_at)
        self.meter = StepMeter(
            self.device, schedule, ReportInterval.of(newest.record if newest else {})
        )
        loop.train(
            model,
            self.loss,
            self.optimizer,
            finish_batches(experiment, self.source, self._waited_for(batches), self.device),
            schedule,
            loop.Callbacks(self.report, self.epoch_end, self.save, self.requests.ask),
            precision=experiment.precision,
            seed=experiment.seed,
            num_groups=experiment.num_groups,
            clip_norm=experiment.optimizer.clip_norm,
            meter=self.meter,
        )

    def close(self) -> None:
        """End the rank's thread, however it has ended itself: its process may go on."""
        self.heartbeat.close()

    def report(self, metrics: loop.Metrics) -> None:
        """Send the metrics to the driver."""
        named = metrics._asdict()
        step, epoch = named.pop("step"), named.pop("epoch")
        named[self.loss.top1_name] = named.pop("top1")
        values = {f"train/{name}": value for name, value in named.items()}
        for module in self.model.modules():
            if isinstance(module, LearnableTemperature):
                values["train/temperature"] = module.log_temperature.exp().item()
        self._send(step, epoch, values)
        self.exported.reported(step)

    def epoch_end(self, epoch: int, step: int) -> None:
        """Evaluate and save when it is due. A collective."""
        every, last = self.experiment.evaluation.every_epochs, step == self.total
        if every and (epoch % every == 0 or last):
            self._check_finite(step, self.model.state_dict())  # else evaluation fails for it
            self.heartbeat.enter("evaluation", step)
            self._send(step, epoch, self.evaluation(self.model))
        if epoch % self.experiment.checkpoint.every_epochs == 0 or last:
            self.save(step)

    def save(self, step: int) -> None:
        """Write a checkpoint. A collective.

        Raises:
            DivergedError: A weight is not finite, on all ranks at once, since they hold the same.
        """
        if step == self.saved:
            if self.requests.reason:
                # saved at the epoch's end, before the request to stop came: the first rank that
                # ends would end an upload that is still under way
                self.uploaded.wait()
                collectives.broadcast_text("")
            return
        self.heartbeat.enter("checkpoint", step)
        began = time.monotonic()
        self.uploaded.wait()  # one at a time: else they would pile up on this machine's disk
        tensors = checkpoint.pack(self.model, self.optimizer)
        self._check_finite(step, tensors)
        local, interval = None, self.meter.interval()
        name = collectives.broadcast_text(checkpoint.new_name(step))
        if self.rank == 0:
            local = Path(tempfile.gettempdir()) / f"{self._scratch_prefix}{name}"
            record = {
                "experiment": cfg.to_tree(self.experiment),
                **self.resolved.identity,
                **self.rollbacks.record,
                **(interval.record if interval else {}),
                "class_names": list(self.resolved.class_names),
            }
            checkpoint.write(local, step, tensors, record)
            self.uploaded.clear()
        is_last = step == self.total or self.requests.reason != ""
        wait = is_last or self.upload_s < SLOW_S
        self.context.save(step, local, name, self._upload, wait=wait)
        self.saved = step
        self.exported.saved(time.monotonic() - began)

    def _check_finite(self, step: int, tensors: Mapping[str, Tensor]) -> None:
        wrong = checkpoint.first_not_finite(tensors.items())
        if wrong:
            problem = f"{wrong} is not finite at step {step}"
            error = DivergedError(problem if step else BAD_START.format(wrong))
            error.rate_may_help = step > 0
            raise error

    def _upload(self, written: Path, name: str) -> None:
        """Copy a checkpoint to where the run lies, its record last: what has one is whole."""
        began = time.monotonic()
        try:
            with_retries(lambda: self.folder.put_checkpoint(written, name), name)
        except BaseException as error:
            if final_error(error) is not None:  # after others Ray tries the same files again
                shutil.rmtree(written, ignore_errors=True)
                tell_final(self.inbox, error)  # one beside the steps raises in no caller of ours
            raise
        finally:
            self.upload_s = time.monotonic() - began
            self.uploaded.set()

    @property
    def _scratch_prefix(self) -> str:
        """What the names of this run's checkpoints begin with before they are uploaded."""
        storage = hashlib.sha256(self.folder.uri.encode()).hexdigest()[:6]  # names do not tell it
        return f"simclr_ray-{self.folder.name}-{storage}-"

    def _clear_scratch(self) -> None:
        """Remove what a killed worker of this run has left on this machine."""
        for left in Path(tempfile.gettempdir()).glob(f"{glob.escape(self._scratch_prefix)}step-*"):
            shutil.rmtree(left, ignore_errors=True)

    def _newest(self) -> checkpoint.Checkpoint | None:
        """Return the newest whole checkpoint, the one that rank 0 finds. A collective.

        Raises:
            CheckpointError: There are checkpoints, and none can be gone on from.
        """
        identity = self.resolved.identity
        newest = self.folder.newest_checkpoint(identity) if self.rank == 0 else nullcontext()
        with newest as own:
            if self.rank == 0 and own is None:
                self.folder.check_resumable(identity)
            name = collectives.broadcast_text(own.name if own else "")
            if own:
                return checkpoint.read(own, identity)
        if not name:
            return None
        with self.folder.fetched(name) as path:
            return checkpoint.read(path, identity)

    def _build(self, newest: checkpoint.Checkpoint | None) -> None:
        """Make the model and the optimizer, as they were when the checkpoint was written."""
        self.model = build_model(self.experiment)
        if newest is None:
            load_init(self.model, self.experiment)
        self.optimizer = prepare_training(self.model, self.experiment, self.device)
        if newest is not None:
            checkpoint.unpack(newest.tensors, self.model, self.optimizer)

    def _waited_for(self, batches: Iterator[Batch]) -> Iterable[Batch]:
        return self.meter.timed(self._with_replaced_rows_sent(batches))

    def _with_replaced_rows_sent(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """Pass batches on; tell the driver, once, of each row that had to be replaced.

        And how long the first one was waited for, all else being ready.
        """
        sent: set[int] = set()
        wait_began = time.perf_counter()
        for index, batch in enumerate(batches):
            if index == 0:
                waited = {FIRST_BATCH: time.perf_counter() - wait_began}
                self._send(batch.step, batch.step / self.resolved.steps_per_epoch, waited)
            for row_id, *about in zip(batch.bad.tolist(), batch.reasons, batch.paths, strict=True):
                if row_id not in sent:
                    sent.add(row_id)
                    named = dict(zip(("reason", "path"), about, strict=True))
                    self.inbox.put({"step": batch.step, "id": row_id, **named})
            self.heartbeat.enter("step", batch.step)
            yield batch
            self.heartbeat.enter("data", batch.step + 1)

    def _send(self, step: int, epoch: float, values: dict[str, float]) -> None:
        if self.rank == 0:
            self.inbox.put({"step": step, "epoch": epoch, "total": self.total, **values})
            self.exported.logged(epoch, values)


def check_storage(folder: RunFolder, driver: str, wait_s: float = 0.0) -> None:
    """Check that this machine has the run folder of the driver's: of another there is no way back.

    Ray looks at it once, in the driver, and each node would keep the checkpoints of its own ranks.

    Args:
        folder: Of the run.
        driver: As `WorkerInput` has it.
        wait_s: For what the driver has written to be seen here.

    Raises:
        ConfigError: It is another folder, or none.
    """
    if folder.local is None or not driver or run_lock.is_seen(folder.local, driver, wait_s):
        return
    raise ConfigError.of(
        "storage",
        f"{folder.storage} on {platform.node()} is not that of {driver}: workers on several "
        "machines need one that all of them have, as of NFS, or a bucket (s3://, gs://)",
    )


def prepare_training(
    model: SimCLRModel, experiment: Experiment, device: torch.device
) -> torch.optim.Optimizer:
    """Put a model where and how it is trained, in place; return its optimizer."""
    set_recompute(model.encoder, recompute=experiment.scaling.recompute_activations)
    prepare_model(model, device, experiment.precision)
    return build_optimizer(model, experiment.optimizer)


def prepare_process(experiment: Experiment, workers_here: int) -> None:
    """Set threads, allocator and what carries small vectors, for a worker on this node."""
    set_threads(experiment, workers_here)
    keep_freed_memory()
    collectives.allow_shared_memory(allowed=experiment.scaling.shared_memory)


def set_threads(experiment: Experiment, workers_here: int) -> None:
    """Share the node's cores between its workers; Ray sets one thread where CPUs are below 1."""
    torch.set_num_threads(threads_of(experiment, workers_here))


def threads_of(experiment: Experiment, workers_here: int = 0) -> int:
    """Return the threads of a worker, on a node of so many of them; 0: of all."""
    scaling = experiment.scaling
    return scaling.threads_per_worker or max(1, cores() // (workers_here or scaling.max_workers))
