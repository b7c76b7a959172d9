"""State dicts of other programs, fitted to an encoder by names and shapes.

A file may nest its state dict (`state_dict`, `model`, `teacher`), put a prefix before each name
(`backbone.`, `module.encoder_q.`, `_orig_mod.`), number the layers of a ResNet as an
`nn.Sequential` does, or use another library's names (`nn.weight_names`). What fits most tensors by
name and shape is taken; all tensors of the encoder must be there, and what is left over is counted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor, nn

from simclr_ray.config.wording import counted
from simclr_ray.errors import CheckpointError
from simclr_ray.nn.batchnorm import GlobalBatchNorm
from simclr_ray.nn.weight_names import StateDict, readings

DEPTH: Final = 3  # of containers in containers
EXAMPLES: Final = 5
SMALL_STEM: Final = "a stem for CIFAR: encoder.name=torchvision encoder.stem=cifar"
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's
COUNTERS: Final = "num_batches_tracked"  # global batch norm has none
# Of two copies that fit alike, the one to take: the online network, but DINO's teacher.
SECONDARY: Final = ("momentum", "encoder_k", "key_encoder", "ema", "target", "student")
Resize = Callable[[str, Tensor, Tensor], Tensor | None]  # name, its tensor, the one to replace


class MatchedWeights(NamedTuple):
    """Tensors of a file by the names of an encoder.

    Attributes:
        tensors: All that the encoder needs.
        left_out: Names of the file that serve nothing.
        where: Container and prefix, for a message.
        resized: Names whose tensor was brought to another size.
        is_nested: Whether the state dict lies in a container, as training programs write them.
    """

    tensors: StateDict
    left_out: tuple[str, ...]
    where: str
    resized: tuple[str, ...]
    is_nested: bool

    def line(self) -> str:
        """Return what was found, in one line."""
        total = len(self.tensors) + len(self.left_out)
        text = f"{len(self.tensors)} of {total} tensors loaded{self.where}"
        if self.resized:
            text += f"; {', '.join(self.resized)} resampled to the encoder's grid"
        if self.left_out:
            text += f"; left out {len(self.left_out)}: {_some(self.left_out)}"
        return text


class _Match(NamedTuple):
    """How one way to read a file fits."""

    pairs: dict[str, str]  # the encoder's name -> the file's
    tensors: StateDict  # by the file's names in this reading
    prefix: str
    container: str
    kind: str
    names: dict[str, str]  # of the encoder's tensors in this reading, without the prefix


def fit(
    encoder: nn.Module,
    tree: Mapping[str, Any],
    resize: Resize,
    *,
    names: Mapping[str, str],
    children: Sequence[str],
) -> MatchedWeights:
    """Return the tensors of a file that an encoder is made of.

    Args:
        encoder: Its names and shapes are looked at; it stays as it is.
        tree: What the file holds: tensors by name, perhaps in containers.
        resize: Brings a tensor to another shape, or returns None.
        names: What a file calls each tensor of the encoder.
        children: The first parts of these names, in the order of the encoder's layers.

    Raises:
        CheckpointError: The file holds no tensors, or not all that the encoder needs; up to five
            names of each side are given.
    """
    wanted = encoder.state_dict()
    matches = [
        _Match(pairs, form, prefix, container, kind, way)
        for container, tensors in containers(tree)
        for kind, form in readings(tensors)
        for way in _numberings(names, children)
        for prefix, pairs in _prefixes(way, form, wanted, resize)
    ]
    if not matches:
        theirs = [name for _, tensors in containers(tree) for name in tensors]
        raise CheckpointError(_misfit(0, list(wanted), theirs, ""))
    best = max(matches, key=_rank)
    fitting, resized = {}, []
    for own, name in best.pairs.items():
        tensor = best.tensors[name]
        if tensor.shape != wanted[own].shape:
            changed = resize(own, tensor, wanted[own])
            assert changed is not None  # else it were no pair
            tensor = changed
            if tensor.numel() != best.tensors[name].numel():
                resized.append(own)
        fitting[own] = tensor
    used = set(best.pairs.values())
    rest = tuple(n for n in best.tensors if n not in used and not _is_constant(n))
    missing = [own for own in wanted if own not in fitting and not _is_buffer(encoder, own)]
    if missing:
        problem = _misfit(len(fitting), missing, list(rest), best.prefix)
        raise CheckpointError(problem + _other_shapes(best, missing, wanted))
    where = f" from {best.container}" if best.container else ""
    where += f" under {best.prefix!r}" if best.prefix else ""
    where += f" as of {best.kind}" if best.kind else ""
    return MatchedWeights(fitting, rest, where, tuple(resized), bool(best.container))


def _is_buffer(encoder: nn.Module, name: str) -> bool:
    """Return whether a tensor is a constant of the code, which a file may lack."""
    place, _, leaf = name.rpartition(".")
    owner = encoder.get_submodule(place)
    return leaf in owner._buffers and not isinstance(owner, GlobalBatchNorm)


def _is_constant(name: str) -> bool:
    return name.endswith(("relative_position_index", "attn_mask"))


def containers(tree: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, StateDict]]:
    """Yield every state dict in a tree, and its path; counters of batch norm are left out."""
    tensors = {
        str(name): value
        for name, value in tree.items()
        if isinstance(value, Tensor) and not str(name).endswith(COUNTERS)
    }
    if tensors:
        yield path, tensors
    for key, value in tree.items():
        if isinstance(value, Mapping) and path.count(".") < DEPTH and isinstance(key, str):
            yield from containers(value, f"{path}.{key}".lstrip("."))


def _numberings(names: Mapping[str, str], children: Sequence[str]) -> list[dict[str, str]]:
    """Return the ways that a file may name the tensors: as said, and as an nn.Sequential does."""
    with_weights = [c for c in children if any(n.startswith(f"{c}.") for n in names.values())]
    ways = [dict(names)]
    for order in (children, with_weights):
        place = {child: str(index) for index, child in enumerate(order)}
        numbered = {}
        for own, name in names.items():
            first, _, rest = name.partition(".")
            numbered[own] = f"{place[first]}.{rest}" if first in place else name
        ways.append(numbered)
    return ways


def _prefixes(
    names: dict[str, str], tensors: StateDict, wanted: StateDict, resize: Resize
) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield each prefix under which some tensor fits, and what fits there."""
    own_of = {theirs: own for own, theirs in names.items()}
    pairs: dict[str, dict[str, str]] = {}
    for name, tensor in tensors.items():
        parts = name.split(".")
        for cut in range(len(parts)):
            own = own_of.get(".".join(parts[cut:]))
            if own is None:
                continue
            if tensor.shape == wanted[own].shape or resize(own, tensor, wanted[own]) is not None:
                prefix = ".".join(parts[:cut]) + ("." if cut else "")
                pairs.setdefault(prefix, {})[own] = name
    yield from pairs.items()


def _rank(match: _Match) -> tuple[int, bool, int, int]:
    path = f"{match.container}.{match.prefix}"
    secondary = any(word in path for word in SECONDARY)
    return len(match.pairs), not secondary, -len(match.kind), -len(path)


def _misfit(num: int, missing: list[str], theirs: list[str], prefix: str) -> str:
    shown = f" under {prefix!r}" if prefix else ""
    holds = f"holds {_some(theirs)}" if theirs else "holds no more tensors"
    return (
        f"does not fit the encoder: {num} of its {num + len(missing)} tensors are in the file"
        f"{shown}, by name and shape; it lacks {_some(missing)}; it {holds}"
    )


def _other_shapes(match: _Match, missing: list[str], wanted: StateDict) -> str:
    """Return which tensors that an encoder lacks are in the file with another shape."""
    theirs = {own: match.tensors.get(f"{match.prefix}{match.names[own]}") for own in missing}
    shown = [
        f"{own} is {_shape(wanted[own])} here and {_shape(tensor)} there"
        for own, tensor in theirs.items()
        if tensor is not None
    ]
    stems = [t for t in theirs.values() if t is not None and t.shape[2:] == (3, 3)]
    if not shown:
        return ""
    text = f"; {'; '.join(shown[:EXAMPLES])}"
    return f"{text} ({SMALL_STEM})" if len(theirs) == len(stems) == 1 else text


def _shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "a number"


def _some(names: tuple[str, ...] | list[str]) -> str:
    return ", ".join(names[:EXAMPLES]) + (", …" if len(names) > EXAMPLES else "")


def fold_input(
    encoder: nn.Module,
    tensors: StateDict,
    mean: tuple[float, ...],
    deviation: tuple[float, ...],
) -> None:
    """Make weights take images in [0, 1] where they took them less mean, over deviation; in place.

    Exact but for the border that the first convolution pads.

    Args:
        encoder: Whose weights they are.
        tensors: By its names.
        mean: Of each channel.
        deviation: Likewise.

    Raises:
        CheckpointError: The mean is of other channels, or nothing could take it: there is no
            convolution, or the first has no bias and no batch norm.
    """
    if not any(mean) and all(d == 1 for d in deviation):
        return
    modules = list(encoder.named_modules())
    index = next((i for i, (_, m) in enumerate(modules) if isinstance(m, nn.Conv2d)), None)
    if index is None:
        raise CheckpointError(
            "has no convolution to take the mean of images into; say init.mean=[0,0,0] "
            "init.std=[1,1,1] for weights of images that were not shifted"
        )
    convolution = modules[index][0]
    name, bias = f"{convolution}.weight", f"{convolution}.bias"
    channels = tensors[name].shape[1]
    if len(mean) != channels:
        raise CheckpointError(
            f"takes images of {counted(channels, 'channel')}, and the mean of images is of "
            f"{len(mean)}; say init.mean and init.std, one number a channel"
        )
    weight = tensors[name] / torch.tensor(deviation)[:, None, None]
    shift = (weight * torch.tensor(mean)[:, None, None]).sum((1, 2, 3))
    norm = f"{modules[index + 1][0]}.running_mean" if index + 1 < len(modules) else ""
    if bias in tensors:
        tensors[bias] = tensors[bias] - shift
    elif norm in tensors:
        tensors[norm] = tensors[norm] + shift
    elif any(mean):
        raise CheckpointError(
            f"{convolution} has neither bias nor batch norm to take the mean of images into; "
            "say init.mean=[0,0,0] for weights of images that were not shifted"
        )
    tensors[name] = weight
