"""A checkpoint is a record: tensors and a manifest, read without pickle, whole or not at all.

    step-00001200-<attempt>/
        state.safetensors     model.*, optimizer.*
        record.json           written last: names the file with size and SHA-256, what tensors
                              it holds, and the SHA-256 of itself

`RunFolder.newest_checkpoint` walks from the newest and takes the first that verifies.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle  # nosec B403 # for its error
import re
import secrets
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from safetensors import SafetensorError, safe_open

from simclr_ray.config.uris import without_passwords
from simclr_ray.errors import CheckpointError, one_line
from simclr_ray.storage.filesystem import filesystem, write_text_whole
from simclr_ray.storage.provenance import sha256, versions_of
from simclr_ray.storage.space import writing

if TYPE_CHECKING:  # torch is imported where tensors are read: names and folders need none of it
    import torch
    from torch import Tensor, nn

FORMAT_VERSION = 3  # docs/upgrade.md
FORMATS_READ = (2, 3)  # a record of format 2 says nothing of itself; it has no `sha256`
STATE, RECORD = "state.safetensors", "record.json"
NAME = re.compile(r"step-(\d{8,})-[0-9a-f]{8}")
Identity = Mapping[str, str]
ANY: Final[Identity] = {}
TORCH_MAGIC = (b"PK\x03\x04", b"\x80")  # a zip archive, or a pickle as torch wrote before 1.6
FIRST_BYTES = 64
LIBRARIES = ("simclr-ray", "torch", "torchvision", "ray", "numpy")


class Checkpoint(NamedTuple):
    """One verified checkpoint."""

    step: int  # steps done
    tensors: dict[str, Tensor]
    record: dict[str, Any]  # the manifest: experiment, digest, fingerprint, versions, files, …


def new_name(step: int) -> str:
    """Return a directory name for `step` that is never used again."""
    return f"step-{step:08d}-{secrets.token_hex(4)}"


def step_of(name: str) -> int:
    """Return the step in a directory name, or -1 where the name is no checkpoint's."""
    match = NAME.fullmatch(name)
    return int(match[1]) if match else -1


def pack(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return all state as named tensors: `model.<name>`, `optimizer.<index>.<name>`.

    On the CPU they share memory with the model: write them before the next step.
    """
    import torch

    tensors = {f"model.{name}": t for name, t in model.state_dict().items()}
    for index, state in optimizer.state_dict()["state"].items():
        for name, value in state.items():
            tensors[f"optimizer.{index}.{name}"] = torch.as_tensor(value)
    return {name: t.detach().cpu().contiguous() for name, t in tensors.items()}


def unpack(
    tensors: Mapping[str, Tensor], model: nn.Module, optimizer: torch.optim.Optimizer
) -> None:
    """Load what `pack` returned, in place.

    Raises:
        CheckpointError: The tensors do not fit the model, or the optimizer's are missing.
    """
    restore_model(tensors, model)
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if name.startswith("optimizer."):
            _, index, key = name.split(".", 2)
            # a copy: it stays in use, and with it a file that is read by mapping, removed or not
            state.setdefault(int(index), {})[key] = tensor.clone()
    groups = optimizer.state_dict()["param_groups"]
    indices = {index for group in groups for index in group["params"]}
    kinds = {frozenset(of) for of in state.values()}
    if not state.keys() <= indices or len(kinds) > 1 or (keeps_state(optimizer) and not state):
        raise CheckpointError("the checkpoint does not hold the state of this optimizer")
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def keeps_state(optimizer: torch.optim.Optimizer) -> bool:
    """Return whether an optimizer's steps hang on more than the gradient: all but plain SGD's."""
    import torch

    plain = isinstance(optimizer, torch.optim.SGD)
    return not plain or any(group["momentum"] for group in optimizer.param_groups)


def restore_model(tensors: Mapping[str, Tensor], model: nn.Module, prefix: str = "model.") -> None:
    """Load the tensors under `prefix` into `model`, strictly. Raises `CheckpointError`."""
    state_dict = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
    try:
        model.load_state_dict(state_dict)
    except RuntimeError as error:
        problem = f"the checkpoint does not fit the model: {one_line(error)}"
        raise CheckpointError(problem) from error


def flaw(folder: Path, identity: Identity) -> str:
    """Return why a checkpoint cannot be gone on from; nothing where it can."""
    try:
        read_record(folder, identity)
    except CheckpointError as error:
        return str(error)
    return ""


def layout(names: Iterable[tuple[str, str, Sequence[int]]]) -> str:
    """Return a hash of which tensors there are: name, dtype as safetensors writes it, shape."""
    return _hash_of(sorted((name, dtype, list(shape)) for name, dtype, shape in names))


def write(
    folder: Path, step: int, tensors: Mapping[str, Tensor], record: Mapping[str, Any]
) -> None:
    """Write a checkpoint into `folder`, which is made and must not exist.

    Nothing stays of one that could not be written.

    Raises:
        CheckpointError: A tensor holds a value that is not finite; nothing is written.
        StorageError: The disk takes no more.
    """
    name = first_not_finite(tensors.items())
    if name:
        raise CheckpointError(f"{name} is not finite at step {step}; no checkpoint is written")
    try:
        with writing(folder.parent, sum(t.nbytes for t in tensors.values())):
            _write(folder, step, tensors, record)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _write(
    folder: Path, step: int, tensors: Mapping[str, Tensor], record: Mapping[str, Any]
) -> None:
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    save_file(dict(tensors), folder / STATE)
    _sync(folder / STATE)
    whole = {
        "format_version": FORMAT_VERSION,
        "step": step,
        **record,
        "versions": versions_of(LIBRARIES),
        "tensors": _layout_in(folder / STATE),
        "files": {
            STATE: {"size": (folder / STATE).stat().st_size, "sha256": sha256(folder / STATE)}
        },
    }
    sign(folder / RECORD, whole)


def sign(path: Path, record: Mapping[str, Any]) -> None:
    """Write a record with its own hash, which is of all else that it says."""
    shown = without_passwords(record)
    rest = {key: value for key, value in shown.items() if key != "sha256"}
    signed = rest | {"sha256": _hash_of(rest)}
    write_text_whole(*filesystem(str(path)), json.dumps(signed, indent=1))


def first_not_finite(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """Return the name of the first tensor that holds a NaN or an infinity, or nothing."""
    import torch

    return next((name for name, t in tensors if not torch.isfinite(t).all()), "")


def read_record(folder: Path, identity: Identity = ANY) -> dict[str, Any]:
    """Return the manifest of a checkpoint after checking it and the file that it names.

    Args:
        folder: The checkpoint.
        identity: What the record must say of the experiment and its images, key -> value.

    Raises:
        CheckpointError: There is no manifest, it was altered, is of another format, step or
            experiment, the file is missing or altered, or a weight is not finite: training from
            it could only fail again.
    """
    record = _own_record(folder / RECORD)
    step = step_of(folder.name)
    if step >= 0 and record["step"] != step:
        problem = f"is of step {record['step']}, its folder of {step}"
        raise CheckpointError(f"{folder / RECORD}: {problem}")
    for key, value in identity.items():
        if record.get(key) != value:
            problem = f"is of another run: its {key} is {record.get(key)}, not {value}"
            raise CheckpointError(f"{folder / RECORD}: {problem}")
    file, entry = folder / STATE, record["files"][STATE]
    try:
        if not file.is_file() or file.stat().st_size != entry["size"]:
            raise CheckpointError(f"{file}: missing or of the wrong size")
        if sha256(file) != entry["sha256"]:
            raise CheckpointError(f"{file}: altered; its hash is not the recorded one")
        if record["tensors"] not in ("", _layout_in(file)):
            raise CheckpointError(f"{file}: holds other tensors than were written")
    except OSError as error:
        raise CheckpointError(f"{file}: {one_line(error)}") from error
    name = first_not_finite(_tensors_in(file))
    if name:
        raise CheckpointError(f"{file}: {name} is not finite; the training had diverged")
    return record


def _own_record(path: Path) -> dict[str, Any]:
    """Return what a manifest says, after checking that it is as it was written."""
    if not path.is_file():
        raise CheckpointError(f"{path.parent}: no {RECORD}; the checkpoint was not finished")
    try:
        record: Any = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not JSON: {one_line(error)}") from error
    if not isinstance(record, dict):
        raise CheckpointError(f"{path}: no checkpoint's record")
    version, own = record.get("format_version"), record.pop("sha256", None)
    if version not in FORMATS_READ:
        read = " and ".join(map(str, FORMATS_READ))
        raise CheckpointError(
            f"{path}: format {version}, this release reads {read}; see docs/upgrade.md"
        )
    if (own is not None or version != 2) and own != _hash_of(record):
        raise CheckpointError(f"{path}: altered; its hash is not the one that it states")
    record.setdefault("tensors", "")
    files = record.get("files")
    entry = files.get(STATE) if isinstance(files, dict) else None
    is_entry = isinstance(entry, dict) and {"size", "sha256"} <= set(entry)
    if not is_entry or type(record.get("step")) is not int:
        raise CheckpointError(f"{path}: no checkpoint's record")
    return record


def _hash_of(tree: object) -> str:
    text = json.dumps(tree, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _layout_in(path: Path) -> str:
    """Return the layout of a file, of its header alone."""
    try:
        with safe_open(path, framework="pt") as file:
            slices = ((name, file.get_slice(name)) for name in file.keys())  # noqa: SIM118
            return layout((name, part.get_dtype(), part.get_shape()) for name, part in slices)
    except SafetensorError as error:
        raise CheckpointError(f"{path}: {error}") from error


def _tensors_in(path: Path) -> Iterator[tuple[str, Tensor]]:
    """Yield name and tensor one after the other, so that one is in memory at a time."""
    try:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - a safetensors file is no mapping
                yield name, file.get_tensor(name)
    except SafetensorError as error:
        raise CheckpointError(f"{path}: {error}") from error


def read(folder: Path, identity: Identity = ANY) -> Checkpoint:
    """Return the checkpoint in `folder`, verified as `read_record` does."""
    from safetensors.torch import load_file

    record = read_record(folder, identity)
    try:
        tensors = load_file(folder / STATE)
    except SafetensorError as error:
        raise CheckpointError(f"{folder / STATE}: {error}") from error
    return Checkpoint(int(record["step"]), tensors, record)


def read_file(path: Path) -> dict[str, Any]:
    """Return what a .safetensors or .npz file holds, or one that torch wrote; no code is run.

    That is tensors by name, perhaps in dicts of dicts.

    Raises:
        CheckpointError: It holds something else, or other objects besides.
    """
    import numpy as np
    import torch
    from safetensors.torch import load_file

    with path.open("rb") as file:
        first_bytes = file.read(FIRST_BYTES)
    if not first_bytes:
        raise CheckpointError(f"{path} is empty")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as arrays:
                return {name: torch.from_numpy(arrays[name]) for name in arrays.files}
        if not first_bytes.startswith(TORCH_MAGIC):
            raise CheckpointError(f"{path} is no file of weights{_guess(first_bytes)}")
        tree: Any = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL ([\w.]+)", str(error))
        if named is None:
            raise CheckpointError(f"{path} is no file of weights: {one_line(error)}") from error
        raise CheckpointError(
            f"{path} holds {named[1]} besides tensors, and to read that would run code; where you "
            "trust it, read it by the program that wrote it and write its tensors alone: "
            "torch.save(model.state_dict(), 'weights.pth')"
        ) from error
    except (CheckpointError, MemoryError):
        raise
    except Exception as error:  # torch raises anything at all on broken bytes
        problem = f"{one_line(error).partition('. ')[0]}{_guess(first_bytes)}"
        raise CheckpointError(f"{path} is no whole file of weights: {problem}") from error
    if not isinstance(tree, dict):
        raise CheckpointError(f"{path} holds a {type(tree).__name__}; expected tensors by name")
    return tree


def _guess(first_bytes: bytes) -> str:
    """Return what a file is that holds no weights, where its first bytes tell."""
    if first_bytes.startswith(b"version https://git-lfs"):
        return ": it is a pointer of Git LFS (git lfs pull fetches the file)"
    if first_bytes.lstrip()[:1] == b"<":
        return ": it is a page of HTML, as a download without permission gives"
    return ""


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
