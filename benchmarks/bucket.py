"""A bucket on this machine for benchmarks: served by moto, and what was read of it is counted."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pyarrow.fs as pafs

from tests.cluster.services import install

NAME = "bench"
KEYS = {
    "AWS_ACCESS_KEY_ID": "bench", "AWS_SECRET_ACCESS_KEY": "bench",  # moto asks for some
    "AWS_DEFAULT_REGION": "us-east-1", "AWS_EC2_METADATA_DISABLED": "true",
}  # fmt: skip
_RANGE = re.compile(r"bytes=(\d+)-\d*")


class Read(NamedTuple):
    """One answer to a reader: which bytes of which object, `first` to before `first + size`."""

    path: str
    first: int
    size: int


class Bucket(NamedTuple):
    """A bucket that is being served; this process's environment names its server.

    Attributes:
        pid: Of the server.
        address: HOST:PORT of the server.
        log: Where it notes its answers.
    """

    pid: int
    address: str
    log: Path

    @property
    def uri(self) -> str:
        """Return where it is, for processes that have this one's environment."""
        return f"s3://{NAME}"

    def put(self, name: str, files: Iterable[Path]) -> str:
        """Store files in a folder of the bucket; return its URI."""
        s3 = pafs.S3FileSystem(
            endpoint_override=self.address, scheme="http", allow_bucket_creation=True
        )
        s3.create_dir(NAME)
        for file in files:
            with s3.open_output_stream(f"{NAME}/{name}/{file.name}") as stream:
                stream.write(file.read_bytes())
        return f"{self.uri}/{name}"

    def reads(self) -> list[Read]:
        """Return all that was read so far, in order."""
        out = []
        for line in self.log.read_text().splitlines():
            method, path, span, size = line.split("\t")
            if method == "GET":
                part = _RANGE.fullmatch(span)
                out.append(Read(path.removeprefix("/"), int(part[1]) if part else 0, int(size)))
        return out

    def bytes_sent(self) -> int:
        """Return the bytes of all answers so far."""
        return sum(int(line.rpartition("\t")[2]) for line in self.log.read_text().splitlines())


@contextmanager
def serving(folder: Path) -> Iterator[Bucket]:
    """Serve a bucket from a process of its own, whose packages are installed below `folder`."""
    python = install(folder)
    log = folder / "answers.txt"
    program = str(Path(__file__).with_name("bucket_server.py"))
    server = subprocess.Popen(
        [python, program, str(log)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    try:
        assert server.stdout is not None
        port = server.stdout.readline().strip()
        if not port:
            raise SystemExit("the bucket's server did not start")
        address = f"127.0.0.1:{port}"
        os.environ.update(KEYS, AWS_ENDPOINT_URL=f"http://{address}")
        yield Bucket(server.pid, address, log)
    finally:
        server.terminate()
        server.wait()
