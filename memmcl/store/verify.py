"""Reading a whole store, or one artifact with all that it was made from, to see that it is what the manifests say."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass

from memmcl.store.documents import parse_checkpoint, parse_pointer
from memmcl.store.manifest import Manifest, blob_path, manifest_path, parse_manifest
from memmcl.store.objects import Objects
from memmcl.store.sealed import is_sealed, unseal


@dataclass(frozen=True)
class Problem:
    """Something in a store that is not as it should be: `where` it lies and `what` is wrong with it."""

    where: str
    what: str


@dataclass(frozen=True)
class Verification:
    """What `Store.verify` read: counts of objects by kind, bytes of all blobs, and the problems.

    `unreferenced` blobs belong to no manifest: left by interrupted or replaced publications, harmless. `unsealed`
    objects were written by earlier versions: healthy as far as one can see, but without a digest inside.
    """

    manifests: int
    blobs: int
    records: int
    pointers: int
    checkpoints: int
    unreferenced: int
    unsealed: int
    bytes: int
    problems: tuple[Problem, ...]


def verify(objects: Objects) -> Verification:
    """Read every object once and report what is missing, invalid or corrupt."""
    manifests: dict[str, Manifest] = {}

    def is_manifest(path: str, data: bytes) -> bool:
        manifest = parse_manifest(data, path)
        if manifest is not None:
            manifests[path] = manifest
        return manifest is not None

    judged = {
        "manifest": _judge(objects, "manifests", ".json", is_manifest),
        "record": _judge(objects, "logs", ".json", lambda path, data: unseal(path, data) is not None),
        "pointer": _judge(objects, "pointers", ".json", lambda path, data: parse_pointer(path, data) is not None),
        "checkpoint": _judge(objects, "checkpoints", ".bin", lambda _, data: parse_checkpoint(data) is not None),
    }
    problems = [
        Problem(path, f"not a valid {kind}")
        for kind, states in judged.items()
        for path, (whole, _) in states.items()
        if not whole
    ]
    known = {problem.where for problem in problems}
    problems += [problem for problem in missing_inputs(manifests) if problem.where not in known]
    blobs, owners = objects.sizes("blobs"), owners_of(manifests.values())
    problems += damaged_blobs(objects, dict.fromkeys([*blobs, *owners]), owners)
    return Verification(
        manifests=len(judged["manifest"]),
        blobs=len(blobs),
        records=len(judged["record"]),
        pointers=len(judged["pointer"]),
        checkpoints=len(judged["checkpoint"]),
        unreferenced=len(blobs.keys() - owners.keys()),
        unsealed=sum(whole and not sealed for states in judged.values() for whole, sealed in states.values()),
        bytes=sum(blobs.values()),
        problems=tuple(problems),
    )


def _judge(
    objects: Objects, folder: str, suffix: str, is_whole: Callable[[str, bytes], bool]
) -> dict[str, tuple[bool, bool]]:
    """Return by path, for the objects of a folder that are still there, whether each is whole and holds its digest."""

    def judge(
        path: str,
    ) -> tuple[bool, bool] | None:  # in a thread of `map`, so that few contents are in memory at once
        data = objects.read(path)
        return None if data is None else (is_whole(path, data), suffix != ".json" or is_sealed(data))

    paths = [path for path in objects.sizes(folder) if path.endswith(suffix)]
    states = zip(paths, objects.map(judge, paths), strict=True)
    return {path: state for path, state in states if state is not None}


def drop_damaged(objects: Objects, folder: str) -> list[str]:
    """Remove the damaged log records or checkpoints below a folder, and return their paths.

    They count as not written, and may never be written again. What a writer puts in their place meanwhile stays.
    """

    def dropped(path: str) -> bool:
        versioned = objects.versioned(path)
        if versioned is None:
            return False
        data, token = versioned
        whole = parse_checkpoint(data) if path.startswith("checkpoints/") else unseal(path, data)
        return whole is None and objects.remove(path, token)

    paths = list(objects.sizes(folder))
    return [path for path, gone in zip(paths, objects.map(dropped, paths), strict=True) if gone]


def missing_inputs(manifests: Mapping[str, Manifest]) -> list[Problem]:
    """Return the artifacts that runs name, themselves or through what they name, and that are not there."""
    waiting = [manifest for manifest in manifests.values() if manifest.kind == "run"]
    seen, problems = set(), []
    while waiting:
        manifest = waiting.pop()
        for ref in manifest.inputs:
            path = manifest_path(ref.kind, ref.key)
            if path not in seen and path in manifests:
                waiting.append(manifests[path])
            elif path not in seen:
                problems.append(Problem(path, f"missing; {ref} is an input of {manifest.ref}"))
            seen.add(path)
    return problems


def owners_of(manifests: Iterable[Manifest]) -> dict[str, str]:
    """Return path of a blob -> the file of the artifact that it belongs to."""
    owners: dict[str, str] = {}
    for manifest in manifests:
        for file, info in manifest.blobs.items():
            owners.setdefault(blob_path(info.sha256), f"{file!r} of {manifest.ref}")
    return owners


def damaged_blobs(objects: Objects, paths: Iterable[str], owners: Mapping[str, str]) -> list[Problem]:
    """Return which of the blobs at `paths` are missing or do not match their digest; owners: of `owners_of`."""
    paths, problems = list(paths), []
    for path, digest in zip(paths, objects.map(objects.digest, paths), strict=True):
        owner = owners.get(path, "no artifact")
        if digest is None and path in owners:
            problems.append(Problem(path, f"missing; belongs to {owner}"))
        elif digest is not None and blob_path(digest[0]) != path:
            problems.append(Problem(path, f"does not match its digest; belongs to {owner}"))
    return problems


@dataclass(frozen=True)
class Closure:
    """The manifest of an artifact, those of all that it was made from, by path, and what is damaged or missing.

    `root` is None where the artifact was never published (without problems), or its manifest is damaged (with one).
    """

    root: Manifest | None
    manifests: dict[str, Manifest]
    problems: tuple[Problem, ...]


def read_closure(objects: Objects, kind: str, key: str, leaves: Collection[str] = ()) -> Closure:
    """Read an artifact and all that it was made from, but the inputs of kinds in `leaves`; check all digests."""
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
