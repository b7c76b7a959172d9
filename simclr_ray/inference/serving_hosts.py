"""The names by which a server may be asked: one door before all of its routes."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

from starlette.requests import HTTPConnection
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send
from starlette.websockets import WebSocketClose


class OwnHosts:
    """Middleware that answers what is asked by a name of others: a 403, whatever the route.

    Args:
        app: What is behind it.
        hosts: Gives the server's names as a request comes; none: any will do.
        open_paths: Whose routes may be asked by any name.
    """

    def __init__(
        self, app: ASGIApp, hosts: Callable[[], Sequence[str]], open_paths: Collection[str] = ()
    ) -> None:
        self.app, self.hosts, self.open_paths = app, hosts, open_paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one connection."""
        answer: ASGIApp = self.app
        if scope["type"] != "lifespan" and scope["path"] not in self.open_paths:
            hosts = self.hosts()
            if hosts and HTTPConnection(scope).url.hostname not in hosts:
                answer = _refusal(scope, f"ask it as {hosts[0]}, or start it with --allowed-host")
        await answer(scope, receive, send)


def _refusal(scope: Scope, problem: str) -> ASGIApp:
    if scope["type"] == "websocket":
        return WebSocketClose(reason=problem)
    return JSONResponse({"detail": problem}, 403)
