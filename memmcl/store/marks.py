"""What of a store may go: pure decisions over a census. `gc.py` says why they are safe, and carries them out."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

from memmcl.store.census import RUN, Census
from memmcl.store.manifest import ArtifactRef, Manifest, blob_path, manifest_path
from memmcl.store.plan import Item, Policy, RemovalPlan

NEVER = float("-inf")
MARGIN = 3600.0
"""Seconds. Clocks of hosts and of the store may differ, and a run looks into the store before it takes its lease."""
WEEK = 7 * 86400.0
"""Seconds for which what belongs to no finished run stays, where nothing else is asked for."""


@dataclass
class _Judge:
    """When objects were used last, against what protects them.

    young: what was used since then stays. live: the same for what runs that are at work may hold. settled: by path,
    when the last removed run that explains the object was published: use up to then was that run's own.
    """

    census: Census
    young: float
    live: float
    settled: dict[str, float] = field(default_factory=dict)

    def may_go(self, paths: Iterable[str], settled: float | None = None) -> bool:
        """Return whether these objects, one unit, were neither used lately nor can be in use now."""
        paths = list(paths)
        touched = self.census.touched(paths)
        if settled is None:
            settled = max((self.settled.get(path, NEVER) for path in paths), default=NEVER)
        return touched < self.live and (touched < self.young or touched <= settled)


def decide(census: Census, policy: Policy, now: float) -> RemovalPlan:
    """Decide what goes. now: seconds since 1970."""
    unknown = [path for path in census.unreadable if _kind(path) == RUN and _key(path) != policy.only]
    if unknown:
        problems = [f"{path} is not a valid manifest" for path in unknown]
        return RemovalPlan((), {}, problems=(*problems, "nothing goes while nobody knows what these runs need"))
    judge = _Judge(census, *_ages(census, policy, now))
    runs = _kept_runs(census, policy, now, judge)
    marked = _marked(census, policy, judge, runs)
    removed = {path: found for path, found in census.manifests.items() if path not in marked}
    for path in marked:
        if census.manifests[path].kind == RUN:
            runs.setdefault(path, "what stays names it")
    torn, damaged = _torn(census, policy, judge, marked)
    blobs = _blobs(census, judge, marked, removed)
    journals, logs, unfinished = _logs(census, policy, judge, removed)
    items = [
        *_items(census, sorted(removed, key=lambda path: (removed[path].kind != RUN, path)), "artifacts: {kind}"),
        *_items(census, torn, "damaged manifests"),
        *_items(census, [] if damaged else blobs, "files that no artifact names"),
        *_items(census, journals, "journals of runs"),
        *_items(census, logs, "records of searches"),
        *_items(census, _checkpoints(census, policy, judge, removed), "checkpoints"),
        *_items(census, _pointers(census, judge), "leases and marks of processes that died"),
        *(
            Item("uploads and files that were never completed", name, entry.size, leftover=True)
            for name, entry in census.leftovers.items()
            if entry.touched < min(judge.young, judge.live)
        ),
    ]
    return RemovalPlan(
        tuple(items),
        {census.manifests[path].key: why for path, why in runs.items()},
        tuple(_reasons(census, marked, runs, unfinished)),
        tuple(damaged),
    )


def _ages(census: Census, policy: Policy, now: float) -> tuple[float, float]:
    """Return since when use protects: anything loose; and anything at all, because of runs at work."""
    live = min((held.since - MARGIN for held in census.leases if held.live), default=float("inf"))
    if policy.only is not None:
        return NEVER, live
    young = now - max(WEEK if policy.older_than is None else policy.older_than, MARGIN)
    starts = [held.since - MARGIN for held in census.leases if held.touched >= young]
    journals = census.journal_records
    for run_id in journals.keys() - census.finished:  # at work, or killed and perhaps to be gone on with
        records = [*journals[run_id], *_records(census, census.searches(run_id))]
        if run_id in census.held or census.touched(records) >= young:
            starts.append(min(census.entries[path].touched for path in journals[run_id]) - MARGIN)
    return min([young, *starts]), live


def _kept_runs(census: Census, policy: Policy, now: float, judge: _Judge) -> dict[str, str]:
    """Return the runs that stay for their own sake: path of the manifest -> why."""
    runs = {path: found for path, found in census.manifests.items() if found.kind == RUN}
    newest = sorted(runs, key=lambda path: (runs[path].created, path), reverse=True)
    kept: dict[str, str] = {}
    for name, line in census.champions.items():
        for run_id, why in zip(
            reversed(line), (f"champion {name}", f"champion {name} before the present one"), strict=False
        ):
            if manifest_path(RUN, run_id) in runs and run_id != policy.only:
                kept.setdefault(manifest_path(RUN, run_id), why)
    for place, path in enumerate(newest):
        touched = census.touched([path])
        if runs[path].key in census.held:
            kept.setdefault(path, "being worked on")
        elif policy.only is not None:
            if runs[path].key != policy.only:
                kept.setdefault(path, "another run")
        elif policy.keep_runs is None:
            kept.setdefault(path, "no --keep-runs")
        elif place < policy.keep_runs:
            kept.setdefault(path, f"among the {policy.keep_runs} newest")
        elif policy.older_than is not None and touched >= now - policy.older_than:
            kept.setdefault(path, "not older than --older-than")
        if touched >= judge.live:
            kept.setdefault(path, "a run that is at work may use it")
    return kept


def _marked(census: Census, policy: Policy, judge: _Judge, runs: Collection[str]) -> set[str]:
    """Return the manifests that stay: of kept runs, of what names only such, and of what was used lately."""
    condemned = []
    roots = set(runs)
    for path, manifest in census.manifests.items():
        named = [_path(ref) for ref in manifest.inputs if ref.kind == RUN]
        if manifest.kind == RUN and path not in runs:
            condemned.append(path)
        elif manifest.kind != RUN and named:  # a judgement: worth nothing without both its runs
            gone = [one for one in named if one not in runs and policy.only in {None, _key(one)}]
            (condemned.append if gone else roots.add)(path)
    for path in sorted(condemned, key=lambda one: census.touched([one]), reverse=True):
        for one in _reached(census, [path], judge.settled):
            judge.settled[one] = census.touched([path])
    marked = _reached(census, roots | _pinned(census, judge))
    young = [
        path
        for path, manifest in census.manifests.items()
        if path not in marked and manifest.kind != RUN and not judge.may_go([path])
    ]
    return marked | _reached(census, young, marked)


def _pinned(census: Census, judge: _Judge) -> set[str]:
    """Return what unfinished runs that stay have taken over from a champion: they may not have looked for it yet."""
    staying = [
        noted
        for run_id, noted in census.journals.items()
        if run_id not in census.finished and (run_id in census.held or not judge.may_go(census.journal_records[run_id]))
    ]
    return {path for noted in staying for one in noted for path in one.pinned}


def _reached(census: Census, roots: Iterable[str], stop: Collection[str] = ()) -> set[str]:
    """Return `roots` and all that they name, themselves or through what they name, but for `stop`."""
    reached: set[str] = set()
    waiting = [path for path in roots if path not in stop]
    while waiting:
        path = waiting.pop()
        if path in census.manifests and path not in reached:
            reached.add(path)
            waiting += [one for ref in census.manifests[path].inputs if (one := _path(ref)) not in stop]
    return reached


def _torn(census: Census, policy: Policy, judge: _Judge, marked: Collection[str]) -> tuple[list[str], list[str]]:
    """Return damaged manifests that may go, and what is to be said of those that may not."""
    needed = {_path(ref) for path in marked for ref in census.manifests[path].inputs}
    torn = [path for path in census.unreadable if _kind(path) != RUN]
    named = [path for path in torn if path in needed]
    problems = [f"{path} is not a valid manifest, and what stays names it" for path in named]
    if problems:
        problems.append("no file goes while nobody knows which of them those artifacts need; run their runs again")
    going = [path for path in torn if path not in needed and judge.may_go([path])]
    return [*going, *(path for path in census.unreadable if path == manifest_path(RUN, policy.only or ""))], problems


def _blobs(census: Census, judge: _Judge, marked: Collection[str], removed: Mapping[str, Manifest]) -> list[str]:
    needed = {path for one in marked for path in _files(census.manifests[one])}
    settled: dict[str, float] = {}
    for one, manifest in removed.items():
        for path in _files(manifest):
            settled[path] = max(settled.get(path, NEVER), judge.settled.get(one, NEVER))
    return [
        path
        for path in census.entries
        if path.startswith("blobs/") and path not in needed and judge.may_go([path], settled.get(path, NEVER))
    ]


def _logs(
    census: Census, policy: Policy, judge: _Judge, removed: Mapping[str, Manifest]
) -> tuple[list[str], list[str], int]:
    """Return the records that go, of journals and of searches, and how many unfinished runs stay."""
    ended = {found.key: census.touched([path]) for path, found in removed.items() if found.kind == RUN}
    journals, finished, held = census.journal_records, census.finished, census.held
    going, needed, unfinished = [], set(held), 0
    settled: dict[str, float] = {}
    for run_id in census.journals:
        keys = census.searches(run_id)
        unit = [*journals[run_id], *_records(census, keys)]
        goes = run_id not in held and (
            run_id in ended or run_id == policy.only or (run_id not in finished and judge.may_go(unit))
        )
        if goes:
            going += journals[run_id]
            for key in keys:
                settled[key] = max(settled.get(key, NEVER), ended.get(run_id, NEVER))
                if run_id == policy.only:
                    settled[key] = max(settled[key], census.touched(_records(census, [key])))
        else:
            needed.update(keys)
            unfinished += run_id not in finished
    logs = [
        path
        for key, records in census.search_records.items()
        if key not in needed and judge.may_go(records, settled.get(key, NEVER))
        for path in records
    ]
    return going, logs, unfinished


def _checkpoints(census: Census, policy: Policy, judge: _Judge, removed: Mapping[str, Manifest]) -> list[str]:
    """Return those of trainings that nobody went on with, and those whose training has been published."""
    manifests = census.manifests if policy.only is None else removed
    published: dict[str, float] = {}
    for path, found in manifests.items():
        published[found.key] = max(published.get(found.key, NEVER), census.touched([path]))
    paths = [path for path in census.entries if path.startswith("checkpoints/")]
    names = {path: path.removeprefix("checkpoints/").removesuffix(".bin") for path in paths}
    return [path for path in paths if judge.may_go([path], published.get(names[path], NEVER))]


def _pointers(census: Census, judge: _Judge) -> list[str]:
    """Return leases whose holders are dead, and marks that a look at a cluster left."""
    dead = [held.path for held in census.leases if not held.live]
    marks = [path for path in census.entries if path.startswith("pointers/checks/")]
    return [path for path in (*dead, *marks) if path in census.entries and judge.may_go([path])]


def _reasons(census: Census, marked: set[str], runs: Mapping[str, str], unfinished: int) -> Iterable[str]:
    loose = len(marked - _reached(census, runs))
    if loose:
        yield f"{loose} artifacts that no finished run needs, not old enough or in use"
    if unfinished:
        yield f"{unfinished} unfinished runs that were at work not long ago: `memmcl search resume` goes on with them"
    for held in census.leases:
        if held.live:
            yield f"whatever was used since run {held.run_id[:8]} began, which is at work now"


def _items(census: Census, paths: Iterable[str], what: str) -> list[Item]:
    return [Item(what.format(kind=_kind(path)), path, census.entries[path].size) for path in paths]


def _records(census: Census, searches: Iterable[str]) -> list[str]:
    return [path for key in searches for path in census.search_records.get(key, ())]


def _files(manifest: Manifest) -> list[str]:
    return [blob_path(info.sha256) for info in manifest.blobs.values()]


def _path(ref: ArtifactRef) -> str:
    return manifest_path(ref.kind, ref.key)


def _kind(path: str) -> str:
    return path.split("/")[1]


def _key(path: str) -> str:
    return path.split("/")[2].removesuffix(".json")
