from __future__ import annotations

from email.utils import formatdate
from pathlib import Path

import pytest
from typer import Typer
from typer.testing import CliRunner

from flows.cli import fetch as cli_fetch
from memmcl.errors import UsageError
from memmcl.suite.download import LONGEST_PAUSE, base_of, retry_after, shown
from memmcl.suite.fetch import fetch_sentieval, sentieval_listing
from memmcl.suite.subtasks import SUBTASKS
from memmcl.suite.target import open_target

NOW = 1_800_000_000.0


def test_the_list_has_every_published_file() -> None:
    listing = sentieval_listing()
    assert len(listing.files) == len({file.path for file in listing.files}) == 260
    assert listing.size == 3_736_170
    assert {len(file.sha256) for file in listing.files} == {64}
    assert listing.base_url.endswith("/DAMO-NLP-SG/LLM-Sentiment/4c6e0435fe442c1a4a0dd23a967f70f4d5305afd/")


def test_the_list_has_the_test_rows_of_every_data_set_of_the_catalogue() -> None:
    tests = {file.place for file in sentieval_listing().files if file.place.endswith("/test.csv")}
    named = {f"{subtask.group.lower()}/{name}/test.csv" for subtask in SUBTASKS.values() for name in subtask.datasets}
    assert len(tests) == 26
    assert tests == named


def test_the_notice_names_where_the_texts_come_from_and_their_terms() -> None:
    notice = sentieval_listing().notice
    for word in (
        "DAMO-NLP-SG/LLM-Sentiment",
        "4c6e0435",
        "MIT",
        "Copyright (c) 2023",
        "original terms",
        "research use",
    ):
        assert word in notice


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        (None, 0.0),
        ("7", 7.0),
        ("0", 0.0),
        ("-5", 0.0),
        ("3600", LONGEST_PAUSE),
        ("soon", 0.0),
        ("nan", 0.0),
        ("inf", 0.0),
        ("", 0.0),
        (formatdate(NOW + 12, usegmt=True), 12.0),
        (formatdate(NOW - 12, usegmt=True), 0.0),
        (formatdate(NOW + 86_400, usegmt=True), LONGEST_PAUSE),
        ("Mon, 99 Foo 2026 99:99:99 GMT", 0.0),
    ],
)
def test_retry_after_is_read_as_seconds_or_date_and_bounded(value: str | None, seconds: float) -> None:
    assert retry_after(value, NOW) == seconds


@pytest.mark.parametrize("url", ["ftp://host/x", "host/folder", "https://", "http://user:hunter2@host/x", "http://[::"])
def test_an_address_to_fetch_from_that_cannot_be_used_is_refused_and_not_repeated(url: str) -> None:
    with pytest.raises(UsageError, match="address to fetch from") as caught:
        fetch_sentieval("memory://never", base_url=url)
    assert "hunter2" not in str(caught.value)


def test_an_address_is_shown_without_its_query() -> None:
    assert shown(base_of("https://mirror:8443/a/b/?token=hunter2#x")) == "https://mirror:8443/a/b"


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("", "names no place"),
        ("s3://", "names no place"),
        ("s3://key:hunter2@bucket/x", "credentials"),
        ("https://host/x?sig=hunter2", "query"),
        ("gopher://host/x", "cannot open gopher://host/x: expected a path or a URL"),
    ],
)
def test_a_target_that_cannot_be_used_is_refused_and_its_secrets_are_not_repeated(target: str, message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        open_target(target, {})
    assert "hunter2" not in str(caught.value)


def _command() -> Typer:
    app = Typer()
    app.command()(cli_fetch.fetch)
    return app


def test_a_file_that_another_process_removes_first_is_no_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = open_target(str(tmp_path), {})
    monkeypatch.setattr(type(target), "read", lambda self, path: b"it was there")
    target.remove("NOTICE")
    (tmp_path / "NOTICE").write_text("")
    target.remove("NOTICE")
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_benchmark_is_refused_with_the_known_ones() -> None:
    caught = CliRunner().invoke(_command(), ["glue", "--to", "memory://never"]).exception
    assert isinstance(caught, UsageError)
    assert "'glue'" in str(caught)
    assert "sentieval" in str(caught)


def test_a_place_to_write_to_must_be_named() -> None:
    result = CliRunner().invoke(_command(), ["sentieval"])
    assert result.exit_code == 2
    assert "--to" in result.output
