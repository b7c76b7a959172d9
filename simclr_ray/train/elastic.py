"""How many workers a run has, and when they are started: Ray Train's policies, and what they lack.

With `scaling.num_workers=[least, most]` Ray counts every few seconds the workers that there is
room for, and starts the group anew where that is another number. Ray 2.60 falls short in six
things, each mended here and shown in `tests/unit/train/test_elastic.py` and
`tests/faults/test_elastic.py`:

- it ends workers in the middle of a step: here they save first and end by themselves
  (`requests.RanksMoved`), and no step is made twice;
- it counts what workers take: here there has to be room for the data actors of each as well, for a
  fixed number, too, whose workers would else wait for the first batch until they are given up;
- it counts nodes that are being drained, and those of up to 20 s ago: here neither (what it keeps
  for the run may lie on such a node, and then it lies elsewhere);
- what it keeps for the run may lie on nodes without the labels that workers need: here what is free
  on nodes with them counts as well;
- a killed run keeps what it had asked for during 180 s: here what is free counts, where else fewer
  than the fewest workers would be left;
- what waits for room keeps a core busy, and hears of no interrupt.
"""

from __future__ import annotations

import logging
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, Final

import ray
import ray.train.v2.api.config as ray_config
from ray.train.v2._internal.callbacks.backend_setup import BackendSetupCallback
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.execution.scaling_policy import (
    ElasticScalingPolicy,
    FixedScalingPolicy,
    NoopDecision,
    ResizeDecision,
    ScalingDecision,
)
from ray.train.v2.torch.torch_trainer import TorchTrainer

from simclr_ray.config.sections.running import ScalingConfig
from simclr_ray.distributed.placement import free_nodes, matches, staying_nodes, workers_on
from simclr_ray.distributed.ray_cluster import PickledQueue, is_local
from simclr_ray.storage.run_folder import RunFolder
from simclr_ray.train.restarts import BackendEnd, RestartPolicy
from simclr_ray.train.stop import RESIZE

RESIZE_S: Final = 10.0  # how often the running workers are counted anew
ANSWER_S: Final = 5.0  # for Ray's actor that keeps account
WAIT_S: Final = 1.0  # between two looks for room
ABORT_S: Final = 10.0  # until a controller that does not hear of an interrupt is killed
log = logging.getLogger(__name__)


class Trainer(TorchTrainer):
    """Ray's trainer, whose number of workers may change as `scaling` says."""

    def __init__(
        self,
        *args: Any,
        scaling: ScalingConfig,
        folder: RunFolder,
        inbox: PickledQueue,
        abort_s: float = ABORT_S,
        **options: Any,
    ) -> None:
        super().__init__(*args, **options)
        self._scaling, self._folder, self._inbox = scaling, folder, inbox
        self._abort_s = abort_s

    def _create_default_callbacks(self) -> list[Any]:
        replacements: dict[type, Any] = {
            BackendSetupCallback: BackendEnd(self.backend_config),
            DatasetsCallback: _NoDatasets(self.train_run_context, {}),
        }
        return [replacements.get(type(c), c) for c in super()._create_default_callbacks()]

    def _register_sigint_handler(self, controller: Any) -> None:
        """Have an interrupt also end a run that waits for room: its controller hears nothing."""
        super()._register_sigint_handler(controller)
        of_ray: Any = signal.getsignal(signal.SIGINT)

        def end(number: int, frame: Any) -> None:
            late = threading.Timer(self._abort_s, ray.kill, [controller])
            late.daemon = True
            late.start()
            try:
                of_ray(number, frame)
            finally:
                late.cancel()

        signal.signal(signal.SIGINT, end)

    def _initialize_and_run_controller(self, **parts: Any) -> Any:
        of_ray: Any = self.scaling_config
        failures: Any = self.run_config.failure_config
        if self._scaling.is_elastic:
            parts["scaling_policy"] = ElasticWorkers(of_ray, self._scaling, self._folder)
        else:
            parts["scaling_policy"] = FixedWorkers(of_ray, self._scaling)
        parts["failure_policy"] = RestartPolicy(failures, self._inbox)
        return super()._initialize_and_run_controller(**parts)


class _NoDatasets(DatasetsCallback):
    """Ray's, less the actor that hands out a trainer's `datasets`: each rank makes its own stream.

    It would take a process and 1.8 s of a core, just while the workers start.
    """

    def before_init_train_context(self, workers: list[Any]) -> dict[str, list[Any]]:  # noqa: ARG002 - Ray's form
        """Return nothing for the workers to be given."""
        return {}


@contextmanager
def interrupts_kept() -> Iterator[None]:
    """Raise `KeyboardInterrupt` for an interrupt while Ray trains; then put the handler back.

    Ray's own handler aborts the run and exits by 0; and Ray leaves it behind.
    """
    handler = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit:
        raise KeyboardInterrupt from None
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, handler)


class FixedWorkers(FixedScalingPolicy):
    """Ray's policy, which waits until the data actors have room as well."""

    def __init__(self, of_ray: ray_config.ScalingConfig, scaling: ScalingConfig) -> None:
        super().__init__(of_ray)
        self.scaling = scaling

    def after_controller_start(self, train_run_context: Any) -> None:
        """Tell Ray's autoscaler what is needed, where there may be one.

        Ray waits for the answer of an actor, which takes seconds to start, before it starts the
        workers. A cluster of this machine alone grows by nothing.
        """
        if not is_local():
            super().after_controller_start(train_run_context)

    def _maybe_send_resource_request(self) -> None:
        if self._coordinator_client is not None:
            super()._maybe_send_resource_request()  # type: ignore[no-untyped-call] # Ray's

    def make_decision_for_non_running_worker_group(self) -> ScalingDecision:
        """Return to start all workers, or to wait."""
        decision = super().make_decision_for_non_running_worker_group()
        room = workers_on(staying_nodes(), self.scaling)
        return decision if room >= self.scaling.min_workers else wait()


class ElasticWorkers(ElasticScalingPolicy):
    """Ray's policy; it lives in the process that Ray Train keeps for a run."""

    def __init__(
        self, of_ray: ray_config.ScalingConfig, scaling: ScalingConfig, folder: RunFolder
    ) -> None:
        super().__init__(of_ray)
        self.scaling, self.folder = scaling, folder
        self._resizing = True  # the workers are to save; by a killed driver they may be
        self._num_running = 0

    def make_decision_for_non_running_worker_group(self) -> ScalingDecision:
        """Return with how many workers to start."""
        self._num_running = 0
        if self._resizing:
            with suppress(OSError):  # then the next group saves and starts again once more
                self.folder.remove(RESIZE)
                self._resizing = False
        decision = super().make_decision_for_non_running_worker_group()
        return wait() if isinstance(decision, NoopDecision) else decision

    def make_decision_for_running_worker_group(
        self, worker_group_state: Any, worker_group_status: Any
    ) -> ScalingDecision:
        """Ask the workers to save and start again where another number of them has room."""
        self._num_running = worker_group_state.num_workers
        decision = super().make_decision_for_running_worker_group(
            worker_group_state, worker_group_status
        )
        if isinstance(decision, ResizeDecision):
            self._resizing = True
            with suppress(OSError):  # of a store that does not answer now: the next time
                self.folder.write_text(RESIZE, "")
        return NoopDecision()

    def _get_reserved_resources(self) -> dict[str, dict[str, float]] | None:
        """Return what Ray keeps for this run as of now; None: it did not answer."""
        try:
            kept: dict[str, dict[str, float]] = ray.get(
                self._autoscaling_coordinator.get_reserved_resources.remote(
                    self._requester_id, recompute=True
                ),
                timeout=ANSWER_S,
            )
        except Exception as error:  # noqa: BLE001 - whatever it is: the next round asks again
            log.warning("Ray's account of resources did not answer: %s", error)
            return None
        return kept

    def _count_possible_workers(self, reserved_resources: Mapping[str, dict[str, float]]) -> int:
        """Return the workers that there is room for, with their data actors."""
        nodes, scaling = staying_nodes(), self.scaling
        selector = scaling.worker_selector
        fitting = {node.id for node in nodes if matches(selector, node.labels)}
        kept = super()._count_possible_workers(
            {node: kept for node, kept in reserved_resources.items() if node in fitting}
        )
        if selector or kept < scaling.min_workers:
            kept = max(kept, self._num_running + workers_on(free_nodes(), scaling))
        return min(kept, workers_on(nodes, scaling), scaling.max_workers)


def wait() -> NoopDecision:
    """Return to wait, a little later: Ray asks again at once, and would keep a core busy."""
    time.sleep(WAIT_S)
    return NoopDecision()
