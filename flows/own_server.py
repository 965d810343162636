"""The Prefect server that ends with a run, or shows its history; it refuses the pages of other sites.

    python -m flows.own_server PORT

People open its UI in a browser, and it asks for no login. A page of another site in that browser must not reach it.
CORS keeps such a page from reading an answer, but from neither sending what needs no permission (a form, a WebSocket)
nor calling itself by a name that leads to this machine. So each request is looked at before Prefect sees it.
"""

from __future__ import annotations

import sys

import uvicorn
from starlette.datastructures import Headers
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send

HOST = "127.0.0.1"
NAMES = (HOST, "localhost")
FRAMES = ("iframe", "frame", "embed", "object")


class OwnPagesOnly:
    """ASGI middleware that answers pages of this server and clients on this machine, and refuses pages of others."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it."""
        if scope["type"] == "lifespan" or may_ask(Headers(scope=scope)):
            await self._app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            await PlainTextResponse("this server answers its own pages only", 403)(scope, receive, send)


def may_ask(headers: Headers) -> bool:
    """Return whether a request comes from a page of this server or from no browser, and goes to this machine by name.

    Browsers send Origin with whatever may change something and with WebSockets. Sec-Fetch-Dest says what is framed: a
    page could have a person click in it unknowingly.
    """
    host, _, port = headers.get("host", "").partition(":")
    if host not in NAMES:
        return False
    if headers.get("sec-fetch-dest") in FRAMES and headers.get("sec-fetch-site") != "same-origin":
        return False
    origin = headers.get("origin")
    return origin is None or origin in origins(port)


def origins(port: int | str) -> list[str]:
    """Return the origins of this server's pages; the port is empty where it is that of HTTP."""
    return [f"http://{name}" + (f":{port}" if port else "") for name in NAMES]


if __name__ == "__main__":
    from prefect.server.api.server import create_app  # seconds

    uvicorn.run(OwnPagesOnly(create_app(final=True)), host=HOST, port=int(sys.argv[1]), log_level="warning")
