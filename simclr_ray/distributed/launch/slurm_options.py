"""Values of `#SBATCH` options, and the form of a script, as `sbatch` takes or refuses them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final

from simclr_ray.config.findings import Finding, Findings
from simclr_ray.distributed.launch.file import cut

REFUSED: Final = "`sbatch` refuses the script"
MEMORY_GIB: Final = 4.0  # of a node: Ray's processes take 2, torch with its libraries 1
_UNITS: Final = {"": 1 / 1024, "m": 1 / 1024, "k": 1 / 1024**2, "g": 1.0, "t": 1024.0}
_WHOLE: Final = r"[1-9]\d{0,6}"
_MEMORY: Final = r"(\d{1,12})([kmgt]?)b?"
_GPUS: Final = r"(?:[a-z][\w.-]*:)?\d{1,6}|[a-z][\w.-]*"
_WORDS: Final = {
    _WHOLE: "a whole number, 1 or more",
    _MEMORY: "a whole number and K, M, G or T, such as 64G",
    _GPUS: "NUMBER or TYPE:NUMBER, such as 4 or a100:4",
}
_FORMS: Final = {
    "--ntasks": _WHOLE, "--cpus-per-task": _WHOLE, "--ntasks-per-node": _WHOLE,
    "--cpus-per-gpu": _WHOLE, "--threads-per-core": _WHOLE,
    "--mem": _MEMORY, "--mem-per-cpu": _MEMORY, "--mem-per-gpu": _MEMORY, "--tmp": _MEMORY,
    "--gpus": _GPUS, "--gpus-per-node": _GPUS, "--gpus-per-task": _GPUS,
}  # fmt: skip
_TIMES: Final = ("--time", "--time-min")


def check_form(text: str) -> Findings:
    """Return why `sbatch` would refuse a script before it reads it."""
    findings = []
    if not text.startswith("#!"):
        shown = f"the script's first line is no #!: {REFUSED}"
        if text.startswith("\ufeff#!"):
            shown = f"a byte order mark stands before #!: {REFUSED}"
        advice = "write #!/bin/bash as the first line, with nothing before it"
        findings.append(Finding("schema", "fail", shown, advice))
    if "\r" in text:
        line = text.partition("\r")[0].count("\n") + 1
        shown = f"DOS line ends (CRLF), from line {line}: {REFUSED}"
        findings.append(Finding("schema", "fail", shown, "write it with LF: dos2unix FILE"))
    return findings


def check_options(options: Mapping[str, str]) -> Findings:
    """Return the values that `sbatch` refuses, and memory that Ray does not start in.

    Args:
        options: Options by their long names; those of nodes are checked where they are read.
    """
    findings = []
    for key, value in options.items():
        form = _FORMS.get(key)
        if key in _TIMES and value.lower() not in ("infinite", "unlimited"):
            if hours_of(value) is None:
                wanted = "minutes, H:MM:SS or DAYS-H, such as 24:00:00 or 2-12"
                findings.append(_refused(key, value, wanted))
        elif form and not all(re.fullmatch(form, part, re.IGNORECASE) for part in value.split(",")):
            findings.append(_refused(key, value, _WORDS[form]))
        elif form == _GPUS and not re.search(r"(?:^|:)\d+(?:,|$)", value):
            shown = f"#SBATCH {key}={value} names a type: one GPU of it is asked for"
            findings.append(Finding("schema", "warn", shown, f"write {key}={value}:NUMBER"))
    return [*findings, *_check_memory(options)]


def _refused(key: str, value: str, wanted: str) -> Finding:
    return Finding("schema", "fail", f"#SBATCH {key}={cut(value)}: {REFUSED}", f"write {wanted}")


def _check_memory(options: Mapping[str, str]) -> Findings:
    """Return whether a node has the memory that Ray starts in; 0 is all of it."""
    cpus = count_of(options.get("--cpus-per-task", "1")) * count_of(
        options.get("--ntasks-per-node", "1")
    )
    for key, times in (("--mem", 1), ("--mem-per-cpu", cpus)):
        match = re.fullmatch(_MEMORY, options.get(key, ""), re.IGNORECASE)
        gib = int(match[1]) * _UNITS[match[2].lower()] * times if match else 0.0
        if 0 < gib < MEMORY_GIB:
            shown = f"#SBATCH {key}={options[key]}: {gib:.3g} GiB on a node is too little for Ray"
            advice = f"ask for {MEMORY_GIB:g} GiB or more, or --mem=0 for all of a node"
            return [Finding("memory", "warn", shown, advice)]
    return []


def hours_of(text: str) -> float | None:
    """Return a time of Slurm in hours: `minutes`, `h:mm:ss` or `days-h[:mm[:ss]]`."""
    match = re.fullmatch(r"(?:(\d{1,6})-)?(\d{1,9})(?::(\d{1,6}))?(?::(\d{1,6}))?", text)
    if not match:
        return None
    days, first, second, third = (int(part) if part else None for part in match.groups())
    if days is not None:
        return days * 24 + (first or 0) + (second or 0) / 60 + (third or 0) / 3600
    if third is not None:
        return (first or 0) + (second or 0) / 60 + third / 3600
    return ((first or 0) + (second or 0) / 60) / 60


def count_of(text: str) -> int:
    """Return the number of `[TYPE:]NUMBER[,...]`; a type alone is one."""
    last = [part.rpartition(":")[2] for part in text.split(",")]
    return sum(int(part) if re.fullmatch(r"\d{1,9}", part) else 1 for part in last)
