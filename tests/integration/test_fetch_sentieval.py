from __future__ import annotations

import errno
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import fsspec
import pytest
from planted import GOOD, Planted, planted_files, planted_server
from servers import S3Server, free_ports
from typer import Typer
from typer.testing import CliRunner

from flows.cli import fetch as cli_fetch
from memmcl.errors import DataError, MemmclError, StoreAccessError, StoreFull
from memmcl.suite import download, fetch
from memmcl.suite.fetch import NOTICE, Fetched, fetch_sentieval

FIRST = "data/sc/set0/test.csv"
DEADLINE = 60.0
CHILD = """
import json, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # whoever runs the tests in the background ignores it
from memmcl.suite import download
from memmcl.suite.fetch import Listed, Listing, fetch_sentieval
target, url, jobs, listing = sys.argv[1:]
download.READ_SECONDS = 2.0
values = json.loads(listing)
listing = Listing("owner/planted", "c0ffee", "MIT", "Copyright (c) nobody", tuple(Listed(*one) for one in values))
fetch_sentieval(target, base_url=url, jobs=int(jobs), listing=listing)
"""
_names = itertools.count()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Planted]:
    for variable in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(download, "PAUSES", (0.01, 0.01, 0.01, 0.01))
    with planted_server(planted_files()) as planted:
        yield planted


@pytest.fixture(params=["directory", "file", "memory", "s3"])
def target(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "s3":
        return f"s3://{request.getfixturevalue('s3').bucket}/fetch{next(_names)}/sentieval"
    places = {
        "directory": str(tmp_path / "a" / "b"),
        "file": f"file://{tmp_path}/c d",
        "memory": f"memory://fetch{next(_names)}/x",
    }
    return places[request.param]


def _fetch(
    server: Planted, target: str | Path, request: pytest.FixtureRequest | None = None, **options: object
) -> Fetched:
    url = str(target)
    if url.startswith("s3://") and request is not None:
        options["storage"] = {"endpoint_url": request.getfixturevalue("s3").endpoint_url}
    return fetch_sentieval(url, base_url=server.url, listing=server.listing, **options)  # type: ignore[arg-type]


def _contents(target: str | Path, request: pytest.FixtureRequest | None = None) -> dict[str, bytes]:
    """Return everything at the target, hidden files too, by path."""
    options = {}
    if str(target).startswith("s3://") and request is not None:
        server: S3Server = request.getfixturevalue("s3")
        options = {"endpoint_url": server.endpoint_url, "skip_instance_cache": True, "use_listings_cache": False}
    fs, root = fsspec.url_to_fs(str(target), **options)
    return {name[len(root.rstrip("/")) + 1 :]: fs.cat_file(name) for name in fs.find(root)}


def _expected(server: Planted) -> dict[str, bytes]:
    return {path.removeprefix("data/"): data for path, data in server.files.items()} | {
        NOTICE: server.listing.notice.encode()
    }


def test_every_file_arrives_and_a_second_call_fetches_nothing(
    server: Planted, target: str, request: pytest.FixtureRequest
) -> None:
    first = _fetch(server, target, request)
    assert _contents(target, request) == _expected(server)
    assert (first.files, first.size, first.present) == (12, server.listing.size, 0)
    assert server.asked == 12
    second = _fetch(server, target, request)
    assert (second.files, second.present) == (12, 12)
    assert server.asked == 12


def test_what_is_missing_or_differs_is_fetched_again_and_nothing_else(
    server: Planted, target: str, request: pytest.FixtureRequest
) -> None:
    _fetch(server, target, request)
    options = {"endpoint_url": request.getfixturevalue("s3").endpoint_url} if target.startswith("s3://") else {}
    fs, root = fsspec.url_to_fs(target, **options)
    fs.pipe_file(f"{root}/sc/set3/test.csv", b"other bytes")
    fs.pipe_file(f"{root}/sc/set4/test.csv", bytes(len(server.files["data/sc/set4/test.csv"])))
    fs.rm_file(f"{root}/sc/set5/test.csv")
    fs.pipe_file(f"{root}/other.txt", b"not ours")
    server.requests.clear()
    assert _fetch(server, target, request).present == 9
    assert set(server.requests) == {f"data/sc/set{number}/test.csv" for number in (3, 4, 5)}
    assert _contents(target, request) == _expected(server) | {"other.txt": b"not ours"}


@pytest.mark.parametrize("trouble", ["truncated", "unframed", "garbled", "short", "long", 500, 503, 429, 408])
def test_a_trouble_that_passes_is_tried_through(server: Planted, tmp_path: Path, trouble: int | str) -> None:
    server.plan[FIRST] = [trouble, GOOD]
    _fetch(server, tmp_path)
    assert _contents(tmp_path) == _expected(server)
    assert len(server.requests[FIRST]) == 2


@pytest.mark.parametrize(
    ("trouble", "tries", "message"),
    [
        (404, 1, "not found (HTTP 404)"),
        (403, 1, "refused (HTTP 403)"),
        (500, 5, "HTTP 500, 5 times"),
        ("truncated", 5, "the connection broke before the whole body was there, 5 times"),
        ("unframed", 5, "the connection ended after 3 of 7 bytes, 5 times"),
        ("garbled", 2, "expected 7 bytes with sha256 {sha256}, got 7 bytes with sha256 "),
        ("short", 2, "expected 7 bytes with sha256 {sha256}, got 4 bytes with sha256 "),
        ("long", 2, "expected 7 bytes with sha256 {sha256}, got more bytes than that"),
    ],
)
def test_a_trouble_that_stays_is_said_at_the_end_and_the_other_files_arrive(
    server: Planted, tmp_path: Path, trouble: int | str, tries: int, message: str
) -> None:
    server.plan[FIRST] = [trouble]
    with pytest.raises(DataError) as caught:
        _fetch(server, tmp_path)
    expected = message.format(sha256=server.listing.files[0].sha256)
    text = str(caught.value)
    assert f"{FIRST}: {expected}" in text
    assert f"11 of 12 files are at {tmp_path}; 1 could not be fetched from {server.url.rstrip('/')}" in text
    assert text.endswith("Run the same command again to go on")
    assert "\n" not in text
    assert len(server.requests[FIRST]) == tries
    there = _expected(server)
    del there["sc/set0/test.csv"], there[NOTICE]
    assert _contents(tmp_path) == there

    server.plan.clear()
    server.requests.clear()
    assert _fetch(server, tmp_path).present == 11
    assert set(server.requests) == {FIRST}
    assert _contents(tmp_path) == _expected(server)


def test_the_notice_goes_while_files_are_missing(server: Planted, tmp_path: Path) -> None:
    _fetch(server, tmp_path)
    (tmp_path / "sc/set0/test.csv").unlink()
    server.plan[FIRST] = [404]
    with pytest.raises(DataError):
        _fetch(server, tmp_path)
    assert not (tmp_path / NOTICE).exists()


def test_only_the_first_failures_are_told(server: Planted, tmp_path: Path) -> None:
    server.plan = {path: [404] for path in server.files}
    with pytest.raises(DataError, match="0 of 12 files") as caught:
        _fetch(server, tmp_path)
    assert str(caught.value).count("HTTP 404") == 3
    assert "and 9 more" in str(caught.value)


def test_a_source_that_serves_nothing_is_given_up_early(server: Planted, tmp_path: Path) -> None:
    server.plan = {path: [503] for path in server.files}
    with pytest.raises(DataError, match=r"5 could not be fetched from .* and 7 were not tried"):
        _fetch(server, tmp_path, jobs=1)
    assert len(server.requests) < 12


def test_a_server_that_is_not_there_is_said_without_the_query(server: Planted, tmp_path: Path) -> None:
    nowhere = f"http://127.0.0.1:{free_ports(1)[0]}/mirror?token=hunter2"
    with pytest.raises(DataError, match="no connection") as caught:
        fetch_sentieval(str(tmp_path), base_url=nowhere, listing=server.listing)
    assert "hunter2" not in str(caught.value)
    assert _contents(tmp_path) == {}


def test_the_query_of_a_mirror_goes_with_every_request(server: Planted, tmp_path: Path) -> None:
    fetch_sentieval(str(tmp_path), base_url=f"{server.url}?token=x", listing=server.listing)
    assert _contents(tmp_path) == _expected(server)


@pytest.mark.parametrize("status", [429, 503])
def test_the_wait_that_a_server_asks_for_is_kept(server: Planted, tmp_path: Path, status: int) -> None:
    server.plan[FIRST] = [status, GOOD]
    server.headers["Retry-After"] = "1"
    _fetch(server, tmp_path)
    first, second = server.requests[FIRST]
    assert second - first >= 1.0
    assert _contents(tmp_path) == _expected(server)


def test_progress_counts_files_and_bytes_up_to_all(server: Planted, tmp_path: Path) -> None:
    _fetch(server, tmp_path)
    (tmp_path / "sc/set0/test.csv").unlink()
    seen: list[tuple[int, int, str]] = []
    _fetch(server, tmp_path, progress=lambda *values: seen.append(values))
    assert [files for files, _, _ in seen] == list(range(1, 13))
    assert seen[-1] == (12, server.listing.size, "sc/set0/test.csv")


def test_a_file_where_a_folder_belongs_is_named(server: Planted, tmp_path: Path) -> None:
    (tmp_path / "sc").write_text("a file")
    with pytest.raises(StoreAccessError, match="in the way"):
        _fetch(server, tmp_path)
    assert (tmp_path / "sc").read_text() == "a file"


def test_a_full_disk_is_said_and_leaves_no_half_file(
    server: Planted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Path.write_bytes

    def half(path: Path, data: bytes) -> int:
        if b",9" not in data:
            return whole(path, data)
        whole(path, data[: len(data) // 2])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(Path, "write_bytes", half)
    with pytest.raises(StoreFull, match="no space left"):
        _fetch(server, tmp_path, jobs=1)
    expected = _expected(server)
    assert _contents(tmp_path).items() <= expected.items()
    assert "sc/set9/test.csv" not in _contents(tmp_path)
    monkeypatch.undo()
    _fetch(server, tmp_path)
    assert _contents(tmp_path) == expected


def test_a_missing_bucket_is_said(server: Planted, s3: S3Server) -> None:
    storage = {"endpoint_url": s3.endpoint_url}
    with pytest.raises(StoreAccessError, match="create the folder or bucket"):
        fetch_sentieval("s3://no-such-bucket/x", base_url=server.url, listing=server.listing, storage=storage)


def test_wrong_credentials_are_said_and_not_repeated(
    server: Planted, s3: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hunter2")
    with pytest.raises(StoreAccessError, match="no permission") as caught:
        fetch_sentieval(
            f"s3://{s3.bucket}/denied",
            base_url=server.url,
            listing=server.listing,
            storage={"endpoint_url": s3.endpoint_url},
        )
    assert "hunter2" not in str(caught.value)
    assert s3.access_key not in str(caught.value)


def test_what_a_killed_call_left_long_ago_is_swept_and_what_lives_is_not(server: Planted, tmp_path: Path) -> None:
    folder = tmp_path / "sc/set0"
    folder.mkdir(parents=True)
    old, new = folder / ".test.csv.aaaa.part", folder / ".test.csv.bbbb.part"
    for part in (old, new):
        part.write_bytes(b"half")
    long_ago = time.time() - 2 * 24 * 3600
    os.utime(old, (long_ago, long_ago))
    _fetch(server, tmp_path)
    assert not old.exists()
    assert new.exists()


def test_a_killed_call_leaves_only_whole_files_and_the_next_one_goes_on(server: Planted, tmp_path: Path) -> None:
    held = "data/sc/set7/test.csv"
    server.plan[held] = ["held"]
    child = _child(server, tmp_path, jobs=1)
    try:
        _wait(lambda: held in server.requests, child)
        child.kill()
    finally:
        child.kill()
        child.wait()
    whole = _expected(server)
    left = _contents(tmp_path)
    assert left == {f"sc/set{number}/test.csv": whole[f"sc/set{number}/test.csv"] for number in range(7)}
    server.plan.clear()
    server.requests.clear()
    assert _fetch(server, tmp_path).present == 7
    assert len(server.requests) == 5
    assert _contents(tmp_path) == whole


@pytest.mark.parametrize("trouble", [429, "held", "trickle"])
def test_ctrl_c_ends_every_wait_soon_and_leaves_no_half_file(
    server: Planted, tmp_path: Path, trouble: int | str
) -> None:
    """The Retry-After and the trickling body would outlast the deadline."""
    last = "data/sc/set11/test.csv"
    server.plan = {last: [trouble]}
    server.headers["Retry-After"] = "3600"
    there = _expected(server)
    del there["sc/set11/test.csv"], there[NOTICE]
    child = _child(server, tmp_path, jobs=2)
    try:
        _wait(lambda: last in server.requests and all((tmp_path / path).exists() for path in there), child)
        child.send_signal(signal.SIGINT)
        assert child.wait(30) != 0
    finally:
        child.kill()
        child.wait()
    assert _contents(tmp_path) == there


def test_the_command_says_what_is_there_and_how_to_use_it(
    server: Planted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetch, "sentieval_listing", lambda: server.listing)
    app = Typer()
    app.command()(cli_fetch.fetch)
    arguments = ["sentieval", "--to", str(tmp_path), "--from", server.url]
    result = CliRunner().invoke(app, arguments)
    assert result.exception is None, result.output
    first, *rest = result.output.splitlines()
    assert first == f"12 files, {server.listing.size:,} bytes (0 files were there already) in {tmp_path}"
    assert rest[-1] == f"use it with    data.source: {tmp_path}"
    assert "\n".join(rest[:-1]).strip() == server.listing.notice.strip()
    server.plan = {FIRST: [404]}
    (tmp_path / "sc/set0/test.csv").unlink()
    assert isinstance(CliRunner().invoke(app, arguments).exception, MemmclError)


def _child(server: Planted, target: Path, jobs: int) -> subprocess.Popen[bytes]:
    listed = json.dumps([[file.path, file.sha256, file.size] for file in server.listing.files])
    return subprocess.Popen([sys.executable, "-c", CHILD, str(target), server.url, str(jobs), listed])


def _wait(ready: Callable[[], bool], child: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + DEADLINE
    while not ready():
        assert child.poll() is None, "the child ended by itself"
        assert time.monotonic() < deadline, "the child did not come so far"
        time.sleep(0.02)
