"""Launch files of KubeRay: a RayCluster, or a RayJob that brings one of its own."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from simclr_ray.config.findings import Finding, Findings
from simclr_ray.distributed.launch import kuberay_keys as keys
from simclr_ray.distributed.launch.file import (
    LaunchFile,
    NodeGroup,
    check_version,
    command_in,
    mapping,
    name_of,
    number,
    refused,
    scalars,
    sequence,
    unknown_keys,
)
from simclr_ray.distributed.launch.kuberay_quantities import check_quantities, quantity_gib
from simclr_ray.distributed.launch.kuberay_schema import (
    HEAD,
    check_groups,
    check_names,
    check_types,
    container_of,
    pods_of,
    pruned,
)
from simclr_ray.errors import ConfigError, last_line

KINDS: Final = ("RayCluster", "RayJob")
API: Final = "ray.io/v1"
SHARED_VOLUMES: Final = ("persistentVolumeClaim", "nfs", "csi", "cephfs", "glusterfs")
_Level = tuple[str, dict[str, Any], tuple[str, ...]]  # path, mapping, keys that it may have
_DROPPED: Final = "Kubernetes drops it without a word"


def read_kuberay(
    tree: dict[str, Any], text: str, source: str, versions: Mapping[str, str]
) -> LaunchFile:
    """Return what a RayCluster or RayJob says, held against KubeRay's keys and Ray's autoscaler.

    Args:
        tree: The document of that kind.
        text: The file, whose head comment holds the command where a RayCluster runs it.
        source: Name of the file, for messages.
        versions: Installed versions of `ray` and `simclr-ray`.

    Raises:
        ConfigError: The job runs on a cluster of another file.
    """
    tree = pruned(tree)
    spec = mapping(tree.get("spec"))
    is_job = tree["kind"] == "RayJob"
    if is_job and spec.get("clusterSelector"):
        problem = "the job runs on a cluster that is up (clusterSelector): check the file of that"
        raise ConfigError.of(source, problem)
    cluster = mapping(spec.get("rayClusterSpec")) if is_job else spec
    wrong = [
        *_unknown(tree),
        *check_types(tree),
        *check_names(tree),
        *check_groups(cluster),
        *check_quantities(cluster),
    ]
    # what is refused before it reaches the autoscaler would only be said a second time
    derived, more = ({}, []) if refused(wrong) else _derived(cluster)
    findings = [*wrong, *more]
    findings += _check_token(cluster)
    findings += _check_versions(cluster, versions)
    if is_job:
        findings += _check_end(spec)
    pods = dict(pods_of(cluster))
    return LaunchFile(
        kind="RayJob" if is_job else "RayCluster",
        groups=tuple(_group(name, kind, pods.get(name, {})) for name, kind in derived.items()),
        command=command_in(str(spec.get("entrypoint", "")) if is_job else text),
        findings=findings,
        values=tuple(scalars(tree)),
        mounts=_shared_mounts(pods),
        environment=_environment(pods.get(HEAD, {})),
    )


def only_first(documents: Sequence[Mapping[str, Any]]) -> Findings:
    """Return a warning where a file starts more than one cluster."""
    if len(documents) == 1:
        return []
    named = [f"{d['kind']} {name_of(d.get('metadata')) or '?'}" for d in documents]
    shown = f"the file has {' and '.join(named)}: only the first is checked"
    advice = "put each into a file of its own, and check each"
    return [Finding("schema", "warn", shown, advice)]


def _unknown(tree: dict[str, Any]) -> Iterator[Finding]:
    """Yield a failure for each key that KubeRay or Kubernetes would drop."""
    if tree.get("apiVersion") != API:
        advice = f"write apiVersion: {API}"
        yield Finding("schema", "fail", f"apiVersion is {tree.get('apiVersion')}", advice)
    spec = mapping(tree.get("spec"))
    levels: list[_Level] = [("", tree, keys.TOP)]
    if tree["kind"] == "RayJob":
        levels.append(("spec", spec, keys.RAY_JOB))
        where, cluster = "spec.rayClusterSpec", mapping(spec.get("rayClusterSpec"))
    else:
        where, cluster = "spec", spec
    levels += [
        (where, cluster, keys.RAY_CLUSTER),
        (f"{where}.authOptions", mapping(cluster.get("authOptions")), keys.AUTH),
        (f"{where}.autoscalerOptions", mapping(cluster.get("autoscalerOptions")), keys.AUTOSCALER),
    ]
    head = mapping(cluster.get("headGroupSpec"))
    groups: list[_Level] = [(f"{where}.headGroupSpec", head, keys.HEAD_GROUP)]
    for index, group in enumerate(sequence(cluster.get("workerGroupSpecs"))):
        at = f"{where}.workerGroupSpecs.{index}"
        groups.append((at, mapping(group), keys.WORKER_GROUP))
    for at, group, _ in groups:
        template = mapping(group.get("template"))
        pod = mapping(template.get("spec"))
        levels.append((f"{at}.template", template, keys.TEMPLATE))
        levels.append((f"{at}.template.spec", pod, keys.POD))
        for position, item in enumerate(sequence(pod.get("containers"))):
            place, container = f"{at}.template.spec.containers.{position}", mapping(item)
            levels.append((place, container, keys.CONTAINER))
            resources = mapping(container.get("resources"))
            levels.append((f"{place}.resources", resources, keys.RESOURCES))
    for path, node, allowed in [*levels, *groups]:
        yield from unknown_keys(path, node, allowed, _DROPPED)


def _derived(cluster: dict[str, Any]) -> tuple[dict[str, dict[str, Any]], Findings]:
    """Return the node types that Ray's autoscaler reads from a RayCluster, and what it says."""
    from ray.autoscaler._private.kuberay.autoscaling_config import (
        _derive_autoscaling_config_from_ray_cr,
    )

    named = {"metadata": {"name": "checked", "namespace": "default"}, "spec": cluster}
    try:
        types = _derive_autoscaling_config_from_ray_cr(named)["available_node_types"]
    except Exception as error:  # noqa: BLE001 - whatever it stumbles over, the operator would too
        cause = f"{error.args[0]} is missing" if isinstance(error, KeyError) else last_line(error)
        advice = "correct it: the operator starts no cluster from the file"
        return {}, [Finding("schema", "fail", f"Ray's autoscaler: {cause}", advice)]
    return types, [Finding("schema", "ok", "Ray's autoscaler reads the groups")]


def _check_token(cluster: Mapping[str, Any]) -> Findings:
    options = mapping(cluster.get("authOptions"))
    if options.get("mode") != "token":
        shown = "authOptions.mode is not token: anyone who reaches the pods may run code on them"
        advice = "write authOptions: {mode: token, secretName: simclr-ray-auth} (docs/cluster.md)"
        return [Finding("token", "fail", shown, advice)]
    if not options.get("secretName"):
        shown = "the operator draws a token: clients read it from the Secret named as the cluster"
        return [Finding("token", "ok", shown)]
    return [Finding("token", "ok", f"from the Secret {options['secretName']}")]


def _check_versions(cluster: Mapping[str, Any], versions: Mapping[str, str]) -> Findings:
    findings = []
    stated = cluster.get("rayVersion")
    if stated is None:
        advice = f'write rayVersion: "{versions["ray"]}"'
        findings.append(Finding("versions", "fail", "rayVersion is not stated", advice))
    else:
        findings.append(check_version("rayVersion", str(stated), versions["ray"]))
    images = {name: str(container_of(pod).get("image", "")) for name, pod in pods_of(cluster)}
    if len({*images.values()} - {""}) > 1:
        shown = ", ".join(f"{name} {image}" for name, image in images.items())
        advice = "run one image on all nodes: Ray insists on one Python and one version"
        findings.append(Finding("versions", "fail", f"images differ: {shown}", advice))
    loose = {i for i in images.values() if ("@sha256:" not in i and i.rpartition(":")[2] in
             ("latest", "", i)) or "/" in i.rpartition(":")[2]}  # fmt: skip
    if loose:
        advice = f"name a tag, such as simclr-ray:{versions['simclr-ray']}"
        shown = f"image {', '.join(sorted(loose)) or 'not stated'}: any day another one"
        findings.append(Finding("versions", "fail", shown, advice))
    return findings


def _check_end(spec: Mapping[str, Any]) -> Findings:
    """Return whether the nodes of a job are given back when it has ended."""
    if spec.get("shutdownAfterJobFinishes") is True:
        return []
    shown = "the cluster stays after the job, and is paid for"
    return [Finding("end", "warn", shown, "write shutdownAfterJobFinishes: true")]


def _group(name: str, kind: Mapping[str, Any], pod: Mapping[str, Any]) -> NodeGroup:
    amounts = {str(key): number(value) for key, value in mapping(kind.get("resources")).items()}
    is_head = name == HEAD
    return NodeGroup(
        name="head" if is_head else name,
        least=1 if is_head else int(kind.get("min_workers", 0)),
        most=1 if is_head else int(kind.get("max_workers", 0)),
        is_head=is_head,
        cpus=amounts.get("CPU"),
        gpus=amounts.get("GPU", 0.0),
        labels={str(k): str(v) for k, v in mapping(kind.get("labels")).items()},
        disk_gib=_disk_gib(pod),
        is_spot=bool(re.search(r"spot|preemptible", json.dumps(pod, default=str), re.IGNORECASE)),
    )


def _disk_gib(pod: Mapping[str, Any]) -> float | None:
    """Return the disk that a pod reserves, or that is mounted where Ray spills objects to."""
    container = container_of(pod)
    resources = mapping(container.get("resources"))
    sizes = [
        mapping(resources.get(kind)).get("ephemeral-storage") for kind in ("requests", "limits")
    ]
    spills = {
        name_of(m)
        for m in map(mapping, sequence(container.get("volumeMounts")))
        if m.get("mountPath") in ("/tmp", "/tmp/ray")  # nosec B108 # noqa: S108 - in a pod
    }
    for volume in map(mapping, sequence(pod.get("volumes"))):
        local = mapping(volume.get("emptyDir"))
        if name_of(volume) in spills and local.get("medium") != "Memory":
            sizes.append(local.get("sizeLimit"))
    stated = [gib for gib in map(quantity_gib, sizes) if gib]
    return max(stated, default=None)


def _shared_mounts(pods: Mapping[str, Mapping[str, Any]]) -> tuple[str, ...]:
    """Return the paths at which every pod mounts a volume that others see as well."""
    paths = []
    for pod in pods.values():
        volumes = map(mapping, sequence(pod.get("volumes")))
        shared = {name_of(v) for v in volumes if any(kind in v for kind in SHARED_VOLUMES)}
        mounts = map(mapping, sequence(container_of(pod).get("volumeMounts")))
        paths.append({str(m.get("mountPath")) for m in mounts if name_of(m) in shared})
    return tuple(sorted(set.intersection(*paths))) if paths else ()


def _environment(pod: Mapping[str, Any]) -> dict[str, str]:
    entries = map(mapping, sequence(container_of(pod).get("env")))
    return {str(e.get("name")): str(e["value"]) for e in entries if "value" in e}
