"""The Ray cluster at hand: connecting to it, or starting one on this machine."""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import os
import re
import signal
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from typing import Any, Final

import ray
from ray import cloudpickle
from ray._private import services
from ray.experimental import internal_kv
from ray.util.queue import Queue
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from simclr_ray.config.experiment import Experiment
from simclr_ray.config.imports import EVERYTHING, PERMISSION, imports_in, runtime_env
from simclr_ray.config.wording import counted
from simclr_ray.distributed import ray_logging, ray_reaper, ray_token
from simclr_ray.distributed.machine import cores
from simclr_ray.distributed.machine_limits import check_fits
from simclr_ray.distributed.malloc import one_arena
from simclr_ray.distributed.object_store import local_store_bytes
from simclr_ray.distributed.placement import nodes
from simclr_ray.distributed.ray_address import STARTED_HERE, check_answers, names_cluster
from simclr_ray.errors import ClusterError, last_line, one_line

# Each idle process of Ray takes 0.7 % of a core, and more for metrics that nobody reads here: those
# that were started in advance and have found no work are ended after a while.
QUIET = {
    "enable_metrics_collection": False,
    "num_workers_soft_limit": 0,
    "idle_worker_killing_time_threshold_ms": 30_000,
    # 100,000 calls of actors would be kept for a dashboard that is not there: 250 MB in some hours
    "task_events_report_interval_ms": 0,
}
STARTS: Final = 2  # of a Ray on this machine, where the first fails
REMEDY: Final = (
    "set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN_PATH or RAY_AUTH_TOKEN to that of the cluster "
    "(docs/cluster.md)"
)
_ADDRESS: Final = re.compile(r"auto|local|(\w+://)?\[?[\w.:-]+\]?:\d+")
NAMESPACE: Final = "simclr-ray"  # of ours in Ray's GCS, which all jobs of a cluster read
LOCAL: Final = "local"  # key there of a cluster that `connect` has started
log = logging.getLogger(__name__)


def connect(
    experiment: Experiment | None = None,
    *,
    copies: int = 1,
    others: Sequence[Experiment] = (),
    paths: Sequence[str] = (),
) -> None:
    """Connect to the cluster of `RAY_ADDRESS`, or start one on this machine. Idempotent.

    A handler of SIGTERM stays.

    A cluster that is started here offers as many logical CPUs and, as far as there is room, as
    large an object store as `copies` of `experiment` need, asks for a token of its own, and ends
    with this process, however that ends.
    Code that `experiment` and `others` import, and that of the import `paths`, is shipped to all
    workers, by the job's runtime environment.

    Raises:
        ClusterError: No cluster answers or starts; or this process had connected before, without
            the code that they import.
    """
    # Ray Data sets its own level when it is imported: by this variable, if it is there
    os.environ.setdefault("RAY_DATA_LOG_LEVEL", "ERROR")
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    whose = [experiment, *others]
    if ray.is_initialized():
        _check_code(whose, paths)
        return
    check_machine(experiment, copies)
    code = runtime_env(whose, *paths) or None
    os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")
    ray_token.remove()  # another cluster has its own
    if not names_cluster():  # unset, or down again
        os.environ.pop("RAY_ADDRESS", None)
    if "RAY_ADDRESS" in os.environ:
        _join(os.environ["RAY_ADDRESS"], code)
        return
    # one machine is not preempted, and the watcher costs a process
    os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
    # logical CPUs may exceed cores: workers and decode actors share them by time
    wanted = 0.0
    if experiment:
        evaluation = experiment.evaluation
        wanted = max(
            copies * experiment.scaling.num_cpus,
            evaluation.num_actors * evaluation.cpus_per_actor,
        )
    log.info("starting Ray on this machine")
    began = time.monotonic()
    ray_token.create()
    _start(
        address="local",
        num_cpus=max(cores(), math.ceil(wanted) + 1),
        object_store_memory=local_store_bytes(experiment, copies),
        runtime_env=code,
        include_dashboard=False,  # five processes; MLflow and the terminal show the run
        # several runs start their processes side by side; else Ray warns of their number
        _system_config=QUIET
        | ({"worker_maximum_startup_concurrency": 4 * copies} if copies > 1 else {}),
    )
    # Ray Train's helpers find the cluster by this, where several run on one machine
    os.environ["RAY_ADDRESS"] = ray.get_runtime_context().gcs_address
    STARTED_HERE.add(os.environ["RAY_ADDRESS"])
    internal_kv._internal_kv_put(LOCAL, "", namespace=NAMESPACE)
    log.info("Ray is up after %.0f s", time.monotonic() - began)


def start_to_check() -> None:
    """Start a small Ray on this machine with a dashboard, which `doctor` asks; it dies with us.

    Raises:
        ClusterError: It does not start.
    """
    ray_token.create()
    _start(address="local", object_store_memory=128 * 2**20, include_dashboard=True)


def _start(**options: Any) -> None:
    """Start Ray on this machine; a second time where the first fails.

    Its raylet gives its agents 30 s to come up, and no setting makes the driver wait longer: on a
    busy machine that is too little now and then.

    Raises:
        ClusterError: It does not start.
    """
    for attempt in range(STARTS):
        try:
            _init_marked(**options)
        except Exception as error:  # Ray has no type of its own for it
            ray.shutdown()  # what it has started by then
            if attempt + 1 < STARTS:
                log.info("Ray did not start, as on a very busy machine; once more")
                continue
            raise ClusterError(
                "Ray did not start on this machine; is it very busy, or out of memory? "
                f"{one_line(error)}"
            ) from error
        return


def _init_marked(**options: Any) -> None:
    """Same as `init`; what it starts ends when this process is gone, even by SIGKILL."""
    mark = uuid.uuid4().hex
    reaper = ray_reaper.start(mark)
    os.environ[ray_reaper.MARK] = mark
    added = {k: v for k, v in one_arena().items() if k not in os.environ}  # for its processes
    os.environ.update(added)
    try:
        with _groups_of_their_own():
            session = str(init(**options).address_info["session_dir"])
        if reaper:
            with contextlib.suppress(OSError):
                reaper.write(session.encode())
    finally:
        for name in (ray_reaper.MARK, *added):  # what this process itself starts is none of Ray
            del os.environ[name]
        if reaper:
            with contextlib.suppress(OSError):
                reaper.close()


@contextlib.contextmanager
def _groups_of_their_own() -> Iterator[None]:
    """Have each process that Ray starts lead a process group.

    A signal to that of the driver, by `timeout`, systemd or a scheduler, would end Ray before the
    workers have saved.
    """
    of_ray: Any = services
    usual = of_ray.ConsolePopen
    of_ray.ConsolePopen = functools.partial(usual, process_group=0)
    try:
        yield
    finally:
        of_ray.ConsolePopen = usual


def _join(address: str, code: dict[str, Any] | None) -> None:
    """Connect to a cluster that is up, shipping code. Raises `ClusterError` where none answers."""
    log.info("connecting to the Ray cluster at %s", address)
    try:
        init(runtime_env=code)
    except ray.exceptions.AuthenticationError as error:
        raise ClusterError(f"RAY_AUTH_MODE=token, and there is no token; {REMEDY}") from error
    except (OSError, ValueError) as error:  # ConnectionError, which Ray raises, is one
        raise _refusal(address) from error
    except RuntimeError as error:  # such as another version of Ray or Python
        message = f"the Ray cluster at RAY_ADDRESS={address} cannot be joined: {last_line(error)}"
        raise ClusterError(message) from error
    alive = [node for node in nodes() if node.is_alive]
    cpus, gpus = sum(node.cpus for node in alive), sum(node.gpus for node in alive)
    log.info("connected: %s, %g CPUs, %g GPUs", counted(len(alive), "node"), cpus, gpus)


def _check_answers(address: str) -> None:
    try:
        check_answers(address)
    except OSError as error:
        raise _no_answer(address) from error


def _refusal(address: str) -> ClusterError:
    """Return why a client could not join: nobody answers, or who answers has another token."""
    with contextlib.suppress(OSError):
        check_answers(address)
        if address != "auto":
            mode = os.environ.get("RAY_AUTH_MODE", "unset")
            return ClusterError(
                f"a Ray cluster answers at RAY_ADDRESS={address} and turns this client away: its "
                f"token is missing or wrong (RAY_AUTH_MODE is {mode}); {REMEDY}"
            )
    return _no_answer(address)


def _no_answer(address: str) -> ClusterError:
    return ClusterError(
        f"no Ray cluster answers at RAY_ADDRESS={address}: it names the head's GCS, HOST:6379 as "
        "`ray start --head` says it, not the dashboard"
    )


def init(**options: Any) -> Any:
    """Connect by `ray.init`, without Ray's log; a SIGTERM handler that is installed is kept.

    Returns Ray's context, which differs between a cluster and a client of one (`ray://`).

    Ray puts its own there, which exits: a command would lose its exit code, and who stopped it.
    What Ray starts inherits that SIGHUP is blocked: it outlives the terminal, as the driver does,
    for as long as that needs it.
    """
    options |= ray_logging.options()
    handler = signal.getsignal(signal.SIGTERM)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})
    try:
        context = ray.init(logging_level=logging.ERROR, log_to_driver=False, **options)
    except SystemExit:  # by Ray's handler, before ours is back
        if callable(handler):
            handler(signal.SIGTERM, None)
        raise
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        if (
            handler not in (None, signal.SIG_DFL)
            and threading.current_thread() is threading.main_thread()
        ):
            signal.signal(signal.SIGTERM, handler)
    return context


def _check_code(whose: list[Experiment | None], paths: Sequence[str]) -> None:
    """Raise `ClusterError` if this process's job was begun without code that these import."""
    wanted = {*paths, *(node.path for _, node in imports_in(whose))}
    if not wanted:
        return
    job = ray.get_runtime_context().runtime_env
    permitted = set(job.get("env_vars", {}).get(PERMISSION, "").split(","))
    missing = {path for path in wanted if not {path, EVERYTHING} & permitted}
    if missing:
        raise ClusterError(
            f"Ray was started before the config that imports {', '.join(sorted(missing))} was "
            "read, so its workers lack that code; start Ray by this run, or by ray.init("
            "runtime_env=simclr_ray.config.imports.runtime_env(experiment))"
        )


def check_machine(experiment: Experiment | None, copies: int = 1) -> None:
    """Raise `ClusterError` for what Ray cannot give, before it is started or joined.

    Of a cluster that is named by `RAY_ADDRESS`, only whether something listens there is known.
    """
    if ray.is_initialized():
        return
    if names_cluster():
        address = os.environ["RAY_ADDRESS"]
        if not _ADDRESS.fullmatch(address):
            raise ClusterError(
                f"RAY_ADDRESS={address} is no address of a cluster; the form is HOST:PORT, "
                "ray://HOST:PORT or auto"
            )
        _check_answers(address)
    elif experiment is not None:
        check_fits(experiment, copies)


def is_local() -> bool:
    """Return whether the cluster at hand was started by a process for itself, by `connect`.

    The cluster itself says so, to all its processes: a trial of a study runs in one of them.
    Before Ray is connected, a process knows only of those that it has started.
    """
    address = os.environ.get("RAY_ADDRESS", "")
    return _says_local(address) if ray.is_initialized() else address in STARTED_HERE


@functools.cache  # one call a process: what is at an address stays what it is
def _says_local(address: str) -> bool:  # noqa: ARG001 - of the answer that is kept
    return internal_kv._internal_kv_get(LOCAL, namespace=NAMESPACE) is not None


class PickledQueue(Queue):
    """A Ray queue whose actor handles bytes only.

    An actor unpickles its arguments. For a message whose class stands beside torch it would import
    torch: 3 s of a core and 700 MB in a process that only passes it on.
    """

    def put(self, item: Any, *args: Any, **kwargs: Any) -> None:
        """Same as `ray.util.queue.Queue.put`."""
        super().put(cloudpickle.dumps(item), *args, **kwargs)  # type: ignore[no-untyped-call] # Ray's

    def get(self, *args: Any, **kwargs: Any) -> Any:
        """Same as `ray.util.queue.Queue.get`."""
        return cloudpickle.loads(super().get(*args, **kwargs))


def driver_queue() -> PickledQueue:
    """Return a new queue whose actor lives on this process's node.

    Ray places an actor without CPUs on any node. A run would then die with a node that holds
    nothing of it but the queue; on the driver's own node it is lost only with the driver.
    `ray.train.report` cannot carry progress: it is a barrier of all ranks, and stores each report
    with the run. The queue costs an actor without CPUs, and a worker one call a logged record.
    """
    here = ray.get_runtime_context().get_node_id()
    strategy = NodeAffinitySchedulingStrategy(here, soft=False)
    return PickledQueue(actor_options={"num_cpus": 0, "scheduling_strategy": strategy})
