"""Batch scripts of Slurm that start Ray on the nodes of an allocation.

A script can do anything, so this reads only what is plain: its `#SBATCH` lines, its exports, and
the command that it runs.
"""

from __future__ import annotations

import math
import re
import shlex
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Final

from simclr_ray.config.findings import Finding, Findings
from simclr_ray.config.validation import nearest
from simclr_ray.distributed.launch.file import (
    MOST_NODES,
    LaunchFile,
    NodeGroup,
    command_in,
    cut,
    labels_of,
    refused,
)
from simclr_ray.distributed.launch.slurm_options import (
    check_form,
    check_options,
    count_of,
    hours_of,
)

DIRECTIVE: Final = re.compile(r"^#SBATCH\s+(\S.*)", re.MULTILINE)
_NODES: Final = re.compile(r"(\d{1,9})(?:-(\d{1,9}))?")
_ODD: Final = re.compile(r"\s+#SBATCH\s|#(?!SBATCH)(?i:sbatch)\s")
_START: Final = r"\bray (?:start|symmetric-run)\b"
_STEP: Final = re.compile(rf"\bsrun\b(.*){_START}")
_BOUND: Final = re.compile(r"\s(?:-c|--cpus-per-task[= ]|--cpu-bind=none)")
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
    return DIRECTIVE.search(text.replace("\r", "\n")) is not None


def read_slurm(text: str) -> LaunchFile:
    """Return what is plain in a batch script: nodes and what they have, time, token, command."""
    form = check_form(text)
    lines = re.split(r"\r\n|\r|\n", text.removeprefix("\ufeff"))
    begin = _first_command(lines)
    options, unread = _options(lines[:begin])
    form += _check_ignored(lines, begin)
    code = "\n".join(line for line in lines if not re.match(r"\s*#(?!SBATCH)", line))
    least, most, unsaid = _nodes(options)
    return LaunchFile(
        kind="Slurm",
        groups=_groups(options, code, least, most),
        command=command_in(code),
        findings=[
            *_schema([*form, *unread, *_check_options(options), *check_options(options), *unsaid]),
            *_check_start(code),
            *_check_binding(options, code),
            *_check_end(options, code),
        ],
        values=tuple(
            (f"line {number}", line)
            for number, line in enumerate(lines, 1)
            if not re.match(r"\s*#(?!SBATCH)", line)
        ),
        owned=True,
        environment=dict(_exports(code)),
        hours=hours_of(options.get("--time", "")),
    )


def _first_command(lines: Sequence[str]) -> int:
    """Return the index of the first line that is no comment: there `sbatch` ends reading."""
    commands = (i for i, line in enumerate(lines) if line.strip() and line.strip()[0] != "#")
    return next(commands, len(lines))


def _check_ignored(lines: Sequence[str], begin: int) -> Findings:
    """Return the lines that look like options and are none to `sbatch`."""
    late = [i for i, line in enumerate(lines, 1) if i > begin and DIRECTIVE.match(line)]
    findings = []
    if late:
        shown = (
            f"`sbatch` ignores #SBATCH in line {', '.join(map(str, late))}: after line "
            f"{begin + 1}, `{lines[begin].strip()[:40]}`, the first command"
        )
        findings.append(Finding("schema", "fail", shown, "move them above it"))
    odd = [i for i, line in enumerate(lines[:begin], 1) if _ODD.match(line)]
    if odd:
        shown = f"a comment to `sbatch`: #SBATCH in line {', '.join(map(str, odd))}"
        advice = "write #SBATCH in capitals, as the first letters of the line, or take it out"
        findings.append(Finding("schema", "warn", shown, advice))
    return findings


def _schema(findings: Findings) -> Findings:
    """Return what was found of the options, or that all are well."""
    if refused(findings):
        return findings
    well = Finding("schema", "ok", "known #SBATCH options; the script is not run")
    return [*findings, well]


def _options(lines: Sequence[str]) -> tuple[dict[str, str], Findings]:
    """Return the options of all `#SBATCH` lines by their long names, and the lines it cannot read.

    As getopt reads them: `-N4`, `-N 4`, `--nodes=4` and `--nodes 4` are one.
    """
    options: dict[str, str] = {}
    findings = []
    for line in DIRECTIVE.findall("\n".join(lines)):
        try:
            words = deque(shlex.split(line, comments=True))
        except ValueError as error:
            shown, advice = f"#SBATCH {line}: {error}", "`sbatch` refuses the script"
            findings.append(Finding("schema", "fail", shown, advice))
            continue
        while words:
            word = words.popleft()
            if word.startswith("--"):
                key, _, value = word.partition("=")
            elif word.startswith("-"):
                key, value = _SHORT.get(word[:2], word[:2]), word[2:]
            else:
                continue
            if not value and "=" not in word and words and not words[0].startswith("-"):
                value = words.popleft()
            options[key] = value
    return options, findings


def _nodes(options: Mapping[str, str]) -> tuple[int, int, Findings]:
    """Return the fewest and the most nodes that Slurm gives; none where no option tells."""
    text = options.get("--nodes", "")
    match = _NODES.fullmatch(text)
    least = int(match[1]) if match else 0
    most = int(match[2] or least) if match else 0
    if match and 0 < least <= most <= MOST_NODES:
        return least, most, []
    advice = "state --nodes=N: without it storage, tracking and workers are not checked"
    if "--nodes" in options:
        shown = f"#SBATCH --nodes={cut(text)} is no number of nodes"
        return 0, 0, [Finding("nodes", "fail", shown, advice)]
    if count_of(options.get("--ntasks", "1")) == 1:
        return 1, 1, []  # what Slurm gives to whom asks for none
    if per_node := count_of(options.get("--ntasks-per-node", "0")):
        nodes = math.ceil(count_of(options["--ntasks"]) / per_node)
        return nodes, nodes, []
    shown = f"--ntasks={options['--ntasks']} without --nodes: Slurm chooses how many there are"
    return 0, 0, [Finding("nodes", "warn", shown, advice)]


def _groups(options: Mapping[str, str], code: str, least: int, most: int) -> tuple[NodeGroup, ...]:
    """Return the head, which is the first of the nodes, and the others."""
    if not most:
        return ()
    stated = options.get("--cpus-per-task", "")
    cpus = float(stated) if re.fullmatch(r"\d{1,9}", stated) else None
    gpus = _gpus(options, least)
    worker = NodeGroup("workers", least - 1, most - 1, cpus=cpus, gpus=gpus, labels=_labels(code))
    head = worker._replace(name="head", least=1, most=1, is_head=True)
    reserved = re.search(r"--num-cpus=\$\(\(\s*SLURM_CPUS_PER_TASK\s*-\s*(\d+)\s*\)\)", code)
    if cpus is not None and reserved:
        head = head._replace(cpus=cpus - float(reserved[1]))
    return (head, worker) if most > 1 else (head,)


def _exports(code: str) -> Iterator[tuple[str, str]]:
    """Yield name and value of each `export NAME=VALUE ...` of a script."""
    for line in code.replace("\\\n", " ").splitlines():
        if not re.search(r"\bexport\s", line):
            continue
        lexer = shlex.shlex(line, posix=True, punctuation_chars=";&|")
        lexer.whitespace_split, lexer.commenters = True, ""
        is_export = False
        try:
            for word in lexer:
                if word.startswith("#"):
                    break
                is_export = (is_export or word == "export") and word[:1] not in set(";&|")
                if is_export and "=" in word:
                    name, _, value = word.partition("=")
                    yield name, value
        except ValueError:  # a text of several lines
            continue


def _gpus(options: Mapping[str, str], nodes: int) -> float:
    """Return the GPUs of a node: as stated for it, for each of its tasks, or for the whole job."""
    if text := options.get("--gpus-per-node"):
        return count_of(text)
    parts = [p.removeprefix("gres/") for p in options.get("--gres", "").split(",")]
    if gpus := [part for part in parts if part.split(":")[0] == "gpu"]:
        return sum(map(count_of, gpus))
    if text := options.get("--gpus-per-task"):
        tasks = options.get("--ntasks-per-node") or str(
            math.ceil(count_of(options.get("--ntasks", str(nodes))) / nodes)
        )
        return count_of(text) * count_of(tasks)
    return count_of(options.get("--gpus", "0")) // nodes


def _labels(code: str) -> dict[str, str]:
    match = re.search(r"--labels[= ][\"']?([^\s\"'\\]+)", code)
    return labels_of(match[1]) if match else {}


def _check_options(options: Mapping[str, str]) -> Findings:
    """Return the options that `sbatch` does not know, where one that it knows is near."""
    findings = []
    for key in options:
        near = nearest(key, OPTIONS)
        if key.startswith("--") and key not in OPTIONS and near:
            advice = "see `sbatch --help`: it refuses the script"
            findings.append(Finding("schema", "fail", f"#SBATCH {key}: unknown{near}", advice))
    return findings


def _check_start(code: str) -> Findings:
    """Return whether Ray is started on all nodes, and asks for a token."""
    if not re.search(_START, code):
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


def _check_binding(options: Mapping[str, str], code: str) -> Findings:
    """Return whether `srun` lets Ray run on all the CPUs that it is told of."""
    if "--cpus-per-task" not in options or "SRUN_CPUS_PER_TASK=" in code:
        return []
    steps = _STEP.findall(code.replace("\\\n", " "))
    if all(_BOUND.search(options) for options in steps):
        return []
    shown = "since Slurm 22.05 srun does not take --cpus-per-task from sbatch: Ray gets one core"
    advice = "export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK before the first srun"
    return [Finding("start", "warn", shown, advice)]


def _check_end(options: Mapping[str, str], code: str) -> Findings:
    """Return whether the run hears of the end of its time before it comes."""
    if "--time" not in options or "--signal" in options:
        return []
    shown = f"at the end of --time={options['--time']} the run is killed between two checkpoints"
    if "--requeue" in options and "trap" in code:
        return []
    advice = "add #SBATCH --signal=B:TERM@300 and pass TERM on to simclr-ray (cluster/slurm.sh)"
    return [Finding("end", "warn", shown, advice)]
