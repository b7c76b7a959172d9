"""How large Ray's object store has to be for the views of a run, and what is said if it is not."""

from __future__ import annotations

from typing import Any

import pytest
import ray

from simclr_ray.config.experiment import Experiment
from simclr_ray.config.wording import GIB
from simclr_ray.distributed import object_store, ray_cluster, ray_token
from simclr_ray.distributed.object_store import (
    HAND_OVER_BYTES,
    LEAST_BYTES,
    local_store_bytes,
    num_decode_actors,
    store_bytes,
    store_line,
    table_bytes,
)
from simclr_ray.distributed.placement import Node, hand_over_bytes, store_problem
from simclr_ray.train.scaling import of_machine

SMALL = Experiment.load("cifar10_cpu", "data.train=x")


def run_on(preset: str, gpus: int, cpus: int) -> Experiment:
    """Return a preset as `scaling: auto` makes it on a machine."""
    run = Experiment.load(preset, "data.train=x", "scaling=auto")
    return run.model_copy(update={"scaling": of_machine(run.scaling, gpus, cpus)})


def machine_of(monkeypatch: pytest.MonkeyPatch, memory: float, shared: float | None) -> None:
    """Have this machine so many GiB of memory, and free in /dev/shm."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    bytes_free = None if shared is None else int(shared * GIB)
    monkeypatch.setattr(object_store, "machine_memory", lambda: int(memory * GIB))
    monkeypatch.setattr(object_store, "free_shared_memory", lambda: bytes_free)


@pytest.mark.parametrize(
    ("preset", "gpus", "cpus", "actors", "outstanding_gib"),
    # measured on a real Ray: three tables of each actor are outstanding
    [("photos_gpu", 8, 64, 56, 56 * 3 * 15.5 / 1024), ("photos_gpu", 4, 32, 28, 1.3),
     ("photos_gpu", 2, 16, 14, 0.43), ("photos_gpu", 1, 16, 8, 0.43),
     ("imagenet_resnet50", 8, 192, 64, 3.4)],
)  # fmt: skip
def test_a_store_holds_what_is_outstanding_and_more_before_ray_spills(
    preset: str, gpus: int, cpus: int, actors: int, outstanding_gib: float
) -> None:
    run = run_on(preset, gpus, cpus)
    assert num_decode_actors(run) == actors
    tables = 3 * actors * table_bytes(run) / GIB
    assert tables == pytest.approx(outstanding_gib, rel=0.03)
    # a fourth is being used, and Ray spills from 0.8 of a store on
    assert 0.7 * store_bytes(run, actors) > 4 / 3 * tables * GIB > 0.6 * store_bytes(run, actors)


def test_a_table_is_of_whole_steps() -> None:
    run = run_on("photos_gpu", 8, 64)  # 9 or 10 of 512 images an actor
    image = 2 * 3 * 224**2
    assert table_bytes(run) == 6 * 9 * image  # 5 of 10 are fewer
    assert table_bytes(run, 8 * 2**20) == 3 * 9 * image
    assert table_bytes(run, 0) == 10 * image  # one step


def test_a_local_store_is_as_large_as_the_run_needs_and_no_smaller_than_it_was(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    machine_of(monkeypatch, memory=1000, shared=500)
    assert LEAST_BYTES == 2**30
    for run in (None, SMALL, run_on("photos_gpu", 1, 16), run_on("photos_gpu", 2, 16)):
        assert local_store_bytes(run) == 2**30
    large = run_on("photos_gpu", 8, 64)
    needed = store_bytes(large, 56)
    assert local_store_bytes(large) == needed == pytest.approx(2 * 2.54 * GIB, rel=0.01)
    assert local_store_bytes(large, copies=3) == 3 * needed


@pytest.mark.parametrize(
    ("memory", "shared", "expected_gib"),
    [(10, 500, 3.0), (1000, 2, 1.9), (1000, None, 5.09), (2, 0.06, 1.0), (1, 500, 1.0)],
)
def test_memory_and_shared_memory_bound_a_local_store(
    memory: float, shared: float | None, expected_gib: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Above what /dev/shm holds Ray puts a store on disk, and refuses one of 10 GB or more."""
    machine_of(monkeypatch, memory, shared)
    large = run_on("photos_gpu", 8, 64)
    assert local_store_bytes(large) / GIB == pytest.approx(expected_gib, rel=0.01)


def test_ray_is_started_with_the_store_of_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    machine_of(monkeypatch, memory=1000, shared=500)
    started: dict[str, Any] = {}

    def start(**options: Any) -> None:
        started.update(options)
        raise InterruptedError

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray_cluster, "check_machine", lambda *_: None)
    for name in ("create", "remove"):  # the session's cluster asks for its token later as well
        monkeypatch.setattr(ray_token, name, lambda: None)
    monkeypatch.setattr(ray_cluster, "_start", start)
    large = run_on("photos_gpu", 8, 64)
    for run, expected in ((large, store_bytes(large, 56)), (SMALL, 2**30), (None, 2**30)):
        with pytest.raises(InterruptedError):
            ray_cluster.connect(run)
        assert started["object_store_memory"] == expected


@pytest.mark.parametrize(
    ("memory", "shared", "said"),
    [
        (1000, 500, "in /dev/shm"),
        (1000, 2, "this machine has room for 1.9: fewer steps are handed over at once"),
        (1000, 0.06, "/dev/shm has 0.1 free, so that Ray keeps them on disk: more of /dev/shm"),
        (3, 500, "this machine has room for 1.0: fewer steps are handed over at once"),
    ],
)
def test_a_dry_run_says_what_a_large_run_needs_and_gets(
    memory: float, shared: float, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine_of(monkeypatch, memory, shared)
    line = store_line(run_on("photos_gpu", 8, 64))
    assert line.startswith("5.1 GiB for the views of 56 decode actors")
    assert said in line
    assert store_line(SMALL) == ""
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert "doctor --cluster" in store_line(run_on("photos_gpu", 8, 64))


def test_where_single_steps_do_not_fit_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    machine_of(monkeypatch, memory=10, shared=500)
    line = store_line(run_on("imagenet_resnet50", 1, 16))  # 8 actors with 147 MiB a step
    assert line.startswith(
        "6.9 GiB for the views of 8 decode actors; this machine has room for 3.0"
    )
    assert "Ray writes each batch to disk" in line
    assert "--shm-size" in line


def nodes_with(store_gib: float, num: int = 1, **values: Any) -> list[Node]:
    node = Node("10.0.0.1", True, 64.0, 8.0, store=store_gib * GIB)._replace(**values)
    return [node._replace(id=str(i), address=f"10.0.0.{i}") for i in range(num)]


def test_less_is_handed_over_where_a_store_is_small() -> None:
    large = run_on("photos_gpu", 8, 64)
    assert hand_over_bytes(large, nodes_with(16)) == HAND_OVER_BYTES
    assert hand_over_bytes(large, nodes_with(0)) == HAND_OVER_BYTES  # its size is not known
    assert hand_over_bytes(large, []) == HAND_OVER_BYTES
    one = hand_over_bytes(large, nodes_with(1))
    assert store_bytes(large, 56, one) <= GIB
    assert store_bytes(large, 56, 2 * one) > GIB
    assert store_problem(large, nodes_with(1)) == ""
    assert hand_over_bytes(SMALL, nodes_with(1)) == HAND_OVER_BYTES


def test_a_node_whose_store_holds_no_steps_is_named() -> None:
    large = run_on("imagenet_resnet50", 8, 192)
    assert store_problem(large, nodes_with(8)) == ""
    line = store_problem(large, nodes_with(4))
    assert "10.0.0.0 4.0 of 6.9 GiB; Ray writes each batch to disk: " in line
    assert store_problem(large, nodes_with(0)) == ""
    assert store_problem(SMALL, nodes_with(0.2)) == ""


def test_nodes_that_decode_share_the_views_and_those_that_train_have_their_own() -> None:
    apart = {"scaling.data_label_selector.role=data", "scaling.gpus_per_worker=1"}
    run = Experiment.load(
        "imagenet_resnet50", "data.train=x", "scaling.num_workers=4", *sorted(apart)
    )
    data = nodes_with(2, 4, gpus=0.0, labels={"role": "data"})
    gpu = nodes_with(2, 4, gpus=1.0, cpus=8.0, address="10.0.1.0")
    assert store_problem(run, [*data, *gpu]) == ""  # a quarter of 6.9 GiB each
    packed = [n._replace(gpus=4.0) for n in gpu]
    assert store_problem(run, [*data, *packed]).count("of 6.9 GiB") == 4
    assert store_problem(run, [*data[:2], *gpu]).count("of 3.4 GiB") == 2
    head = nodes_with(0.1, cpus=0.0, gpus=0.0)
    assert store_problem(run, [*head, *data, *gpu]) == ""
