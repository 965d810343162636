"""What may be opened: schemes, and the prefixes of MEMMCL_ALLOWED_URLS, behind links, redirects and globs."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import fsspec
import pytest
from tiny import make_sixteen
from web import web_server

from memmcl.adapters.load import read_user_adapter
from memmcl.backbone.load import resolve_base
from memmcl.config import parse_config
from memmcl.errors import ConfigError, DataError
from memmcl.experts.forced import read_texts
from memmcl.files import allowed
from memmcl.files.folder import made_before, new_folder
from memmcl.files.places import open_place
from memmcl.store import Store
from memmcl.suite import hub
from memmcl.suite.configured import read_splits
from memmcl.suite.fetch import Listed, Listing, fetch_sentieval
from memmcl.suite.files import read_files
from memmcl.suite.sources import Reading, Source, read_sources
from memmcl.suite.subtasks import SUBTASKS

VARIABLE = allowed.VARIABLE
IRONY = SUBTASKS["irony"]


def refused(place: str) -> str:
    with pytest.raises(ConfigError) as caught:
        allowed.require(place)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    "place",
    [
        "reference://::https://host/refs.json",
        "reference://",
        "simplecache::https://host/a.csv",
        "filecache::s3://bucket/a.csv",
        "https://host/a.zip::zip://a.csv",
        "zip://a.csv::https://host/a.zip",
        "s3://bucket/a::file:///etc/passwd",
        "http://host/a.csv",
        "ftp://host/a.csv",
        "local:///etc/passwd",
        "S3://bucket/a.csv",
        "github://org:repo@main/a.csv",
        "https://user:secret@host/a.csv",
        "https://host\\@other/a.csv",
        "https://ho%73t/a.csv",
        "https://host:99999/a.csv",
        "https:///a.csv",
        "s3:///bucket/a.csv",
        "s3://user@bucket/a.csv",
        "s3://bucket/a/../b.csv",
        "https://host/a/%2e%2e/b.csv",
        "https://host/a/%252e%252e/b.csv",
        "https://host/a%2f..%2fb.csv",
        "hf://datasets/org/../../x",
        "/tmp/a\x1b[31m.csv",
        "s3://bucket/a\n.csv",
    ],
)
def test_places_that_are_never_opened(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    assert "secret" not in refused(place)
    monkeypatch.setenv(VARIABLE, "s3:// https:// hf:// /")
    assert refused(place).startswith("cannot open ")


@pytest.mark.parametrize(
    "place",
    [
        "a.csv",
        "/etc/hosts",
        "~/a.csv",
        "file:///a.csv",
        "data:x.csv",
        "a::b.csv",
        "s3://bucket/a b.csv",
        "gs://bucket/a",
        "az://container/a",
        "https://host:8443/a.csv?download=1",
        "hf://datasets/org/name@main/a.csv",
        "memory://x/a.csv",
    ],
)
def test_places_that_are_opened_where_nothing_is_set(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    allowed.require(place)
    assert "MEMMCL_ALLOWED_URLS is not set: whoever sets a run's parameters" in allowed.described()


def test_prefixes_end_at_whole_names(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    prefixes = f"s3://bucket/a/, https://Host.example.org/d%20e\nhf://org gs://,{tmp_path}/in"
    monkeypatch.setenv(VARIABLE, prefixes)
    for place in (
        "s3://bucket/a",
        "s3://bucket/a/",
        "s3://bucket/a/b.csv",
        "https://host.example.org/d e/x?q=1",
        "https://HOST.example.org.:443/d%20e",
        "hf://org/name",
        "hf://org/name@main/x",
        "gs://any/thing",
        f"{tmp_path}/in",
        f"file://{tmp_path}/in/x",
        f"{tmp_path}/out/../in/x",
    ):
        allowed.require(place)
    for place in (
        "s3://bucket/ab",
        "s3://bucket",
        "s3://bucket//a",
        "s3://Bucket/a",
        "s3://other/a",
        "https://host.example.org/d%20ef",
        "https://host.example.org:8443/d%20e",
        "https://host.example.org.evil/d%20e",
        "https://evil/d%20e",
        "hf://organisation/name",
        "hf://datasets/org/name",
        "az://bucket/a",
        "memory://x",
        f"{tmp_path}/inside",
        f"{tmp_path}/in/../x",
        "/etc/passwd",
        "file:///etc/passwd",
    ):
        message = refused(place)
        assert "may not be opened: MEMMCL_ALLOWED_URLS allows only s3://bucket/a/, https://Host" in message, place
    assert allowed.described().startswith("MEMMCL_ALLOWED_URLS allows only s3://bucket/a/, ")


def test_what_is_set_and_cannot_be_read_allows_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "")
    assert "MEMMCL_ALLOWED_URLS allows nothing" in refused("s3://bucket/a")
    for wrong in ("data", "s3://bucket reference://x", "https://user:hunter2@host"):
        monkeypatch.setenv(VARIABLE, wrong)
        message = refused("s3://bucket/a")
        assert message.startswith("MEMMCL_ALLOWED_URLS: ")
        assert "hunter2" not in message


def test_a_link_is_followed_before_it_is_judged(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    inside, outside = tmp_path / "in", tmp_path / "out"
    for folder in (inside, outside):
        folder.mkdir()
        (folder / "a.csv").write_text("text\nwords\n")
    (inside / "b.csv").symlink_to(outside / "a.csv")
    (inside / "link").symlink_to(outside)
    (outside / "back.csv").symlink_to(inside / "a.csv")
    monkeypatch.setenv(VARIABLE, str(inside))
    assert read_texts(str(inside / "a.csv")) == read_texts(str(outside / "back.csv")) == ["words"]
    for place in (inside / "b.csv", inside / "link" / "a.csv", inside / "*.csv", inside, outside / "a.csv"):
        with pytest.raises(ConfigError, match=r"a\.csv\)? may not be opened") as caught:
            list(read_files(str(place)))
        assert str(outside / "a.csv") in str(caught.value)


def test_texts_are_no_way_to_the_files_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "s3://bucket")
    for place in ("/etc/passwd", "file:///etc/passwd", "/proc/self/environ"):
        with pytest.raises(ConfigError, match=r"may not be opened: MEMMCL_ALLOWED_URLS allows only s3://bucket;"):
            read_texts(place)


def test_templates_of_a_chained_protocol_never_see_the_environment(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setenv("PLANTED", "hunter2")
    refs = {"version": 1, "templates": {"x": "{{ PLANTED }}"}, "refs": {"a.csv": "text\nwords\n"}}
    (tmp_path / "refs.json").write_text(json.dumps(refs))
    for place in (f"reference://a.csv::file://{tmp_path}/refs.json", f"reference://a.csv::{tmp_path}/refs.json"):
        for read in (lambda: list(read_files(place)), lambda: read_texts(place)):  # noqa: B023
            with pytest.raises(ConfigError, match="cannot open reference://"):
                read()


def test_a_redirect_is_judged_before_it_is_followed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.csv").write_text("text\nwords\n")
    (tmp_path / "in" / "plain.txt").write_text("more words\n")
    with web_server(tmp_path / "in") as web, web_server(tmp_path / "in", tls=False) as plain:
        web.redirects |= {
            "/here.csv": f"{web.url}/a.csv",
            "/plain.csv": f"{plain.url}/a.csv",
            "/meta": "http://169.254.169.254/latest",
            "/sub/away.csv": f"{web.url}/a.csv",
            "/twice.csv": f"{web.url}/plain.csv",
        }
        assert [row.values for row in read_files(f"{web.url}/here.csv")] == [{"text": "words"}]  # type: ignore[union-attr]
        for name in ("plain.csv", "twice.csv", "meta"):
            with pytest.raises(ConfigError, match=r"cannot open http://\S+: expected a path or a URL of https"):
                read_texts(f"{web.url}/{name}")
        assert plain.asked == []
        monkeypatch.setenv(VARIABLE, f"{web.url}/sub")
        web.asked.clear()
        with pytest.raises(ConfigError, match=r"/a\.csv may not be opened: MEMMCL_ALLOWED_URLS allows only"):
            read_texts(f"{web.url}/sub/away.csv")
        assert "/a.csv" not in web.asked
        with pytest.raises(ConfigError, match="may not be opened"):
            read_sources([IRONY], Reading(source=f"{web.url}"))
        monkeypatch.setenv(VARIABLE, f"{web.url}/plain.txt")
        assert read_texts(f"{web.url}/plain.txt") == ["more words"]


def test_a_mirror_sends_nobody_elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    data = b"text\nwords\n"
    (tmp_path / "in" / "data").mkdir(parents=True)
    (tmp_path / "in" / "data" / "a.csv").write_bytes(data)
    listed = Listed("data/a.csv", hashlib.sha256(data).hexdigest(), len(data))
    listing = Listing("org/name", "0" * 40, "MIT", "by all", (listed,))
    with web_server(tmp_path / "in", tls=False) as web, web_server(tmp_path / "in", tls=False) as other:
        web.redirects["/sub/data/a.csv"] = f"{other.url}/data/a.csv"
        monkeypatch.setenv(VARIABLE, f"{tmp_path}/out {web.url}")
        for base in (f"{web.url}/sub", other.url):
            with pytest.raises(ConfigError, match="may not be opened"):
                fetch_sentieval(str(tmp_path / "out"), base_url=base, listing=listing)
        assert other.asked == []
        assert fetch_sentieval(str(tmp_path / "out"), base_url=web.url, listing=listing).files == 1


def test_every_way_to_rows_is_judged(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    rows = make_sixteen(tmp_path / "rows")
    monkeypatch.setenv(VARIABLE, f"{tmp_path}/elsewhere hf://datasets/org")
    file = str(rows / "mast" / "irony" / "train.jsonl")
    for source in (
        {"data": {"source": str(rows), "subtasks": ["irony"]}},
        {"data": {"subtasks": ["irony"], "sources": {"irony": {"path": file}}}},
        {"data": {"subtasks": ["irony"], "sources": {"irony": {"train": file, "test": file}}}},
        {"data": {"subtasks": ["irony"], "sources": {"irony": {"dataset": str(rows)}}}},
        {"data": {"subtasks": ["irony"], "sources": {"irony": {"dataset": "someone/irony"}}}},
    ):
        with pytest.raises(ConfigError, match="may not be opened: MEMMCL_ALLOWED_URLS allows only"):
            read_splits(parse_config(source))
    monkeypatch.setenv(VARIABLE, str(rows))
    assert read_splits(parse_config({"data": {"source": str(rows), "subtasks": ["irony"]}})).parts["irony"]["test"]


def test_rows_of_a_bucket_are_read_from_no_other_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "s3://bucket http://s3:8333")
    for endpoint in ("http://169.254.169.254", "https://s3:8333", "http://s3"):
        with pytest.raises(ConfigError, match="may not be opened"):
            open_place("s3://bucket/latest/meta-data", {"endpoint_url": endpoint})
        with pytest.raises(ConfigError, match="may not be opened"):
            Store.open("s3://bucket/store", endpoint_url=endpoint)
    open_place("s3://bucket/rows", {"endpoint_url": "http://s3:8333"})


def test_models_and_adapters_are_judged(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model, gguf = tmp_path / "in" / "model", tmp_path / "model.gguf"
    model.mkdir(parents=True)
    gguf.write_bytes(b"GGUF")
    (tmp_path / "tokenizer.json").write_text("{}")
    (model / "config.json").write_text("{}")
    (model / "tokenizer.json").symlink_to(tmp_path / "tokenizer.json")
    monkeypatch.setenv(VARIABLE, f"hf://org/fine {tmp_path}/in")
    for place in (str(model), str(gguf), "other/model", "org/fine-not", "gpt2"):
        with pytest.raises(ConfigError, match="may not be opened"):
            resolve_base(place)
    for place in (str(tmp_path), "other/adapter@main", f"file://{tmp_path}", "s3://bucket/adapter"):
        with pytest.raises(ConfigError, match=r"expert a: .*may not be opened"):
            read_user_adapter("a", place)


def test_stores_and_outputs_are_judged(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "out")
    monkeypatch.setenv(VARIABLE, f"{tmp_path}/in memory://here")
    store = Store.open(str(tmp_path / "in" / "store"))
    Store.open("memory://here/store")
    artifact = store.publish("expert", "aa", name="e", files={"f": b"data"})
    store.fetch(artifact, tmp_path / "in" / "copy")
    for refused_call in (
        lambda: Store.open(str(tmp_path / "out")),
        lambda: Store.open("memory://there"),
        lambda: Store.from_spec({"url": f"file://{tmp_path}/out", "endpoint_url": None, "region": None}),
        lambda: store.fetch(artifact, tmp_path / "link"),
        lambda: made_before(tmp_path / "out", "record.json", {}),
        lambda: new_folder(tmp_path / "link" / "x").__enter__(),
        lambda: fetch_sentieval(str(tmp_path / "out")),
        lambda: fetch_sentieval("s3://bucket/x"),
    ):
        with pytest.raises(ConfigError, match="may not be opened: MEMMCL_ALLOWED_URLS allows only"):
            refused_call()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "files", ["/etc/*.conf", "reference://a::https://host/x", "https://host/a.csv", "../*.csv", {"split": "train"}]
)
@pytest.mark.parametrize("card", ["README.md", ".huggingface.yaml"])
def test_the_card_of_a_data_set_names_its_own_files_alone(tmp_path: Path, card: str, files: object) -> None:
    (tmp_path / "a.csv").write_text("text,label\nwords,a\n")
    named = json.dumps([files | {"path": "/etc/*.conf"}] if isinstance(files, dict) else files)
    said = f"configs:\n- config_name: default\n  data_files: {named}\n"
    (tmp_path / card).write_text(f"---\n{said}---\n" if card.endswith("md") else said)
    with pytest.raises(ConfigError, match=r"its card names '.*', which is no file of its own"):
        hub.load(str(tmp_path))


def test_a_data_set_with_files_of_its_own_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "a.csv").write_text("text,label\nwords,a\n")
    (tmp_path / "set" / "README.md").write_text("---\nconfigs:\n- config_name: default\n  data_files: a.csv\n---\n")
    monkeypatch.setenv(VARIABLE, str(tmp_path / "set"))
    place = str(tmp_path / "set")
    assert [row.values["text"] for row in hub.rows(place, "train", hub.load(place))] == ["words"]
    (tmp_path / "b.csv").write_text("text,label\nmore,b\n")
    (tmp_path / "set" / "b.csv").symlink_to(tmp_path / "b.csv")
    with pytest.raises(ConfigError, match="may not be opened"):
        hub.load(place)


def test_a_subtask_whose_rows_may_not_be_read_is_no_missing_data_set(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    with pytest.raises(DataError, match="is not a directory"):
        read_sources([IRONY], Reading(source=str(tmp_path / "nothing")))
    with pytest.raises(ConfigError, match="may not be opened"):
        read_sources([IRONY], Reading(sources={"irony": Source(path="/etc/hosts.csv")}))


def test_memory_is_judged_too(monkeypatch: pytest.MonkeyPatch) -> None:
    fsspec.filesystem("memory").pipe_file("/allowed/a.csv", b"text\nwords\n")
    monkeypatch.setenv(VARIABLE, "memory://allowed")
    assert read_texts("memory://allowed/a.csv") == ["words"]
    monkeypatch.setenv(VARIABLE, "memory://other")
    with pytest.raises(ConfigError, match="may not be opened"):
        read_texts("memory://allowed/a.csv")
