"""What launch files have in common: groups of nodes, the command they run, and what was read."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Final, Literal, NamedTuple

from simclr_ray.config.findings import Finding, Findings
from simclr_ray.config.validation import nearest

Kind = Literal["ray up", "RayCluster", "RayJob", "Slurm"]
PLACEHOLDER: Final = "REPLACE-ME"
MOST_CHARS: Final = 60  # of a value that is shown
MOST_NODES: Final = 10_000  # of a group: more is a slip, and each is laid out
_VERBS: Final = ("pretrain", "study run")
# The command ends where its shell word does, and so do the words of a comment that quotes it.
_VERB: Final = re.compile(rf"^({'|'.join(_VERBS)})\s")
_COMMAND: Final = re.compile(rf"\bsimclr-ray\s+(?P<words>(?:{'|'.join(_VERBS)})\s[^'\"&|;#`)]*)")


class NodeGroup(NamedTuple):
    """Nodes of one kind. What a file does not say of them is None."""

    name: str
    least: int  # nodes that are kept
    most: int
    is_head: bool = False
    cpus: float | None = None  # of one node, as Ray counts them
    gpus: float | None = None
    labels: Mapping[str, str] = {}
    disk_gib: float | None = None
    is_spot: bool = False


class LaunchFile(NamedTuple):
    """A launch file as far as a run depends on it."""

    kind: Kind
    groups: tuple[NodeGroup, ...]
    command: str  # of simclr-ray, without its name; empty where the file names none
    findings: Findings  # of its own kind: schema, token, versions
    values: Sequence[tuple[str, str]]  # key and text, in which nothing may be left to fill in
    owned: bool = False  # machines of yours, whose mounts and disks no file states
    mounts: tuple[str, ...] = ()  # shared folders that the file itself mounts on all nodes
    environment: Mapping[str, str] = {}  # of the head's processes
    hours: float | None = None  # after which the nodes are taken away

    @property
    def workers(self) -> list[NodeGroup]:
        """Return the groups that are not the head."""
        return [group for group in self.groups if not group.is_head]

    @property
    def num_nodes(self) -> int:
        """Return the nodes that are kept, the head included."""
        return sum(group.least for group in self.groups)

    @property
    def max_nodes(self) -> int:
        """Return the nodes that there may be at most, the head included."""
        return sum(group.most for group in self.groups)


def command_in(text: str) -> str:
    """Return the first command of ours that starts a run in a text, comments joined, or nothing."""
    lines = [re.sub(r"^\s*#+\s?", " ", line).rstrip("\\") for line in text.splitlines()]
    match = _COMMAND.search(" ".join(lines))
    if not match:
        return ""
    verb, *rest = _VERB.split(" ".join(match["words"].split()), maxsplit=1)[1:]
    return " ".join([verb, *_arguments(rest[0].split())])


def _arguments(words: list[str]) -> list[str]:
    """Return a name and the options and `key=value` after it, up to the first word that is none."""
    kept = words[:1]
    for before, word in itertools.pairwise(words):
        is_value = before.startswith("--") and "=" not in before
        if not (is_value or word.startswith("--") or "=" in word):
            break
        kept.append(word)
    return kept


def mapping(value: Any) -> dict[str, Any]:
    """Return a mapping, empty for what is none: its keys are looked for, and are missing."""
    return value if isinstance(value, dict) else {}


def sequence(value: Any) -> list[Any]:
    """Return a list, empty for what is none."""
    return value if isinstance(value, list) else []


def number(value: Any, default: float = 0.0) -> float:
    """Return a finite number, or the default for what is none: the schema has said so by then."""
    try:
        amount = float(value) if isinstance(value, int | float) else default
    except OverflowError:
        return default
    return amount if math.isfinite(amount) else default


def name_of(value: Any) -> str:
    """Return the `name` of an entry of a list."""
    return str(mapping(value).get("name", ""))


def scalars(value: Any, at: str = "") -> Iterator[tuple[str, str]]:
    """Yield dotted path and text of each value of a tree, and of each key, beside its mapping."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield at, str(key)
            yield from scalars(item, f"{at}.{key}" if at else str(key))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from scalars(item, f"{at}.{index}")
    else:
        yield at, str(value)


def unknown_keys(
    where: str, keys: Iterable[str], allowed: Iterable[str], consequence: str
) -> Findings:
    """Return a failure for each key that is not allowed, with the nearest one that is.

    Args:
        where: Dotted path of the mapping, empty for the top of the file.
        keys: Its keys.
        allowed: Those that it may have.
        consequence: What would come of the key.
    """
    names = list(allowed)
    return [
        Finding(
            "schema",
            "fail",
            f"{where + '.' if where else ''}{key}: unknown key{nearest(str(key), names)}; "
            f"{consequence}",
            f"allowed here: {', '.join(sorted(names))}",
        )
        for key in keys
        if key not in names
    ]


def cut(value: object) -> str:
    """Return a value as text, cut where it is long."""
    text = str(value)
    return text if len(text) <= MOST_CHARS else f"{text[:MOST_CHARS]}..."


def refused(findings: Findings) -> bool:
    """Return whether a finding is a failure."""
    return any(finding.status == "fail" for finding in findings)


def labels_of(text: str) -> dict[str, str]:
    """Return the labels of `ray start --labels`: `key=value,key=value`."""
    pairs = [pair.partition("=") for pair in text.split(",") if "=" in pair]
    return {key.strip(): value.strip() for key, _, value in pairs}


def check_version(what: str, version: str, installed: str) -> Finding:
    """Return whether nodes get the Ray that is installed here, which the lock file names."""
    if version == installed:
        return Finding("versions", "ok", f"{what} is Ray {version}, as here")
    advice = "name one version everywhere: nodes and clients of different Rays do not work together"
    return Finding("versions", "fail", f"{what} is Ray {version}, here it is {installed}", advice)
