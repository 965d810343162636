"""What the store knows about an artifact: its manifest, the reference that travels, and its cache key."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from memmcl.seeds import digest
from memmcl.store.sealed import open_text

if TYPE_CHECKING:
    from memmcl.store.objects import Objects

logger = logging.getLogger(__name__)

_SEGMENT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


def check_name(name: str) -> str:
    """Return `name` if it can be part of an object's path; raises ValueError if it cannot, as `/etc` or `.hidden`."""
    if not all(_SEGMENT.fullmatch(segment) for segment in name.split("/")):
        raise ValueError(f"{name!r} cannot name an object; use letters, digits, '.', '_', '-' and '/'")
    return name


def check_file(name: str) -> str:
    """Return `name` if it is a relative path; raises ValueError if it is absolute or empty, or climbs with `..`."""
    path = PurePosixPath(name)
    plain = str(path) == name and "\\" not in name and "\0" not in name
    if not plain or not path.parts or path.is_absolute() or ".." in path.parts:
        raise ValueError(f"{name!r} is no relative file path such as 'adapter/config.json'")
    return name


Kind = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
Key = Annotated[str, Field(pattern=r"^[0-9a-f]+$")]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
FileName = Annotated[str, AfterValidator(check_file)]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ArtifactRef(_Frozen):
    """The name of an artifact: small JSON that crosses task boundaries in place of the artifact itself."""

    kind: Kind = Field(description="what sort of artifact it is, for instance `expert`")
    key: Key = Field(description="hex digest of everything the artifact depends on (see `cache_key`)")
    name: str = Field(description="what a human calls it, for instance `expert irony`")

    def __str__(self) -> str:
        return f"{self.kind} {self.name!r} ({self.key[:12]})"


Refs = Mapping[str, ArtifactRef]  # references by name, most often by subtask


class BlobInfo(_Frozen):
    """The content of one file: sha256 (hex) and size in bytes."""

    sha256: Sha256
    size: int = Field(ge=0)


class Manifest(_Frozen):
    """Everything about one published artifact; written last, so where it is the artifact is whole."""

    schema_version: Literal[1] = 1
    kind: Kind
    key: Key
    name: str
    blobs: dict[FileName, BlobInfo] = Field(description="content of each file, by file name")
    inputs: tuple[ArtifactRef, ...] = Field(description="the artifacts it was made from, in order")
    config: dict[str, Any] = Field(description="the part of the configuration that the stage read")
    config_digest: str = Field(description="sha256 of `config` as canonical JSON")
    seed: int
    stage_version: int = Field(description="version of the stage's core function")
    code_version: str = Field(description="version of memmcl that made it")
    created: str = Field(description="UTC time of publication, ISO 8601")
    seconds: float = Field(description="wall-clock seconds that making it took")
    metrics: dict[str, Any] = Field(description="numbers worth showing without opening the files")

    @property
    def ref(self) -> ArtifactRef:
        """The reference to this artifact."""
        return ArtifactRef(kind=self.kind, key=self.key, name=self.name)

    @property
    def inputs_by_name(self) -> dict[str, ArtifactRef]:
        """The inputs by `kind:name`, as `expert:expert irony`."""
        return {f"{ref.kind}:{ref.name}": ref for ref in self.inputs}


@dataclass(frozen=True)
class StageSettings:
    """What decides the content of an artifact beside its inputs.

    config: the part of the configuration that the stage reads. stage_version: of the stage's core function.
    """

    config: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    stage_version: int = 1


def cache_key(
    kind: str, *, inputs: Sequence[ArtifactRef], config: Mapping[str, Any], stage_version: int, seed: int
) -> str:
    """Return the key (64 hex digits) under which a stage's result is looked up before the stage runs.

    It depends on the kind, the inputs' kinds and keys in their order, the configuration subtree that the
    stage reads, the version of the stage's core function, and the seed; not on names, places or times.

    Raises:
        TypeError, ValueError: `config` is not JSON (see `memmcl.seeds.digest`).
    """
    parts = [[ref.kind, ref.key] for ref in inputs]
    return digest(["artifact", kind, parts, dict(config), stage_version, seed])


def parse_manifest(data: bytes, path: str) -> Manifest | None:
    """Return the manifest stored at `path`, or None when `data` is torn, invalid, or belongs elsewhere."""
    try:
        manifest = Manifest.model_validate_json(open_text(path, data) or b"")
    except ValidationError:
        return None
    return manifest if manifest_path(manifest.kind, manifest.key) == path else None


def read_manifest(objects: Objects, path: str) -> Manifest | None:
    """Return the manifest stored at `path`; None, with a warning where something is there that is none."""
    data = objects.read(path)
    manifest = None if data is None else parse_manifest(data, path)
    if data is not None and manifest is None:
        logger.warning("%s/%s is not a valid manifest and counts as not written", objects.url, path)
    return manifest


def manifest_path(kind: str, key: str) -> str:
    """Return where the manifest of (kind, key) lies in a store."""
    return f"manifests/{kind}/{key}.json"


def kind_and_key(path: str) -> tuple[str, str]:
    """Return the kind and the key of the manifest that lies at `path`."""
    kind, _, key = path.removeprefix("manifests/").partition("/")
    return kind, key.removesuffix(".json")


def blob_path(sha256: str) -> str:
    """Return where the content with this digest lies in a store."""
    return f"blobs/{sha256[:2]}/{sha256}"
