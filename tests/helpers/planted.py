"""An HTTP server with planted files that misbehaves as told, and the list of what it should serve."""

from __future__ import annotations

import hashlib
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from memmcl.suite.fetch import Listed, Listing

GOOD = "good"


class Planted:
    """Files by path, and for each path what the next answers are: GOOD, a status, or another word of `_answer`."""

    def __init__(self, files: dict[str, bytes]) -> None:
        self.files = files
        self.plan: dict[str, list[int | str]] = {}
        self.headers: dict[str, str] = {}
        self.requests: dict[str, list[float]] = defaultdict(list)
        self.go_on = threading.Event()
        self.lock = threading.Lock()
        self.url = ""

    @property
    def listing(self) -> Listing:
        listed = (Listed(path, hashlib.sha256(data).hexdigest(), len(data)) for path, data in self.files.items())
        return Listing("owner/planted", "c0ffee", "MIT", "Copyright (c) nobody", tuple(listed))

    @property
    def asked(self) -> int:
        """How many requests there were."""
        return sum(map(len, self.requests.values()))

    def next_answer(self, path: str) -> int | str:
        with self.lock:
            self.requests[path].append(time.monotonic())
            plan = self.plan.get(path, [])
            return plan.pop(0) if len(plan) > 1 else (plan or [GOOD])[0]


def planted_files(count: int = 12) -> dict[str, bytes]:
    return {f"data/sc/set{number}/test.csv": f"text,{number}\n".encode() * (number + 1) for number in range(count)}


@contextmanager
def planted_server(files: dict[str, bytes]) -> Iterator[Planted]:
    """Serve `files` below /mirror until the block ends."""
    planted = Planted(files)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path = self.path.partition("?")[0].removeprefix("/mirror/")
            _answer(self, planted, planted.next_answer(path), planted.files.get(path))

        def log_message(self, *arguments: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    planted.url = f"http://127.0.0.1:{server.server_address[1]}/mirror/"
    try:
        yield planted
    finally:
        planted.go_on.set()
        server.shutdown()
        thread.join()
        server.server_close()


def _answer(handler: BaseHTTPRequestHandler, planted: Planted, answer: int | str, data: bytes | None) -> None:
    if data is None:
        answer, data = 404, b""
    status = answer if isinstance(answer, int) else 200
    body = data
    if answer == "garbled":
        body = data[:-1] + b"#"
    elif answer == "long":
        body = data + b"more"
    elif answer == "short":
        body = data[:-3]
    elif status != 200:
        body = b"<html>no</html>"
    handler.send_response(status)
    if answer != "unframed":
        handler.send_header("Content-Length", str(len(body)))
    for name, value in planted.headers.items() if status != 200 else ():
        handler.send_header(name, value)
    handler.end_headers()
    if answer in {"truncated", "unframed"}:
        body = body[: len(body) // 2]
    try:
        if answer == "held":  # half of it, and the rest when the test is over
            handler.wfile.write(body[: len(body) // 2])
            planted.go_on.wait(60)
            body = body[len(body) // 2 :]
        while answer == "trickle" and body and not planted.go_on.wait(0.5):
            handler.wfile.write(body[:1])
            body = body[1:]
        handler.wfile.write(body)
    except OSError:  # the client was killed, as planned
        handler.close_connection = True
    if answer in {"truncated", "unframed"}:
        handler.close_connection = True
