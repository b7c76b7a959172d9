"""Passes TCP on, held back: `slow_proxy.py HOST:PORT PORT FILE` listens on the first of them.

FILE holds JSON and is read anew for each question: `seconds` that it waits before it is passed on,
and `bytes_per_s` at most of all that is passed, 0 for no limit. A question is what the client says
first, or after the server has said something: a request of HTTP, however many parts it comes in.
"""

from __future__ import annotations

import asyncio
import json
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

PART_BYTES = 2**16


class Proxy:
    """One listener and what it passes to."""

    def __init__(self, target_port: int, settings: Path) -> None:
        self.target_port = target_port
        self.settings = settings
        self.free_at = 0.0  # when the limited line has passed all that it was given

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Pass one connection on, both ways, until both sides have closed."""
        try:
            back, forth = await asyncio.open_connection("127.0.0.1", self.target_port)
        except OSError:
            writer.close()
            return
        asked = asyncio.Event()
        with suppress(ConnectionError):
            await asyncio.gather(
                self._pass(reader, forth, asked, is_question=True),
                self._pass(back, writer, asked, is_question=False),
            )
        for stream in (forth, writer):
            stream.close()

    async def _pass(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        asked: asyncio.Event,
        *,
        is_question: bool,
    ) -> None:
        while part := await reader.read(PART_BYTES):
            told = self._read()
            if not is_question:
                asked.clear()
            elif not asked.is_set():
                asked.set()
                await asyncio.sleep(told["seconds"])
            if rate := told["bytes_per_s"]:
                now = asyncio.get_running_loop().time()
                self.free_at = max(self.free_at, now) + len(part) / rate
                await asyncio.sleep(self.free_at - now)
            writer.write(part)
            await writer.drain()
        with suppress(OSError):
            writer.write_eof()

    def _read(self) -> dict[str, Any]:
        with suppress(OSError, ValueError):
            told: dict[str, Any] = json.loads(self.settings.read_text())
            return told
        return {"seconds": 0.0, "bytes_per_s": 0.0}


async def main(listen: str, target_port: int, settings: Path) -> None:
    """Serve until the process ends."""
    host, _, port = listen.rpartition(":")
    server = await asyncio.start_server(Proxy(target_port, settings).serve, host, int(port))
    async with server:
        await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])))
