"""The protocols by which a frozen encoder is evaluated: one table, without torch.

Columns of the score table, the help of `evaluate`, the schema of studies and the names of metrics
follow from it. A protocol is a line here and its function in `evaluation.protocols`; one of your
own is named by its import path, as `--protocols knn,package.module:function`.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import Annotated, Any, Final, NamedTuple

import pydantic

from simclr_ray.config.imports import IMPORT_PATH, import_object
from simclr_ray.config.validation import nearest
from simclr_ray.errors import ConfigError

OUR_OWN: Final = "simclr_ray."


class Protocol(NamedTuple):
    """One way to score features.

    Attributes:
        name: What it is asked for by.
        label: Heading of its column.
        run: Import path of the function, `(bank, test, num_classes, experiment)` -> which rows of
            `test` it names rightly, bool [Q], or their share; see `evaluation.protocols`.
    """

    name: str
    label: str
    run: str

    @property
    def metric(self) -> str:
        """Return the name of its number among scores; after training it stands under `final/`."""
        return f"{self.name}_top1"

    def load(self) -> Any:
        """Return the function. Raises `ConfigError` for code that may not or cannot be imported."""
        if not self.run.startswith(OUR_OWN):
            return import_object(self.run)
        module, _, function = self.run.partition(":")
        return getattr(import_module(module), function)


# The two kNNs besides: solo-learn's is k=20, τ=0.07; `knn_k1` is the nearest neighbour, unweighted.
# `knn` is by default that of InstDisc and lightly, k=200 and τ=0.1.
PROTOCOLS: Final = (
    Protocol("knn", "kNN top-1", "simclr_ray.evaluation.protocols:knn"),
    Protocol("linear", "linear top-1", "simclr_ray.evaluation.protocols:linear"),
    Protocol(
        "logistic_regression",
        "logistic regression top-1",
        "simclr_ray.evaluation.protocols:logistic_regression",
    ),
    Protocol("knn_k20", "kNN (k=20) top-1", "simclr_ray.evaluation.protocols:knn_k20"),
    Protocol("knn_k1", "1-NN top-1", "simclr_ray.evaluation.protocols:knn_k1"),
)
PROTOCOL_NAMES: Final = tuple(protocol.name for protocol in PROTOCOLS)
DEFAULT_PROTOCOLS: Final = ("knn", "linear")
PROBE: Final = "probe"  # of studies: what h and z know of transformations, which has no labels


def protocol_named(name: str) -> Protocol:
    """Return the protocol of a name or an import path.

    Raises:
        ConfigError: There is none; of an import path only the form is looked at.
    """
    builtin = {protocol.name: protocol for protocol in PROTOCOLS}.get(name)
    if builtin is not None:
        return builtin
    if IMPORT_PATH.fullmatch(name):
        own = name.rpartition(":")[2]
        return Protocol(own, f"{own} top-1", name)
    raise ConfigError.of(name, _allowed(name, PROTOCOL_NAMES))


def protocols_named(names: Sequence[str]) -> list[Protocol]:
    """Return the protocols of names or import paths, whose metrics differ.

    Raises:
        ConfigError: As in `protocol_named`, or two have one metric, of which one would be lost.
    """
    protocols = [protocol_named(name) for name in names]
    if problem := same_metric(names):
        raise ConfigError.of("protocols", problem)
    return protocols


def same_metric(names: Sequence[str]) -> str:
    """Return that two protocols have one metric; empty: there are no such."""
    first: dict[str, str] = {}
    for name in names:
        metric = protocol_named(name).metric
        if metric in first:
            return f"{first[metric]} and {name} are both called {metric}; give only one of them"
        first[metric] = name
    return ""


def _of_study(name: str) -> str:
    if name not in (*PROTOCOL_NAMES, PROBE) and not IMPORT_PATH.fullmatch(name):
        raise ValueError(f"got {name!r}; {_allowed(name, (*PROTOCOL_NAMES, PROBE))}")
    return name


def _allowed(name: str, names: tuple[str, ...]) -> str:
    return f"allowed: {', '.join(names)}{nearest(name, names)}"


StudyProtocol = Annotated[str, pydantic.AfterValidator(_of_study)]
