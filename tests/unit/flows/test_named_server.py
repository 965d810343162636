"""A Prefect server that PREFECT_API_URL names is asked in the way that Prefect's client takes: through a proxy, too."""

from __future__ import annotations

import threading
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from flows import server
from memmcl.errors import ServiceDied, ServiceError
from tasks.run import watch

NAMED = "http://prefect.invalid:4200/api"


class Proxy(ThreadingHTTPServer):
    """Answers for any host, with `status`; `asked` is set at each request."""

    status = 200

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Answer)
        self.asked = threading.Semaphore(0)


class _Answer(BaseHTTPRequestHandler):
    server: Proxy

    def do_GET(self) -> None:
        self.send_response(self.server.status if self.path == f"{NAMED}/health" else 404)
        self.end_headers()
        self.server.asked.release()

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def proxy(monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    with Proxy() as found:
        threading.Thread(target=found.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        for variable in ("NO_PROXY", "no_proxy", "HTTP_PROXY"):
            monkeypatch.delenv(variable, raising=False)
        monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{found.server_address[1]}")
        monkeypatch.setenv("PREFECT_API_URL", NAMED)
        monkeypatch.setattr(urllib.request, "_opener", None)  # it keeps the proxies of its first use
        monkeypatch.setattr(watch, "ASK_EVERY", 0.01)
        monkeypatch.setattr(server, "AWAY_SECONDS", 0.2)
        yield found
        found.shutdown()


@pytest.mark.timeout(60)
def test_a_server_behind_a_proxy_is_there_until_it_answers_no_more(proxy: Proxy) -> None:
    def work() -> None:
        with server.prefect_server() as api:
            assert api == NAMED
            for _ in range(30):  # longer than it may be away
                assert proxy.asked.acquire(timeout=30)
            proxy.status = 503
            threading.Event().wait()

    with pytest.raises(ServiceDied, match="has not answered"):
        work()
    assert proxy.status == 503


def test_a_server_that_does_not_answer_is_said_at_once(proxy: Proxy) -> None:
    proxy.status = 503
    with pytest.raises(ServiceError, match=NAMED), server.prefect_server():
        pass
