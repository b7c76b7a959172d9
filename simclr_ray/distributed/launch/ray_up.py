"""Launch files of `ray up`: AWS, GCP and other clouds, and machines that you have."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import logging
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from math import inf
from pathlib import Path
from typing import Any, Final

from simclr_ray.config.findings import CheckStatus, Finding, Findings
from simclr_ray.config.validation import nearest
from simclr_ray.config.wording import counted
from simclr_ray.distributed.launch.file import (
    MOST_NODES,
    LaunchFile,
    NodeGroup,
    check_version,
    command_in,
    cut,
    mapping,
    number,
    refused,
    scalars,
    sequence,
    unknown_keys,
)
from simclr_ray.errors import last_line

START_KEYS: Final = ("head_start_ray_commands", "worker_start_ray_commands")
REQUIRED: Final = {  # of a provider, by its type
    "aws": ("region",),
    "gcp": ("region", "availability_zone", "project_id"),
    "local": ("head_ip", "worker_ips"),
}
MOST_OF_A_NODE: Final = {"CPU": 4096, "GPU": 1024}
MACHINE_KEYS: Final = ("InstanceType", "machineType", "vmSize")
OF_LOCAL: Final = ("min_workers",)  # which Ray moves into its one node type
_START: Final = re.compile(r"\bray start --")
_TOKEN_PATH: Final = re.compile(r"RAY_AUTH_TOKEN_PATH=[\"']?(?:\$HOME|~)/([^\s;\"']+)")
_RAY_PIN: Final = re.compile(r"\bray(?:\[[\w,-]+\])?==([\w.]+)")
_WHEEL: Final = re.compile(r"simclr_ray-([0-9][\w.]*)-")


def read_ray_up(tree: dict[str, Any], text: str, versions: Mapping[str, str]) -> LaunchFile:
    """Return what a file of `ray up` says, held against Ray's own schema.

    Args:
        tree: The parsed file.
        text: The file, whose head comment holds the command to submit.
        versions: Installed versions of `ray` and `simclr-ray`.
    """
    owned = mapping(tree.get("provider")).get("type") == "local"
    counts = [*_check_counts(tree), *(_check_addresses(tree) if owned else [])]
    missing = _check_required(tree)
    ready, findings = ({}, missing) if missing else _validated(tree)
    if refused(counts):  # Ray counts no hosts, and takes any whole number
        findings = [finding for finding in findings if finding.status != "ok"]
    findings += counts
    findings += _check_believed(ready)
    findings += _check_token(tree)
    findings += _check_versions(tree, versions)
    findings += _check_mounts(tree)
    return LaunchFile(
        kind="ray up",
        groups=() if refused(counts) else tuple(_groups(ready or tree, tree)),
        command=command_in(text),
        findings=findings,
        values=tuple(scalars(tree)),
        owned=owned,
    )


def only_one(documents: Sequence[Any]) -> Findings:
    """Return a failure where a file of `ray up` has more than one document."""
    if len(documents) == 1:
        return []
    shown = f"the file has {len(documents)} documents (---): `ray up` takes one"
    return [Finding("schema", "fail", shown, "put each cluster into a file of its own")]


def _check_required(tree: Mapping[str, Any]) -> Findings:
    """Return a failure for each key without which Ray starts no cluster."""
    provider = mapping(tree.get("provider"))
    kind = str(provider.get("type"))
    required = {"cluster_name": tree.get("cluster_name")}
    required["provider.type"] = provider.get("type")
    is_manual = "coordinator_address" not in provider
    keys = REQUIRED.get(kind, ()) if is_manual else ()
    required |= {f"provider.{key}": provider.get(key) for key in keys}
    return [
        Finding("schema", "fail", f"{key} is missing: `ray up` refuses the file", f"write {advice}")
        for key, value in required.items()
        if value is None
        for advice in [f"{key}: {'aws, gcp, local, ...' if key == 'provider.type' else 'yours'}"]
    ]


def _check_counts(tree: Mapping[str, Any]) -> Findings:
    """Return a failure for each number of nodes that none is, of which Ray minds few."""
    places = {"": tree}
    types = mapping(tree.get("available_node_types"))
    places |= {f"available_node_types.{name}.": mapping(value) for name, value in types.items()}
    findings = []
    for at, place in places.items():
        numbers = [place.get(key) for key in ("min_workers", "max_workers")]
        for key, count in zip(("min_workers", "max_workers"), numbers, strict=True):
            if isinstance(count, int) and not 0 <= count <= MOST_NODES:
                advice = f"write a whole number from 0 to {MOST_NODES:,}"
                findings.append(Finding("schema", "fail", f"{at}{key}={cut(count)}", advice))
        for key, amount in mapping(place.get("resources")).items():
            if isinstance(amount, int | float) and not 0 <= amount <= MOST_OF_A_NODE.get(key, inf):
                advice = f"write a number from 0 to {MOST_OF_A_NODE.get(key, 'what a node has')}"
                shown = f"{at}resources.{key}={cut(amount)}"
                findings.append(Finding("schema", "fail", shown, advice))
        least, most = numbers
        if isinstance(least, int) and isinstance(most, int) and least > most:
            shown = f"{at}min_workers={cut(least)} is more than {at}max_workers={cut(most)}"
            findings.append(Finding("schema", "fail", shown, "raise max_workers to it, or more"))
    return findings


def _check_addresses(tree: Mapping[str, Any]) -> Findings:
    """Return what is wrong with the machines of the `local` provider, which Ray does not count."""
    provider = mapping(tree.get("provider"))
    if "coordinator_address" in provider:
        return []
    if not isinstance(provider.get("worker_ips"), list):
        return []  # the schema has said so
    hosts = [str(host) for host in provider["worker_ips"]]
    findings = []
    if str(provider.get("head_ip")) in hosts:
        shown = f"provider.worker_ips holds head_ip={provider['head_ip']}: two Rays on one machine"
        advice = "take it out of worker_ips: the head is started beside them"
        findings.append(Finding("schema", "fail", shown, advice))
    if twice := sorted({host for host in hosts if hosts.count(host) > 1}):
        shown = f"provider.worker_ips holds twice: {', '.join(twice)}"
        findings.append(Finding("schema", "fail", shown, "name each machine once"))
    for key in ("min_workers", "max_workers"):
        if number(tree.get(key)) > len(hosts):
            shown = f"{key}={tree[key]} with {counted(len(hosts), 'host')} in provider.worker_ips"
            advice = "write as many as there are, or add hosts: Ray starts no others"
            status: CheckStatus = "fail" if key == "min_workers" else "warn"
            findings.append(Finding("schema", status, shown, advice))
    return findings


def _check_believed(ready: Mapping[str, Any]) -> Findings:
    """Return what the file itself says of its nodes, which no cloud was asked."""
    stated = []
    for name, value in mapping(ready.get("available_node_types")).items():
        amounts, node = mapping(mapping(value).get("resources")), mapping(value).get("node_config")
        machine = next((str(mapping(node)[k]) for k in MACHINE_KEYS if k in mapping(node)), "")
        if amounts and machine:
            text = ", ".join(f"{cut(n)} {key}" for key, n in amounts.items())
            stated.append(f"{name} {text} on {machine}")
    if not stated:
        return []
    shown = (
        f"the file's own numbers are believed, and compared with no machine: {'; '.join(stated)}"
    )
    return [Finding("resources", "ok", shown)]


def _validated(tree: dict[str, Any]) -> tuple[dict[str, Any], Findings]:
    """Return the file as `ray up` reads it, empty where it refuses it, and what it says."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    logging.getLogger("ray.autoscaler._private.util").setLevel(logging.WARNING)
    output = io.StringIO()
    try:
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            ready: dict[str, Any] = prepare_config(copy.deepcopy(tree))
        wrong = _schema_failures(ready)
        if not wrong:
            validate_config(ready)
            return ready, [Finding("schema", "ok", "Ray takes the file for `ray up`")]
    except Exception as error:  # noqa: BLE001 - Ray has no type of its own for it
        rest = {key: value for key, value in tree.items() if key not in OF_LOCAL}
        shown = last_line(str(error) or output.getvalue() or type(error).__name__)
        if isinstance(error, KeyError):
            shown = f"the key {shown} is missing"
        advice = "correct it: `ray up` ends with the same words"
        wrong = _schema_failures(rest) or [Finding("schema", "fail", f"Ray: {shown}", advice)]
    return {}, wrong


def _schema_failures(tree: dict[str, Any]) -> Findings:
    """Return all that Ray's schema refuses; `validate_config` would name the first."""
    import jsonschema
    from ray import autoscaler

    schema = json.loads(Path(str(autoscaler.__file__)).with_name("ray-schema.json").read_text())
    # a key that is a number is text to Ray's patterns, which fall over it
    tree = json.loads(json.dumps(tree, default=str, skipkeys=True))
    errors = jsonschema.validators.validator_for(schema)(schema).iter_errors(tree)
    # what is left out Ray fills in
    return [finding for e in errors if e.validator != "required" for finding in _of_schema(e)]


def _of_schema(error: Any) -> Findings:
    where = ".".join(map(str, error.absolute_path))
    if error.validator == "additionalProperties":
        allowed = list(error.schema.get("properties", {}))
        extra = [key for key in error.instance if key not in allowed]
        return unknown_keys(where, extra, allowed, "`ray up` refuses the file")
    hint = ""
    if error.validator == "enum" and isinstance(error.instance, str):
        hint = nearest(error.instance, map(str, error.validator_value))
    advice = "correct it: `ray up` refuses the file"
    return [Finding("schema", "fail", f"{where}: {error.message}{hint}", advice)]


def _commands(tree: Mapping[str, Any], *keys: str) -> list[str]:
    """Return the commands of some keys, of the file and of its node types."""
    trees = [tree, *map(mapping, mapping(tree.get("available_node_types")).values())]
    return [str(c) for each in trees for key in keys for c in sequence(each.get(key))]


def _check_token(tree: Mapping[str, Any]) -> Findings:
    """Return whether every `ray start` asks for a token whose file is on the node."""
    mounts = [str(key).replace("$HOME/", "~/") for key in mapping(tree.get("file_mounts"))]
    findings = []
    for key in START_KEYS:
        starts = [c for c in _commands(tree, key) if _START.search(c)]
        if not starts:
            advice = f"write {key}: Ray's own ask for no token"
            findings.append(Finding("token", "fail", f"{key} holds no `ray start`", advice))
            continue
        if "RAY_AUTH_MODE=token" not in starts[0]:
            shown = f"{key}: anyone who reaches the cluster may run code on it"
            advice = "put `export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=...;` before `ray start`"
            findings.append(Finding("token", "fail", shown, advice))
            continue
        path = _TOKEN_PATH.search(starts[0])
        wanted = f"~/{path[1]}" if path else "~/.ray/auth_token"
        if wanted not in mounts:
            shown = f"{key}: the token file {wanted} is in no file_mounts, so no node has it"
            advice = f"add `{wanted}: ~/.simclr-ray/auth_token` to file_mounts (docs/cluster.md)"
            findings.append(Finding("token", "fail", shown, advice))
    return findings or [Finding("token", "ok", "every `ray start` asks for the mounted token")]


def _check_versions(tree: Mapping[str, Any], versions: Mapping[str, str]) -> Findings:
    """Return whether nodes install the Ray of this environment and this package."""
    setup = " ; ".join(_commands(tree, "setup_commands", "head_setup_commands"))
    pins = {f"ray=={pin} of setup_commands": pin for pin in _RAY_PIN.findall(setup)}
    docker = mapping(tree.get("docker"))
    for key in ("image", "head_image", "worker_image"):
        if pin := re.search(r":([0-9]+\.[0-9]+\.[0-9]+)", str(docker.get(key, ""))):
            pins[f"docker.{key}"] = pin[1]
    for source in map(str, mapping(tree.get("file_mounts")).values()):
        is_used = source.endswith("requirements.lock") and "requirements.lock" in setup
        file = Path(os.path.expanduser(source))  # noqa: PTH111 - as it is for a user unknown
        if is_used and _is_here(source) and file.is_file():
            lines = file.read_text("utf-8", errors="replace")
            if pin := re.search(rf"^{_RAY_PIN.pattern}", lines, re.MULTILINE):
                pins[source] = pin[1]
    findings = [check_version(what, pin, versions["ray"]) for what, pin in pins.items()]
    if not pins and "requirements.lock" not in setup:
        advice = "install requirements.lock with --require-hashes, or name ray==VERSION"
        shown = "setup_commands pin no Ray, so each node may get another one"
        findings.append(Finding("versions", "fail", shown, advice))
    findings += [
        Finding("versions", "fail", f"the wheel of setup_commands is {wheel}, here it is {own}",
                "name the version of the wheel that `python -m build --wheel` made")
        for wheel in dict.fromkeys(_WHEEL.findall(setup))
        if wheel != (own := versions["simclr-ray"])
    ]  # fmt: skip
    return findings


def _is_here(source: str) -> bool:
    """Return whether a path is on this machine; what no path can be is not."""
    return os.path.exists(os.path.expanduser(source))  # noqa: PTH110, PTH111 - they never raise


def _check_mounts(tree: Mapping[str, Any]) -> Findings:
    """Return the sources of file_mounts that are not on this machine."""
    sources = [str(source) for source in mapping(tree.get("file_mounts")).values()]
    missing = [source for source in sources if not _is_here(source)]
    if not missing:
        return []
    advice = "make them before `ray up`, and call it from the repository root (docs/cluster.md)"
    return [Finding("file mounts", "warn", f"not here: {', '.join(map(cut, missing))}", advice)]


def _groups(ready: Mapping[str, Any], tree: Mapping[str, Any]) -> Iterable[NodeGroup]:
    """Yield the node types; those of the `local` provider are its addresses."""
    provider = mapping(tree.get("provider"))
    heads = _commands(tree, "head_start_ray_commands")
    head_cpus = _option(heads, "num-cpus")
    if provider.get("type") == "local":
        total = len(sequence(provider.get("worker_ips")))
        least, most = (
            min(int(number(tree.get(key), total)), total) for key in ("min_workers", "max_workers")
        )
        yield NodeGroup("head", 1, 1, is_head=True, cpus=head_cpus)
        yield NodeGroup("workers", least, most)
        return
    for name, value in mapping(ready.get("available_node_types")).items():
        kind, node = mapping(value), mapping(mapping(value).get("node_config"))
        amounts = {str(key): number(n) for key, n in mapping(kind.get("resources")).items()}
        is_head = name == ready.get("head_node_type")
        cpus = amounts.get("CPU")
        yield NodeGroup(
            name=name,
            least=1 if is_head else int(number(kind.get("min_workers"))),
            most=1 if is_head else int(number(kind.get("max_workers"))),
            is_head=is_head,
            cpus=head_cpus if is_head and head_cpus is not None else cpus,
            gpus=amounts.get("GPU", None if cpus is None else 0.0),
            labels={str(k): str(v) for k, v in mapping(kind.get("labels")).items()},
            disk_gib=_disk_gib(node),
            is_spot=_is_spot(node),
        )


def _option(commands: Iterable[str], name: str) -> float | None:
    """Return the number of an option of `ray start`."""
    match = re.search(rf"--{name}[= ](\d+)", " ".join(commands))
    return float(match[1]) if match else None


def _disk_gib(node: Mapping[str, Any]) -> float | None:
    """Return the size of the largest disk of a node of AWS or GCP, where its file says one."""
    aws = [mapping(mapping(d).get("Ebs")).get("VolumeSize")
           for d in sequence(node.get("BlockDeviceMappings"))]  # fmt: skip
    gcp = [mapping(mapping(d).get("initializeParams")).get("diskSizeGb")
           for d in sequence(node.get("disks"))]  # fmt: skip
    sizes = [float(size) for size in map(str, (*aws, *gcp)) if size.isdigit()]
    return max(sizes, default=None)


def _is_spot(node: Mapping[str, Any]) -> bool:
    aws = mapping(node.get("InstanceMarketOptions")).get("MarketType") == "spot"
    scheduling = node.get("scheduling")
    gcp = [mapping(item) for item in [scheduling, *sequence(scheduling)]]
    return aws or any(s.get("provisioningModel") == "SPOT" or s.get("preemptible") for s in gcp)
