"""`cluster/slurm.sh`, run by bash with recorders in the place of Slurm, Ray and the run.

The stand-in for `srun` starts its command on this machine, as Slurm would on each node; Slurm
itself is not run. What is tested is the script: what it starts, what it waits for, where signals
go, and that nothing is left.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "cluster" / "slurm.sh"
NODES = 3
PROGRAM = """#!{python} -S
import json, os, pathlib, signal, sys, time
folder, name, words = pathlib.Path({folder!r}), {name!r}, sys.argv[1:]
with open(folder / "calls.jsonl", "a") as log:
    log.write(json.dumps([name, *words]) + "\\n")
"""
BODIES = {
    # one process stands for all tasks of a step; its options end where `ray` begins
    "srun": """
with open(folder / "bound", "a") as bound:
    bound.write(os.environ.get("SRUN_CPUS_PER_TASK", "1") + "\\n")
if "ray" in words:
    os.execvp("ray", words[words.index("ray"):])
""",
    "scontrol": "",
    "ray": """
if words[:2] == ["list", "nodes"]:
    deadline = time.monotonic() + 10 * (os.environ["JOINED"] != "0")
    while len(list(folder.glob("ray-*"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    print(json.dumps([{"node_id": n} for n in range(int(os.environ["JOINED"]))], indent=1))
    sys.exit()
if "--head" in words and os.environ.get("FAIL"):
    sys.exit("Address already in use")
open(folder / f"ray-{os.getpid()}", "w").close()
signal.sigwait({signal.SIGTERM})
""",
    "simclr-ray": """
def save(*_):
    time.sleep(0.3)  # bash's `wait` ends before the run does
    sys.exit(75)
signal.signal(signal.SIGTERM, save)
open(folder / "running", "w").close()
time.sleep(float(os.environ.get("RUN_S", "0")))
sys.exit(int(os.environ.get("CODE", "0")))
""",
}


class Job:
    """The script in a folder of its own, with the recorders on its PATH."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        programs = folder / "env" / "bin"
        programs.mkdir(parents=True)
        for name, body in BODIES.items():
            head = PROGRAM.format(python=sys.executable, folder=str(folder), name=name)
            (programs / name).write_text(head + body)
            (programs / name).chmod(0o755)
        (programs / "activate").write_text(f"export PATH={programs}:$PATH\n")
        text = SCRIPT.read_text("utf-8").replace("/REPLACE-ME/simclr-ray/env", f"{folder}/env")
        self.script = folder / "slurm.sh"
        self.script.write_text(text)
        self.env = {
            "HOME": str(folder), "PATH": "/usr/bin:/bin", "SLURM_JOB_ID": "41",
            "SLURM_JOB_NUM_NODES": str(NODES), "SLURM_CPUS_PER_TASK": "64",
            "SLURMD_NODENAME": "n1", "JOINED": str(NODES),
        }  # fmt: skip

    def start(self, **env: str) -> subprocess.Popen[str]:
        """Start the script as Slurm does."""
        return subprocess.Popen(
            ["bash", str(self.script)], env=self.env | env, cwd=self.folder, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip

    def calls(self, name: str) -> list[list[str]]:
        """Return the arguments of each call of a program."""
        lines = (self.folder / "calls.jsonl").read_text().splitlines()
        return [call[1:] for call in map(json.loads, lines) if call[0] == name]

    def wait_for(self, name: str) -> None:
        """Return when a file is there."""
        deadline = time.monotonic() + 30
        while not (self.folder / name).exists():
            assert time.monotonic() < deadline, f"no {name}"
            time.sleep(0.02)

    def alive(self) -> list[int]:
        """Return the processes of Ray's recorders that live."""
        pids = [int(path.name.removeprefix("ray-")) for path in self.folder.glob("ray-*")]
        return [pid for pid in pids if Path(f"/proc/{pid}").exists()]


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return Job(tmp_path)


def test_ray_is_started_on_every_node_with_a_token_and_ends_with_the_run(job: Job) -> None:
    process = job.start()
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0, out
    head, others = [call for call in job.calls("ray") if call[0] == "start"]
    if "--head" not in head:
        head, others = others, head
    assert "--num-cpus=62" in head
    assert "--port=20041" in head
    assert "--address=n1:20041" in others
    assert all("--labels=node-group=gpu" in call for call in (head, others))
    *steps, last = job.calls("srun")
    assert last == ["--overlap", "--ntasks-per-node=1", "rm", "-rf", "/tmp/ray-41"]
    assert (job.folder / "bound").read_text().split() == ["64"] * 3, "cores of each step's tasks"
    assert sorted(word for step in steps for word in step if word.startswith("--nodes=")) == [
        "--nodes=1", f"--nodes={NODES - 1}",
    ]  # fmt: skip
    (run,) = job.calls("simclr-ray")
    assert run[:2] == ["pretrain", "cifar10_resnet18"]
    assert "scaling.num_workers=16" in run
    assert len(list(job.folder.glob("ray-*"))) == 2
    assert job.alive() == []
    assert job.calls("scontrol") == []


def test_the_runs_own_exit_code_is_the_jobs(job: Job) -> None:
    process = job.start(CODE="2")
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "Ray's logs are in /tmp/ray-41" in out
    assert not any("rm" in call for call in job.calls("srun"))
    assert job.calls("scontrol") == []
    assert job.alive() == []


def test_a_run_that_never_gets_anywhere_is_not_queued_for_ever(job: Job) -> None:
    assert job.start(CODE="75", SLURM_RESTART_COUNT="49").wait(timeout=60) == 75
    assert job.calls("scontrol") == [["requeue", "41"]]
    assert job.start(CODE="75", SLURM_RESTART_COUNT="50").wait(timeout=60) == 75
    assert len(job.calls("scontrol")) == 1


def test_a_signal_before_the_end_reaches_the_run_which_saves_and_is_queued_again(job: Job) -> None:
    process = job.start(RUN_S="60")
    job.wait_for("running")
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 75, out
    assert job.calls("scontrol") == [["requeue", "41"]]
    calls = [json.loads(line) for line in (job.folder / "calls.jsonl").read_text().splitlines()]
    assert [call[0] for call in calls[-2:]] == ["srun", "scontrol"], "it is cleared up first"
    assert job.alive() == []


def test_a_ray_that_does_not_start_fails_the_job_before_the_run(job: Job) -> None:
    process = job.start(FAIL="1", JOINED="0")
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "Address already in use" in out
    assert job.calls("simclr-ray") == []
    assert job.alive() == []


def test_shellcheck_has_nothing_to_say() -> None:
    program = shutil.which("shellcheck")
    if program is None:
        # a Debian package, which no package index has as such; `bash -n` stands in the next test
        pytest.skip("shellcheck is missing (Debian: shellcheck)")
    for script in sorted((ROOT / "cluster").glob("*.sh")):
        done = subprocess.run([program, str(script)], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("script", sorted(p.name for p in (ROOT / "cluster").glob("*.sh")))
def test_a_script_is_valid_shell_and_executable(script: str) -> None:
    path = ROOT / "cluster" / script
    assert os.access(path, os.X_OK)
    shell = path.read_text("utf-8").splitlines()[0].removeprefix("#!")
    assert subprocess.run([shell, "-n", str(path)], check=False).returncode == 0
