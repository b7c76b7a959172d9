"""A launch file against a run: what would go wrong on such nodes, and what the run would be.

Data in, findings out. Nothing is started or reached: what only a running cluster can show, such as
whether a path is one folder on all nodes, `simclr-ray doctor` asks there.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

from simclr_ray.config.experiment import Experiment, ScalingConfig
from simclr_ray.config.findings import Finding, Findings
from simclr_ray.config.tracking_uri import (
    SERVER_ADVICE,
    WITHOUT_SCHEME,
    file_store_problem,
    unknown_store_problem,
)
from simclr_ray.config.uris import hide_passwords
from simclr_ray.config.wording import counted
from simclr_ray.distributed.launch.documents import documents_of
from simclr_ray.distributed.launch.file import (
    PLACEHOLDER,
    LaunchFile,
    NodeGroup,
    mapping,
)
from simclr_ray.distributed.launch.kuberay import KINDS, only_first, read_kuberay
from simclr_ray.distributed.launch.ray_up import only_one, read_ray_up
from simclr_ray.distributed.launch.slurm import is_slurm, read_slurm
from simclr_ray.distributed.placement import (
    Node,
    matches,
    places_on,
    workers_alone_on,
    workers_on,
)
from simclr_ray.distributed.selectors import selectors_of
from simclr_ray.distributed.selectors import shown as selector_text
from simclr_ray.errors import ConfigError

DISK_GIB: Final = 50.0  # 15 of an environment with CUDA, 20 of a machine image, the rest to spill
LOOPBACK: Final = re.compile(r"localhost|127\.[\d.]+|0\.0\.0\.0|::1|")
MOST_SHOWN: Final = 12  # values in one line
OF_ONE_NODE: Final = ("/tmp/", "/var/tmp/", "/dev/shm/", "/run/")  # nosec B108 # noqa: S108


# which nodes are counted, and what to do where they are too few: of a run that waits, and that not
NODES_OF: Final = {
    True: (
        "the nodes that there may be",
        "allow more nodes (max_workers, maxReplicas), or ask for fewer workers",
    ),
    False: (
        "the nodes that are kept",
        "keep more nodes (min_workers, minReplicas, --nodes), ask for fewer workers, or let the "
        "run wait for those of an autoscaler: scaling.wait_for_nodes_s=900",
    ),
}


def read_launch_file(path: Path, versions: Mapping[str, str]) -> LaunchFile:
    """Return what a launch file says, whatever its kind.

    Args:
        path: A file of `ray up`, a RayCluster or RayJob, or a batch script of Slurm.
        versions: Installed versions of `ray` and `simclr-ray`, which nodes are to have.

    Raises:
        ConfigError: There is no such file, it is not YAML, or it is no launch file.
    """
    try:
        text = path.read_bytes().decode("utf-8")  # with its line ends, which sbatch minds
    except (OSError, UnicodeDecodeError) as error:
        problem = getattr(error, "strerror", None) or "is no text"
        raise ConfigError.of(str(path), f"cannot be read: {problem}") from error
    if is_slurm(text):
        return read_slurm(text)
    documents = [mapping(document) for document in documents_of(text, str(path))]
    of_kuberay = [d for d in documents if str(d.get("kind")) in KINDS]
    if of_kuberay:
        launch = read_kuberay(of_kuberay[0], text, str(path), versions)
        return launch._replace(findings=[*launch.findings, *only_first(of_kuberay)])
    tree = next(iter(documents), {})
    if "provider" in tree or "cluster_name" in tree:
        launch = read_ray_up(tree, text, versions)
        return launch._replace(findings=[*launch.findings, *only_one(documents)])
    kinds = [str(d["kind"]) for d in documents if "kind" in d]
    shown = f"is of kind {', '.join(kinds)}, which is" if kinds else "is"
    problem = f"{shown} no launch file: neither of `ray up` (provider), nor a RayCluster or RayJob"
    raise ConfigError.of(str(path), f"{problem}, nor a Slurm script (#SBATCH)")


def check_launch(launch: LaunchFile, experiment: Experiment | None) -> Findings:
    """Return all that is found: of the file alone, then of the run on it.

    Args:
        launch: What the file says.
        experiment: The run that it is to carry; None where neither the file nor anyone names one.
    """
    findings = [*launch.findings, *_check_filled_in(launch), *_check_head(launch)]
    findings += _check_disk(launch)
    if experiment is None:
        shown = "the file starts none: what it needs of the nodes is not checked"
        advice = "name it: simclr-ray cluster check FILE PRESET_OR_YAML KEY=VALUE ..."
        return [*findings, Finding("run", "warn", shown, advice)]
    if launch.max_nodes > 1:
        findings += _check_paths(launch, experiment)
        findings.append(_check_tracking(launch, experiment))
    findings += _check_room(launch, experiment)
    return [*findings, *_check_spot(launch, experiment.scaling)]


def _check_filled_in(launch: LaunchFile) -> Findings:
    left: dict[str, list[str]] = {}  # what is to be filled in: the keys that hold it
    for key, text in [*launch.values, ("", launch.command)]:
        for word in text.split():
            if PLACEHOLDER in word:
                left.setdefault(hide_passwords(word), []).append(key)
    if not left:
        return []
    named = [_named(word, list(dict.fromkeys(keys))) for word, keys in left.items()]
    more = f"; and {len(named) - MOST_SHOWN} more" if len(named) > MOST_SHOWN else ""
    values = "; ".join(named[:MOST_SHOWN])
    shown = f"{counted(len(left), 'value')} still {PLACEHOLDER}: {values}{more}"
    return [Finding("filled in", "fail", shown, f"write yours in place of {PLACEHOLDER}")]


def _named(word: str, keys: Sequence[str]) -> str:
    """Return a value with the first of its keys, and how many others hold it."""
    if PLACEHOLDER not in word.partition("=")[0] and "=" in word:
        return word  # an override, which names its key itself
    others = [key for key in keys[1:] if key]
    more = f" (and {counted(len(others), 'more key')})" if others else ""
    return f"{keys[0]}={word}{more}" if keys[0] else word


def _check_head(launch: LaunchFile) -> Findings:
    """Return whether the head is left to itself, or, alone, can work."""
    head = next((group for group in launch.groups if group.is_head), None)
    if head is None:
        return []
    if not any(group.most for group in launch.workers):
        if head.cpus == 0:
            shown = "the head offers no CPU and there is no other node: nothing can run"
            return [Finding("head", "fail", shown, "add workers, or let the head offer its CPUs")]
        return [Finding("head", "ok", "works alone")]
    if head.cpus == 0:
        return [Finding("head", "ok", "offers no CPU: no step can starve the cluster's processes")]
    if launch.kind == "Slurm":  # its nodes are alike, and paid for alike
        return [Finding("head", "ok", f"is one of {counted(launch.num_nodes, 'equal node')}")]
    shown = "offers its CPUs" if head.cpus is None else f"offers {head.cpus:g} CPUs"
    advice = 'let it offer none: `--num-cpus=0`, `resources: {CPU: 0}` or `num-cpus: "0"`'
    detail = f"{shown}: workers and decoding may starve the processes that hold the cluster"
    return [Finding("head", "warn", detail, advice)]


def _check_disk(launch: LaunchFile) -> Findings:
    """Return whether nodes have disk to spill objects to, where the file says how much."""
    if launch.owned:
        return []
    small = [f"{g.name} {g.disk_gib:g} GiB" for g in launch.groups
             if g.disk_gib is not None and g.disk_gib < DISK_GIB]  # fmt: skip
    unsaid = [group.name for group in launch.groups if group.disk_gib is None]
    if small or unsaid:
        names = [*small, *(f"{name} not stated" for name in unsaid)]
        where = "ephemeral-storage in requests" if "Ray" in launch.kind else "the disk's size"
        advice = f"give {DISK_GIB:g} GiB or more ({where}): Ray spills objects to /tmp/ray"
        return [Finding("disk", "warn", ", ".join(names), advice)]
    least = min((g.disk_gib for g in launch.groups if g.disk_gib is not None), default=0.0)
    return [Finding("disk", "ok", f"{least:g} GiB or more on each node")] if least else []


def _check_paths(launch: LaunchFile, experiment: Experiment) -> Findings:
    """Return whether all nodes see storage and data, as far as names tell."""
    data = experiment.data
    named = {"storage": experiment.storage, "data.train": data.train, "data.test": data.test,
             "data.eval_train": data.eval_train}  # fmt: skip
    wrong, paths = [], []
    for key, path in named.items():
        problem = _problem_of(path, launch)
        if problem:
            wrong.append(f"{key}={hide_passwords(path)} {problem}")
        elif path.startswith("/"):
            paths.append(path)
    if wrong:
        advice = "use s3://..., gs://..., or the path of a folder that every node mounts"
        shown = f"{counted(launch.max_nodes, 'node')}: {'; '.join(wrong)}"
        return [Finding("shared storage", "fail", shown, advice)]
    if paths and launch.owned:
        shown = f"every node must mount {', '.join(dict.fromkeys(paths))}"
        advice = "simclr-ray doctor --storage ... on the running cluster asks each node"
        return [Finding("shared storage", "ok", shown, advice)]
    return [Finding("shared storage", "ok", "storage and data are seen by all nodes")]


def _problem_of(path: str, launch: LaunchFile) -> str:
    """Return why the nodes of a file would not all see a path; empty where they do, or may."""
    local = path.removeprefix("file://")
    if not path or path == "shapes" or (local == path and "://" in path):
        return ""
    if not local.startswith("/"):
        return "is a folder of each node's own"
    if f"{local}/".startswith(OF_ONE_NODE):
        return "is a folder of each node's own"
    under = any(f"{local}/".startswith(f"{mount.rstrip('/')}/") for mount in launch.mounts)
    if launch.owned or under:
        return ""
    return "is a local path, and no volume that all nodes share is mounted there"


def _check_tracking(launch: LaunchFile, experiment: Experiment) -> Finding:
    """Return whether all nodes reach the MLflow store, as far as its address tells."""
    uri = experiment.tracking.uri or launch.environment.get("MLFLOW_TRACKING_URI", "")
    key = "tracking.uri" if experiment.tracking.uri else "MLFLOW_TRACKING_URI"
    if problem := file_store_problem(uri):
        return Finding("tracking", "fail", problem, SERVER_ADVICE)
    if problem := unknown_store_problem(uri):
        return Finding("tracking", "fail", f"{key}: {problem}", SERVER_ADVICE)
    is_databricks = uri.startswith(WITHOUT_SCHEME)
    if not is_databricks and LOOPBACK.fullmatch(urlsplit(uri).hostname or ""):
        shown = f"{key}={hide_passwords(uri)} means each node itself"
        return Finding("tracking", "fail", shown, SERVER_ADVICE)
    return Finding("tracking", "ok", hide_passwords(uri))


def _check_spot(launch: LaunchFile, scaling: ScalingConfig) -> Findings:
    """Return whether the cluster and the run outlive nodes that may be taken away."""
    spot = [group for group in launch.groups if group.is_spot]
    if any(group.is_head for group in spot):
        shown = "the head is spot: when it is taken away, the cluster is gone and the run with it"
        return [Finding("spot", "fail", shown, "keep the head on demand")]
    if not spot:
        return []
    names = ", ".join(group.name for group in spot)
    if scaling.max_failures == 0:
        shown = f"{names}: the first node that is taken away ends the run"
        advice = "set scaling.max_failures=3: restarts from the last checkpoint"
        return [Finding("spot", "warn", shown, advice)]
    shown = f"{names}: a lost node costs the steps since the last checkpoint"
    return [Finding("spot", "ok", shown)]


def nodes_for(launch: LaunchFile, scaling: ScalingConfig) -> list[Node]:
    """Return the nodes that a run finds, as a cluster has them: those that are kept.

    Of a run that waits for nodes, also those that an autoscaler may bring.
    """
    waits = scaling.wait_for_nodes_s > 0
    return [
        Node(group.name, is_alive=True, cpus=group.cpus or 0.0, gpus=group.gpus or 0.0,
             labels=group.labels, id=f"{group.name}-{i}")
        for group in launch.groups
        for i in range(group.most if waits else group.least)
    ]  # fmt: skip


def _check_room(launch: LaunchFile, experiment: Experiment) -> Findings:
    """Return whether workers, their decoding and the scores' actors find room on the nodes."""
    scaling, of = experiment.scaling, experiment.evaluation
    groups = [group for group in launch.groups if group.most and group.cpus != 0]
    if not launch.groups:
        return []  # the file was refused
    if lacking := _unmatched(launch.groups, scaling):
        return [_unsaid(scaling) if launch.owned else lacking]
    if any(group.cpus is None for group in groups):
        return [_unsaid(scaling)]
    nodes, wanted = nodes_for(launch, scaling), scaling.min_workers
    which, advice = NODES_OF[scaling.wait_for_nodes_s > 0]
    workers, decoded = workers_alone_on(nodes, scaling), workers_on(nodes, scaling)
    if workers < wanted:
        shown = (
            f"{which} hold {counted(workers, 'worker')} of {_worker_resources(scaling)}, "
            f"scaling.num_workers asks for {wanted}"
        )
        return [Finding("workers", "fail", shown, advice)]
    findings = [Finding("workers", "ok", f"{which} have room for {counted(workers, 'worker')}")]
    cpus = f"{scaling.data_cpus_per_worker:g} CPUs of decoding each"
    if decoded < wanted:
        shown = f"{counted(wanted, 'worker')} with {cpus}: there is room for {decoded} of them"
        advice = "add data nodes, or lower scaling.data_actors_per_worker or cpus_per_worker"
        findings.append(Finding("data CPUs", "fail", shown, advice))
    else:
        shown = f"room for the views of {counted(decoded, 'worker')}, {cpus}"
        findings.append(Finding("data CPUs", "ok", shown))
    encoding = [node for node in nodes if matches(scaling.worker_selector, node.labels)]
    actors = places_on(encoding, of.cpus_per_actor, of.gpus_per_actor)
    if actors < of.num_actors:
        shown = f"evaluation.actors={of.num_actors}: {which} have room for {actors}"
        findings.append(Finding("scores", "fail", shown, "set evaluation.actors=auto, or fewer"))
    return findings


def _unmatched(groups: Sequence[NodeGroup], scaling: ScalingConfig) -> Finding | None:
    """Return which label selector no group satisfies."""
    for key, selector in selectors_of(scaling).items():
        if not any(matches(selector, group.labels) for group in groups):
            labels = sorted({f"{k}={v}" for group in groups for k, v in group.labels.items()})
            text = f"no group has the labels of scaling.{key}={selector_text(selector)}"
            there = f"; there are: {', '.join(labels)}" if labels else ""
            advice = "give a group `labels: {KEY: VALUE}`, or ray start --labels=KEY=VALUE"
            return Finding("workers", "fail", text + there, advice)
    return None


def _worker_resources(scaling: ScalingConfig) -> str:
    """Return what one worker reserves."""
    gpus = f", {_amount(scaling.gpus_per_worker, 'GPU')}" if scaling.gpus_per_worker else ""
    return f"{_amount(scaling.cpus_per_worker, 'CPU')}{gpus}"


def _amount(number: float, noun: str) -> str:
    return f"{number:g} {noun}{'s' * (number != 1)}"


def _unsaid(scaling: ScalingConfig) -> Finding:
    shown = (
        f"the file does not say what its nodes have: {scaling.num_cpus:g} CPUs and "
        f"{scaling.num_gpus:g} GPUs are needed"
    )
    advice = "simclr-ray cluster status PRESET KEY=VALUE on the running cluster counts them"
    return Finding("workers", "ok", shown, advice)


def runs_at_a_time(launch: LaunchFile, scaling: ScalingConfig, most: int) -> int:
    """Return how many runs the nodes hold side by side; 1 where the file does not say."""
    fits = workers_on(nodes_for(launch, scaling), scaling) // scaling.max_workers
    return max(1, min(most, fits))


def _local_batch(batch_size: int, workers: int) -> str:
    least, more = divmod(batch_size, workers)
    return f"{least + 1} or {least} images" if more else f"{least} images"


def derived(
    launch: LaunchFile,
    runs: Sequence[Experiment],
    *,
    images_per_s: float = 0.0,
    images: int = 0,
) -> dict[str, str]:
    """Return what a run on such nodes is, as name -> text.

    Args:
        launch: What the file says.
        runs: The run, or the trials of a study.
        images_per_s: Assumed of one worker on its device, 0 for no assumption.
        images: In `data.train`, 0 where that is not known.
    """
    experiment = runs[0]
    scaling = experiment.scaling
    workers, least_workers = scaling.max_workers, scaling.min_workers
    at_a_time = runs_at_a_time(launch, scaling, len(runs))
    decode_cpus = at_a_time * workers * scaling.data_cpus_per_worker
    rows = {"nodes": ", ".join(f"{g.least} {g.name}" for g in launch.groups)}
    if len(runs) > 1:
        rows["trials"] = f"{len(runs)}, of which {at_a_time} fit at a time; of the first:"
    rows |= {
        "workers": f"{f'{least_workers} to ' * scaling.is_elastic}{workers} of "
        f"{_worker_resources(scaling)} each",
        "local batch": _local_batch(experiment.batch_size, least_workers)
        + (f"; {_local_batch(experiment.batch_size, workers)} on {workers}") * scaling.is_elastic,
        "decoding": f"{counted(at_a_time * workers * scaling.data_actors_per_worker, 'actor')} on "
        f"{decode_cpus:g} CPUs",
    }
    if not images_per_s:
        unknown = "give --images-per-second-per-worker, measured by a short run on such a node"
        return rows | {"images/s": unknown}
    total = at_a_time * workers * images_per_s
    rows["images/s"] = (
        f"{total:,.0f} must be decoded, assumed {images_per_s:,.0f} for each worker: "
        f"{total / decode_cpus:,.0f} for each CPU of decoding"
    )
    if not images:
        return rows | {"hours": "give --images, the rows of data.train"}
    hours = sum(run.epochs for run in runs) * images / total / 3600
    rows["hours"] = f"{hours:,.1f} of training, without start and evaluation"
    if launch.hours and hours > launch.hours:
        pieces = math.ceil(hours / launch.hours)
        rows["hours"] += f"; the script's time is {launch.hours:g}: {pieces} pieces, by requeue"
    return rows
