"""Four nodes as a cluster has them, and a run that is submitted to them as a job.

A head without workers, a node that only makes views, and two that train one worker each; images
and checkpoints in a bucket, MLflow by HTTP before PostgreSQL.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import pyarrow.fs as pafs
import pyarrow.parquet as pq
import pytest
from mlflow import MlflowClient

from simclr_ray import config as cfg
from simclr_ray.config.experiment import Experiment
from simclr_ray.train.resolve import resolve
from tests.cluster.needs import needing_this_machine
from tests.cluster.nodes import RAY, Network, Node
from tests.cluster.noting_network import FOLDER, notes_in
from tests.cluster.services import S3, MLflow
from tests.faults.curves import CLOSE, STEPS_CLOSE, logged_losses, tree_of, undisturbed
from tests.ray.images import write_splits

pytestmark = [pytest.mark.long, pytest.mark.timeout(1500)]

ENV = {"GLOO_SOCKET_IFNAME": "eth0"}
TRAINING = ("first", "second")
WITHIN_S = 900.0
ROWS, TEST_ROWS, GROUP_ROWS = 2_048, 512, 128
IMPORTED = "tests.cluster.noting_network:noting_network"
# Ray keeps what it knew of an actor that has ended: its class, and the node that it was on
ACTORS = """
import json
from ray.util.state import list_actors, list_nodes
names = {node.node_id: node.node_ip for node in list_nodes(limit=100)}
actors = list_actors(limit=10_000)
print(json.dumps([[actor.class_name, names.get(actor.node_id, "")] for actor in actors]))
"""


class Nodes(NamedTuple):
    """The cluster, and what it talks to."""

    network: Network
    head: Node
    by_name: dict[str, Node]
    s3: S3
    tracking: MLflow
    bucket: str

    def submit(self, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
        """Submit `simclr-ray ARGUMENTS` as a job, and return how it ended and what it said."""
        shipped = json.dumps({"env_vars": env})
        submit = ["job", "submit", f"--address=http://{self.head.address}:8265"]
        return self.head.run(
            [
                *(sys.executable, *RAY, *submit, f"--runtime-env-json={shipped}", "--"),
                *(sys.executable, "-m", "simclr_ray", *arguments),
            ],
            timeout_s=WITHIN_S,
        )

    def nodes_of_actors(self) -> dict[str, set[str]]:
        """Return on which nodes there were actors of each class so far."""
        done = self.head.run([sys.executable, "-c", ACTORS])
        assert done.returncode == 0, done.stderr
        names = {node.address: name for name, node in self.by_name.items()}
        out = defaultdict(set)
        for kind, address in json.loads(done.stdout.splitlines()[-1]):
            out[kind].add(names.get(address, address))
        return dict(out)


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    with ExitStack() as stack:
        with needing_this_machine():
            network = stack.enter_context(Network())
            s3, tracking = stack.enter_context(network.s3()), stack.enter_context(network.mlflow())
        head = stack.enter_context(network.node("head", head=True, cpus=0, env=ENV))
        by_name = {"head": head}
        by_name["data"] = stack.enter_context(
            network.node("data", cpus=2, labels={"role": "data"}, env=ENV)
        )
        for name in TRAINING:
            by_name[name] = stack.enter_context(network.node(name, cpus=1, env=ENV))
        yield Nodes(network, head, by_name, s3, tracking, s3.uri("bucket"))


def test_a_job_of_two_training_nodes_and_a_data_node(nodes: Nodes, image_root: Path) -> None:
    for split, rows in (("train", ROWS), ("test", TEST_ROWS)):
        source = pq.ParquetFile(next((image_root / "cifar10" / split).glob("*.parquet")))
        images = next(source.iter_batches(rows))
        put(nodes, images, f"cifar10/{split}/0.parquet")
    began = time.monotonic()
    done = nodes.submit(
        *("pretrain", "cifar10_cpu", "batch_size=128", "epochs=2", "evaluation.every_epochs=1"),
        *(f"data.{split}={nodes.bucket}/cifar10/{split}" for split in ("train", "test")),
        *(f"storage={nodes.bucket}/runs", f"tracking.uri={nodes.tracking.uri}"),
        *(
            "scaling.num_workers=2",
            "scaling.data_label_selector.role=data",
            "scaling.cpus_per_worker=1",
        ),
        *("registry.name=cifar10", "registry.require=", "evaluation.linear.epochs=5"),
    )
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    took = time.monotonic() - began
    assert "Traceback" not in said
    assert re.search(r"epoch\s+2\.00\s+step 32/32\s+loss \d", said), said
    at = nodes.nodes_of_actors()
    sys.stdout.write(f"{said}\n{at}\n{took:.0f} s\n")
    assert at["RayTrainWorker"] == set(TRAINING)
    views = [kind for kind in at if kind.startswith("MapWorker")]
    assert views
    assert all(at[kind] == {"data"} for kind in views)
    assert took < WITHIN_S
    check_stored(nodes)


def check_stored(nodes: Nodes) -> None:
    """Hold what the job left in the bucket and in MLflow to what it is to leave."""
    kept = [info.path for info in listed(nodes, "runs")]
    scores = [path for path in kept if path.endswith("/scores.json")]
    assert len(scores) == 1
    assert any(re.search(r"/step-00000032-[^/]+/", path) for path in kept)
    with filesystem(nodes).open_input_stream(scores[0]) as stream:
        rows = json.loads(stream.readall())
    by_name = {row["name"]: row for row in rows}
    assert len(by_name) >= 2, "an encoder is scored beside doing nothing"
    client = MlflowClient(nodes.tracking.uri, nodes.tracking.uri)
    (version,) = client.search_model_versions("name='cifar10'")
    assert version.status == "READY"
    run = client.get_run(version.run_id or "")
    assert run.info.status == "FINISHED"
    assert "train/mean_loss" in run.data.metrics


def test_batches_and_losses_of_four_nodes_are_those_of_one_process(
    nodes: Nodes, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = nodes.network.folder / "same"
    folder.mkdir()
    write_splits(folder, 330)
    with filesystem(nodes).open_output_stream("bucket/shapes/train.parquet") as stream:
        stream.write((folder / "train.parquet").read_bytes())  # its row groups decide the order
    tree = tree_of(
        folder, folder / "runs", epochs=5, encoder={"name": "import", "path": IMPORTED},
        scaling={"num_workers": 2, "cpus_per_worker": 1, "data_label_selector": {"role": "data"},
                 "threads_per_worker": 1},
    )  # fmt: skip
    for name in ("tried", "here", "there"):
        (folder / name).mkdir()
    cfg.imports.allow(IMPORTED)
    monkeypatch.setenv(FOLDER, str(folder / "tried"))
    resolve(cfg.validate(Experiment, tree))  # which tries the network before a run trains it
    monkeypatch.setenv(FOLDER, str(folder / "here"))
    alone = undisturbed(tree)
    tree["data"] = {"train": f"{nodes.bucket}/shapes/train.parquet", "test": ""}
    (folder / "run.yaml").write_text(cfg.dump_yaml(tree))
    done = nodes.submit(
        *(
            "pretrain",
            str(folder / "run.yaml"),
            "--allow-code",
            f"tracking.uri={nodes.tracking.uri}",
        ),
        **{FOLDER: str(folder / "there")},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    files = [path for name in TRAINING for path in (folder / "there").glob(f"{name}-*")]
    assert len(files) == 2, "one process on each training node"
    there, here = Counter(notes_in(files)), Counter(notes_in((folder / "here").iterdir()))
    here -= Counter(notes_in((folder / "tried").iterdir()))
    assert here.total() == STEPS_CLOSE * 2 * 32
    assert there == here
    (run,) = (folder / "runs").iterdir()
    losses = logged_losses(run)
    assert [step for step, _ in losses] == list(range(1, STEPS_CLOSE + 1))
    apart = [abs(loss - alone.losses[step - 1]) / abs(loss) for step, loss in losses]
    sys.stdout.write(f"largest relative difference of {len(apart)} losses: {max(apart):.1e}\n")
    assert max(apart) <= CLOSE


def put(nodes: Nodes, rows: object, path: str) -> None:
    """Store rows as a parquet file in the bucket."""
    import pyarrow as pa

    table = pa.Table.from_batches([rows]) if isinstance(rows, pa.RecordBatch) else rows
    with filesystem(nodes).open_output_stream(f"bucket/{path}") as stream:
        pq.write_table(table, stream, row_group_size=GROUP_ROWS)


def listed(nodes: Nodes, folder: str) -> list[pafs.FileInfo]:
    """Return the files below a folder of the bucket."""
    found = filesystem(nodes).get_file_info(pafs.FileSelector(f"bucket/{folder}", recursive=True))
    return [info for info in found if info.type == pafs.FileType.File]


def filesystem(nodes: Nodes) -> pafs.FileSystem:
    """Return the bucket's file system, for this process."""
    keys = {"access_key": "nodes", "secret_key": "nodes", "region": "us-east-1"}
    return pafs.S3FileSystem(
        endpoint_override=nodes.s3.url.partition("//")[2], scheme="http", **keys
    )
