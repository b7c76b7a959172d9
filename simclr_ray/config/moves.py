"""Where a stored path lies after its project's folder was moved or copied.

A config is stored with absolute paths, since workers have other working directories. The `storage`
that it names beside the folder that holds it now tells whether the project was moved: what both
paths end in alike is taken off, and what is left is the root before and after. A path below the old
root is read below the new one where there is something of its name; else it stays as it is, such as
images that were deliberately kept elsewhere.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any, Final, NamedTuple, Self

CONFIG_FILE: Final = "experiment.yaml"
SQLITE: Final = "sqlite:///"
OLD_KEY: Final = "data_resource"  # of `scaling`, up to format 3: a custom resource of Ray


class Move(NamedTuple):
    """The root of a project, before and now."""

    old: PurePosixPath
    new: PurePosixPath

    @classmethod
    def between(cls, old: str, new: str) -> Self | None:
        """Return the move by which what lay at `old` lies at `new`; None where it did not move.

        Args:
            old: Absolute path.
            new: Absolute path.
        """
        before, after = PurePosixPath(old), PurePosixPath(new)
        if before == after:
            return None
        while before.name and before.name == after.name:
            before, after = before.parent, after.parent
        return cls(before, after)

    def target(self, path: str) -> str:
        """Return where a path below the old root lies now; empty for other paths.

        Roots are compared part by part: `/a/proj2` is not below `/a/proj`. What lies below the new
        root as well, where that is within the old one, was not moved.
        """
        where = PurePosixPath(path)
        if not where.is_relative_to(self.old):
            return ""
        if self.new.is_relative_to(self.old) and where.is_relative_to(self.new):
            return ""
        return str(self.new / where.relative_to(self.old))


def stored_tree(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Return the tree of a config that a run has stored, without the key that is no more.

    It said where the run ran, which is nothing to those who read the run.
    """
    scaling = tree.get("scaling")
    if not isinstance(scaling, Mapping) or OLD_KEY not in scaling:
        return dict(tree)
    return {**tree, "scaling": {key: scaling[key] for key in scaling if key != OLD_KEY}}


def relocated(tree: Mapping[str, Any], move: Move) -> dict[str, Any]:
    """Return a config's tree with paths below the old root where they lie now.

    Those are translated that exist below the new root. A SQLite URI counts as its path.
    """
    return {key: _relocated(value, move) for key, value in tree.items()}


def _relocated(node: Any, move: Move) -> Any:
    if isinstance(node, Mapping):
        return relocated(node, move)
    if isinstance(node, list):
        return [_relocated(item, move) for item in node]
    return relocated_path(node, move) if isinstance(node, str) else node


def relocated_path(text: str, move: Move) -> str:
    """Return a path or SQLite URI where it lies now; as it is where nothing lies there."""
    prefix = SQLITE if text.startswith(SQLITE) else ""
    path = text.removeprefix(prefix)
    if not path.startswith("/"):
        return text
    target = move.target(path)
    return prefix + target if target and Path(target).exists() else text


def relocated_run(tree: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Return the tree of a run's config, its paths and `storage` as they are where the run lies.

    Args:
        tree: Of a whole config.
        folder: That holds the config. One that is no run's folder, such as the copy of a remote
            checkpoint, changes nothing.
    """
    storage, name = tree.get("storage"), tree.get("name")
    if not isinstance(storage, str) or not storage.startswith("/"):
        return tree
    folder = folder.resolve()
    if not folder.name.startswith(f"{name}-") or not (folder / CONFIG_FILE).is_file():
        return tree
    move = Move.between(storage, str(folder.parent))
    if move is None:
        return tree
    return {**relocated(tree, move), "storage": str(folder.parent)}
