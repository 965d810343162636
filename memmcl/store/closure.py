"""An artifact with all that it names: itself, its inputs, their inputs; and whether all of that is whole."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from memmcl.store.manifest import Manifest, manifest_path, parse_manifest
from memmcl.store.objects import Objects
from memmcl.store.verify import Problem, damaged_blobs, owners_of


@dataclass(frozen=True)
class Closure:
    """The manifest of an artifact, those of all that it was made from, by path, and what is damaged or missing.

    `root` is None where the artifact was never published (without problems), or its manifest is damaged (with one).
    """

    root: Manifest | None
    manifests: dict[str, Manifest]
    problems: tuple[Problem, ...]


def read_closure(objects: Objects, kind: str, key: str, leaves: Collection[str] = ()) -> Closure:
    """Read an artifact, and all that it was made from, once: every manifest and every blob is checked.

    leaves: kinds of artifacts whose own inputs are left out.
    """
    root = manifest_path(kind, key)
    manifests: dict[str, Manifest] = {}
    problems: list[Problem] = []
    seen, ahead = {root}, {root: ""}
    while ahead:
        following: dict[str, str] = {}
        for path, data in zip(ahead, objects.map(objects.read, ahead), strict=True):
            manifest = None if data is None else parse_manifest(data, path)
            if manifest is not None:
                manifests[path] = manifest
                inputs = () if manifest.kind in leaves else manifest.inputs
                for ref in inputs:
                    following.setdefault(manifest_path(ref.kind, ref.key), f"{ref} is an input of {manifest.ref}")
            elif data is not None:
                problems.append(Problem(path, "not a valid manifest"))
            elif path != root:
                problems.append(Problem(path, f"missing; {ahead[path]}"))
        ahead = {path: why for path, why in following.items() if path not in seen}
        seen |= ahead.keys()
    owners = owners_of(manifests.values())
    problems += damaged_blobs(objects, owners, owners)
    return Closure(manifests.get(root), manifests, tuple(problems))
