"""The artifact store: content-addressed blobs, manifests written last, logs, and pointers.

    blobs/ab/abcd...                   file contents by sha256, write-once
    manifests/<kind>/<key>.json        the commit of an artifact, write-once
    logs/  pointers/  checkpoints/     small objects that check themselves (`documents.py`)
    index/<kind>                       derived from the manifests of a kind, for listings (`index.py`)
    tmp/                               local disks only: files being written

Nothing is published until its manifest is; the loser of a race reads the winner; whatever is read is checked
against its digest, which a blob has for a name and every other object inside (`sealed.py`, `documents.py`); a torn
or corrupt object counts as absent and is replaced by the next publication. What is reused is touched before it is
checked, so that no garbage collection takes it away (`gc.py`).
"""

from __future__ import annotations

import builtins
import hashlib
import logging
from collections.abc import Collection, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from memmcl import seeds
from memmcl.errors import ArtifactNotFound, CorruptArtifact, StoreAccessError, StoreError
from memmcl.files import allowed
from memmcl.store.documents import Documents
from memmcl.store.lease import wait_for_collection
from memmcl.store.manifest import (
    ArtifactRef,
    BlobInfo,
    Manifest,
    StageSettings,
    blob_path,
    check_file,
    check_name,
    manifest_path,
    parse_manifest,
    read_manifest,
)
from memmcl.store.objects import Objects, normalise, open_objects
from memmcl.store.sealed import seal
from memmcl.store.verify import Closure, Verification, read_closure, verify
from memmcl.version import __version__

logger = logging.getLogger(__name__)


class Store(Documents):
    """Artifacts, logs and pointers below one URL; safe to use from many threads, processes and hosts."""

    def __init__(self, objects: Objects, spec: Mapping[str, str | None]) -> None:
        self.objects = objects
        self.spec = dict(spec)

    @classmethod
    def open(cls, url: str, *, endpoint_url: str | None = None, region: str | None = None) -> Store:
        """Open the store at a directory (a path or file://), at s3://bucket/folder, or at memory://name.

        A directory is made when the first object is written. Credentials for s3:// come from the environment.

        Raises:
            ConfigError: the URL or the endpoint cannot be a store's.
            StoreAccessError: it cannot be reached or used; the message says why and what to do.
        """
        store = cls.from_spec({"url": normalise(url), "endpoint_url": endpoint_url, "region": region})
        store.objects.check()
        return store

    @classmethod
    def from_spec(cls, spec: Mapping[str, str | None]) -> Store:
        """Open the store of `store.spec` again, for instance in another process, without checking access."""
        return cls(open_objects(str(spec["url"]), spec["endpoint_url"], spec["region"]), spec)

    @property
    def url(self) -> str:
        """The absolute URL, without a slash at its end."""
        return self.objects.url

    def __repr__(self) -> str:
        return f"Store({self.url!r})"

    def put_blob(self, content: bytes | Path, info: BlobInfo | None = None) -> BlobInfo:
        """Store a content, or that of a file, under its digest; keep what is there when it is healthy.

        info: its digest and size, where they are known.
        """
        info = info or _info(content)
        path = blob_path(info.sha256)
        if not self._reuse(path) or self.objects.digest(path) != (info.sha256, info.size):
            self.objects.write(path, content)
        return info

    def publish(
        self,
        kind: str,
        key: str,
        *,
        name: str,
        files: Mapping[str, bytes | Path],
        inputs: Sequence[ArtifactRef] = (),
        settings: StageSettings | None = None,
        seconds: float = 0.0,
        metrics: Mapping[str, Any] | None = None,
    ) -> Manifest:
        """Publish `files` (name -> content, or the path of a file that holds it) as artifact (kind, key).

        Blobs first, manifest last: a writer that dies in between has published nothing. When another writer
        was first, the manifest that is returned is that writer's, unless its blobs are damaged.

        Raises:
            ValueError, TypeError: a name that cannot be stored, or config and metrics that are not JSON.
            StoreFull, StoreAccessError: nothing was published.
        """
        settings = settings or StageSettings()
        config = dict(settings.config)
        for file in files:
            check_file(file)
        manifest = Manifest(
            kind=kind,
            key=key,
            name=name,
            blobs={file: _info(content) for file, content in files.items()},
            inputs=tuple(inputs),
            config=config,
            config_digest=seeds.digest(config),
            seed=settings.seed,
            stage_version=settings.stage_version,
            code_version=__version__,
            created=datetime.now(UTC).isoformat(timespec="microseconds"),
            seconds=seconds,
            metrics=dict(metrics or {}),
        )
        path = manifest_path(kind, key)
        data = seal(path, manifest.model_dump())
        for file, content in files.items():
            self.put_blob(content, manifest.blobs[file])
        earlier = self.find(kind, key)
        if earlier is not None:
            return earlier

        def healthy(stored: bytes) -> bool:
            other = parse_manifest(stored, path)
            return other is not None and self._damage(other) is None

        stored = parse_manifest(self.objects.write_once(path, data, healthy), path)
        assert stored is not None, "written by this method, or accepted by `healthy`"
        return stored

    def find(self, kind: str, key: str) -> Manifest | None:
        """Return the artifact's manifest when the artifact is whole, else None: the caller makes it (again).

        Every blob is read and checked. Damage is logged as one warning that names the artifact and the blob. The
        caller may rely on what is returned: no garbage collection removes it while the caller holds a lease.
        """
        path = manifest_path(kind, key)
        manifest = read_manifest(self.objects, path) if self._reuse(path) else None
        damage = None if manifest is None else self._damage(manifest)
        if manifest is not None and damage is not None:
            logger.warning("%s is damaged and will be made again: %s", manifest.ref, damage)
            return None
        return manifest

    def load(self, ref: ArtifactRef) -> Manifest:
        """Return the manifest of `ref`; its blobs are checked when they are read. Raises ArtifactNotFound."""
        manifest = read_manifest(self.objects, manifest_path(ref.kind, ref.key))
        if manifest is None:
            raise ArtifactNotFound(f"{ref} is not in {self.url}; run the pipeline that makes it")
        return manifest

    def read(self, artifact: ArtifactRef | Manifest, file: str) -> bytes:
        """Return the content of one of the artifact's files, checked against its digest.

        Raises:
            ArtifactNotFound: no such artifact, file or blob.
            CorruptArtifact: the blob does not match its digest.
        """
        manifest = self.load(artifact) if isinstance(artifact, ArtifactRef) else artifact
        info = manifest.blobs.get(file)
        if info is None:
            raise ArtifactNotFound(f"{manifest.ref} has no file {file!r}; it has {', '.join(sorted(manifest.blobs))}")
        data = self.objects.read(blob_path(info.sha256))
        if data is None or hashlib.sha256(data).hexdigest() != info.sha256:
            raise self._unusable(manifest, file, missing=data is None)
        return data

    def fetch(self, artifact: ArtifactRef | Manifest, directory: Path) -> Path:
        """Write all files of the artifact into `directory` and return it; no file is ever seen half-written.

        Raises:
            ArtifactNotFound, CorruptArtifact: as `read`; files written before are complete.
            StoreFull, StoreAccessError: `directory` cannot hold them.
            ConfigError: it may not be written to.
        """
        manifest = self.load(artifact) if isinstance(artifact, ArtifactRef) else artifact
        for file, info in manifest.blobs.items():
            allowed.require(str(directory / file))
            digest = self.objects.fetch(blob_path(info.sha256), directory / file, info.sha256)
            if digest != info.sha256:
                raise self._unusable(manifest, file, missing=digest is None)
        return directory

    def list(self, kind: str | None = None) -> builtins.list[Manifest]:
        """Return the manifests (of one kind), newest first; invalid ones are skipped with a warning.

        All of them are read: to find one of many, or to print what there is, see `memmcl.store.index`.
        """
        paths = self.objects.sizes("manifests" if kind is None else f"manifests/{check_name(kind)}")
        read = self.objects.map(lambda path: read_manifest(self.objects, path), paths)
        manifests = [manifest for manifest in read if manifest is not None]
        return sorted(manifests, key=lambda manifest: (manifest.created, manifest.kind, manifest.key), reverse=True)

    def closure(self, kind: str, key: str, leaves: Collection[str] = ()) -> Closure:
        """Read an artifact and all that it was made from, but the inputs of kinds in `leaves`, every digest checked."""
        return read_closure(self.objects, kind, key, leaves)

    def run_closure(self, run_id: str) -> Closure:
        """Read all artifacts of a finished run, as `closure` does.

        Pinned anchor rows and warm start are among them; the rows that those were made from belong to the earlier run.
        """
        return self.closure("run", run_id, leaves=("anchors", "warm"))

    def verify(self) -> Verification:
        """Read every object once and report what is missing, invalid or corrupt."""
        return verify(self.objects)

    def _reuse(self, path: str) -> bool:
        """Touch an object, and return once no garbage collection can take it away; False when there is none.

        A store that this process may only read is not touched: nothing can be published on top of it.
        """
        try:
            there = self.objects.touch(path)
        except StoreAccessError:
            return True
        if there:
            wait_for_collection(self)
        return there

    def _unusable(self, manifest: Manifest, file: str, *, missing: bool) -> StoreError:
        what = f"{file!r} of {manifest.ref}"
        if missing:
            return ArtifactNotFound(f"{what} is missing from {self.url}; run the pipeline again")
        return CorruptArtifact(f"{what} does not match its digest in {self.url}; run the pipeline again")

    def _damage(self, manifest: Manifest) -> str | None:
        """What is wrong with the first damaged blob of an artifact; None when all are healthy."""
        for file, info in manifest.blobs.items():
            path = blob_path(info.sha256)
            digest = self.objects.digest(path)
            if digest is None:
                return f"{file!r} ({path}) is missing"
            if digest != (info.sha256, info.size):
                return f"{file!r} ({path}) does not match its digest"
        return None


def _info(content: bytes | Path) -> BlobInfo:
    if isinstance(content, bytes):
        return BlobInfo(sha256=hashlib.sha256(content).hexdigest(), size=len(content))
    with content.open("rb") as file:
        return BlobInfo(sha256=hashlib.file_digest(file, "sha256").hexdigest(), size=file.tell())
