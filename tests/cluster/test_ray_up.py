"""`ray up cluster/onprem.yaml` over real sshd: two machines come up, run a job, and are stopped.

Three machines of the harness, each with its own processes, home and `/tmp`: an operator, who has
nothing but the launch file and a key, a head and a worker, who have sshd. What differs from the
file is where things lie: addresses, user, and the setup commands, in place of which this
environment is put on PATH. Those are checked apart, in an empty home.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml  # type: ignore[import-untyped]  # what Ray reads them with; has no stubs

from tests.cluster.machines import Machine, leftovers
from tests.cluster.needs import needing_this_machine
from tests.cluster.nodes import Network
from tests.long.environments import uv
from tests.ray.images import write_shapes

pytestmark = [pytest.mark.long, pytest.mark.ray, pytest.mark.timeout(1500)]

ROOT = Path(__file__).resolve().parents[2]
SSHD = "/usr/sbin/sshd"
RAY = (sys.executable, "-m", "ray.scripts.scripts")
JOIN_S = 480.0  # a Ray that finds no time to start is started again, by the start command
JOB_S = 900.0
STORE = f"--object-store-memory={128 * 2**20}"
# A `/run` of its own, for sshd wants a folder there, and no password: keys only.
START_SSHD = f"""
mount -t tmpfs run /run && mkdir -m 755 /run/sshd && ssh-keygen -q -t ed25519 -N '' -f ~/host_key
exec {SSHD} -D -e -f /dev/null -h ~/host_key -o ListenAddress=$ADDRESS -o UsePAM=no \
  -o PasswordAuthentication=no -o PidFile=none -o StrictModes=no
"""
CPUS = re.compile(r"0\.0/\d+\.0 CPU")  # the worker's: the head offers none


class Site(NamedTuple):
    """Two machines with sshd, an operator, and the launch file that he edited."""

    network: Network
    operator: Machine
    head: Machine
    worker: Machine
    file: Path

    def ray(self, *words: str, timeout_s: float = 300.0) -> subprocess.CompletedProcess[str]:
        """Run `ray` as the operator."""
        return self.operator.run([*RAY, *words], timeout_s=timeout_s)

    def on_head(self, command: str, timeout_s: float = 300.0) -> subprocess.CompletedProcess[str]:
        """Run a command as the file's head comment says: by `ray exec`, with the client's token."""
        return self.ray("exec", str(self.file), f". ~/.simclr-ray/client; {command}",
                        timeout_s=timeout_s)  # fmt: skip


def home_of(machine: Machine) -> Path:
    """Return the folder that a machine has for its home."""
    return machine.folder / "home"


def start_sshd(machine: Machine, key: str) -> None:
    """Start sshd on a machine, for who holds the key."""
    keys = home_of(machine) / ".ssh"
    keys.mkdir(mode=0o700)
    (keys / "authorized_keys").write_text(key)
    machine.popen(["bash", "-c", START_SSHD], env={"ADDRESS": machine.address}, log="sshd")
    log = machine.folder / "sshd.log"
    deadline = time.monotonic() + 30
    while "Server listening" not in log.read_text():
        assert time.monotonic() < deadline, machine.told()
        time.sleep(0.1)


def edited(head: Machine, worker: Machine, user: str) -> dict[str, Any]:
    """Return the launch file as an operator edits it, with a ready environment for setup."""
    tree: dict[str, Any] = yaml.safe_load((ROOT / "cluster" / "onprem.yaml").read_text("utf-8"))
    tree["provider"] |= {"head_ip": head.address, "worker_ips": [worker.address]}
    tree |= {"min_workers": 1, "max_workers": 1}
    tree["auth"]["ssh_user"] = user
    tree["file_mounts"] = {
        there: here for there, here in tree["file_mounts"].items() if "token" in there
    }
    programs = Path(sys.executable).parent
    environment = f"export PATH={programs}:$PATH PYTHONPATH={ROOT} OMP_NUM_THREADS=1"
    kept = [c for c in tree["setup_commands"] if "auth_token" in c]
    assert len(kept) == 2
    tree["setup_commands"] = [*kept, f"echo '{environment}' > ~/.bashrc"]
    for key in ("head_start_ray_commands", "worker_start_ray_commands"):  # no third of the memory
        tree[key] = [c.replace("--disable-usage-stats", f"--disable-usage-stats {STORE}")
                     for c in tree[key]]  # fmt: skip
    return tree


@pytest.fixture
def site() -> Iterator[Site]:
    for program in (SSHD, "ssh", "ssh-keygen", "rsync"):
        if shutil.which(program) is None:
            # Debian packages of the system, which no package index has; `ray up` is ssh and rsync
            pytest.skip(f"{program} is missing (Debian: openssh-server, openssh-client, rsync)")
    with ExitStack() as stack:
        with needing_this_machine():
            network = stack.enter_context(Network())
        network.env.pop("RAY_AUTH_TOKEN")  # the file brings it, or nothing does
        network.env.pop("RAY_AUTH_MODE")
        operator, head, worker = (network.machine(n) for n in ("operator", "head", "worker"))
        folder = home_of(operator) / ".ssh"
        folder.mkdir(mode=0o700)
        private = folder / "id_ed25519"
        subprocess.run(
            ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(private)], check=True
        )
        (folder / "config").write_text("StrictHostKeyChecking accept-new\n")
        for machine in (head, worker):
            start_sshd(machine, private.with_suffix(".pub").read_text())
        token = home_of(operator) / ".simclr-ray" / "auth_token"
        token.parent.mkdir()
        token.touch(mode=0o600)
        token.write_text(secrets.token_hex(32))
        file = network.folder / "onprem.yaml"
        user = operator.run(["id", "-un"]).stdout.strip()
        file.write_text(yaml.safe_dump(edited(head, worker, user)))
        yield Site(network, operator, head, worker, file)
    assert not leftovers(network.token)


def ray_processes(machine: Machine) -> list[str]:
    """Return the command lines of Ray's processes of a machine."""
    lines = machine.run(["ps", "-eo", "args"]).stdout.splitlines()
    return [line for line in lines if re.search(r"ray start|/ray/|ray::|^ray\b", line)]


def test_ray_up_over_ssh_runs_a_job_and_the_stop_script_leaves_nothing(site: Site) -> None:
    began = time.monotonic()
    up = site.ray("up", "--yes", "--no-config-cache", str(site.file))
    assert up.returncode == 0, up.stdout[-6000:] + up.stderr[-3000:]
    is_up = time.monotonic()
    deadline = is_up + JOIN_S
    status = site.on_head("ray status")
    while not CPUS.search(status.stdout) and time.monotonic() < deadline:
        time.sleep(2)
        status = site.on_head("ray status")
    assert CPUS.search(status.stdout), status.stdout + status.stderr
    joined = time.monotonic()
    assert ray_processes(site.worker), "the worker was started by the head's autoscaler, over ssh"
    open_to = site.operator.run(["bash", "-c", f"echo > /dev/tcp/{site.head.address}/8265"])
    assert open_to.returncode != 0, "the dashboard listens on the head itself"

    data, runs = site.network.folder / "data", site.network.folder / "runs"
    data.mkdir()
    write_shapes(data / "train.parquet", 256, row_group_size=100)
    write_shapes(data / "test.parquet", 64)
    settings = (
        f"data.train={data}/train.parquet data.test={data}/test.parquet storage={runs} epochs=2 "
        "evaluation.every_epochs=0 evaluation.linear.epochs=1 registry.name= scaling.num_workers=1 "
        "scaling.data_label_selector.node-group=data tracking.system_metrics=false "
        "scaling.worker_label_selector.node-group=data"  # the one machine is for both
    )
    job = site.on_head(
        "ray job submit --address http://127.0.0.1:8265 -- "
        f"simclr-ray pretrain shapes_demo {settings}",
        timeout_s=JOB_S,
    )
    assert job.returncode == 0, job.stdout[-8000:] + job.stderr[-3000:]
    assert "succeeded" in job.stdout
    assert list(runs.glob("shapes_demo-*/step-00000004-*"))
    done = time.monotonic()

    hosts = [f"{site.operator.run(['id', '-un']).stdout.strip()}@{m.address}"
             for m in (site.head, site.worker)]  # fmt: skip
    stop = site.operator.run(["sh", str(ROOT / "cluster" / "onprem_stop.sh"), *hosts])
    assert stop.returncode == 0, stop.stdout + stop.stderr
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline and any(map(ray_processes, (site.head, site.worker))):
        time.sleep(0.5)
    assert ray_processes(site.head) == []
    assert ray_processes(site.worker) == []
    # recorded only: what a machine is fast enough for is not for this test to say
    sys.stdout.write(
        f"up in {is_up - began:.0f} s, joined after {joined - is_up:.0f} s, job in "
        f"{done - joined:.0f} s, stopped in {time.monotonic() - done:.0f} s\n"
    )


def test_the_setup_commands_make_an_environment_in_an_empty_home(tmp_path: Path) -> None:
    tree = yaml.safe_load((ROOT / "cluster" / "onprem.yaml").read_text("utf-8"))
    home = tmp_path / "home"
    own = home / ".simclr-ray"
    own.mkdir(parents=True)
    (own / "auth_token").write_text(secrets.token_hex(32))
    shutil.copy(ROOT / "requirements.lock", own / "requirements.lock")
    subprocess.run([uv(), "build", "--quiet", "--wheel", "--out-dir", str(own / "dist"), str(ROOT)],
                   check=True)  # fmt: skip
    environment = {
        name: value for name, value in os.environ.items()
        if name not in ("PYTHONPATH", "VIRTUAL_ENV") and not name.startswith("RAY_")
    }  # fmt: skip
    # the Python that this environment was made of, and what uv has fetched before
    environment |= {
        "HOME": str(home),
        "PATH": f"{sys.base_prefix}/bin:/usr/bin:/bin",
        "UV_CACHE_DIR": subprocess.run(
            [uv(), "cache", "dir"], capture_output=True, text=True, check=True
        ).stdout.strip(),
    }
    for _ in range(2):  # the file is used again after each change
        for command in tree["setup_commands"]:
            done = subprocess.run(["bash", "-c", command], env=environment, cwd=home, text=True,
                                  capture_output=True, check=False)  # fmt: skip
            assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
    assert (own / "auth_token").stat().st_mode & 0o777 == 0o600
    assert (home / ".bashrc").read_text().count("simclr-ray/env") == 1
    asked = ["bash", "-c", ". ~/.bashrc; simclr-ray --version; ray --version; command -v ray"]
    done = subprocess.run(asked, env=environment, cwd=home, text=True, capture_output=True,
                          check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert f"{own}/env/bin/ray" in done.stdout
    pin = re.search(r"^ray\[?.*==([\d.]+)", (own / "requirements.lock").read_text(), re.MULTILINE)
    assert pin
    assert f"version {pin[1]}" in done.stdout
