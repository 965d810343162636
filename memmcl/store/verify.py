"""Reading a whole store to see that it is what its manifests say."""

from __future__ import annotations

from dataclasses import dataclass

from memmcl.store.manifest import blob_path, parse_manifest
from memmcl.store.objects import Objects


@dataclass(frozen=True)
class Problem:
    """Something in a store that is not as it should be: `where` it lies and `what` is wrong with it."""

    where: str
    what: str


@dataclass(frozen=True)
class Verification:
    """What `Store.verify` read: counts of manifests and blobs, bytes of all blobs, and the problems.

    `unreferenced` blobs belong to no manifest: left by interrupted or replaced publications, harmless.
    """

    manifests: int
    blobs: int
    unreferenced: int
    bytes: int
    problems: tuple[Problem, ...]


def verify(objects: Objects) -> Verification:
    """Read every manifest and every blob once and report what is missing, invalid or corrupt."""
    problems: list[Problem] = []
    owners: dict[str, str] = {}
    paths = list(objects.sizes("manifests"))
    for path, data in zip(paths, objects.map(objects.read, paths), strict=True):
        manifest = None if data is None else parse_manifest(data, path)
        if manifest is None:
            problems.append(Problem(path, "not a valid manifest"))
            continue
        for file, info in manifest.blobs.items():
            owners.setdefault(blob_path(info.sha256), f"{file!r} of {manifest.ref}")
    blobs = objects.sizes("blobs")
    for path, found in zip(blobs, objects.map(objects.digest, blobs), strict=True):
        if found is not None and blob_path(found[0]) != path:
            owner = owners.get(path, "no artifact")
            problems.append(Problem(path, f"does not match its digest; belongs to {owner}"))
    for path, owner in owners.items():
        if path not in blobs:
            problems.append(Problem(path, f"missing; belongs to {owner}"))
    return Verification(
        manifests=len(paths),
        blobs=len(blobs),
        unreferenced=len(blobs.keys() - owners.keys()),
        bytes=sum(blobs.values()),
        problems=tuple(problems),
    )
