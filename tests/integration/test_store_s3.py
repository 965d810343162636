"""A store on a real S3 server: large objects, and a proxy that leaves out what servers answer."""

from __future__ import annotations

import http.client
import subprocess
import sys
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from memmcl.errors import StoreAccessError
from memmcl.store import Lease, Store

ROOT = Path(__file__).parents[2]
KEY = "0f" * 32
MIB = 1 << 20
BIG = 64 * MIB


@contextmanager
def proxy(server: Any, tag: str | None, methods: tuple[str, ...]) -> Iterator[str]:
    """Pass everything on to the S3 server; the ETag of answers to `methods` becomes `tag % ETag`, or is left out."""
    upstream = urlsplit(server.endpoint_url).netloc

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def answer(self) -> None:
            connection = http.client.HTTPConnection(upstream)
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            connection.request(self.command, self.path, body, dict(self.headers))
            found = connection.getresponse()
            content = found.read()
            self.send_response(found.status)
            for name, value in found.getheaders():
                if name.lower() in ("transfer-encoding", "connection", "content-length"):
                    continue
                if name.lower() != "etag" or self.command not in methods:
                    self.send_header(name, value)
                elif tag is not None:
                    self.send_header(name, tag % value)
            length = found.getheader("Content-Length") if self.command == "HEAD" else len(content)
            self.send_header("Content-Length", str(length))
            self.end_headers()
            self.wfile.write(content)
            connection.close()

        do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = answer

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        thread = threading.Thread(target=running.serve_forever, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{running.server_address[1]}"
        finally:
            running.shutdown()
            thread.join()


def opened(server: Any, endpoint_url: str) -> Store:
    return Store.open(f"s3://{server.bucket}/{uuid.uuid4().hex}", endpoint_url=endpoint_url, region="us-east-1")


def test_without_an_etag_artifacts_work_and_swaps_are_refused_in_one_line(s3: Any, tmp_path: Path) -> None:
    with proxy(s3, None, ("GET", "PUT", "HEAD")) as endpoint:
        store = opened(s3, endpoint)
        manifest = store.publish("expert", KEY, name="e", files={"a": b"weights"})
        assert store.find("expert", KEY) == manifest
        assert store.read(manifest, "a") == b"weights"
        assert (store.fetch(manifest, tmp_path) / "a").read_bytes() == b"weights"
        assert store.append("log", 0, {"n": 0}) == {"n": 0}
        assert store.append("log", 0, {"n": 1}) == {"n": 0}
        assert store.records("log") == {0: {"n": 0}}
        store.save_checkpoint(KEY, b"step 2")
        assert store.read_checkpoint(KEY) == b"step 2"
        assert store.verify().problems == ()
        with pytest.raises(StoreAccessError) as caught:
            store.swap_pointer("champions/c", {"a": 1}, None)
        assert str(caught.value) == (
            f"{store.url} at {endpoint} answers without an ETag, which tells whether an object changed since it was "
            "read; use another server, or have the proxy before it pass the header ETag on"
        )
        value, token = store.read_pointer("champions/c")
        for call in (lambda: store.swap_pointer("champions/c", {"a": 2}, token), Lease(store, "run", {}).__enter__):
            with pytest.raises(StoreAccessError, match="answers without an ETag"):
                call()
        assert store.read_pointer("champions/c") == (value, token) == ({"a": 1}, "")


@pytest.mark.parametrize(("tag", "methods"), [(None, ("PUT",)), ("W/%s", ("GET", "PUT", "HEAD"))], ids=str)
def test_swaps_work_where_writes_are_answered_without_an_etag_or_by_a_weak_one(
    s3: Any, tag: str | None, methods: tuple[str, ...]
) -> None:
    with proxy(s3, tag, methods) as endpoint:
        store = opened(s3, endpoint)
        token = store.swap_pointer("champions/c", {"a": 1}, None)
        token = store.swap_pointer("champions/c", {"a": 2}, token)
        assert store.read_pointer("champions/c") == ({"a": 2}, token)
        with Lease(store, "run", {}) as lease:
            lease.update(n=1)
        assert store.read_pointer("leases/run") == (None, None)


PEAK = """
import resource, sys
from pathlib import Path
from memmcl.store import Store
store = Store.from_spec({"url": sys.argv[1], "endpoint_url": sys.argv[2] or None, "region": "us-east-1"})
small, big = store.load(store.list("small")[0].ref), store.load(store.list("big")[0].ref)
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
def use(manifest):
    assert store.find(manifest.kind, manifest.key) == manifest
    store.fetch(manifest, Path(sys.argv[3]))
use(small)
before = peak()
use(big)
print(peak() - before)
"""


@pytest.mark.parametrize("place", ["file", "s3"])
def test_a_large_object_is_never_in_memory_as_a_whole(
    place: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    url, endpoint = f"file://{tmp_path}/store", ""
    if place == "s3":
        server = request.getfixturevalue("s3")
        url, endpoint = f"s3://{server.bucket}/{uuid.uuid4().hex}", server.endpoint_url
    store = Store.open(url, endpoint_url=endpoint or None, region="us-east-1")
    content = tmp_path / "big.bin"
    with content.open("wb") as file:
        file.truncate(BIG)
    store.publish("small", "00", name="small", files={"a": b"weights"})
    store.publish("big", "01", name="big", files={"b": content})
    child = [sys.executable, "-c", PEAK, url, endpoint, str(tmp_path / "fetched")]
    done = subprocess.run(child, capture_output=True, text=True, check=True, cwd=ROOT)
    assert int(done.stdout) < BIG // MIB // 2, "MiB more than for a small object"
    assert (tmp_path / "fetched" / "b").stat().st_size == BIG
