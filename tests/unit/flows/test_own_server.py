"""Who may ask the Prefect server that a run starts, and that it passes on what it is asked."""

from __future__ import annotations

import asyncio
from collections.abc import MutableMapping
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route, WebSocketRoute
from starlette.testclient import TestClient
from starlette.websockets import WebSocket, WebSocketDisconnect

from flows.own_server import OwnPagesOnly
from flows.server import server_environment

SITE = "127.0.0.1:4200"
OWN = {"host": SITE}


@pytest.fixture
def client() -> TestClient:
    async def hear(socket: WebSocket) -> None:
        await socket.accept()
        await socket.send_text("heard")
        await socket.close()

    routes = [Route("/", lambda _: PlainTextResponse("told"), methods=["GET", "POST"]), WebSocketRoute("/socket", hear)]
    return TestClient(OwnPagesOnly(Starlette(routes=routes)), base_url=f"http://{SITE}")


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"origin": f"http://{SITE}"},
        {"origin": "http://localhost:4200"},
        {"host": "localhost:8080", "origin": "http://localhost:8080"},  # through a tunnel
        {"sec-fetch-dest": "document", "sec-fetch-site": "cross-site"},  # a link from elsewhere
        {"sec-fetch-dest": "iframe", "sec-fetch-site": "same-origin"},
    ],
    ids=str,
)
def test_clients_and_pages_of_its_own_are_answered(client: TestClient, headers: dict[str, str]) -> None:
    assert client.get("/", headers=headers).text == "told"
    assert client.post("/", headers=headers).text == "told"
    with client.websocket_connect(f"ws://{SITE}/socket", headers=headers) as socket:
        assert socket.receive_text() == "heard"


@pytest.mark.parametrize(
    "headers",
    [
        {"origin": "http://other.example"},
        {"origin": "http://127.0.0.1:8888"},
        {"origin": f"https://{SITE}"},
        {"origin": "null"},
        {"host": "rebound.example:4200"},
        {"host": "rebound.example:4200", "origin": "http://rebound.example:4200"},
        {"host": ""},
        {"host": "127.0.0.1.example:4200"},
        {"host": "[::1"},
        {"sec-fetch-dest": "iframe", "sec-fetch-site": "cross-site"},
    ],
    ids=str,
)
def test_pages_of_other_sites_are_refused(client: TestClient, headers: dict[str, str]) -> None:
    for answer in (client.get("/", headers=headers), client.post("/", headers=headers)):
        assert (answer.status_code, answer.text) == (403, "this server answers its own pages only")
    with pytest.raises(WebSocketDisconnect), client.websocket_connect(f"ws://{SITE}/socket", headers=headers):
        pass


def test_start_and_end_of_the_server_are_passed_on() -> None:
    seen: list[str] = []

    async def app(scope: MutableMapping[str, Any], *_: object) -> None:
        seen.append(scope["type"])

    asyncio.run(OwnPagesOnly(app)({"type": "lifespan"}, None, None))  # type: ignore[arg-type]
    assert seen == ["lifespan"]


def test_its_pages_alone_may_read_what_it_answers() -> None:
    origins = server_environment(4200)["PREFECT_SERVER_CORS_ALLOWED_ORIGINS"]
    assert origins.split(",") == ["http://127.0.0.1:4200", "http://localhost:4200"]
