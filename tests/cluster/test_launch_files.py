"""The launch files of `cluster/`, checked offline by Ray's schema and for what Ray lets pass."""

from __future__ import annotations

import copy
import os
import re
import subprocess
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]  # what Ray reads them with; has no stubs
from ray.autoscaler._private.util import prepare_config, validate_config

from simclr_ray.config.experiment import Experiment

ROOT = Path(__file__).resolve().parents[2]
CLUSTER = ROOT / "cluster"
LAUNCHERS = ("aws.yaml", "onprem.yaml")
ALL_FILES = (*LAUNCHERS, "kuberay-rayjob.yaml")
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
    text = re.sub(r"\n *#? *", " ", read(name))
    found = re.findall(r"simclr-ray pretrain ((?:[\w.]+ )(?:[\w.]+=[^\s']+ ?)+)", text)
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
    assert not re.search(r"(--index-url|--extra-index-url|--find-links|\bhttps://)", read(name))


def test_kubernetes_runs_the_locked_ray_and_this_wheel() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["version"]
    job = tree_of("kuberay-rayjob.yaml")
    ray_version = job["spec"]["rayClusterSpec"]["rayVersion"]
    docker = read("Dockerfile")
    assert f"rayproject/ray:{ray_version}-py311-gpu" in docker
    assert docker.count(f"simclr_ray-{version}-*.whl") == 2
    assert set(re.findall(r"image: (\S+)", read("kuberay-rayjob.yaml"))) == {
        f"REPLACE-ME/simclr-ray:{version}"
    }
    assert lock_version("ray") in (None, ray_version)


def test_all_files_run_one_training_command_but_for_where_data_and_storage_lie() -> None:
    commands = {
        name: [re.sub(r"(s3:/|/mnt)/REPLACE-ME", "ROOT", w) for w in training_command(name)]
        for name in ALL_FILES
    }
    first, *others = commands.values()
    assert all(other == first for other in others), commands


@pytest.mark.parametrize("name", ALL_FILES)
def test_the_training_command_is_a_valid_experiment(name: str) -> None:
    preset, *overrides = training_command(name)
    experiment = Experiment.load(preset, *overrides)
    assert experiment.scaling.gpus_per_worker == 1
    assert experiment.scaling.data_label_selector, "decode actors need nodes of their own"
    assert experiment.tracking.uri.startswith("http"), "sqlite does not work across nodes"


def test_aws_has_a_gpu_group_and_a_data_group_without_gpu() -> None:
    types = prepared(tree_of("aws.yaml"))["available_node_types"]
    assert types["gpu"]["resources"]["GPU"] >= 1
    assert "data" not in types["gpu"]["resources"]
    assert types["data"]["resources"]["data"] >= 1
    assert not types["data"]["resources"].get("GPU")
    assert types["head"]["resources"] == {"CPU": 0}
    assert types["data"]["min_workers"] < types["data"]["max_workers"], "the data group grows"
    assert tree_of("aws.yaml")["idle_timeout_minutes"] <= 15


@pytest.mark.parametrize("name", LAUNCHERS)
def test_the_dashboard_is_reached_through_ssh_only(name: str) -> None:
    head = " ".join(tree_of(name)["head_start_ray_commands"])
    assert "--dashboard-host=127.0.0.1" in head


def test_the_nodes_that_are_kept_hold_what_the_command_asks_for() -> None:
    experiment = Experiment.load(*training_command("aws.yaml"))
    scaling = experiment.scaling
    types = tree_of("aws.yaml")["available_node_types"]
    kept = {
        what: sum(t.get("min_workers", 0) * t["resources"].get(what, 0) for t in types.values())
        for what in ("CPU", "GPU", "data")
    }
    assert kept["GPU"] >= scaling.num_gpus
    assert kept["data"] >= scaling.max_workers * scaling.data_actors_per_worker
    data_cpus = types["data"]["min_workers"] * types["data"]["resources"]["CPU"]
    actors = scaling.max_workers * scaling.data_actors_per_worker
    assert data_cpus >= actors * scaling.cpus_per_data_actor


@pytest.mark.parametrize("name", LAUNCHERS)
def test_every_command_is_valid_shell(name: str) -> None:
    tree = tree_of(name)
    keys = ("setup_commands", "head_setup_commands", *START_COMMANDS)
    for command in [c for key in keys for c in tree[key]]:
        check = subprocess.run(
            ["bash", "-n", "-c", command], capture_output=True, text=True, check=False
        )
        assert check.returncode == 0, f"{command}\n{check.stderr}"


def test_scripts_are_valid_shell_and_executable() -> None:
    script = CLUSTER / "onprem_stop.sh"
    assert os.access(script, os.X_OK)
    assert subprocess.run(["sh", "-n", str(script)], check=False).returncode == 0
