"""Amounts of Kubernetes in a RayCluster: how they are written, and which no pod can have."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, Final

from simclr_ray.config.findings import Finding, Findings
from simclr_ray.config.wording import GIB
from simclr_ray.distributed.launch.file import cut, mapping, name_of, sequence
from simclr_ray.distributed.launch.kuberay_schema import groups_of, pods_of

_QUANTITY: Final = re.compile(
    r"([+-]?(?:\d+\.?\d*|\.\d+))(?:([KMGTPE]i|[numkMGTPE])|[eE]([+-]?\d{1,2}))?"
)
_POWERS: Final = {"n": -3, "u": -2, "m": -1, "k": 1, "K": 1, "M": 2, "G": 3, "T": 4, "P": 5, "E": 6}
BOUNDS: Final = {  # least and most of a node, in its unit, and how the least is written
    "cpu": (0.001, 4096.0, "1m to 4096 (the largest machines have some 2,000)"),
    "memory": (GIB, 2**16 * GIB, "1Gi, in which Ray starts, to 64Ti"),
    "ephemeral-storage": (GIB, 2**20 * GIB, "1Gi to 1Pi"),
}
DEVICES: Final = (0.0, 1024.0, "0 to 1024, in whole numbers: no part of a device is given")
AS_BOUNDS: Final = {"CPU": "cpu", "memory": "memory"}  # keys of a group's own `resources`


def quantity(text: object) -> float | None:
    """Return a quantity of Kubernetes (`500m`, `50Gi`, `1e9`); None for what is none."""
    match = _QUANTITY.fullmatch(str(text))
    if not match or match[1].startswith("-"):
        return None
    unit = match[2] or ""
    base = 1024.0 if unit.endswith("i") else 1000.0
    exponent = int(match[3] or 0)
    return float(match[1]) * base ** _POWERS.get(unit[:1], 0) * 10.0**exponent


def quantity_gib(text: object) -> float | None:
    """Return a quantity of bytes in GiB; None for what is none."""
    amount = quantity(text)
    return None if amount is None else amount / GIB


def check_quantities(cluster: Mapping[str, Any]) -> Findings:
    """Return a failure for each amount that Kubernetes refuses, or that no pod of Ray can have."""
    findings: Findings = []
    for name, pod in pods_of(cluster):
        for kind in ("initContainers", "containers"):
            for index, item in enumerate(map(mapping, sequence(pod.get(kind)))):
                is_ray = kind == "containers" and index == 0
                at = "" if is_ray else f"{kind}.{index}."
                resources = mapping(item.get("resources"))
                findings += _of_container(f"{name}: {at}", resources, is_ray=is_ray)
        for volume in map(mapping, sequence(pod.get("volumes"))):
            local = mapping(volume.get("emptyDir"))
            if "sizeLimit" in local and quantity(local["sizeLimit"]) is None:
                key = f"{name}: volumes.{name_of(volume)}.emptyDir.sizeLimit"
                findings.append(_no_quantity(key, local["sizeLimit"]))
    for name, group in groups_of(cluster):  # Ray's own amounts, which stand above the pod's
        for key, value in mapping(group.get("resources")).items():
            bound = AS_BOUNDS.get(key, "/device" if key in ("GPU", "TPU") else key)
            findings += _of_amount(f"{name}: resources.{key}", bound, value, is_ray=key != "CPU")
    return findings


def _of_container(at: str, resources: Mapping[str, Any], *, is_ray: bool) -> Iterator[Finding]:
    requests, limits = (mapping(resources.get(kind)) for kind in ("requests", "limits"))
    for kind, amounts in (("requests", requests), ("limits", limits)):
        for key, value in amounts.items():
            place = f"{at}resources.{kind}.{key}"
            yield from _of_amount(place, str(key), value, is_ray=is_ray)
    for key, value in requests.items():
        requested, most = quantity(value), quantity(limits.get(key))
        if requested is None:
            continue
        place = f"{at}resources.limits.{key}"
        if "/" in str(key) and requested != most:
            shown = f"{place}={cut(limits.get(key, 'not stated'))} is not the request, {cut(value)}"
            yield Finding("schema", "fail", shown, f"write {key}: {cut(value)} in both")
        elif most is not None and requested > most:
            shown = f"{place}={cut(limits[key])} is below the request, {cut(value)}"
            yield Finding("schema", "fail", shown, "raise the limit, or lower the request")


def _of_amount(place: str, key: str, value: object, *, is_ray: bool) -> Iterator[Finding]:
    if not isinstance(value, str | int | float):
        return  # its type is refused
    amount = quantity(value)
    if amount is None:
        yield _no_quantity(place, value)
        return
    is_device = "/" in key
    least, most, words = DEVICES if is_device else BOUNDS.get(key, (0.0, float("inf"), ""))
    if is_device and amount != int(min(amount, most)):
        shown = f"{place}={cut(value)}: Kubernetes gives whole devices only"
        yield Finding("schema", "fail", shown, "write a whole number, such as 1")
    elif amount > most or (is_ray and amount < least):
        size = "too much for any node" if amount > most else "too little for Ray"
        yield Finding("schema", "fail", f"{place}={cut(value)}: {size}", f"write {words}")


def _no_quantity(place: str, value: object) -> Finding:
    advice = "write a number and a unit, such as 500m, 2, 50Gi or 1e9"
    return Finding("schema", "fail", f"{place}={cut(value)} is no quantity", advice)
