"""Batch scripts of Slurm that start Ray on the nodes of an allocation.

A script can do anything, so this reads only what is plain: its `#SBATCH` lines, its exports, and
the command that it runs.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final

from simclr_ray.config.findings import Finding, Findings
from simclr_ray.config.validation import nearest
from simclr_ray.distributed.launch.file import LaunchFile, NodeGroup, command_in, labels_of

DIRECTIVE: Final = re.compile(r"^#SBATCH\s+(-\w|--[\w-]+)(?:[ =]\s*(\S+))?", re.MULTILINE)
_SHORT: Final = {
    "-N": "--nodes", "-c": "--cpus-per-task", "-G": "--gpus", "-t": "--time", "-J": "--job-name",
    "-n": "--ntasks", "-p": "--partition", "-A": "--account", "-o": "--output", "-e": "--error",
    "-q": "--qos", "-w": "--nodelist", "-x": "--exclude", "-C": "--constraint",
    "-d": "--dependency",
}  # fmt: skip
OPTIONS: Final = (
    *_SHORT.values(), "--array", "--begin", "--chdir", "--clusters", "--comment", "--cpu-freq",
    "--cpus-per-gpu", "--deadline", "--distribution", "--exclusive", "--export", "--gpu-bind",
    "--gpus-per-node", "--gpus-per-task", "--gres", "--hint", "--hold", "--input",
    "--kill-on-bad-exit", "--licenses", "--mail-type", "--mail-user", "--mem", "--mem-bind",
    "--mem-per-cpu", "--mem-per-gpu", "--network", "--nice", "--no-kill", "--no-requeue",
    "--ntasks-per-node", "--open-mode", "--oversubscribe", "--parsable", "--priority",
    "--profile", "--reservation", "--requeue", "--signal", "--switches", "--threads-per-core",
    "--time-min", "--tmp", "--tres-per-task", "--wait", "--wait-all-nodes", "--wckey", "--wrap",
)  # fmt: skip


def is_slurm(text: str) -> bool:
    """Return whether a text is a batch script of Slurm."""
    return text.startswith("#!") and DIRECTIVE.search(text) is not None


def read_slurm(text: str) -> LaunchFile:
    """Return what is plain in a batch script: nodes and what they have, time, token, command."""
    given = {_SHORT.get(key, key): value or "" for key, value in DIRECTIVE.findall(text)}
    code = "\n".join(line for line in text.splitlines() if not re.match(r"\s*#(?!SBATCH)", line))
    nodes = int(given["--nodes"]) if given.get("--nodes", "").isdigit() else 1
    cpus = float(given["--cpus-per-task"]) if given.get("--cpus-per-task", "").isdigit() else None
    worker = NodeGroup(
        "workers", nodes - 1, nodes - 1, cpus=cpus, gpus=_gpus(given), labels=_labels(code)
    )
    head = worker._replace(name="head", least=1, most=1, is_head=True)
    reserved = re.search(r"--num-cpus=\$\(\(\s*SLURM_CPUS_PER_TASK\s*-\s*(\d+)\s*\)\)", code)
    if cpus is not None and reserved:
        head = head._replace(cpus=cpus - float(reserved[1]))
    groups = [head, worker] if nodes > 1 else [head]
    return LaunchFile(
        kind="Slurm",
        groups=tuple(groups),
        command=command_in(code),
        findings=[*_check_options(given), *_check_start(code), *_check_end(given, code)],
        values=code,
        owned=True,
        environment=dict(re.findall(r"\bexport\s+(\w+)=[\"']?([^\s\"';]*)", code)),
        hours=hours_of(given.get("--time", "")),
    )


def hours_of(text: str) -> float | None:
    """Return a time of Slurm in hours: `minutes`, `h:mm:ss` or `days-h[:mm[:ss]]`."""
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", text)
    if not match:
        return None
    days, first, second, third = (int(part) if part else None for part in match.groups())
    if days is not None:
        return days * 24 + (first or 0) + (second or 0) / 60 + (third or 0) / 3600
    if third is not None:
        return (first or 0) + (second or 0) / 60 + third / 3600
    return ((first or 0) + (second or 0) / 60) / 60


def _gpus(given: Mapping[str, str]) -> float:
    """Return the GPUs of a node."""
    for key in ("--gpus-per-node", "--gpus-per-task", "--gres"):
        if match := re.search(r"(\d+)$", given.get(key, "")):
            return float(match[1])
    return 0.0


def _labels(code: str) -> dict[str, str]:
    match = re.search(r"--labels[= ][\"']?([^\s\"'\\]+)", code)
    return labels_of(match[1]) if match else {}


def _check_options(given: Mapping[str, str]) -> Findings:
    """Return the options that `sbatch` does not know, where one that it knows is near."""
    findings = []
    for key in given:
        near = nearest(key, OPTIONS)
        if key.startswith("--") and key not in OPTIONS and near:
            advice = "see `sbatch --help`: it refuses the script"
            findings.append(Finding("schema", "fail", f"#SBATCH {key}: unknown{near}", advice))
    if not findings:
        findings.append(Finding("schema", "ok", "known #SBATCH options; the script is not run"))
    return findings


def _check_start(code: str) -> Findings:
    """Return whether Ray is started on all nodes, and asks for a token."""
    if not re.search(r"\bray (?:start|symmetric-run)\b", code):
        advice = "start Ray on each node (cluster/slurm.sh), or the run sees one node"
        return [Finding("start", "fail", "the script starts no Ray", advice)]
    findings = []
    if "RAY_AUTH_MODE=token" not in code:
        shown = "anyone who reaches the nodes may run code on them, as you"
        advice = "export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=... before Ray is started"
        findings.append(Finding("token", "fail", shown, advice))
    else:
        findings.append(Finding("token", "ok", "Ray asks for a token"))
    if re.search(r"\bray stop\b|\bray symmetric-run\b", code) and "--exclusive" not in code:
        shown = "`ray stop`, which symmetric-run calls as well, ends your other jobs' Ray on a node"
        findings.append(Finding("end", "fail", shown, "add #SBATCH --exclusive"))
    return findings


def _check_end(given: Mapping[str, str], code: str) -> Findings:
    """Return whether the run hears of the end of its time before it comes."""
    if "--time" not in given or "--signal" in given:
        return []
    shown = f"at the end of --time={given['--time']} the run is killed between two checkpoints"
    if "--requeue" in given and "trap" in code:
        return []
    advice = "add #SBATCH --signal=B:TERM@300 and pass TERM on to simclr-ray (cluster/slurm.sh)"
    return [Finding("end", "warn", shown, advice)]
