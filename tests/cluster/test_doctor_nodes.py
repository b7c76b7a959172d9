"""`doctor --cluster` on nodes of their own: sound ones, and each kind of odd one by name."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from mlflow import MlflowClient

from tests.cluster.machines import Machine
from tests.cluster.needs import needing_this_machine
from tests.cluster.nodes import Network, Node
from tests.cluster.services import MLflow
from tests.ray.images import write_splits

pytestmark = [pytest.mark.long, pytest.mark.timeout(1500)]

ENV = {"GLOO_SOCKET_IFNAME": "eth0"}
SCALING = [
    *("scaling.num_workers=2", "scaling.cpus_per_worker=0.6"),  # one on each of two nodes
    "scaling.cpus_per_data_actor=0.4",
]
OURS = [sys.executable, "-m", "simclr_ray"]
PRELOADED = Path(__file__).with_name("an_hour_ahead.c")


class Cluster:
    """A head without CPUs, and two nodes that can train."""

    def __init__(self, stack: ExitStack) -> None:
        self.stack = stack
        self.network = stack.enter_context(Network())
        self.tracking: MLflow = stack.enter_context(self.network.mlflow())
        self.head = self.node("head", head=True, cpus=0)
        self.storage = self.network.folder / "runs"

    def node(
        self, name: str, env: dict[str, str] | None = None, *, head: bool = False, cpus: float = 1
    ) -> Node:
        given = ENV | (env or {})
        return self.stack.enter_context(self.network.node(name, head=head, cpus=cpus, env=given))

    def doctor(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run the check on the head, of two workers and what makes their views."""
        planned = [
            f"storage={self.storage}", f"tracking.uri={self.tracking.uri}",
            *SCALING,
        ]  # fmt: skip
        return self.head.run([*OURS, "doctor", "--cluster", *planned, *arguments])


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    with ExitStack() as stack:
        with needing_this_machine():
            made = Cluster(stack)
        yield made


def test_a_sound_cluster_passes_and_its_encoders_say_so(cluster: Cluster) -> None:
    cluster.node("first")
    cluster.node("second")
    done = cluster.doctor()
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 workers on 2 nodes over gloo (cpu) against 1: " in done.stdout
    difference = re.search(r"against 1: (\S+)", done.stdout)
    assert difference is not None
    assert float(difference[1]) < 1e-9
    data = cluster.network.folder / "data"
    data.mkdir()
    write_splits(data, 128)
    trained = cluster.head.run(
        [
            *(*OURS, "pretrain", "shapes_demo", f"data.train={data}/train.parquet"),
            *("data.test=", "epochs=1", "batch_size=64", f"storage={cluster.storage}"),
            *(f"tracking.uri={cluster.tracking.uri}", "registry.name=checked", "registry.require="),
            *("evaluation.every_epochs=0", *SCALING),
        ],
        timeout_s=900,
    )
    assert trained.returncode == 0, trained.stdout + trained.stderr
    client = MlflowClient(cluster.tracking.uri, cluster.tracking.uri)
    (version,) = client.search_model_versions("name='checked'")
    assert version.tags["cluster_doctor"].startswith("ok; 2 workers on 2 nodes over gloo")


def test_odd_nodes_are_named_each_with_what_is_wrong(cluster: Cluster) -> None:
    cluster.storage.mkdir()
    ahead = cluster.network.folder / "ahead.so"
    try:
        subprocess.run(["cc", "-shared", "-fPIC", "-o", str(ahead), str(PRELOADED)], check=True)
    except FileNotFoundError:
        # nodes share this machine's clock, and a library gives the processes of one another
        pytest.skip("no C compiler is installed")
    older = cluster.network.folder / "older"
    write_other_version(older)
    cluster.node("old", {"PYTHONPATH": f"{older}:{cluster.network.env['PYTHONPATH']}"})
    cluster.node("ahead", {"LD_PRELOAD": str(ahead)})
    apart = cluster.node("apart")
    hide(apart, cluster.storage)
    done = cluster.doctor(f"tracking.uri=sqlite:///{cluster.network.folder}/mlflow.db")
    said = done.stdout
    assert done.returncode == 1, said + done.stderr
    assert re.search(r"FAIL +mlflow: .*: a file is no store for several machines\n", said), said
    assert re.search(r"FAIL +nodes: old: simclr-ray 0\.0\.1, not \S+\n", said), said
    assert re.search(r"FAIL +clock: ahead is 3,(59|60)\d s ahead of this machine\n", said), said
    assert re.search(r"FAIL +shared storage: .* not seen on apart\n", said), said
    assert "Traceback" not in said + done.stderr


def write_other_version(folder: Path) -> None:
    """Write the metadata of another version of the package, which Python sees before ours."""
    record = folder / "simclr_ray-0.0.1.dist-info"
    record.mkdir(parents=True)
    (record / "METADATA").write_text("Metadata-Version: 2.1\nName: simclr-ray\nVersion: 0.0.1\n")


def hide(machine: Machine, folder: Path) -> None:
    """Give a machine an empty folder of its own in the place of one that is shared."""
    done = machine.run(["mount", "-t", "tmpfs", "-o", "size=16m", "own", str(folder)])
    assert done.returncode == 0, done.stderr
