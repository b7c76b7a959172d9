"""The SQLite store of a project whose folder was moved or copied.

MLflow keeps absolute URIs in its database. Which of them have moved is inferred from the place of
the database, experiment by experiment; nothing else is recorded, so that older stores are read too.

- An experiment that `Tracker.open` made keeps its artifacts beside the database, in `mlartifacts`.
  One whose `mlartifacts` stand beside another place has moved if its runs are found beside this
  database, if there is nothing in the other place, or if another database lies there: then this
  one is a copy, and must not write to what is the original's.
- An experiment of another location has moved if that location's last parts, below a folder that
  holds this database, are a folder with its runs in it; run ids are unique.
- A folder that is reached by two paths (a link, a mount) has not moved.

What is below the location of such an experiment is translated. So is what is below the root that
moved with it (the old and the new location less what both end in alike), if it exists there now:
the rest is deliberately elsewhere. Other schemes than `file:` and plain paths are left alone, and
so is every database that is not a SQLite file of this machine. The file store (`file:`), which
MLflow 3 refuses by default, is not handled.

Parameters stay as they are, as do `mlflow.source.*`: they say what a run was given then.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import sqlite3
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing
from datetime import datetime
from pathlib import Path, PurePosixPath
from typing import Final, NamedTuple
from urllib.parse import quote, unquote, urlsplit

from simclr_ray.config.moves import Move
from simclr_ray.config.wording import counted
from simclr_ray.errors import TrackingError
from simclr_ray.tracking.store import ARTIFACTS, sqlite_file

# where artifacts are read and written
LOCATIONS: Final = (
    ("experiments", "artifact_location", ""),
    ("runs", "artifact_uri", ""),
    ("logged_models", "artifact_location", ""),
    ("model_versions", "source", ""),
    ("model_versions", "storage_location", ""),
    ("trace_tags", "value", "key IN ('mlflow.artifactLocation', 'mlflow.trace.archiveLocation')"),
)
# where a run lies and what it read: shown, and translated where it lies here now
LINEAGE: Final = (
    ("tags", "value", "key = 'storage'"),
    ("experiment_tags", "value", "key = 'storage'"),
    ("datasets", "dataset_source", ""),
)
WAIT_S: Final = 60.0  # for another process that rewrites or writes
log = logging.getLogger(__name__)


class MovedLocation(NamedTuple):
    """One experiment's artifacts, as paths."""

    old: str
    new: str

    @property
    def root(self) -> Move:
        """The root that moved, as far up as the names agree."""
        move = Move.between(self.old, self.new)
        assert move is not None
        return move


def rewrite_moved_store(uri: str) -> None:
    """Rewrite the URIs of a store that was moved, after a backup; say so in one line.

    For commands that write, before they do. Does nothing to a store that lies where it says, that
    is no SQLite file, or that does not exist yet. Of several processes one rewrites.

    Raises:
        TrackingError: The database cannot be read, written or backed up; it is as it was.
    """
    database = sqlite_file(uri)
    if database is None or not _has_moved(database):
        return
    try:
        _rewrite(database)
    except (sqlite3.Error, OSError) as error:
        raise TrackingError(
            f"MLflow's {database} was moved, and its addresses cannot be rewritten: {error}"
        ) from error


def translated(uri: str, location: str) -> str:
    """Return where artifacts lie now, of a store that was moved and not rewritten; writes nothing.

    Args:
        uri: Of the store.
        location: URI or path of artifacts, as the store has it.
    """
    database = sqlite_file(uri)
    return location if database is None else _translated(location, _has_moved(database))


def has_run(uri: str, run_id: str) -> bool:
    """Return whether a SQLite store that is there has a run; of other stores it is taken as so."""
    database = sqlite_file(uri)
    if database is None:
        return True
    if not database.is_file():
        return False
    try:
        with closing(_reading(database)) as db:
            row = db.execute("SELECT 1 FROM runs WHERE run_uuid = ?", (run_id,)).fetchone()
    except sqlite3.Error as error:
        log.debug("%s cannot be looked at: %s", database, error)
        return False
    return row is not None


def _has_moved(database: Path) -> list[MovedLocation]:
    """Return what has moved of a database; nothing where it cannot be read: MLflow says why."""
    if not database.is_file():
        return []
    try:
        with closing(_reading(database)) as db:
            return moved_locations(db, database)
    except (sqlite3.Error, OSError) as error:
        log.debug("%s cannot be looked at: %s", database, error)
        return []


def moved_locations(db: sqlite3.Connection, database: Path) -> list[MovedLocation]:
    """Return the experiments' artifact locations that have moved, the longest first."""
    if not _has_column(db, "experiments", "artifact_location"):  # empty, or being made
        return []
    moves = set()
    rows = db.execute("SELECT experiment_id, artifact_location FROM experiments").fetchall()
    for experiment, location in rows:
        old = path_of(location or "")
        if old:
            new = _new_place(db, database, experiment, old)
            if new and new != old:
                moves.add(MovedLocation(old, new))
    return sorted(moves, key=lambda m: len(m.old), reverse=True)


def _new_place(db: sqlite3.Connection, database: Path, experiment: int, old: str) -> str:
    """Return where an experiment's artifacts lie if they moved with the database, else nothing."""
    before, here = Path(old), database.parent
    if _are_same(before.parent, here):
        return ""
    ids = _ids_of(db, experiment)
    if before.name == ARTIFACTS:
        new = here / ARTIFACTS
        moved = _is_left(before, new, database) or _holds(new, ids)
        return str(new) if moved and not _are_same(before, new) else ""
    for size in range(1, len(before.parts)) if ids else ():
        ending = Path(*before.parts[-size:])
        for folder in (here, *here.parents):
            new = folder / ending
            if new == before or _are_same(new, before):
                return ""  # it is where it says
            if _holds(new, ids) and _is_left(before, new, database):
                return str(new)
    return ""


def _is_left(old: Path, new: Path, database: Path) -> bool:
    """Return whether an old location is gone, or belongs to a database that this is a copy of."""
    root = MovedLocation(str(old), str(new)).root
    back = Move(root.new, root.old).target(str(database))
    original = Path(back) if back else database
    is_copy = original.is_file() and not _are_same(original, database)
    return is_copy or not old.exists()


def _holds(folder: Path, ids: set[str]) -> bool:
    """Return whether a folder of artifacts has one of a run, or of a model, of these ids."""
    return any(_names(f) & ids for f in (folder, folder / "models"))


def _names(folder: Path) -> set[str]:
    try:
        return set(os.listdir(folder))  # noqa: PTH208 - names alone, of thousands of runs
    except OSError:
        return set()


def _ids_of(db: sqlite3.Connection, experiment: int) -> set[str]:
    ids = set()
    for table, column in (("runs", "run_uuid"), ("logged_models", "model_id")):
        if _has_column(db, table, column):
            query = f"SELECT {column} FROM {table} WHERE experiment_id = ?"  # noqa: S608 - our own names
            ids |= {row[0] for row in db.execute(query, (experiment,))}
    return ids


def _rewrite(database: Path) -> None:
    """Rewrite the URIs in one transaction, whose lock lets one process of several do it."""
    with closing(sqlite3.connect(database, timeout=WAIT_S, isolation_level=None)) as db:
        db.execute("BEGIN IMMEDIATE")
        try:
            moves = moved_locations(db, database)
            changes = list(_changes(db, moves)) if moves else []
            if not changes:  # another process was quicker
                db.execute("ROLLBACK")
                return
            backup = _back_up(database)
            for table, column, row, text in changes:
                query = f"UPDATE {table} SET {column} = ? WHERE rowid = ?"  # noqa: S608 - our own names
                db.execute(query, (text, row))
            db.execute("COMMIT")
        except BaseException:
            if db.in_transaction:
                db.execute("ROLLBACK")
            raise
    _forget_artifact_places()
    roots = dict.fromkeys(f"from {move.root.old} to {move.root.new}" for move in moves)
    log.warning(
        "the project was moved or copied %s: %s of MLflow's database rewritten; as it was: %s",
        ", ".join(roots), counted(len(changes), "address", "addresses"), backup,
    )  # fmt: skip


def _changes(
    db: sqlite3.Connection, moves: Sequence[MovedLocation]
) -> Iterator[tuple[str, str, int, str]]:
    """Yield table, column, row id and the new text of everything that is to be rewritten."""
    for table, column, where in (*LOCATIONS, *LINEAGE):
        if not _has_column(db, table, column):
            continue
        query = f"SELECT rowid, {column} FROM {table} WHERE {where or '1'}"  # noqa: S608 - our own names
        for row, text in db.execute(query).fetchall():
            new = _in_text(text, moves) if isinstance(text, str) else text
            if new != text:
                yield table, column, row, new


def _in_text(text: str, moves: Sequence[MovedLocation]) -> str:
    """Return a URI, or JSON with URIs among its values, translated."""
    if not text.startswith("{"):
        return _translated(text, moves)
    try:
        tree = json.loads(text)
    except ValueError:
        return text
    new = {k: _translated(v, moves) if isinstance(v, str) else v for k, v in tree.items()}
    return text if new == tree else json.dumps(new)


def _translated(uri: str, moves: Sequence[MovedLocation]) -> str:
    path = path_of(uri)
    if not path:
        return uri
    for move in moves:
        target = Move(PurePosixPath(move.old), PurePosixPath(move.new)).target(path)
        if target:
            return _like(uri, target)
    for move in moves:
        target = move.root.target(path)
        if target and (Path(target).exists() or _is_unused_default(path, target)):
            return _like(uri, target)
    return uri


def _is_unused_default(path: str, target: str) -> bool:
    """Return whether a location is MLflow's own default, `mlruns/0` of where it was first called.

    The experiment `Default` has it and, of ours, no run.
    """
    default = path.endswith("/mlruns/0")
    return default and not Path(path).exists() and not Path(target).exists()


def path_of(uri: str) -> str:
    """Return the absolute local path that a URI or path means; empty for all others."""
    if uri.startswith("/"):
        return uri.rstrip("/") or "/"
    if not uri.startswith("file:"):
        return ""
    parts = urlsplit(uri)
    path = unquote(parts.path)
    return path.rstrip("/") if parts.netloc in ("", "localhost") and path.startswith("/") else ""


def _like(uri: str, path: str) -> str:
    """Return a path in the form of `uri`: as a URI or plainly, with its slash at the end."""
    slash = "/" if uri.endswith("/") else ""
    return f"file://{quote(path)}{slash}" if uri.startswith("file:") else f"{path}{slash}"


def _back_up(database: Path) -> Path:
    """Return a whole copy of the database beside it, of the state before this transaction."""
    stamp = datetime.now().astimezone().strftime("%Y%m%d-%H%M%S")
    target = database.with_name(f"{database.name}.before-move-{stamp}")
    number = 1
    while target.exists():
        number += 1
        target = database.with_name(f"{database.name}.before-move-{stamp}-{number}")
    hidden = target.with_name(f".{target.name}.tmp")
    try:
        with (
            closing(_reading(database)) as source,
            closing(sqlite3.connect(hidden)) as copy,
        ):
            source.backup(copy)
        shutil.copymode(database, hidden)
        hidden.replace(target)
    finally:
        hidden.unlink(missing_ok=True)
    return target


def _reading(database: Path) -> sqlite3.Connection:
    """Return a connection that cannot write, also where neither file nor folder can be written."""
    db = sqlite3.connect(f"{database.as_uri()}?mode=ro", uri=True, timeout=WAIT_S)
    try:
        db.execute("SELECT 1 FROM sqlite_master").fetchall()
    except sqlite3.OperationalError:  # a write-ahead log needs a file beside it
        db.close()
        return sqlite3.connect(f"{database.as_uri()}?mode=ro&immutable=1", uri=True)
    return db


def _has_column(db: sqlite3.Connection, table: str, column: str) -> bool:
    query = "SELECT 1 FROM pragma_table_info(?) WHERE name = ?"
    return db.execute(query, (table, column)).fetchone() is not None


def _are_same(one: Path, other: Path) -> bool:
    try:
        return one.samefile(other)
    except OSError:
        return False


def _forget_artifact_places() -> None:
    """Empty MLflow's cache of where each run's artifacts are, of this process."""
    utils = sys.modules.get("mlflow.tracking._tracking_service.utils")
    cache = getattr(utils, "_artifact_repos_cache", None)
    if cache is not None:
        cache.clear()
