"""Compare what two commits compute on this machine, to the last bit.

    python -m tests.golden.compare OLD_COMMIT [NEW_COMMIT]

Without NEW_COMMIT, the working tree is compared. Each commit's package is laid into a folder of its
own and `probe.py` of the working tree runs over it in a fresh process with one torch thread.
Exit code 1 where a number or tensor differs; each is named with its largest difference.
"""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[2]
# tensor name of an old commit, its beginning -> what a newer one calls it
RENAMED: dict[str, str] = {}


def lay_out(commit: str, folder: Path) -> Path:
    """Return a folder that holds the package of a commit, or the working tree for no commit."""
    if not commit:
        return ROOT
    command = ["git", "-C", str(ROOT), "archive", commit, "simclr_ray"]
    packed = subprocess.run(command, capture_output=True, check=True).stdout
    with tarfile.open(fileobj=io.BytesIO(packed)) as archive:
        archive.extractall(folder, filter="data")
    return folder


def probe(package: Path, out: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Return numbers and tensors of the package that lies in `package`."""
    environment = os.environ | {"PYTHONPATH": str(package), "OMP_NUM_THREADS": "1"}
    program = [sys.executable, str(ROOT / "tests" / "golden" / "probe.py"), str(out)]
    subprocess.run(program, check=True, env=environment, cwd=package)
    numbers: dict[str, Any] = json.loads((out / "numbers.json").read_text(encoding="utf-8"))
    return numbers, load_file(out / "tensors.safetensors")


def flat(tree: Any, path: str = "") -> dict[str, Any]:
    """Return the leaves of a tree by their paths."""
    if isinstance(tree, dict):
        return {k: v for key in tree for k, v in flat(tree[key], f"{path}/{key}").items()}
    if isinstance(tree, list):
        return {k: v for i, item in enumerate(tree) for k, v in flat(item, f"{path}/{i}").items()}
    return {path: tree}


def renamed(name: str) -> str:
    """Return the newest name of a tensor."""
    for old, new in RENAMED.items():
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name


def differences(old: Path, new: Path, scratch: Path) -> list[str]:
    """Return one line for each number or tensor in which two packages differ."""
    (a, before), (b, after) = probe(old, scratch / "a"), probe(new, scratch / "b")
    first, second = flat(a), flat(b)
    lines = [
        f"{key}: {first.get(key, 'absent')} -> {second.get(key, 'absent')}"
        for key in dict.fromkeys([*first, *second])
        if first.get(key) != second.get(key)
    ]
    before = {renamed(name): tensor for name, tensor in before.items()}
    for name in dict.fromkeys([*before, *after]):
        x, y = before.get(name), after.get(name)
        if x is None or y is None or x.shape != y.shape or x.dtype != y.dtype:
            lines.append(f"{name}: {describe(x)} -> {describe(y)}")
        elif not torch.equal(x, y):
            lines.append(f"{name}: differs by {(x.double() - y.double()).abs().max():.3g}")
    return lines


def describe(tensor: torch.Tensor | None) -> str:
    """Return shape and dtype of a tensor."""
    return "absent" if tensor is None else f"{tensor.dtype} {[*tensor.shape]}"


def main() -> None:
    """Compare, say what differs, and exit by it."""
    if len(sys.argv) not in (2, 3):
        sys.exit(__doc__)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        places = [lay_out(commit, folder / commit) for commit in [*sys.argv[1:], ""][:2]]
        found = differences(places[0], places[1], folder)
    last = f"{len(found)} differ" if found else "equal to the last bit"
    sys.stdout.write("\n".join([*found, last]) + "\n")
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
