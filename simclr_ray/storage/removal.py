"""The removal of a run folder, which no driver may hold meanwhile."""

from __future__ import annotations

from simclr_ray.storage.filesystem import entries_in, filesystem, remove_file
from simclr_ray.storage.lease import claims_at
from simclr_ray.storage.run_folder import RunFolder
from simclr_ray.storage.run_lock import LOCK


def remove_unlocked(folder: RunFolder) -> None:
    """Delete a run folder with all that is in it.

    Raises:
        RunError: A driver holds it.
    """
    if folder.local is not None:
        with folder.lock():
            folder.remove_all()
        return
    files, root = filesystem(folder.uri)
    with folder.lock():  # its claim is renewed until the end, and is left until then
        for entry in entries_in(files, root):
            if entry.is_file:
                remove_file(files, entry.path)
            elif entry.base_name != LOCK:
                files.delete_dir(entry.path)
    others = {entry.base_name for entry in entries_in(files, root)} - {LOCK}
    if not others and not claims_at(folder.uri):  # nobody has begun it anew
        files.delete_dir(root)
