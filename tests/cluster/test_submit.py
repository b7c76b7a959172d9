"""`ray job submit` against a head that was started on its own, with a token.

The head is started by the commands of `cluster/onprem.yaml` themselves; only ports, the number of
CPUs and the folder of Ray's files are changed, so that other clusters of this machine stay apart.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pyarrow.parquet as pq
import pytest
import yaml  # type: ignore[import-untyped]  # what Ray reads them with; has no stubs

ROOT = Path(__file__).resolve().parents[2]
RAY = (sys.executable, "-m", "ray.scripts.scripts")
PRETRAIN = (sys.executable, "-m", "simclr_ray", "pretrain", "cifar10_cpu")

pytestmark = [pytest.mark.long, pytest.mark.ray, pytest.mark.timeout(900)]


class Head(NamedTuple):
    """A running head: where its dashboard is, what a client needs in its environment, its pid."""

    dashboard: str
    env: dict[str, str]
    pid: int
    home: Path

    def submit(
        self, *command: str, timeout_s: float = 600, **env: str
    ) -> subprocess.CompletedProcess[str]:
        """Run `ray job submit -- command` from an empty folder and return how it ended."""
        folder = self.home / "job"
        folder.mkdir(exist_ok=True)
        return subprocess.run(
            [
                *(*RAY, "job", "submit", "--address", self.dashboard),
                *("--working-dir", str(folder), "--", *command),
            ],
            env={**self.env, **env},
            cwd=self.home,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


def processes_of(folder: Path) -> list[int]:
    """Return the ids of the processes whose command line names Ray's folder."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                line = (entry / "cmdline").read_bytes()
            except OSError:
                continue
            if str(folder).encode() in line:
                found.append(int(entry.name))
    return found


def onprem_head_commands(temp: Path, ports: list[int]) -> list[str]:
    """Return the head's start commands of onprem.yaml, with own ports, CPUs and folder."""
    tree = yaml.safe_load((ROOT / "cluster" / "onprem.yaml").read_text("utf-8"))
    gcs, dashboard, client, agent = ports
    changes = {
        "--port=6379": f"--port={gcs} --dashboard-port={dashboard} --temp-dir={temp}"
        f" --ray-client-server-port={client} --dashboard-agent-listen-port={agent}"
        f" --node-ip-address=127.0.0.1 --object-store-memory={256 * 2**20}",
        "--num-cpus=0": "--num-cpus=4",
        "--autoscaling-config=~/ray_bootstrap_config.yaml": "",  # `ray up` writes that file
    }
    commands: list[str] = tree["head_start_ray_commands"]
    for old, new in changes.items():
        assert sum(old in c for c in commands) == 1, old
        commands = [c.replace(old, new) for c in commands]
    return commands


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    # Short, since Ray puts sockets there and a socket's path may have 107 bytes.
    home = Path(tempfile.mkdtemp(prefix="sr-", dir="/tmp"))
    own = home / ".simclr-ray"
    own.mkdir()
    token = own / "auth_token"
    token.touch(mode=0o600)
    token.write_text(secrets.token_hex(32))
    (home / "bin").mkdir()
    # The console script as pip writes it; a venv may be used without being on PATH.
    (home / "bin" / "ray").write_text(
        f"#!{sys.executable}\nfrom ray.scripts.scripts import main\nmain()\n"
    )
    (home / "bin" / "ray").chmod(0o755)
    ports = free_ports(4)
    kept = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    base = {
        **kept,
        "HOME": str(home),
        "PATH": f"{home / 'bin'}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
    }
    try:
        for command in onprem_head_commands(home / "ray", ports):
            subprocess.run(["bash", "-c", command], env=base, check=True, timeout=180)
        pid = int((own / "ray.pid").read_text())
        client = {**base, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
        yield Head(f"http://127.0.0.1:{ports[1]}", client, pid, home)
    finally:
        stop(home)
        shutil.rmtree(home, ignore_errors=True)


def stop(home: Path) -> None:
    """End the head of `home` by its recorded id, then whatever still names its folder."""
    record = home / ".simclr-ray" / "ray.pid"
    if record.exists():
        pid = int(record.read_text())
        if pid in processes_of(home) or Path(f"/proc/{pid}").exists():
            os.kill(pid, signal.SIGTERM)
            subprocess.run(
                ["timeout", "60", "tail", f"--pid={pid}", "-f", "/dev/null"], check=False
            )
    for left in processes_of(home):
        os.kill(left, signal.SIGKILL)


def test_the_log_and_a_zero_exit_code_of_a_job_reach_the_terminal(head: Head) -> None:
    done = head.submit(sys.executable, "-c", "print('hello from', 6 * 7)")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "hello from 42" in done.stdout


def test_the_log_and_failure_of_a_job_reach_the_terminal(head: Head) -> None:
    done = head.submit(sys.executable, "-c", "import sys; print('about to fail'); sys.exit(3)")
    assert done.returncode != 0
    assert "about to fail" in done.stdout
    assert "exit code 3" in done.stdout + done.stderr


def test_a_job_runs_in_token_mode_and_reaches_its_cluster(head: Head) -> None:
    code = textwrap.dedent(
        """
        import os, ray
        ray.init(address="auto", logging_level="ERROR")
        print("mode", os.environ["RAY_AUTH_MODE"], "cpus", int(ray.cluster_resources()["CPU"]))
        """
    )
    (head.home / "job").mkdir(exist_ok=True)
    (head.home / "job" / "ask.py").write_text(code)
    done = head.submit(sys.executable, "ask.py")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "mode token cpus 4" in done.stdout


def test_a_client_without_the_token_is_turned_away(head: Head) -> None:
    done = head.submit(sys.executable, "-c", "print('must not run')", RAY_AUTH_MODE="disabled")
    assert done.returncode != 0
    assert "must not run" not in done.stdout.splitlines()
    with pytest.raises(urllib.error.HTTPError, match="401"):
        urllib.request.urlopen(f"{head.dashboard}/api/jobs/", timeout=30)


def test_a_wrong_config_ends_the_job_with_a_message(head: Head) -> None:
    done = head.submit(*PRETRAIN, "batch_sise=256")
    assert done.returncode != 0
    assert "batch_size" in done.stdout, "the nearest name is in the message"
    assert "exit code 2" in done.stdout + done.stderr


def test_pretraining_runs_as_a_job_for_two_epochs(head: Head, image_root: Path) -> None:
    storage = head.home / "runs"
    # The scores are not looked at: as few rows as show that the evaluation runs.
    few = head.home / "few.parquet"
    rows = pq.read_table(image_root / "cifar10" / "test" / "part-00000.parquet").slice(0, 512)
    pq.write_table(rows, few)
    done = head.submit(
        *PRETRAIN,
        f"data.train={image_root / 'cifar10' / 'train'}",
        f"data.eval_train={few}",
        f"data.test={few}",
        "data.limit=2048",
        "epochs=2",
        "evaluation.linear.epochs=2",
        "scaling.num_workers=2",
        f"storage={storage}",
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-6000:]
    assert re.search(r"epoch\s+2\.00\s+step 16/16\s+loss \d", done.stdout)
    assert "succeeded" in done.stdout
    (run,) = storage.glob("cifar10_cpu-*")
    assert list(run.glob("step-00000016-*"))


def test_stopping_the_recorded_process_ends_every_process_of_that_head(head: Head) -> None:
    # Last in the file: it takes the module's head down, by the command that onprem_stop.sh sends.
    assert len(processes_of(head.home)) > 3
    script = (ROOT / "cluster" / "onprem_stop.sh").read_text("utf-8")
    remote = script.partition('"$host" \'')[2].partition("' ||")[0]
    subprocess.run(["sh", "-c", remote], env=head.env, check=True, timeout=120)
    assert not Path(f"/proc/{head.pid}").exists()
    assert processes_of(head.home / "ray") == []
    assert not (head.home / ".simclr-ray" / "ray.pid").exists()
