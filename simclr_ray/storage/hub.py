"""The Hugging Face hub as a file system to read from: `hf://datasets/owner/name[@revision][/path]`.

`huggingface_hub` (extra `hf`) asks it. Its errors, some of which are no `OSError`, become a
`HubError`, which is one, so that callers meet one kind of failure whatever the place, and which is
a message as well where nobody meets it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any, Never

import pyarrow as pa
import pyarrow.fs as pafs

from simclr_ray.errors import DataError, HubError, one_line

SCHEME = "hf://"
NO_ACCESS = "log in (`hf auth login`, or HF_TOKEN) and ask for access on its page"


def hub_filesystem() -> pafs.FileSystem:
    """Return the hub; paths on it are what follows `hf://`.

    Raises:
        DataError: `huggingface_hub` is not installed.
    """
    try:
        from huggingface_hub import HfFileSystem
    except ImportError as error:
        raise DataError("hf:// needs huggingface_hub: install simclr-ray[hf]") from error
    return pafs.PyFileSystem(_Handler(HfFileSystem(endpoint=os.environ.get("HF_ENDPOINT"))))


@contextmanager
def _as_os_error(path: str) -> Iterator[None]:
    """Turn what the hub's client raises into a `HubError` of one line; missing files stay such."""
    try:
        yield
    except (FileNotFoundError, HubError):
        raise
    except Exception as error:
        response = getattr(error, "response", None)
        status = getattr(response, "status_code", 0)
        if type(error).__name__ == "GatedRepoError" or status in (401, 403):
            raise HubError(f"{SCHEME}{path}: gated or private: {NO_ACCESS}") from error
        raise HubError(f"{SCHEME}{path}: the hub cannot be asked: {one_line(error)}") from error


class _Handler(pafs.FSSpecHandler):  # type: ignore[misc]  # pyarrow has no types
    """Reads only: a file that is written would be a commit."""

    def get_file_info(self, paths: list[str]) -> list[pafs.FileInfo]:
        infos = []
        for path in paths:
            if "#" in path:  # names a split, and is no file
                infos.append(pafs.FileInfo(path, pafs.FileType.NotFound))
                continue
            with _as_os_error(path):
                self._check_repository(path)
                infos += super().get_file_info([path])
        return infos

    def get_file_info_selector(self, selector: pafs.FileSelector) -> list[pafs.FileInfo]:
        with _as_os_error(selector.base_dir):
            infos: list[pafs.FileInfo] = super().get_file_info_selector(selector)
            return infos

    def open_input_stream(self, path: str) -> pa.NativeFile:
        return self.open_input_file(path)

    def open_input_file(self, path: str) -> pa.NativeFile:
        with _as_os_error(path):
            return pa.PythonFile(_File(self.fs.open(path, mode="rb"), path), mode="r")

    def create_dir(self, path: str, recursive: bool) -> Never:  # noqa: FBT001 - pyarrow's own
        del recursive
        _refuse(path)

    def open_output_stream(self, path: str, metadata: object) -> Never:
        del metadata
        _refuse(path)

    def delete_file(self, path: str) -> Never:
        _refuse(path)

    def _check_repository(self, path: str) -> None:
        """Raise `HubError` where there is no such repository, or none that this user may see."""
        try:
            self.fs.resolve_path(path)
        except FileNotFoundError as error:
            raise HubError(f"no such dataset on the hub, or no access: {NO_ACCESS}") from error


class _File:
    """A file of the hub whose reads fail by `HubError`."""

    def __init__(self, file: IO[bytes], path: str) -> None:
        self._file, self._path = file, path

    def read(self, size: int = -1) -> bytes:
        with _as_os_error(self._path):
            return self._file.read(size)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


def _refuse(path: str) -> Never:
    raise HubError(f"hf://{path}: the hub is read from, and not written to")
