"""A study that is submitted as a job uses a node that joins after it began, and registers its best.

Data, runs and the study lie in a bucket, MLflow stands before PostgreSQL, all on machines of their
own; the head offers no CPU, as in `cluster/`.
"""

from __future__ import annotations

import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pyarrow.fs as pafs
import pytest
from mlflow import MlflowClient
from mlflow.entities import Run

from tests.cluster.needs import needing_this_machine
from tests.cluster.nodes import RAY, Network, Node
from tests.ray.images import write_splits

pytestmark = [pytest.mark.long, pytest.mark.ray, pytest.mark.timeout(1800)]

WAIT_S = 600.0
ENV = {"GLOO_SOCKET_IFNAME": "eth0"}
SIMCLR = (sys.executable, "-m", "simclr_ray")
TRIALS = 6  # of the study `temperature` at scale cpu, with one seed
# A whole trial takes one node: 0.5 CPUs train and 0.3 decode.
SMALL = (
    *("study.seeds=[0]", "epochs=1", "batch_size=32", "encoder.width=0.125", "augment.size=16"),
    *("evaluation.every_epochs=0", "evaluation.linear.epochs=2", "data.limit=0"),
    *("scaling.cpus_per_worker=0.5", "scaling.cpus_per_data_actor=0.3"),
)
WORKERS = """
import pathlib
names = [p.read_bytes() for p in pathlib.Path("/proc").glob("[0-9]*/cmdline")]
print(sum(b"ray::Implicit" + b"Func" in name for name in names))  # as Tune calls its actors
"""


def upload(folder: Path, name: str, env: dict[str, str]) -> None:
    """Put a file into the bucket, by the credentials of the network."""
    store = pafs.S3FileSystem(
        access_key=env["AWS_ACCESS_KEY_ID"], secret_key=env["AWS_SECRET_ACCESS_KEY"],
        endpoint_override=env["AWS_ENDPOINT_URL"], region=env["AWS_DEFAULT_REGION"],
    )  # fmt: skip
    with store.open_output_stream(f"bucket/{name}") as stream:
        stream.write((folder / name).read_bytes())


class SubmittedStudy:
    """A study as a job on the head, and what MLflow says of its trials."""

    def __init__(self, head: Node, command: str, tracking_uri: str) -> None:
        self.head, self.client = head, MlflowClient(tracking_uri)
        submit = [sys.executable, *RAY, "job", "submit", "--address", f"http://{head.address}:8265"]
        self.job: subprocess.Popen[str] = head.popen(
            [*submit, "--", "sh", "-c", command], log="job"
        )

    @property
    def said(self) -> str:
        return (self.head.folder / "job.log").read_text()

    def trials(self) -> list[Run]:
        experiments = [e.experiment_id for e in self.client.search_experiments()]
        runs = self.client.search_runs(experiments)
        return [r for r in runs if "trial" in r.data.tags]  # set with the outcome

    def wait(self, until: Callable[[], bool], what: str) -> float:
        """Return the seconds until something holds; `what` names it where it does not."""
        began = time.monotonic()
        while not until():
            assert self.job.poll() is None, f"ended before {what}\n{self.said}"
            assert time.monotonic() - began < WAIT_S, f"no {what}\n{self.said}"
            time.sleep(1)
        return time.monotonic() - began


def trains(node: Node) -> bool:
    """Return whether a process that runs trials lives on a node, whose processes are its own."""
    return int(node.run([sys.executable, "-c", WORKERS]).stdout) > 0


def test_a_study_uses_a_node_that_joins_after_it_began_and_registers_its_best(
    network: Network, tmp_path: Path
) -> None:
    write_splits(tmp_path, 330)
    with (
        needing_this_machine(),
        network.s3() as s3,
        network.mlflow() as tracking,
        ExitStack() as up,
    ):
        bucket = s3.uri("bucket")
        for name in ("train.parquet", "test.parquet"):
            upload(tmp_path, name, s3.env)
        head = up.enter_context(network.node("head", head=True, cpus=0, env=ENV))
        first = up.enter_context(network.node("first", cpus=1, env=ENV))
        run = [*SIMCLR, "study", "run", "temperature", "--scale", "cpu", *SMALL]
        run += [f"data.train={bucket}/train.parquet", f"data.test={bucket}/test.parquet"]
        run += [f"storage={bucket}/runs", f"tracking.uri={tracking.uri}"]
        best = [*SIMCLR, "study", "best", f"{bucket}/runs/studies/temperature"]
        best += ["--register", "temperature", "--alias", "best"]
        study = SubmittedStudy(head, f"{shlex.join(run)} && {shlex.join(best)}", tracking.uri)
        began_s = study.wait(lambda: trains(first), "trial on the first node")
        late = up.enter_context(network.node("late", cpus=1, env=ENV))
        used_s = study.wait(lambda: trains(late), "trial on the late node")
        code = study.job.wait(timeout=1200)
        sys.stdout.write(
            f"{study.said}\na trial began after {began_s:.0f} s; on the late node one did "
            f"{used_s:.0f} s after it had joined\n"
        )
        assert code == 0, study.said
        client = study.client
        version = client.get_model_version_by_alias("temperature", "best")
        assert version.run_id is not None
        assert version.tags["study"] == "temperature"
        (chosen,) = [r for r in study.trials() if r.info.run_id == version.run_id]
        scores = [r.data.metrics["final/linear_top1"] for r in study.trials()]
        assert len(scores) == TRIALS
        assert chosen.data.metrics["final/linear_top1"] == max(scores)
        assert "the cluster holds 2 trials at a time now" in study.said
