"""Every number of the dashboard reaches a real Prometheus from a job on two nodes."""

from __future__ import annotations

import json
import math
import re
import shutil
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow.parquet as pq
import pytest
from ray.dashboard.modules.reporter.reporter_agent import METRICS_GAUGES

from simclr_ray.distributed.ray_metrics import METRICS, PREFIX
from tests.cluster.machines import REPOSITORY
from tests.cluster.nodes import Network, Node

DASHBOARD = REPOSITORY / "cluster" / "grafana-dashboard.json"
OF_RAY = {  # what of Ray's own the dashboard shows
    "ray_object_store_used_memory",
    "ray_object_store_available_memory",
    "ray_spill_manager_objects_bytes",
    "ray_node_mem_used",
    "ray_node_mem_total",
    "ray_node_cpu_utilization",
    "ray_node_network_receive_speed",
    "ray_node_disk_free",
    "ray_node_gpus_utilization",
}
OF_GPUS = {"ray_node_gpus_utilization"}  # Ray reports it of nodes with one
PROMETHEUS_PORT = 9090
SCRAPES_S = 25.0  # Ray's processes report, and its Prometheus file scrapes, every 10 s


def tree() -> dict[str, Any]:
    read: dict[str, Any] = json.loads(DASHBOARD.read_text("utf-8"))
    return read


def expressions() -> list[str]:
    return [target["expr"] for panel in tree()["panels"] for target in panel["targets"]]


def names_in(*texts: str) -> set[str]:
    return {name for text in texts for name in re.findall(r"\bray_\w+", text)}


def test_the_dashboard_shows_exactly_what_is_exported_and_the_listed_ones_of_ray() -> None:
    assert names_in(*expressions()) == {PREFIX + name for name in METRICS} | OF_RAY
    variables = [str(v["query"]) for v in tree()["templating"]["list"]]
    assert names_in(*variables) <= {PREFIX + name for name in METRICS}


def test_what_this_machine_cannot_scrape_is_declared_by_ray() -> None:
    # no GPU here: that Ray reports it is all that can be seen
    assert {name.removeprefix(PREFIX) for name in OF_GPUS} <= set(METRICS_GAUGES)


def test_panels_have_titles_of_their_own_and_do_not_overlap() -> None:
    panels = tree()["panels"]
    assert len({p["title"] for p in panels}) == len({p["id"] for p in panels}) == len(panels)
    cells = [
        (x, y)
        for p in panels
        for x in range(p["gridPos"]["x"], p["gridPos"]["x"] + p["gridPos"]["w"])
        for y in range(p["gridPos"]["y"], p["gridPos"]["y"] + p["gridPos"]["h"])
    ]
    assert len(set(cells)) == len(cells)
    assert max(x for x, _ in cells) < 24  # Grafana's columns


def test_names_follow_prometheus() -> None:
    for name, definition in METRICS.items():
        assert re.fullmatch(r"simclr_[a-z0-9_]+", name)
        assert name.endswith("_total") == (definition.kind.__name__ == "Counter")
        assert definition.description.endswith(".")


class Prometheus(NamedTuple):
    """A running Prometheus."""

    url: str

    def ask(self, what: str, **arguments: str) -> Any:
        query = urllib.parse.urlencode(arguments)
        with urllib.request.urlopen(f"{self.url}/api/v1/{what}?{query}", timeout=30) as answer:
            return json.load(answer)["data"]

    def series(self, expression: str, began: float) -> list[dict[str, Any]]:
        """Return what Grafana would draw: an expression since then, its variables filled in."""
        query = expression.replace("$__rate_interval", "1m").replace("$run", ".*")
        span = {"start": f"{began:.0f}", "end": f"{time.time():.0f}", "step": "5"}
        drawn: list[dict[str, Any]] = self.ask("query_range", query=query, **span)["result"]
        return drawn


def start_prometheus(head: Node) -> Prometheus:
    """Start Prometheus beside the head by the file that Ray wrote for it."""
    program = shutil.which("prometheus")
    if program is None:
        # no Python package has the server; Debian's `prometheus` is it
        pytest.skip("Prometheus is missing (Debian: apt-get install prometheus)")
    address = f"{head.address}:{PROMETHEUS_PORT}"
    config = "/tmp/ray/session_latest/metrics/prometheus/prometheus.yml"
    head.popen(
        [
            *(program, f"--config.file={config}", f"--web.listen-address={address}"),
            f"--storage.tsdb.path={head.folder}/prometheus",
        ],
        log="prometheus",
    )
    server = Prometheus(f"http://{address}")
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            server.ask("query", query="up")
        except OSError:
            time.sleep(0.5)
        else:
            return server
    raise RuntimeError(head.told())


def found_by_http(head: Node, network: Network) -> set[str]:
    """Return the addresses that the dashboard names; it does so by the token alone."""
    url = f"http://{head.address}:8265/api/prometheus/sd"
    with pytest.raises(urllib.error.HTTPError, match="401"):
        urllib.request.urlopen(url, timeout=30)
    token = {"Authorization": f"Bearer {network.env['RAY_AUTH_TOKEN']}"}
    with urllib.request.urlopen(urllib.request.Request(url, headers=token), timeout=30) as answer:
        return {address for group in json.load(answer) for address in group["targets"]}


def settings(cifar: Path, folder: Path) -> list[str]:
    """Return a run of 12 epochs whose two workers need a node of two CPUs each."""
    few = folder / "few.parquet"  # scores are not looked at
    pq.write_table(pq.read_table(cifar / "test" / "part-00000.parquet").slice(0, 512), few)
    return [
        *(f"data.train={cifar}/train", f"data.eval_train={few}", f"data.test={few}"),
        *("data.limit=2048", f"storage={folder}/runs", "epochs=12", "batch_size=256"),
        *("scaling.num_workers=2", "scaling.cpus_per_worker=1.2"),
        *("scaling.cpus_per_data_actor=0.3", "tracking.log_every_steps=2"),
        *("evaluation.every_epochs=1", "evaluation.linear.epochs=1", "registry.name="),
        *("checkpoint.every_epochs=3", "tracking.system_metrics=false"),
    ]


@pytest.mark.long
@pytest.mark.timeout(1200)
def test_prometheus_scrapes_every_metric_of_the_dashboard_from_a_job(
    network: Network, image_root: Path
) -> None:
    env = {"GLOO_SOCKET_IFNAME": "eth0"}
    with (
        network.node("head", head=True, cpus=2, env=env) as head,
        network.node("second", cpus=2, env=env),
    ):
        prometheus, began = start_prometheus(head), time.time()
        command = [sys.executable, "-m", "simclr_ray", "pretrain", "cifar10_cpu"]
        given = settings(image_root / "cifar10", network.folder)
        done = head.run([*command, *given], timeout_s=600)
        assert done.returncode == 0, done.stdout + done.stderr
        time.sleep(SCRAPES_S)
        targets = prometheus.ask("targets")["activeTargets"]
        # found by Ray's file, and answered without a token
        assert {t["health"] for t in targets} == {"up"}, targets
        assert found_by_http(head, network) == {
            t["discoveredLabels"]["__address__"] for t in targets
        }
        drawn = {e: prometheus.series(e, began) for e in expressions()}
        empty = {e for e, found in drawn.items() if not found}
        assert names_in(*empty) == OF_GPUS
        (log,) = network.folder.glob("runs/*/metrics.jsonl")
        records = [json.loads(line) for line in log.read_text().splitlines()]
        check_values(prometheus, began, records, log.parent.name)


def check_values(
    prometheus: Prometheus, began: float, records: list[dict[str, float]], run: str
) -> None:
    """Check that what is exported is what the run logged, of that run, of both ranks."""

    def exported(name: str) -> dict[str, list[float]]:
        """Return the values of each rank."""
        found = prometheus.series(PREFIX + name, began)
        assert {s["metric"]["run"] for s in found} == {run}
        values: dict[str, list[float]] = {}
        for one in found:
            values.setdefault(one["metric"]["rank"], []).extend(float(v) for _, v in one["values"])
        return values

    def logged(*names: str) -> list[float]:
        return [record[name] for record in records for name in names if name in record]

    of_rank_0 = {
        "simclr_loss": ["train/loss"],
        "simclr_images_per_second": ["train/images_per_s"],
        "simclr_effective_rank": ["start/effective_rank", "eval/effective_rank"],
        "simclr_knn_top1_ratio": ["eval/knn_top1"],
        "simclr_epoch": ["epoch"],
    }
    for name, keys in of_rank_0.items():
        (values,) = exported(name).values()
        assert set(values) <= set(logged(*keys)), name
    for name in ("simclr_step_seconds", "simclr_data_wait_ratio", "simclr_checkpoint_seconds"):
        values_of = exported(name)
        assert set(values_of) == {"0", "1"}
        nodes = {s["metric"]["instance"] for s in prometheus.series(PREFIX + name, began)}
        assert len(nodes) == 2
        assert all(v > 0 for values in values_of.values() for v in values)
    slowest = 256 / min(logged("train/images_per_s"))
    assert max(exported("simclr_step_seconds")["0"]) <= slowest * 1.05
    assert max(map(max, exported("simclr_data_wait_ratio").values())) <= 1
    read = sum(max(values) for values in exported("simclr_read_bytes_total").values())
    assert math.isfinite(read)
    assert read > 2048 * 1500  # images of CIFAR-10 are PNG of some 2 kB; all are read once at least
