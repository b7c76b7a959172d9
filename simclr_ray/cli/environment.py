"""What this machine is: its versions, cores, memory and device, as findings with advice.

Nothing here needs Ray or MLflow. `doctor.py` adds the cluster.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Iterable
from importlib import metadata
from typing import Final

import torch
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from torch import nn

from simclr_ray.augment import native
from simclr_ray.config.experiment import Experiment
from simclr_ray.config.findings import Finding, Findings
from simclr_ray.config.wording import GIB
from simclr_ray.distributed.machine import cores, free_shared_memory, machine_memory
from simclr_ray.distributed.object_store import LEAST_BYTES, num_decode_actors, store_bytes
from simclr_ray.nn.precision import unusable_gpu
from simclr_ray.storage.provenance import version_of
from simclr_ray.train.scaling import of_machine

PACKAGE: Final = "simclr-ray"
BF16_WORTHWHILE: Final = 1.2  # below that the lost digits buy nothing


def check_versions() -> Findings:
    """Return one finding for Python and one for the libraries, by the package's own metadata."""
    try:
        requires = metadata.requires(PACKAGE) or []
        python = metadata.metadata(PACKAGE)["Requires-Python"] or ""
    except metadata.PackageNotFoundError:
        advice = "install it (pip install -e . in a checkout), so that versions can be compared"
        return [Finding("versions", "warn", f"{PACKAGE} is not installed as a package", advice)]
    return compare_versions(requires, python)


def compare_versions(requires: Iterable[str], python: str) -> Findings:
    """Return findings for requirement lines such as `torch>=2.9,<2.16` and a Python range."""
    running = platform.python_version()
    if SpecifierSet(python).contains(running, prereleases=True):
        findings = [Finding("python", "ok", f"{running} is in {python}")]
    else:
        findings = [
            Finding("python", "fail", f"{running}; supported: {python}", "use such a Python")
        ]
    wrong, right = [], []
    for requirement in map(Requirement, requires):
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        version = version_of(requirement.name)
        if version != "absent" and requirement.specifier.contains(version, prereleases=True):
            right.append(f"{requirement.name} {version}")
        else:
            wrong.append(f"{requirement.name} {version} (supported: {requirement.specifier})")
    if wrong:
        advice = "install the versions of requirements.lock"
        return [*findings, Finding("libraries", "fail", "; ".join(wrong), advice)]
    return [*findings, Finding("libraries", "ok", ", ".join(right))]


def check_machine() -> Findings:
    """Return findings on cores, memory and shared memory."""
    there = cores()
    few = "decode and training will share one core; use a machine with two or more"
    findings = [Finding("cores", *(("ok", f"{there}") if there > 1 else ("warn", "1", few)))]
    memory = memory_gib()
    little = "keep batch_size, data.cache_gib and scaling.num_workers small, or add memory"
    findings.append(_at_least("memory", memory, 4.0, little))
    free = free_shared_memory()
    if free is not None:
        advice = (
            "give the container more, for instance --shm-size=8g: Ray's objects go to disk else"
        )
        findings.append(_at_least("shared memory", free / GIB, store_gib(), advice))
    return findings


def memory_gib() -> float:
    """Return the memory that this process may use, in GiB: the machine's or its container's."""
    return machine_memory() / GIB


def store_gib() -> float:
    """Return the GiB of views on their way to this machine's GPUs, by the preset for them."""
    least, num_gpus = LEAST_BYTES / GIB, torch.cuda.device_count()
    if not num_gpus:
        return least
    run = Experiment.load("photos_gpu")
    run = run.model_copy(update={"scaling": of_machine(run.scaling, num_gpus, cores())})
    return max(least, store_bytes(run, num_decode_actors(run)) / GIB)


def check_device() -> Findings:
    """Return what torch computes on, and which `precision` is fast there, by measurement."""
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        device, shown = torch.device("cuda"), f"{len(names)} CUDA: {', '.join(names)}"
        advice = "set scaling.gpus_per_worker=1"
    else:
        device, advice = torch.device("cpu"), ""
        shown = f"CPU, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"
    problem = unusable_gpu()
    return [
        Finding("device", "warn" if problem else "ok", shown, problem or advice),
        precision_finding(bf16_speedup(device)),
        views_finding(native.loaded()),
    ]


def views_finding(native_views: native.Native) -> Finding:
    """Return how views are made on this machine's CPU."""
    if native_views.library is not None:
        return Finding("views on CPU", "ok", f"compiled: {native_views.detail}")
    detail = f"made with torch, several times slower: {native_views.detail}"
    advice = (
        "install a wheel for Linux, or a C compiler (apt install gcc), on the nodes that decode"
    )
    return Finding("views on CPU", "warn", detail, f"{advice}: same pixels, sooner")


def precision_finding(gain: float) -> Finding:
    """Return which `precision` to choose where bf16 runs at `gain` times the speed of float32."""
    choice = "bf16" if gain >= BF16_WORTHWHILE else "float32"
    detail = f"{gain:.2f} times the speed of float32 in a convolution"
    return Finding("bf16", "ok", detail, f"set precision={choice}")


def bf16_speedup(device: torch.device, repeats: int = 5) -> float:
    """Return time in float32 / time under bf16 autocast of a 3x3 convolution, both passes.

    Channels last, as the encoder runs; the best of `repeats`, so that other load counts less.
    """
    conv = nn.Conv2d(64, 64, 3, padding=1, bias=False).to(device)
    conv = conv.to(memory_format=torch.channels_last)
    images = torch.randn(16, 64, 32, 32, device=device)  # [n, C, H, W]
    images = images.to(memory_format=torch.channels_last).requires_grad_()

    def seconds(*, bf16: bool) -> float:
        best = float("inf")
        for _ in range(repeats + 1):  # the first one chooses and builds kernels
            start = time.perf_counter()
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=bf16):
                out = conv(images)
            out.float().sum().backward()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            best = min(best, time.perf_counter() - start)
        return best

    return seconds(bf16=False) / seconds(bf16=True)


def _at_least(check: str, have_gib: float, need_gib: float, advice: str) -> Finding:
    if have_gib >= need_gib:
        return Finding(check, "ok", f"{have_gib:.1f} GiB")
    return Finding(check, "warn", f"{have_gib:.1f} GiB, below {need_gib:.3g}", advice)
