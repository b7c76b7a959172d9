"""A run whose workers come and go with the nodes of its cluster: the curve of one that is alone."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from simclr_ray import config as cfg
from simclr_ray.config.experiment import Experiment
from simclr_ray.train.resolve import resolve
from tests.cluster.nodes import Network, Node
from tests.faults.curves import check_equal, check_same, last_step, repeated, tree_of, undisturbed
from tests.ray.images import write_splits

pytestmark = [pytest.mark.long, pytest.mark.timeout(1500)]
WAIT_S = 240.0
ENV = {"GLOO_SOCKET_IFNAME": "eth0"}


class ClusterRun:
    """A `pretrain` on the head of a network, and what it says."""

    def __init__(self, network: Network, head: Node, tree: dict[str, Any]) -> None:
        config = network.folder / "run.yaml"
        config.write_text(cfg.dump_yaml(tree))
        self.head = head
        self.folder = Path(resolve(cfg.validate(Experiment, tree)).folder.uri)
        self.process = head.popen(
            [sys.executable, "-m", "simclr_ray", "pretrain", str(config)], log="pretrain"
        )

    @property
    def said(self) -> str:
        return (self.head.folder / "pretrain.log").read_text()

    @property
    def step(self) -> int:
        """Of the last record of its log."""
        return last_step(self.folder)

    def wait(self, until: Callable[[], bool], what: str) -> float:
        """Return the seconds until something holds; `what` names it where it does not."""
        began = time.monotonic()
        while not until():
            assert self.process.poll() is None, f"ended before {what}\n{self.said}"
            assert time.monotonic() - began < WAIT_S, f"no {what}\n{self.said}"
            time.sleep(0.2)
        return time.monotonic() - began

    def wait_for_steps(self, number: int) -> float:
        """Return the seconds until so many more steps are made."""
        first = self.step
        return self.wait(lambda: self.step >= first + number, f"step {first + number}")

    def wait_for_workers(self, number: int, times: int) -> float:
        """Return the seconds until a group of so many workers is up for the n-th time."""
        line = f"{number} of {number} worker"
        return self.wait(lambda: self.said.count(line) >= times, f"{times} times {number} workers")


def test_four_workers_then_three_then_four_then_two(network: Network) -> None:
    tree = tree_of(
        write_splits(network.folder, 330), network.folder / "runs", epochs=90,
        scaling={"num_workers": [2, 4], "cpus_per_worker": 0.5, "cpus_per_data_actor": 0.5,
                 "threads_per_worker": 1},
    )  # fmt: skip
    expected = undisturbed(tree).losses
    times: dict[str, float] = {}
    with ExitStack() as stack:

        def node(name: str, *, cpus: float, head: bool = False) -> Node:
            return stack.enter_context(network.node(name, env=ENV, cpus=cpus, head=head))

        head = node("head", head=True, cpus=2)
        second, third = node("second", cpus=1), node("third", cpus=1)
        run = ClusterRun(network, head, tree)
        times["start"] = run.wait_for_workers(4, 1)
        run.wait_for_steps(60)
        third.drain(15)
        times["4 to 3"] = run.wait_for_workers(3, 1)
        third.kill()
        run.wait_for_steps(30)
        fourth = node("fourth", cpus=1)
        times["3 to 4"] = run.wait_for_workers(4, 2)
        run.wait_for_steps(30)
        with ThreadPoolExecutor() as both:
            list(both.map(lambda node: node.drain(15), (second, fourth)))
        times["4 to 2"] = run.wait_for_workers(2, 1)
        second.kill()
        fourth.kill()
        assert run.process.wait(timeout=2 * WAIT_S) == 0, run.said
    sys.stdout.write(f"{run.said}\n{times}\n")
    sizes = [int(n) for n in re.findall(r"(\d) of \1 workers ready", run.said)]
    # two nodes that go at once may be counted one after the other
    assert sizes in ([4, 3, 4, 2], [4, 3, 4, 3, 2])
    assert "Traceback" not in run.said
    assert repeated(run.folder) == []
    check_equal(run.folder, tree, expected)


def test_of_three_nodes_one_is_lost_and_another_joins(network: Network) -> None:
    tree = tree_of(
        write_splits(network.folder, 330), network.folder / "runs", epochs=40,
        scaling={"num_workers": 3, "cpus_per_worker": 0.6, "cpus_per_data_actor": 0.4,
                 "collective_timeout_s": 60.0, "threads_per_worker": 1},
    )  # fmt: skip
    expected = undisturbed(tree).losses
    with (
        network.node("head", head=True, cpus=1, env=ENV) as head,
        network.node("second", cpus=1, env=ENV),
        network.node("third", cpus=1, env=ENV) as third,
    ):
        run = ClusterRun(network, head, tree)
        run.wait_for_steps(60)
        third.kill()
        named_s = run.wait(lambda: f"on {third.address} has not answered" in run.said, "a name")
        run.wait(lambda: "waiting for a node to join" in run.said, "a word of what it waits for")
        with network.node("fourth", cpus=1, env=ENV):
            went_on_s = run.wait_for_steps(1)
            assert run.process.wait(timeout=2 * WAIT_S) == 0, run.said
    sys.stdout.write(f"{run.said}\nnamed after {named_s:.0f} s, a step {went_on_s:.0f} s after\n")
    assert named_s < 20 + 5  # so long a beat may have just gone out
    assert went_on_s < 60
    assert "Traceback" not in run.said
    assert len(repeated(run.folder)) <= 10  # an interval of checkpoints
    check_equal(run.folder, tree, expected)


def test_a_node_that_is_drained_with_15_s_notice_costs_no_step(network: Network) -> None:
    tree = tree_of(
        write_splits(network.folder, 330), network.folder / "runs", epochs=40,
        checkpoint={"every_epochs": 40},
        scaling={"num_workers": 2, "cpus_per_worker": 0.6, "cpus_per_data_actor": 0.4,
                 "threads_per_worker": 1},
    )  # fmt: skip
    expected = undisturbed(tree).losses
    with (
        network.node("head", head=True, cpus=1, env=ENV) as head,
        network.node("second", cpus=1, env=ENV) as second,
    ):
        run = ClusterRun(network, head, tree)
        run.wait_for_steps(60)
        second.drain(15)
        told_s = run.wait(lambda: "1 node will be taken away" in run.said, "a word of the drain")
        with network.node("third", cpus=1, env=ENV):
            second.kill()
            run.wait_for_steps(1)
            assert run.process.wait(timeout=2 * WAIT_S) == 0, run.said
    sys.stdout.write(f"{run.said}\nsaved {told_s:.1f} s after the notice\n")
    assert "Traceback" not in run.said
    assert len(repeated(run.folder)) <= 1
    check_equal(run.folder, tree, expected)


def test_workers_go_on_without_a_node_that_is_lost_and_take_another_in(network: Network) -> None:
    tree = tree_of(
        write_splits(network.folder, 330), network.folder / "runs", epochs=60,
        scaling={"num_workers": [1, 2], "cpus_per_worker": 0.6, "cpus_per_data_actor": 0.4,
                 "collective_timeout_s": 60.0, "threads_per_worker": 1},
    )  # fmt: skip
    expected = undisturbed(tree).losses
    with (
        network.node("head", head=True, cpus=1, env=ENV) as head,
        network.node("second", cpus=1, env=ENV) as second,
    ):
        run = ClusterRun(network, head, tree)
        run.wait_for_workers(2, 1)
        run.wait_for_steps(60)
        second.kill()
        named_s = run.wait(lambda: f"on {second.address} has not answered" in run.said, "a name")
        run.wait_for_workers(1, 1)
        went_on_s = named_s + run.wait_for_steps(1)
        with network.node("third", cpus=1, env=ENV):
            run.wait_for_workers(2, 2)
            assert run.process.wait(timeout=2 * WAIT_S) == 0, run.said
    sys.stdout.write(f"{run.said}\nnamed after {named_s:.0f} s, a step by {went_on_s:.0f} s\n")
    assert named_s < 20 + 5
    assert "Traceback" not in run.said
    assert len(repeated(run.folder)) <= 10
    check_equal(run.folder, tree, expected)


def test_a_lost_node_that_holds_data_actors_only_is_told_by_who_waits_for_them(
    network: Network,
) -> None:
    tree = tree_of(
        write_splits(network.folder, 330), network.folder / "runs", epochs=40,
        scaling={"num_workers": 1, "cpus_per_worker": 1.0, "threads_per_worker": 1,
                 "data_label_selector": {"role": "data"}},
    )  # fmt: skip
    expected = undisturbed(tree)
    data = {"role": "data"}
    with (
        network.node("head", head=True, cpus=1, env=ENV) as head,
        network.node("second", cpus=1, env=ENV, labels=data) as second,
    ):
        run = ClusterRun(network, head, tree)
        run.wait_for_steps(60)
        second.kill()
        told_s = run.wait(lambda: "far longer than before" in run.said, "a word of the wait")
        with network.node("third", cpus=1, env=ENV, labels=data):
            went_on_s = run.wait_for_steps(1)
            assert run.process.wait(timeout=2 * WAIT_S) == 0, run.said
    sys.stdout.write(f"{run.said}\ntold after {told_s:.0f} s, a step {went_on_s:.0f} s after\n")
    assert told_s < 20 + 5
    assert "Traceback" not in run.said
    assert len(repeated(run.folder)) <= 10
    check_same(run.folder, expected)
