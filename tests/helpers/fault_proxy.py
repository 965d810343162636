"""A TCP proxy between S3 clients and a real S3 server that does to chosen requests what networks and servers do.

It forwards whole HTTP requests, with the Host header as the client signed it. One fault can be armed at a time: it hits
the n-th request (and those after it) of the sort that its kind is about; all others pass.
"""

from __future__ import annotations

import http.client
import random
import re
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler
from typing import Any
from urllib.parse import parse_qs, urlsplit

HOST = "127.0.0.1"
REFUSED_SECONDS = 0.15
"""How long nobody listens, for each time that a refused connection is asked for."""
RESET = struct.pack("ii", 1, 0)
"""SO_LINGER: closing sends RST."""
CONTENTS = re.compile(rb"<Contents>.*?</Contents>", re.DOTALL)
MODIFIED = re.compile(rb"<LastModified>(.*?)</LastModified>")


@dataclass(frozen=True)
class Request:
    """A request as it came: method, path with query, headers, body."""

    method: str
    target: str
    headers: dict[str, str]
    body: bytes

    @property
    def conditional(self) -> bool:
        """Whether it shall only be executed when something is, or is not, there."""
        return not {"if-match", "if-none-match"}.isdisjoint(self.headers)

    @property
    def changes(self) -> bool:
        """Whether it changes what is stored."""
        return self.method in {"PUT", "POST", "DELETE"}

    @property
    def lists(self) -> bool:
        """Whether it asks for the names of objects."""
        query = parse_qs(urlsplit(self.target).query, keep_blank_values=True)
        return self.method == "GET" and ("list-type" in query or "prefix" in query)

    @property
    def reads(self) -> bool:
        """Whether it asks for the content of an object."""
        return self.method == "GET" and not self.lists


@dataclass
class Answer:
    """An answer of the server: status, headers in their order, body."""

    status: int
    headers: list[tuple[str, str]]
    body: bytes

    def drop_header(self, name: str) -> None:
        """Remove a header, whatever its case."""
        self.headers = [(key, value) for key, value in self.headers if key.lower() != name]


@dataclass(frozen=True)
class Fault:
    """What is done to the requests number `first` to `first + times - 1` (from 0) that the kind is about.

    seconds: how long an answer is delayed; seed: chooses the byte that is damaged.
    """

    kind: str
    first: int = 0
    times: int = 1
    seconds: float = 1.5
    seed: int = 0


def error_answer(status: int, code: str) -> Answer:
    """Return an S3 error as XML."""
    body = f'<?xml version="1.0" encoding="UTF-8"?><Error><Code>{code}</Code><Message>injected</Message></Error>'
    return Answer(status, [("Content-Type", "application/xml")], body.encode())


class FaultProxy:
    """Listens on a free port of 127.0.0.1 and forwards to `server`, an address such as http://127.0.0.1:8333."""

    def __init__(self, server: str) -> None:
        self._server = urlsplit(server)
        self._fault: Fault | None = None
        self._hits = 0
        self._seen: Counter[str] = Counter()
        self._armed = threading.Event()
        self._lock = threading.Lock()
        self._open: set[socket.socket] = set()
        self._closed = threading.Event()
        self._listener = self._listen(0)
        self.port = int(self._listener.getsockname()[1])
        threading.Thread(target=self._accept, name="fault-proxy", daemon=True).start()

    @property
    def endpoint_url(self) -> str:
        """The address that clients use."""
        return f"http://{HOST}:{self.port}"

    @property
    def seen(self) -> Counter[str]:
        """How many requests have come, since a fault was armed or taken away, that each kind is about."""
        return self._seen.copy()

    @property
    def hits(self) -> int:
        """How many requests the armed fault has struck."""
        return self._hits

    def arm(self, fault: Fault | None) -> None:
        """Count from 0, and strike with `fault` from now on; None: with none."""
        with self._lock:
            self._fault, self._seen, self._hits = fault, Counter(), 0
            self._armed.set()

    def close(self) -> None:
        """End all connections and listen no more."""
        self._closed.set()
        self._stop_listening()

    def strike(self, request: Request) -> Fault | None:
        """Count a request; return the fault when it is to be struck."""
        kinds = [name for name, kind in FAULTS.items() if kind.about(request)]
        with self._lock:
            self._seen.update(kinds)
            fault = self._fault
            if fault is None or fault.kind not in kinds:
                return None
            if not fault.first < self._seen[fault.kind] <= fault.first + fault.times:
                return None
            self._hits += 1
            return fault

    def forward(self, request: Request) -> Answer:
        """Let the server execute a request."""
        connection = http.client.HTTPConnection(str(self._server.hostname), self._server.port, timeout=60)
        try:
            connection.putrequest(request.method, request.target, skip_host=True, skip_accept_encoding=True)
            for name, value in request.headers.items():
                if name not in {"expect", "connection"}:
                    connection.putheader(name, value)
            connection.endheaders(request.body or None)
            answer = connection.getresponse()
            return Answer(answer.status, answer.getheaders(), answer.read())
        finally:
            connection.close()

    def refuse(self, seconds: float) -> None:
        """Cut all connections and refuse new ones for a while, or until the next `arm`."""
        self._armed.clear()
        self._stop_listening()
        self._armed.wait(seconds)
        if not self._closed.is_set():
            self._listener = self._listen(self.port)

    def _stop_listening(self) -> None:
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # wakes the thread in accept()
        self._listener.close()
        for connection in list(self._open):
            cut(connection)

    @staticmethod
    def _listen(port: int) -> socket.socket:
        listener = socket.socket()
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((HOST, port))
        listener.listen(128)
        return listener

    def _accept(self) -> None:
        while not self._closed.is_set():
            try:
                connection, address = self._listener.accept()
            except OSError:  # not listening for the moment
                time.sleep(0.01)
                continue
            threading.Thread(target=self._serve, args=(connection, address), daemon=True).start()

    def _serve(self, connection: socket.socket, address: Any) -> None:
        self._open.add(connection)
        try:
            with suppress(OSError, ValueError):  # the client went away, or the connection was cut
                _Handler(connection, address, self)  # type: ignore[arg-type]
        finally:
            self._open.discard(connection)
            connection.close()


class _Handler(BaseHTTPRequestHandler):
    """One connection of a client: request after request."""

    protocol_version = "HTTP/1.1"
    server: Any
    timeout = 60

    def __getattr__(self, name: str) -> Any:
        if name.startswith("do_"):
            return self._handle
        raise AttributeError(name)

    def log_message(self, *_: Any) -> None:
        """Say nothing."""

    def _handle(self) -> None:
        headers = {name.lower(): value for name, value in self.headers.items()}
        if "transfer-encoding" in headers:
            return self.send_error(501, "the proxy takes bodies of a known length")
        body = self.rfile.read(int(headers.get("content-length", 0)))
        request = Request(self.command, self.path, headers, body)
        proxy: FaultProxy = self.server
        fault = proxy.strike(request)
        if fault is None:
            self.send(proxy.forward(request))
        else:
            FAULTS[fault.kind].strike(self, request, fault)

    def send(self, answer: Answer, upto: int | None = None) -> None:
        """Send an answer, or its head and the first `upto` bytes of its body."""
        bodyless = self.command == "HEAD" or answer.status in {204, 304}
        self.send_response_only(answer.status)
        for name, value in answer.headers:
            if name.lower() not in {"transfer-encoding", "connection"} and (
                bodyless or name.lower() != "content-length"
            ):
                self.send_header(name, value)
        if not bodyless:
            self.send_header("Content-Length", str(len(answer.body)))
        self.end_headers()
        if not bodyless:
            self.wfile.write(answer.body if upto is None else answer.body[:upto])
        self.wfile.flush()

    def hang_up(self, *, reset: bool) -> None:
        """End the connection, with RST or in order."""
        self.close_connection = True
        if reset:
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        cut(self.connection, reset=reset)


def cut(connection: socket.socket, *, reset: bool = False) -> None:
    """End a connection."""
    with suppress(OSError):
        if not reset:
            connection.shutdown(socket.SHUT_RDWR)
        connection.close()


Strike = Callable[[_Handler, Request, Fault], None]


def _refused(handler: _Handler, request: Request, fault: Fault) -> None:
    handler.server.refuse(REFUSED_SECONDS * fault.times)


def _reset(handler: _Handler, request: Request, fault: Fault) -> None:
    handler.hang_up(reset=True)


def _reset_in_the_middle(handler: _Handler, request: Request, fault: Fault) -> None:
    answer = handler.server.forward(request)
    handler.send(answer, upto=len(answer.body) // 2)
    handler.hang_up(reset=True)


def _truncated(handler: _Handler, request: Request, fault: Fault) -> None:
    answer = handler.server.forward(request)
    handler.send(answer, upto=max(0, len(answer.body) - 1))
    handler.hang_up(reset=False)


def _lost_answer(handler: _Handler, request: Request, fault: Fault) -> None:
    handler.server.forward(request)
    handler.hang_up(reset=False)


def _delayed(handler: _Handler, request: Request, fault: Fault) -> None:
    answer = handler.server.forward(request)
    time.sleep(fault.seconds)
    handler.send(answer)


def _twice(handler: _Handler, request: Request, fault: Fault) -> None:
    handler.server.forward(request)
    handler.send(handler.server.forward(request))


def _refusing(status: int, code: str) -> Strike:
    def strike(handler: _Handler, request: Request, fault: Fault) -> None:
        handler.send(error_answer(status, code))

    return strike


def _damaged(handler: _Handler, request: Request, fault: Fault) -> None:
    answer = handler.server.forward(request)
    if answer.body:
        draw = random.Random(f"{fault.seed} {len(answer.body)}")
        body = bytearray(answer.body)
        body[draw.randrange(len(body))] ^= 1 << draw.randrange(8)
        answer.body = bytes(body)
    handler.send(answer)


def _without_etag(handler: _Handler, request: Request, fault: Fault) -> None:
    answer = handler.server.forward(request)
    answer.drop_header("etag")
    handler.send(answer)


def _stale(handler: _Handler, request: Request, fault: Fault) -> None:
    answer = handler.server.forward(request)
    answer.body = without_newest(answer.body)
    handler.send(answer)


def without_newest(listing: bytes) -> bytes:
    """Return a listing without the object in it that was written last."""
    found = CONTENTS.findall(listing)
    if not found:
        return listing
    newest = max(found, key=lambda entry: MODIFIED.findall(entry))
    return listing.replace(newest, b"", 1)


@dataclass(frozen=True)
class NetworkKind:
    """A kind of fault between client and server: in words, which requests it is about, what it does."""

    what: str
    strike: Strike
    about: Callable[[Request], bool] = lambda request: True


FAULTS: dict[str, NetworkKind] = {
    "connection refused": NetworkKind("all connections are cut, and nobody listens for a while", _refused),
    "reset before the answer": NetworkKind("the request is not executed, and the connection is reset", _reset),
    "reset within the answer": NetworkKind(
        "the connection is reset after half of the answer", _reset_in_the_middle, lambda one: one.reads or one.lists
    ),
    "answer truncated": NetworkKind(
        "the answer's last byte is missing", _truncated, lambda one: one.reads or one.lists
    ),
    "answer lost": NetworkKind(
        "the change is made, and the connection ends without an answer", _lost_answer, lambda one: one.changes
    ),
    "answer too late": NetworkKind("the request is executed; the client has stopped waiting", _delayed),
    "request executed twice": NetworkKind(
        "the change is made twice; the second answer is given", _twice, lambda one: one.changes
    ),
    "500 InternalError": NetworkKind("the server says so", _refusing(500, "InternalError")),
    "503 SlowDown": NetworkKind("the server says so", _refusing(503, "SlowDown")),
    "403 AccessDenied": NetworkKind("the server says so", _refusing(403, "AccessDenied")),
    "412 PreconditionFailed": NetworkKind(
        "the server says so without looking", _refusing(412, "PreconditionFailed"), lambda one: one.conditional
    ),
    "flipped bit": NetworkKind("one bit of an object's content changes on the way", _damaged, lambda one: one.reads),
    "no ETag": NetworkKind(
        "the answer has no ETag header", _without_etag, lambda one: one.reads or one.method == "PUT"
    ),
    "stale listing": NetworkKind("a listing lacks the newest object", _stale, lambda one: one.lists),
}


@contextmanager
def fault_proxy(server: str) -> Iterator[FaultProxy]:
    """Run a proxy in front of an S3 server until the block ends."""
    proxy = FaultProxy(server)
    try:
        yield proxy
    finally:
        proxy.close()
