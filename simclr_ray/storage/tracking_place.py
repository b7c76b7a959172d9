"""How a file of ours names the MLflow store: relative to the folder that it stands in.

A project that is moved takes its SQLite store along, so that its address must not depend on the
place. A store that is elsewhere, or a server, is named as it is.
"""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import Any

from simclr_ray import config as cfg
from simclr_ray.config.moves import SQLITE, Move, relocated_path
from simclr_ray.config.uris import hide_passwords, recall, remember
from simclr_ray.storage.run_folder import RunFolder

STUDIES = "studies"  # <storage>/studies/<study>/runs/<run>: all share the storage's store


def stored_uri(uri: str, folder: RunFolder) -> str:
    """Return a tracking URI as a file in `folder` names it.

    That of a database in the storage above the folder is relative to the folder, and so is that of
    one that lies below the working directory with the folder.
    """
    uri = hide_passwords(remember(uri))
    path = Path(uri.removeprefix(SQLITE))
    if folder.local is None or not uri.startswith(SQLITE) or not path.is_absolute():
        return uri
    roots = (_storage_above(folder.local), Path.cwd())
    if not any(r.name and path.is_relative_to(r) and folder.local.is_relative_to(r) for r in roots):
        return uri
    return SQLITE + os.path.relpath(path, folder.local)


def read_uri(stored: str, folder: RunFolder, config_file: str, runs: str = "") -> str:
    """Return the tracking URI that a file in `folder` means.

    Args:
        stored: As the file has it. An absolute address, as earlier releases wrote them all, is
            translated where the folder was moved and the database with it.
        folder: Of a run or a study.
        config_file: File in the folder, whose `storage` says where it lay when that was written.
        runs: Where below `folder` that storage lies; empty: the folder lies in it.
    """
    stored = recall(stored)
    path = stored.removeprefix(SQLITE)
    if folder.local is None or not stored.startswith(SQLITE):
        return stored
    if not path.startswith("/"):
        return SQLITE + os.path.normpath(folder.local / path)
    here = str(folder.local / runs) if runs else folder.storage
    move = Move.between(_storage_in(folder.read_text(config_file) or ""), here)
    return relocated_path(stored, move) if move else stored


@functools.lru_cache(maxsize=16)  # a study's is asked for with each of its outcomes
def _storage_in(text: str) -> str:
    tree: Any = cfg.parse_yaml(text)
    storage = tree.get("storage") if isinstance(tree, dict) else None
    return storage if isinstance(storage, str) else ""


def _storage_above(folder: Path) -> Path:
    """Return the storage that a run lies in; of a study or its run the one above the study."""
    for place in (folder.parent, *folder.parents[2:3]):
        if place.name == STUDIES:
            return place.parent
    return folder.parent
