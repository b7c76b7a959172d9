"""The launch files of `cluster/`, checked offline by Ray's schema, by ours, and one by one.

Kubernetes files are held against the whole definition in `test_rayjob_schema.py`; what the Slurm
script does is run in `test_slurm.py`.
"""

from __future__ import annotations

import copy
import re
import subprocess
import tomllib
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]  # what Ray reads them with; has no stubs
from ray.autoscaler._private.util import prepare_config, validate_config

from simclr_ray.cli.launch import runs_of
from simclr_ray.config.experiment import Experiment
from simclr_ray.distributed.launch.check import check_launch, read_launch_file

ROOT = Path(__file__).resolve().parents[2]
CLUSTER = ROOT / "cluster"
CLOUDS = ("aws.yaml", "gcp.yaml")
LAUNCHERS = (*CLOUDS, "onprem.yaml")
KUBERAY = ("kuberay-rayjob.yaml", "kuberay-raycluster.yaml", "kuberay-study.yaml")
WITH_DATA_NODES = (*LAUNCHERS, "kuberay-rayjob.yaml", "kuberay-raycluster.yaml")  # and one command
ALL_FILES = (*LAUNCHERS, *KUBERAY, "slurm.sh")
VERSIONS = {name: metadata.version(name) for name in ("ray", "simclr-ray")}
START_COMMANDS = ("head_start_ray_commands", "worker_start_ray_commands")

Tree = dict[str, Any]


def read(name: str) -> str:
    return (CLUSTER / name).read_text("utf-8")


def tree_of(name: str) -> Tree:
    tree: Tree = yaml.safe_load(read(name))
    return tree


def prepared(tree: Mapping[str, Any]) -> Tree:
    """Return the config as `ray up` sees it; raise what `ray up` would raise."""
    ready: Tree = prepare_config(copy.deepcopy(dict(tree)))
    validate_config(ready)
    return ready


def training_command(name: str) -> list[str]:
    """Return the words of the one `simclr-ray pretrain ...` of a file, comments joined."""
    text = re.sub(r" *\\?\n *#? *", " ", read(name))
    found = re.findall(r"simclr-ray pretrain ((?:[\w.]+ )(?:[\w.-]+=[^\s']+ ?)+)", text)
    assert len(found) == 1, f"{name}: {len(found)} training commands"
    return str(found[0]).split()


def lock_version(package: str) -> str | None:
    lock = ROOT / "requirements.lock"
    if not lock.exists():
        return None
    pin = re.search(rf"^{package}(?:\[[\w,-]+\])?==([\w.]+)", lock.read_text("utf-8"), re.M)
    assert pin, f"requirements.lock does not pin {package}"
    return pin[1]


@pytest.mark.parametrize("name", LAUNCHERS)
def test_ray_accepts_the_file(name: str) -> None:
    ready = prepared(tree_of(name))
    assert ready["max_workers"] >= 6


def test_nodes_of_google_with_a_gpu_install_their_driver_and_no_others_do() -> None:
    types = prepared(tree_of("gcp.yaml"))["available_node_types"]
    driver = {"key": "install-nvidia-driver", "value": "True"}
    assert {name for name, kind in types.items() if "metadata" in kind["node_config"]} == {"gpu"}
    assert types["gpu"]["node_config"]["metadata"]["items"] == [driver]
    for name in ("gpu", "data"):
        node = types[name]["node_config"]
        assert node["scheduling"]["provisioningModel"] == "SPOT"
        assert node["serviceAccounts"][0]["email"] == "REPLACE-ME-worker"


@pytest.mark.parametrize(
    ("vendor", "works_at", "calls", "code"),
    [("0x8086", 1, 0, 0), ("0x10de", 3, 3, 0), ("0x10de", 999, 120, 1)],
)
def test_a_node_of_google_with_a_gpu_waits_for_its_driver(
    vendor: str, works_at: int, calls: int, code: int, tmp_path: Path
) -> None:
    (wait,) = tree_of("gcp.yaml")["worker_setup_commands"]
    (tmp_path / "vendor").write_text(f"{vendor}\n")
    program, log = tmp_path / "nvidia-smi", tmp_path / "calls"
    log.touch()
    program.write_text(f'#!/bin/sh\necho >> {log}\n[ "$(wc -l < {log})" -ge {works_at} ]\n')
    program.chmod(0o755)
    here = wait.replace("/sys/bus/pci/devices/*/vendor", str(tmp_path / "vendor"))
    here = here.replace("sleep 5", "sleep 0")
    assert here.count("sleep 0") == here.count(str(tmp_path)) == 1
    done = subprocess.run(
        ["bash", "-c", f"({here})"], env={"PATH": f"{tmp_path}:/usr/bin:/bin"}, check=False,
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == code
    assert len(log.read_text()) == calls
    assert ("no NVIDIA driver" in done.stderr) == (code == 1)


@pytest.mark.parametrize("name", LAUNCHERS)
def test_ray_refuses_the_file_with_a_misspelt_key(name: str) -> None:
    with pytest.raises(Exception, match="idle_timeout_minute"):
        prepared({**tree_of(name), "idle_timeout_minute": 5})


@pytest.mark.parametrize("name", LAUNCHERS)
def test_every_ray_start_sets_token_mode_and_names_the_mounted_token_file(name: str) -> None:
    tree = tree_of(name)
    for key in START_COMMANDS:
        starts = [c for c in tree[key] if re.search(r"\bray start --", c)]
        assert len(starts) == 1
        exports, _, rest = starts[0].partition("ray start")
        assert "RAY_AUTH_MODE=token" in exports
        path = re.search(r"RAY_AUTH_TOKEN_PATH=\$HOME(\S+?)[ ;]", exports)
        assert path, f"{key}: no token path"
        assert f"~{path[1]}" in tree["file_mounts"], "the token file is mounted on no node"
        assert ("--head" in rest) == (key == "head_start_ray_commands")


@pytest.mark.parametrize("name", ALL_FILES)
def test_no_file_holds_a_token(name: str) -> None:
    text = read(name)
    assert not re.search(r"RAY_AUTH_TOKEN\s*[=:]", text), "a token value has no place in the file"
    assert not re.search(r"\b[0-9a-fA-F]{32,}\b", text), "this looks like a token"


@pytest.mark.parametrize("name", LAUNCHERS)
def test_every_node_installs_the_locked_versions_and_this_wheel(name: str) -> None:
    tree = tree_of(name)
    version = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["version"]
    setup = " ; ".join(tree["setup_commands"])
    assert "--require-hashes" in setup
    assert "requirements.lock" in setup
    assert f"simclr_ray-{version}-*.whl" in setup
    mounted = tree["file_mounts"].values()
    assert "requirements.lock" in mounted
    assert "dist" in mounted


@pytest.mark.parametrize("name", ALL_FILES)
def test_nothing_comes_from_a_named_index(name: str) -> None:
    text = read(name).replace("https://www.googleapis.com/auth/", "")  # a right, not a place
    assert not re.search(r"(--index-url|--extra-index-url|--find-links|\bhttps://)", text)


def test_every_launch_file_is_tested_here() -> None:
    others = {"Dockerfile", "onprem_stop.sh", "grafana-dashboard.json"}
    assert {path.name for path in CLUSTER.iterdir()} == {*ALL_FILES, *others}


@pytest.mark.parametrize("name", ALL_FILES)
def test_the_head_comment_says_cost_size_spot_and_what_was_verified(name: str) -> None:
    lines = read(name).removeprefix("#!/bin/bash\n").splitlines()
    head = lines[: next(i for i, line in enumerate(lines) if not line.startswith("#"))]
    for what in ("Cost", "Size", "Spot", "Verified"):
        assert any(line.startswith(f"# {what}: ") for line in head), what
    assert f"simclr-ray cluster check cluster/{name}" in "\n".join(head)


def filled_in(name: str, folder: Path) -> Path:
    """Return a copy of a file as its user edits it."""
    path = folder / name
    path.write_text(read(name).replace("REPLACE-ME", "mine"))
    return path


@pytest.mark.parametrize("name", ALL_FILES)
def test_cluster_check_passes_the_file_once_it_is_filled_in(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    launch = read_launch_file(filled_in(name, tmp_path), VERSIONS)
    runs = runs_of(launch.command, [])
    findings = check_launch(launch, runs[0])
    assert [f for f in findings if f.status == "fail"] == []
    # where the token lies on the operator's machine, and the wheel that he is still to build
    assert {f.check for f in findings if f.status == "warn"} <= {"file mounts"}
    assert launch.num_nodes >= 4


@pytest.mark.parametrize("name", ALL_FILES)
def test_cluster_check_refuses_the_file_as_it_comes(name: str) -> None:
    launch = read_launch_file(CLUSTER / name, VERSIONS)
    failed = [f for f in check_launch(launch, None) if f.status == "fail"]
    assert [f.check for f in failed] == ["filled in"]


@pytest.mark.parametrize("name", ALL_FILES)
def test_each_group_has_a_label_that_says_what_its_nodes_are_for(name: str) -> None:
    launch = read_launch_file(CLUSTER / name, VERSIONS)
    if name == "onprem.yaml":  # a machine finds out itself: test_onprem_commands.py
        assert "--labels=node-group=head" in read(name)
        return
    for group in launch.groups:
        usual = "head" if group.is_head else "gpu" if group.gpus else "data"
        wanted = "gpu" if launch.kind == "Slurm" else usual  # its nodes are alike
        assert group.labels == {"node-group": wanted}


@pytest.mark.parametrize("name", KUBERAY)
def test_kubernetes_runs_the_locked_ray_and_this_wheel(name: str) -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["version"]
    spec = tree_of(name)["spec"]
    ray_version = spec.get("rayClusterSpec", spec)["rayVersion"]
    docker = read("Dockerfile")
    assert f"rayproject/ray:{ray_version}-py311-gpu" in docker
    assert docker.count(f"simclr_ray-{version}-*.whl") == 2
    assert set(re.findall(r"image: (\S+)", read(name))) == {f"REPLACE-ME/simclr-ray:{version}"}
    assert lock_version("ray") in (None, ray_version)


def test_all_files_run_one_training_command_but_for_where_data_and_storage_lie() -> None:
    commands = {
        name: [re.sub(r"(s3:/|gs:/|/mnt)/REPLACE-ME", "ROOT", w) for w in training_command(name)]
        for name in WITH_DATA_NODES
    }
    first, *others = commands.values()
    assert all(other == first for other in others), commands


@pytest.mark.parametrize("name", [*WITH_DATA_NODES, "slurm.sh"])
def test_the_training_command_is_a_valid_experiment(name: str) -> None:
    preset, *overrides = training_command(name)
    experiment = Experiment.load(preset, *overrides)
    assert experiment.scaling.gpus_per_worker == 1
    selector = {} if name == "slurm.sh" else {"node-group": "data"}
    assert experiment.scaling.data_label_selector == selector
    assert experiment.tracking.uri.startswith("http"), "sqlite does not work across nodes"


@pytest.mark.parametrize("name", CLOUDS)
def test_a_cloud_has_a_gpu_group_and_a_data_group_without_gpu(name: str) -> None:
    types = prepared(tree_of(name))["available_node_types"]
    assert types["gpu"]["resources"]["GPU"] >= 1
    assert types["gpu"]["labels"] != types["data"]["labels"] == {"node-group": "data"}
    assert not types["data"]["resources"].get("GPU")
    assert types["head"]["resources"] == {"CPU": 0}
    assert types["data"]["min_workers"] < types["data"]["max_workers"], "the data group grows"
    assert tree_of(name)["idle_timeout_minutes"] <= 15


@pytest.mark.parametrize("name", LAUNCHERS)
def test_the_dashboard_is_reached_through_ssh_only(name: str) -> None:
    head = " ".join(tree_of(name)["head_start_ray_commands"])
    assert "--dashboard-host=127.0.0.1" in head


@pytest.mark.parametrize("name", CLOUDS)
def test_the_nodes_that_are_kept_hold_what_the_command_asks_for(name: str) -> None:
    experiment = Experiment.load(*training_command(name))
    scaling = experiment.scaling
    types = tree_of(name)["available_node_types"]
    kept = {
        what: sum(t.get("min_workers", 0) * t["resources"].get(what, 0) for t in types.values())
        for what in ("CPU", "GPU")
    }
    assert kept["GPU"] >= scaling.num_gpus
    data_cpus = types["data"]["min_workers"] * types["data"]["resources"]["CPU"]
    actors = scaling.max_workers * scaling.data_actors_per_worker
    assert data_cpus >= actors * scaling.cpus_per_data_actor


@pytest.mark.parametrize("name", LAUNCHERS)
def test_every_command_is_valid_shell(name: str) -> None:
    tree = tree_of(name)
    keys = ("setup_commands", "head_setup_commands", "worker_setup_commands", *START_COMMANDS)
    for command in [c for key in keys for c in tree[key]]:
        check = subprocess.run(
            ["bash", "-n", "-c", command], capture_output=True, text=True, check=False
        )
        assert check.returncode == 0, f"{command}\n{check.stderr}"
