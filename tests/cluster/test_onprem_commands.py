"""The start commands of `cluster/onprem.yaml`, run with a recorder in the place of `ray`."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]  # what Ray reads them with; has no stubs

ROOT = Path(__file__).resolve().parents[2]

# Says that it runs, as Ray does, notes how it was called, and blocks until it is told to stop.
RECORDER = """#!{python}
import json, os, pathlib, signal, sys
home = pathlib.Path(os.environ["HOME"])
env = {{k: v for k, v in os.environ.items() if k.startswith("RAY_")}}
(home / "seen.json").write_text(json.dumps({{"args": sys.argv[1:], "env": env}}))
if os.environ.get("FAIL"):
    sys.exit("Address already in use")
print("Ray runtime started.", flush=True)
signal.sigwait({{signal.SIGTERM}})
"""


class Machine:
    """A home directory and a PATH with a recorder as `ray`, with or without a GPU."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.bin = home / "bin"
        self.bin.mkdir()
        (home / ".simclr-ray").mkdir()
        self._program("ray", RECORDER.format(python=sys.executable))
        self.env = {
            "HOME": str(home),
            "PATH": f"{self.bin}:/usr/bin:/bin",
            "RAY_HEAD_IP": "10.0.0.10",
        }
        tree = yaml.safe_load((ROOT / "cluster" / "onprem.yaml").read_text("utf-8"))
        self.commands: dict[str, list[str]] = {
            role: tree[f"{role}_start_ray_commands"] for role in ("head", "worker")
        }

    def _program(self, name: str, text: str) -> None:
        path = self.bin / name
        path.write_text(text)
        path.chmod(0o755)

    def give_gpu(self, *, listing: str = "GPU 0: NVIDIA A10G (UUID: GPU-1)") -> None:
        self._program("nvidia-smi", f"#!/bin/sh\necho {shlex.quote(listing)}\n")

    def start(self, role: str) -> list[subprocess.CompletedProcess[str]]:
        """Run the start commands one by one, each in its own shell, as `ray up` does over ssh."""
        return [
            subprocess.run(
                ["bash", "-c", command],
                env=self.env,
                capture_output=True,
                text=True,
                check=False,
                timeout=60,
            )
            for command in self.commands[role]
        ]

    def seen(self) -> dict[str, Any]:
        seen: dict[str, Any] = json.loads((self.home / "seen.json").read_text())
        return seen

    def pid(self) -> int:
        return int((self.home / ".simclr-ray" / "ray.pid").read_text())

    def stop(self) -> None:
        """End what the last start left, by its process id."""
        if (self.home / ".simclr-ray" / "ray.pid").exists() and alive(self.pid()):
            os.kill(self.pid(), signal.SIGTERM)


def alive(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    one = Machine(tmp_path)
    yield one
    one.stop()


def argument(seen: dict[str, Any], name: str) -> str:
    found = [a.partition("=")[2] for a in seen["args"] if a.startswith(f"--{name}=")]
    assert len(found) == 1, seen["args"]
    return str(found[0])


def test_the_head_starts_with_a_token_and_without_the_autoscaler_that_lacks_local(
    machine: Machine,
) -> None:
    machine.env["RAY_enable_autoscaler_v2"] = "1"  # what `ray up` exports before each command
    assert [r.returncode for r in machine.start("head")] == [0, 0]
    seen = machine.seen()
    assert seen["env"]["RAY_AUTH_MODE"] == "token"
    assert seen["env"]["RAY_AUTH_TOKEN_PATH"] == f"{machine.home}/.simclr-ray/auth_token"
    assert seen["env"]["RAY_enable_autoscaler_v2"] == "0"
    assert argument(seen, "num-cpus") == "0"
    assert argument(seen, "autoscaling-config") == "~/ray_bootstrap_config.yaml"


def test_a_machine_without_a_gpu_is_a_data_node(machine: Machine) -> None:
    assert [r.returncode for r in machine.start("worker")] == [0, 0]
    seen = machine.seen()
    assert seen["env"]["RAY_AUTH_MODE"] == "token"
    assert argument(seen, "address") == "10.0.0.10:6379"
    assert argument(seen, "labels") == "node-group=data"


def test_a_machine_with_a_gpu_trains(machine: Machine) -> None:
    machine.give_gpu()
    machine.start("worker")
    assert argument(machine.seen(), "labels") == "node-group=gpu"


def test_a_driver_without_a_gpu_makes_a_data_node(machine: Machine) -> None:
    machine.give_gpu(listing="No devices found.")
    machine.start("worker")
    assert argument(machine.seen(), "labels") == "node-group=data"


def test_a_second_start_replaces_the_first_and_leaves_the_ray_of_others_alone(
    machine: Machine, tmp_path: Path
) -> None:
    other = subprocess.Popen(
        [str(machine.bin / "ray"), "start", "--head", "--block"],
        env={**machine.env, "HOME": str(tmp_path / "bin")},
        stdout=subprocess.DEVNULL,
    )
    try:
        machine.start("worker")
        first = machine.pid()
        assert alive(first)
        assert [r.returncode for r in machine.start("worker")] == [0, 0]
        assert machine.pid() != first
        assert not alive(first)
        assert alive(machine.pid())
        assert other.poll() is None
    finally:
        other.terminate()
        other.wait()


def test_a_recorded_process_id_that_now_belongs_to_another_program_is_spared(
    machine: Machine,
) -> None:
    innocent = subprocess.Popen(["/bin/sleep", "60"])
    try:
        (machine.home / ".simclr-ray" / "ray.pid").write_text(f"{innocent.pid}\n")
        assert [r.returncode for r in machine.start("worker")] == [0, 0]
        assert innocent.poll() is None
        assert machine.pid() != innocent.pid
    finally:
        innocent.terminate()
        innocent.wait()


def test_a_ray_that_dies_at_once_fails_the_start_and_shows_its_log(machine: Machine) -> None:
    machine.env["FAIL"] = "1"
    *_, waited = machine.start("worker")
    assert waited.returncode != 0
    assert "Address already in use" in waited.stdout


def test_no_command_stops_every_ray_of_the_machine(machine: Machine) -> None:
    for command in [c for role in ("head", "worker") for c in machine.commands[role]]:
        assert "ray stop" not in command
        assert "pkill" not in command
        assert "killall" not in command
