"""Types of the keys of a RayCluster or RayJob, and the rules of KubeRay that no type states.

Kubernetes refuses a number where text belongs (`num-cpus: 0`) and text where a number does
(`replicas: "4"`). KubeRay's own definition is 1 MB of YAML; these are the types of the keys that a
run's file has, and `tests/cluster/test_rayjob_schema.py` holds them against the definition.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, Final

from simclr_ray.config.findings import Finding, Findings
from simclr_ray.distributed.launch.file import MOST_NODES, cut, mapping, sequence

HEAD: Final = "headgroup"  # as Ray's autoscaler calls it
NAME_CHARS: Final = {"RayCluster": 53, "RayJob": 47}  # KubeRay makes longer names of them
_LABEL: Final = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")

_TEXT: Final = {"type": "string"}
_TEXTS: Final = {"type": "object", "additionalProperties": _TEXT}
_WHOLE: Final = {"type": "integer"}
_COUNT: Final = {"type": "integer", "minimum": 0, "maximum": MOST_NODES}
_FLAG: Final = {"type": "boolean"}
_NUMBER: Final = {"type": "number"}
_AMOUNTS: Final = {"type": "object", "additionalProperties": {"type": ["string", "number"]}}
_RESTART: Final = {"enum": ["Always", "OnFailure", "Never"]}
_PULL: Final = {"enum": ["Always", "IfNotPresent", "Never"]}


def _object(*required: str, **properties: Any) -> dict[str, Any]:
    return {"type": "object", "required": list(required), "properties": properties}


def _same(type_: Any, *keys: str) -> dict[str, Any]:
    return dict.fromkeys(keys, type_)


def _list(items: Any) -> dict[str, Any]:
    return {"type": "array", "items": items}


_DIGITS: Final = {"type": "string", "pattern": r"^\d{1,18}$"}
_START: Final = {
    **_TEXTS,
    "properties": _same(_DIGITS, "num-cpus", "num-gpus", "memory", "object-store-memory"),
}
_CONTAINER: Final = _object(
    "name", **_same(_TEXT, "name", "image", "workingDir"), **_same(_list(_TEXT), "args", "command"),
    **_same(_FLAG, "stdin", "stdinOnce", "tty"), imagePullPolicy=_PULL,
    env=_list(_object("name", **_same(_TEXT, "name", "value"), valueFrom=_object())),
    ports=_list(_object("containerPort", **_same(_WHOLE, "containerPort", "hostPort"),
                        **_same(_TEXT, "name", "protocol", "hostIP"))),
    volumeMounts=_list(_object("name", "mountPath", **_same(_TEXT, "name", "mountPath", "subPath"),
                               readOnly=_FLAG)),
    resources=_object(**_same(_AMOUNTS, "requests", "limits"), claims=_list(_object())),
    **_same(_object(), "lifecycle", "livenessProbe", "readinessProbe", "startupProbe",
            "securityContext"),
)  # fmt: skip
_POD: Final = _object(
    "containers", containers={**_list(_CONTAINER), "minItems": 1}, initContainers=_list(_CONTAINER),
    nodeSelector=_TEXTS, restartPolicy=_RESTART,
    **_same(_TEXT, "serviceAccountName", "serviceAccount", "schedulerName", "priorityClassName",
            "runtimeClassName", "hostname", "dnsPolicy", "nodeName"),
    **_same(_WHOLE, "activeDeadlineSeconds", "priority", "terminationGracePeriodSeconds"),
    **_same(_FLAG, "automountServiceAccountToken", "hostIPC", "hostNetwork", "hostPID",
            "shareProcessNamespace"),
    tolerations=_list(_object(**_same(_TEXT, "key", "operator", "value", "effect"),
                              tolerationSeconds=_WHOLE)),
    volumes=_list(_object("name", name=_TEXT, emptyDir=_object(medium=_TEXT), hostPath=_object(),
                          persistentVolumeClaim=_object(claimName=_TEXT, readOnly=_FLAG))),
    imagePullSecrets=_list(_object(name=_TEXT)), **_same(_object(), "affinity", "securityContext"),
)  # fmt: skip
_METADATA: Final = _object(
    **_same(_TEXT, "name", "namespace"), **_same(_TEXTS, "labels", "annotations")
)
_GROUP: Final[dict[str, Any]] = {
    **_same(_TEXTS, "labels", "resources"), "rayStartParams": _START,
    "template": _object("spec", spec=_POD, metadata=_METADATA),
}  # fmt: skip
_CLUSTER: Final = _object(
    "headGroupSpec", rayVersion=_TEXT, **_same(_FLAG, "enableInTreeAutoscaling", "suspend"),
    headServiceAnnotations=_TEXTS, **_same(_object(), "gcsFaultToleranceOptions", "tlsOptions"),
    authOptions=_object(mode={"enum": ["disabled", "token"]}, secretName=_TEXT,
                        enableK8sTokenAuth=_FLAG),
    autoscalerOptions=_object(
        version={"enum": ["v1", "v2"]}, idleTimeoutSeconds={"type": "integer", "minimum": 0},
        upscalingMode={"enum": ["Default", "Aggressive", "Conservative"]}, image=_TEXT,
        imagePullPolicy=_PULL, env=_CONTAINER["properties"]["env"],
        resources=_CONTAINER["properties"]["resources"],
    ),
    headGroupSpec=_object("template", **_GROUP, serviceType=_TEXT, enableIngress=_FLAG),
    workerGroupSpecs=_list(_object(
        "groupName", "minReplicas", "maxReplicas", "template", **_GROUP, groupName=_TEXT,
        **_same(_COUNT, "replicas", "minReplicas", "maxReplicas"), suspend=_FLAG,
        numOfHosts={"type": "integer", "minimum": 1, "maximum": MOST_NODES},
        idleTimeoutSeconds={"type": "integer", "minimum": 0}, priority=_WHOLE,
    )),
)  # fmt: skip
_JOB: Final = _object(
    "rayClusterSpec", "entrypoint", rayClusterSpec=_CLUSTER,
    **_same(_TEXT, "entrypoint", "entrypointResources", "jobId", "managedBy", "runtimeEnvYAML"),
    **_same(_NUMBER, "entrypointNumCpus", "entrypointNumGpus"), metadata=_TEXTS,
    **_same({"type": "integer", "minimum": 0}, "backoffLimit", "ttlSecondsAfterFinished"),
    **_same({"type": "integer", "minimum": 1}, "activeDeadlineSeconds",
            "preRunningDeadlineSeconds"),
    **_same(_FLAG, "shutdownAfterJobFinishes", "suspend"),
    submissionMode={"enum": ["K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"]},
)  # fmt: skip
SPECS: Final = {"RayCluster": _CLUSTER, "RayJob": _JOB}
_WORDS: Final = {"string": "text", "integer": "a whole number", "boolean": "true or false",
                 "object": "a mapping", "array": "a list", "number": "a number"}  # fmt: skip


def pruned(value: Any, key: object = "") -> Any:
    """Return a tree without keys that have no value, as Kubernetes takes them, but for amounts."""
    if isinstance(value, dict):
        stays = key in ("requests", "limits")
        return {k: pruned(item, k) for k, item in value.items() if stays or item is not None}
    return [pruned(item) for item in value] if isinstance(value, list) else value


def groups_of(cluster: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield name and mapping of each group, the head first."""
    yield HEAD, mapping(cluster.get("headGroupSpec"))
    for group in map(mapping, sequence(cluster.get("workerGroupSpecs"))):
        yield str(group.get("groupName", "?")), group


def pods_of(cluster: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield name and pod of each group, the head first."""
    for name, group in groups_of(cluster):
        yield name, mapping(mapping(group.get("template")).get("spec"))


def container_of(pod: Mapping[str, Any]) -> dict[str, Any]:
    """Return the container that runs Ray: the first, by KubeRay's rule."""
    return mapping(next(iter(sequence(pod.get("containers"))), {}))


def check_types(tree: Mapping[str, Any]) -> Findings:
    """Return a failure for each value of a type that Kubernetes refuses, and each missing key.

    Args:
        tree: A RayCluster or RayJob without keys that have no value.
    """
    import jsonschema  # Ray's own, for its files

    schema = _object("spec", metadata=_METADATA, spec=SPECS[str(tree["kind"])])
    errors = jsonschema.Draft202012Validator(schema).iter_errors(tree)
    return [_of_error(error, tree) for error in errors]


def _of_error(error: Any, tree: Mapping[str, Any]) -> Finding:
    where, value, limit = _place(list(error.absolute_path), tree), error.instance, ""
    key = str(error.path[-1]) if error.path else ""
    if error.validator == "required":
        missing = next(k for k in error.validator_value if k not in value)
        place = f"{where}.{missing}" if where and not where.endswith(": ") else f"{where}{missing}"
        return Finding("schema", "fail", f"{place} is missing", f"write {missing}: ...")
    if error.validator == "type":
        return _of_type(where, key, value, error.validator_value)
    if error.validator in ("minimum", "maximum"):
        limit = f"{error.validator_value:,}"
    advice = {
        "minimum": f"write {limit} or more",
        "maximum": f"write {limit} or less",
        "minItems": "write at least one: the first runs Ray",
        "enum": f"write one of {error.validator_value}",
        "pattern": f'write a whole number in quotes, {key}: "2"',
    }
    shown = f"{where}={_written(value)} is refused"
    return Finding("schema", "fail", shown, advice[error.validator])


def _of_type(where: str, key: str, value: Any, types: str | list[str]) -> Finding:
    kinds = [types] if isinstance(types, str) else types
    wanted = " or ".join(_WORDS[kind] for kind in kinds)
    advice = f"write {wanted}"
    if kinds == ["string"] and isinstance(value, bool | int | float):
        text = str(value).lower() if isinstance(value, bool) else value
        advice = f'write it in quotes, {key}: "{text}"'
    elif kinds == ["integer"] and str(value).isdecimal():
        advice = f"write it without quotes, {key}: {value}"
    shown = f"{where}={_written(value)}: {wanted} is wanted, Kubernetes refuses the file"
    return Finding("schema", "fail", shown, advice)


def _written(value: Any) -> str:
    """Return a value as it stands in YAML, cut where it is long."""
    if isinstance(value, str):
        shown = f'"{value}"'
    elif isinstance(value, bool) or value is None:
        shown = "empty" if value is None else str(value).lower()
    else:
        shown = str(value)
    return cut(shown)


def _place(path: list[Any], tree: Mapping[str, Any]) -> str:
    """Return a path with the name of its group in front, where it is in one."""
    for at, key in enumerate(path):
        if key == "headGroupSpec":
            return f"{HEAD}: {'.'.join(map(str, path[at + 1 :])) or key}"
        if key == "workerGroupSpecs" and len(path) > at + 1:
            group: Any = tree
            for step in path[: at + 2]:
                group = group[step]
            name = mapping(group).get("groupName", f"workerGroupSpecs.{path[at + 1]}")
            rest = ".".join(map(str, path[at + 2 :]))
            return f"{name}: {rest}" if rest or isinstance(group, dict) else str(name)
    return ".".join(map(str, path))


def check_names(tree: Mapping[str, Any]) -> Findings:
    """Return whether the name is one that KubeRay can make names of pods and services of."""
    metadata, most = mapping(tree.get("metadata")), NAME_CHARS[str(tree["kind"])]
    advice = f"write metadata: {{name: simclr-ray}}: a letter, then a-z, 0-9 and -, {most} at most"
    name = metadata.get("name")
    if name is None and "generateName" not in metadata:
        return [Finding("schema", "fail", "metadata.name is missing", advice)]
    if name is None or not isinstance(name, str):
        return []  # its type is refused
    if _LABEL.fullmatch(name) and len(name) <= most:
        return []
    return [Finding("schema", "fail", f"metadata.name={cut(name)} is no name of KubeRay's", advice)]


def check_groups(cluster: Mapping[str, Any]) -> Iterator[Finding]:
    """Yield what KubeRay refuses of a group whose types are right."""
    names = [name for name, _ in groups_of(cluster)]
    for name in sorted({n for n in names if names.count(n) > 1 and n != "?"}):
        shown = f"{name}: groupName stands twice, and Ray's autoscaler sees one of them"
        yield Finding("schema", "fail", shown, "give each group a name of its own")
    options = mapping(cluster.get("autoscalerOptions"))
    is_v2 = cluster.get("enableInTreeAutoscaling") is True and options.get("version") == "v2"
    for name, group in groups_of(cluster):
        if not _LABEL.fullmatch(name) and name != "?":
            advice = "write a letter, then a-z, 0-9 and -: pods are called by it"
            yield Finding("schema", "fail", f"groupName={name} is no name of a pod", advice)
        start, own = mapping(group.get("rayStartParams")), mapping(group.get("resources"))
        twice = [key for key in ("num-cpus", "num-gpus", "memory", "resources") if key in start]
        if own and twice:
            shown = f"{name}: rayStartParams.{twice[0]} beside the group's own resources"
            yield Finding("schema", "fail", shown, "write one of them: KubeRay refuses both")
        if "labels" in start:
            shown = f"{name}: rayStartParams.labels is refused by KubeRay"
            yield Finding("schema", "fail", shown, "write labels: {...} in the group itself")
        restart = mapping(mapping(group.get("template")).get("spec")).get("restartPolicy", "Never")
        if is_v2 and restart != "Never":
            shown = f"{name}: restartPolicy={restart} with autoscaler v2"
            yield Finding("schema", "fail", shown, "write restartPolicy: Never")
        least, most = group.get("minReplicas"), group.get("maxReplicas")
        if isinstance(least, int) and isinstance(most, int) and least > most:
            shown = f"{name}: minReplicas={least} is more than maxReplicas={most}"
            yield Finding("schema", "fail", shown, "raise maxReplicas to it, or more")
