"""Places as text: what is secret in them, and that it is neither taken nor shown."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path

import jsonschema
import pytest
from pydantic import ValidationError

from memmcl.adapters.load import read_user_adapter
from memmcl.config import RunConfig, load_config, parse_config
from memmcl.errors import ConfigError
from memmcl.files.places import reading
from memmcl.logs import CleanFormatter
from memmcl.store import Store
from memmcl.urls import public, redact, redacted, schema_pattern, secret_in

SECRET = "hunter2hunter2"
SCHEMA = jsonschema.Draft202012Validator(RunConfig.model_json_schema())
SECRET_URLS = [
    f"https://bucket.s3.amazonaws.com/a.csv?X-Amz-Credential=me&X-Amz-Signature={SECRET}",
    f"https://host/a.csv?x-amz-security-token={SECRET}",
    f"https://storage.googleapis.com/b/a.csv?X-Goog-Signature={SECRET}",
    f"https://account.blob.core.windows.net/c/a.csv?sv=2024&sig={SECRET}",
    f"https://host/a.csv?AWSAccessKeyId={SECRET}&Expires=1",
    f"https://host/a.csv?download=1&token={SECRET}",
    f"https://host/a.csv?access_token={SECRET}",
    f"https://host/a.csv?key={SECRET}",
    f"https://host/a.csv?api-key={SECRET}",
    f"https://host/a.csv?password={SECRET}",
    f"https://host/a.csv#id_token={SECRET}",
    f"https://host/a.csv?x=1;auth={SECRET}",
    f"https://me:{SECRET}@host/a.csv",
    f"https://{SECRET}@host/a.csv",
    f"s3://me:{SECRET}@bucket/a.csv",
]
PLAIN_URLS = [
    "https://host/a.csv",
    "https://host/a.csv?download=1&page=2",
    "https://host/a.csv?author=smith&keyword=x&monkey=y",
    "https://host/a.csv?design=2",
    "s3://bucket/part-?.csv",
    "s3://bucket/a#b.csv",
    "hf://datasets/org/name@main/a.csv",
    "/data/a.csv",
    "org/name",
    "/data/a.csv?token=1",
    "memory://x",
]
IN_CONFIGURATIONS = [
    lambda url: {"data": {"source": url}},
    lambda url: {"data": {"subtasks": ["sent2"], "sources": {"sent2": {"path": url}}}},
    lambda url: {
        "data": {"subtasks": ["sent2"], "sources": {"sent2": {"train": "a.csv", "weak": url, "test": "b.csv"}}}
    },
    lambda url: {"data": {"subtasks": ["sent2"], "sources": {"sent2": {"dataset": url}}}},
    lambda url: {"experts": {"anchor_source": "texts", "anchor_texts": url}},
    lambda url: {"model": {"name_or_path": url}},
    lambda url: {"store": {"url": url}},
    lambda url: {"store": {"endpoint_url": url}},
    lambda url: {"ray": {"address": url}},
]


@pytest.mark.parametrize("tree", IN_CONFIGURATIONS, ids=lambda make: next(iter(make("").items())).__repr__()[:40])
@pytest.mark.parametrize("url", SECRET_URLS)
def test_a_configuration_with_a_secret_in_a_url_is_refused_and_not_repeated(url: str, tree: object) -> None:
    settings = tree(url)  # type: ignore[operator]
    with pytest.raises(
        ConfigError, match=r"a URL with .* in it would be stored: give credentials in the env"
    ) as caught:
        parse_config(settings)
    assert SECRET not in str(caught.value)
    assert re.match(r"config: [a-z]+\.[\w.]+: a URL", str(caught.value)), "it says where"
    with pytest.raises(ConfigError) as caught:  # as the parameters of a flow are read
        RunConfig.model_validate(settings)
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize("url", SECRET_URLS)
def test_a_prefect_server_refuses_such_parameters(url: str) -> None:
    for make in IN_CONFIGURATIONS:
        assert not SCHEMA.is_valid(make(url))


@pytest.mark.parametrize("url", PLAIN_URLS)
def test_other_places_are_taken_as_they_are(url: str) -> None:
    assert secret_in(url) is None
    assert parse_config({"data": {"source": url}}).data.source == url
    assert SCHEMA.is_valid({"data": {"source": url}})


def test_the_pattern_of_the_schema_is_one_of_javascript_too() -> None:
    pattern = RunConfig.model_json_schema()["$defs"]["DataConfig"]["properties"]["source"]["pattern"]
    assert not re.search(r"\(\?P|\(\?<|\(\?[aiLmsux]|\\[AZ]", pattern)


@pytest.mark.timeout(20)
@pytest.mark.parametrize("piece", ["token", "://", "?a", "&sig", "@", "a@", ";key", "%", "s3://u:p", "=", "?token="])
def test_no_text_takes_long_to_look_through(piece: str) -> None:
    for text in (piece * 100_000, f"https://host/?{piece * 100_000}", f"https://{piece * 100_000}"):
        secret_in(text)
        redact(text)
        public(text)
        re.search(schema_pattern(), text)


def test_other_mistakes_beside_a_secret_do_not_show_it(tmp_path: Path) -> None:
    url = SECRET_URLS[0]
    for text in (f"data: {url}", f"data: [{url}]", f"data: {{source: {{a: '{url}'}}}}", f"'{url}': 1", f"a: b: {url}"):
        (tmp_path / "run.yaml").write_text(text)
        with pytest.raises(ConfigError) as caught:
            load_config(tmp_path / "run.yaml")
        assert SECRET not in str(caught.value), text
    for override in (f"data={url}", url, f"seed={url}", f"data.source=[{url}", f"{url}=1"):
        with pytest.raises(ConfigError) as caught:
            load_config(None, [override])
        assert SECRET not in str(caught.value), override


def test_pydantic_never_repeats_a_place() -> None:
    with pytest.raises((ConfigError, ValidationError)) as caught:
        RunConfig.model_validate({"seed": "x", "data": {"source": SECRET_URLS[0]}})
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize("url", SECRET_URLS)
def test_a_secret_is_hidden_in_what_a_library_says(url: str) -> None:
    for text in (url, f"404 Not Found: '{url}', tried twice", json.dumps({"url": url}), f'<a href="{url}">{url}</a>\n'):
        assert SECRET not in redact(text)
        assert redact(redact(text)) == redact(text)
    assert SECRET not in public(url)
    assert SECRET not in repr(redacted({"a": [url, {"b": url}], "c": 1}))


def test_settings_that_an_older_version_stored_are_read_without_their_secret() -> None:
    for url in SECRET_URLS:
        config = parse_config(redacted({"data": {"source": url}}))
        assert SECRET not in config.data.source
        assert "***" in config.data.source


@pytest.mark.parametrize("url", PLAIN_URLS)
def test_what_is_no_secret_stays(url: str) -> None:
    if not url.startswith("/data/a.csv?"):
        assert redact(f"cannot read {url}, twice") == f"cannot read {url}, twice"


def test_the_keys_of_the_environment_are_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "any")
    assert redact(f"any key, as {SECRET}, is wrong") == "any key, as ***, is wrong"


def test_a_record_in_the_log_is_clean(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        try:
            with reading("https://host/a.csv"):
                raise OSError(f"no answer from {SECRET_URLS[0]}\x1b[2J")
        except Exception as error:
            logging.getLogger("x").warning("%s failed: \u202e\x9b1m", SECRET_URLS[1], exc_info=error)
            raised = str(error)
    for short in ((Exception,), ()):
        line = CleanFormatter(logging.Formatter("%(message)s"), short=short).format(caplog.records[0])
        assert SECRET not in line
        assert not re.search("[\x1b\x9b\u202e]", line)
        assert ("Traceback" in line) is (not short)
    assert SECRET not in raised


def test_stores_and_adapters_take_no_secret_either(tmp_path: Path) -> None:
    for url in SECRET_URLS:
        for call in (lambda: Store.open(url), lambda: read_user_adapter("a", url)):  # noqa: B023
            with pytest.raises(ConfigError) as caught:
                call()
            assert SECRET not in str(caught.value)
