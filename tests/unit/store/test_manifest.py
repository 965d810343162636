"""Keys, names and the JSON of manifests."""

from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from memmcl.store import ArtifactRef, BlobInfo, Manifest, cache_key
from memmcl.store.manifest import check_file, check_name, manifest_path, parse_manifest
from memmcl.store.sealed import seal, unseal

INPUTS = (ArtifactRef(kind="splits", key="ab12", name="irony train"), ArtifactRef(kind="base", key="cd", name="b"))
KEY_ARGUMENTS = {"inputs": INPUTS, "config": {"rank": 8, "lr": 5e-4}, "stage_version": 1, "seed": 7}
MANIFEST = Manifest(
    kind="expert",
    key="0f" * 32,
    name="expert irony",
    blobs={"adapter/model.safetensors": BlobInfo(sha256="a" * 64, size=3)},
    inputs=INPUTS,
    config={"rank": 8},
    config_digest="c" * 64,
    seed=7,
    stage_version=2,
    code_version="0.1.0",
    created="2025-01-01T00:00:00.000000+00:00",
    seconds=1.5,
    metrics={"loss": 0.25, "Grüße": [1, None]},
)
PATH = manifest_path("expert", MANIFEST.key)


def test_cache_key_is_the_digest_of_what_the_artifact_depends_on() -> None:
    text = '["artifact","expert",[["splits","ab12"],["base","cd"]],{"lr":0.0005,"rank":8},1,7]'
    import hashlib

    assert cache_key("expert", **KEY_ARGUMENTS) == hashlib.sha256(text.encode()).hexdigest()


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 8},
        {"stage_version": 2},
        {"config": {"rank": 8, "lr": 1e-4}},
        {"config": {"rank": 8}},
        {"inputs": INPUTS[::-1]},
        {"inputs": INPUTS[:1]},
        {"inputs": (INPUTS[0], ArtifactRef(kind="base", key="ce", name="b"))},
    ],
)
def test_cache_key_changes_with_each_of_them(change: dict[str, object]) -> None:
    assert cache_key("expert", **{**KEY_ARGUMENTS, **change}) != cache_key("expert", **KEY_ARGUMENTS)
    assert cache_key("group", **KEY_ARGUMENTS) != cache_key("expert", **KEY_ARGUMENTS)


def test_cache_key_ignores_names_and_the_order_of_settings() -> None:
    renamed = tuple(ref.model_copy(update={"name": "other"}) for ref in INPUTS)
    other = {**KEY_ARGUMENTS, "inputs": renamed, "config": {"lr": 5e-4, "rank": 8}}
    assert cache_key("expert", **other) == cache_key("expert", **KEY_ARGUMENTS)


def test_a_manifest_survives_json_and_knows_its_place() -> None:
    data = seal(PATH, MANIFEST.model_dump())
    assert parse_manifest(data, PATH) == MANIFEST
    assert parse_manifest(data, manifest_path("expert", "0a")) is None
    assert parse_manifest(MANIFEST.model_dump_json().encode(), PATH) == MANIFEST, "as earlier versions wrote it"
    assert parse_manifest(MANIFEST.model_dump_json().encode(), manifest_path("expert", "0a")) is None
    assert MANIFEST.ref == ArtifactRef(kind="expert", key=MANIFEST.key, name="expert irony")


@given(st.integers(0, len(seal(PATH, MANIFEST.model_dump())) - 1))
def test_a_manifest_cut_anywhere_is_no_manifest(length: int) -> None:
    assert parse_manifest(seal(PATH, MANIFEST.model_dump())[:length], PATH) is None


@pytest.mark.parametrize(
    "change",
    [
        {"schema_version": 2},
        {"kind": "../expert"},
        {"key": "XYZ"},
        {"surprise": 1},
        {"blobs": {"../../escape": {"sha256": "a" * 64, "size": 1}}},
        {"blobs": {"f": {"sha256": "../../secret", "size": 1}}},
        {"blobs": {"f": {"sha256": "a" * 64, "size": -1}}},
    ],
)
def test_a_manifest_that_could_mislead_is_refused(change: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        Manifest.model_validate({**MANIFEST.model_dump(), **change})


@pytest.mark.parametrize("name", ["", "/etc", "../up", "a//b", "a/./b", "a\\b", "a/", "a\0b", "."])
def test_file_names_stay_below_their_directory(name: str) -> None:
    with pytest.raises(ValueError, match="relative file path"):
        check_file(name)
    assert check_file("adapter/config v2.json") == "adapter/config v2.json"


@pytest.mark.parametrize("name", ["", "/a", "a/", "../a", "a//b", ".hidden", "a b", "a*", "ä", "a\n"])
def test_object_names_are_plain(name: str) -> None:
    with pytest.raises(ValueError, match="cannot name an object"):
        check_name(name)
    assert check_name("search/3f2a-1.x") == "search/3f2a-1.x"


def test_json_is_strict() -> None:
    assert unseal("p", seal("p", {"f1": 0.5, "none": None})) == {"f1": 0.5, "none": None}
    with pytest.raises(ValueError, match="JSON compliant"):
        seal("p", {"score": float("-inf")})
    with pytest.raises(TypeError):
        seal("p", {"score": object()})
    assert unseal("p", b'{"a": 1}') == {"a": 1}, "as earlier versions wrote it"
    assert unseal("p", b'{"a": 1') is None
    assert unseal("p", b"[1]") is None
    assert unseal("p", b"") is None
    assert unseal("p", b"\xff\xfe") is None
    assert unseal("p", b'{"a": ' * 100_000) is None


def test_the_store_imports_neither_torch_nor_an_s3_client() -> None:
    code = "import sys, memmcl.store; print({'torch','s3fs','botocore','prefect','ray'} & set(sys.modules))"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "set()"
