"""What of a store may go: pure decisions over a snapshot. `gc.py` says why they are safe, and carries them out."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

from memmcl.store.manifest import ArtifactRef, Manifest, blob_path, kind_and_key, manifest_path
from memmcl.store.plan import Item, Policy, RemovalPlan
from memmcl.store.snapshot import RUN, StoreSnapshot

NEVER = float("-inf")
MARGIN = 3600.0
"""Seconds. Clocks of hosts and of the store may differ, and a run looks into the store before it takes its lease."""
WEEK = 7 * 86400.0  # seconds for which what belongs to no finished run stays, where nothing else is asked for


def decide(snapshot: StoreSnapshot, policy: Policy, now: float) -> RemovalPlan:
    """Decide what goes. now: seconds since 1970."""
    unknown = [path for path in snapshot.unreadable if (one := kind_and_key(path))[0] == RUN and one[1] != policy.only]
    if unknown:
        problems = [f"{path} is not a valid manifest" for path in unknown]
        return RemovalPlan((), {}, problems=(*problems, "nothing goes while nobody knows what these runs need"))
    return _Decision(snapshot, policy, now).plan()


class _Decision:
    """One decision, made step by step.

    young, live: what was used since that time stays, `live` because a run at work may rely on it. own_until: path ->
    when the last removed run that needs the object was published; use before that protects nothing: it was that run's.
    """

    def __init__(self, snapshot: StoreSnapshot, policy: Policy, now: float) -> None:
        self.snapshot = snapshot
        self.policy = policy
        self.now = now
        self.live = min((lease.since - MARGIN for lease in snapshot.leases if lease.live), default=float("inf"))
        self.young = NEVER if policy.only is not None else self._young()
        self.own_until: dict[str, float] = {}

    def plan(self) -> RemovalPlan:
        """Return what goes and why the rest stays."""
        manifests = self.snapshot.manifests
        runs = self._kept_runs()
        marked = self._marked(runs)
        removed = {path: manifest for path, manifest in manifests.items() if path not in marked}
        for path in marked:
            if manifests[path].kind == RUN:
                runs.setdefault(path, "what stays names it")
        torn, damaged = self._torn(marked)
        journals, searches, unfinished = self._logs(removed)
        items = [
            *self._items(sorted(removed, key=lambda path: (removed[path].kind != RUN, path)), "artifacts: {kind}"),
            *self._items(torn, "damaged manifests"),
            *self._items([] if damaged else self._blobs(marked, removed), "files that no artifact names"),
            *self._items(journals, "journals of runs"),
            *self._items(searches, "records of searches"),
            *self._items(self._checkpoints(removed), "checkpoints"),
            *self._items(self._pointers(), "leases and marks of processes that died"),
            *(
                Item("uploads and files that were never completed", name, entry.size, unfinished=True)
                for name, entry in self.snapshot.unfinished.items()
                if entry.touched < min(self.young, self.live)
            ),
        ]
        return RemovalPlan(
            tuple(items),
            {manifests[path].key: why for path, why in runs.items()},
            tuple(self._reasons(marked, runs, unfinished)),
            tuple(damaged),
        )

    def _young(self) -> float:
        """Return the time since when an object that belongs to no finished run must have been used to stay."""
        snapshot = self.snapshot
        young = self.now - max(WEEK if self.policy.older_than is None else self.policy.older_than, MARGIN)
        starts = [lease.since - MARGIN for lease in snapshot.leases if lease.touched >= young]
        journals = snapshot.journal_records
        for run_id in journals.keys() - snapshot.finished:  # at work, or killed and perhaps to be gone on with
            records = [*journals[run_id], *self._records(snapshot.searches(run_id))]
            if run_id in snapshot.working or snapshot.touched(records) >= young:
                starts.append(min(snapshot.entries[path].touched for path in journals[run_id]) - MARGIN)
        return min([young, *starts])

    def _may_go(self, paths: Iterable[str], own_until: float | None = None) -> bool:
        """Return whether these objects, one unit, were neither used lately nor can be in use now."""
        paths = list(paths)
        touched = self.snapshot.touched(paths)
        if own_until is None:
            own_until = max((self.own_until.get(path, NEVER) for path in paths), default=NEVER)
        return touched < self.live and (touched < self.young or touched <= own_until)

    def _kept_runs(self) -> dict[str, str]:
        """Return the runs that stay for their own sake: path of the manifest -> why."""
        snapshot, policy = self.snapshot, self.policy
        runs = {path: manifest for path, manifest in snapshot.manifests.items() if manifest.kind == RUN}
        kept: dict[str, str] = {}
        for name, line in snapshot.champions.items():
            reasons = (f"champion {name}", f"champion {name} before the present one")
            for run_id, why in zip(reversed(line), reasons, strict=False):
                if manifest_path(RUN, run_id) in runs and run_id != policy.only:
                    kept.setdefault(manifest_path(RUN, run_id), why)
        for place, path in enumerate(sorted(runs, key=lambda path: (runs[path].created, path), reverse=True)):
            touched = snapshot.touched([path])
            if runs[path].key in snapshot.working:
                kept.setdefault(path, "being worked on")
            elif policy.only is not None:
                if runs[path].key != policy.only:
                    kept.setdefault(path, "another run")
            elif policy.keep_runs is None:
                kept.setdefault(path, "no --keep-runs")
            elif place < policy.keep_runs:
                kept.setdefault(path, f"among the {policy.keep_runs} newest")
            elif policy.older_than is not None and touched >= self.now - policy.older_than:
                kept.setdefault(path, "not older than --older-than")
            if touched >= self.live:
                kept.setdefault(path, "a run that is at work may use it")
        return kept

    def _marked(self, runs: Collection[str]) -> set[str]:
        """Return the manifests that stay: of kept runs, of what names only such, and of what was used lately."""
        snapshot = self.snapshot
        going = []
        roots = set(runs)
        for path, manifest in snapshot.manifests.items():
            named = [_path(ref) for ref in manifest.inputs if ref.kind == RUN]
            if manifest.kind == RUN and path not in runs:
                going.append(path)
            elif manifest.kind != RUN and named:  # a judgement: worth nothing without both its runs
                gone = [one for one in named if one not in runs and self.policy.only in {None, kind_and_key(one)[1]}]
                (going.append if gone else roots.add)(path)
        for path in sorted(going, key=lambda one: snapshot.touched([one]), reverse=True):
            for one in self._reached([path], self.own_until):
                self.own_until[one] = snapshot.touched([path])
        marked = self._reached(roots | self._pinned())
        young = [
            path
            for path, manifest in snapshot.manifests.items()
            if path not in marked and manifest.kind != RUN and not self._may_go([path])
        ]
        return marked | self._reached(young, marked)

    def _pinned(self) -> set[str]:
        """Return what unfinished runs that stay took over from a champion: they may not have looked for it yet."""
        snapshot = self.snapshot
        return {
            path
            for run_id, records in snapshot.journals.items()
            if run_id not in snapshot.finished
            and (run_id in snapshot.working or not self._may_go(snapshot.journal_records[run_id]))
            for record in records
            for path in record.pinned
        }

    def _reached(self, roots: Iterable[str], stop: Collection[str] = ()) -> set[str]:
        """Return `roots` and all that they name, themselves or through what they name, but for `stop`."""
        manifests = self.snapshot.manifests
        reached: set[str] = set()
        waiting = [path for path in roots if path not in stop]
        while waiting:
            path = waiting.pop()
            if path in manifests and path not in reached:
                reached.add(path)
                waiting += [one for ref in manifests[path].inputs if (one := _path(ref)) not in stop]
        return reached

    def _torn(self, marked: Collection[str]) -> tuple[list[str], list[str]]:
        """Return damaged manifests that may go, and problems about those that may not."""
        needed = {_path(ref) for path in marked for ref in self.snapshot.manifests[path].inputs}
        torn = [path for path in self.snapshot.unreadable if kind_and_key(path)[0] != RUN]
        problems = [f"{path} is not a valid manifest, and what stays names it" for path in torn if path in needed]
        if problems:
            problems.append("no file goes while nobody knows which of them those artifacts need; run their runs again")
        going = [path for path in torn if path not in needed and self._may_go([path])]
        only = manifest_path(RUN, self.policy.only or "")
        return [*going, *(path for path in self.snapshot.unreadable if path == only)], problems

    def _blobs(self, marked: Collection[str], removed: Mapping[str, Manifest]) -> list[str]:
        needed = {path for one in marked for path in _files(self.snapshot.manifests[one])}
        own_until: dict[str, float] = {}
        for one, manifest in removed.items():
            for path in _files(manifest):
                own_until[path] = max(own_until.get(path, NEVER), self.own_until.get(one, NEVER))
        return [
            path
            for path in self.snapshot.entries
            if path.startswith("blobs/") and path not in needed and self._may_go([path], own_until.get(path, NEVER))
        ]

    def _logs(self, removed: Mapping[str, Manifest]) -> tuple[list[str], list[str], int]:
        """Return the records that go, of journals and of searches, and how many unfinished runs stay."""
        snapshot, only = self.snapshot, self.policy.only
        ended = {run.key: snapshot.touched([path]) for path, run in removed.items() if run.kind == RUN}
        going, needed, unfinished = [], set(snapshot.working), 0
        own_until: dict[str, float] = {}
        for run_id in snapshot.journals:
            records, keys = snapshot.journal_records[run_id], snapshot.searches(run_id)
            loose = run_id not in snapshot.finished
            goes = run_id in ended or run_id == only or (loose and self._may_go([*records, *self._records(keys)]))
            if goes and run_id not in snapshot.working:
                going += records
                for key in keys:
                    until = snapshot.touched(self._records([key])) if run_id == only else NEVER
                    own_until[key] = max(own_until.get(key, NEVER), ended.get(run_id, NEVER), until)
            else:
                needed.update(keys)
                unfinished += loose
        searches = [
            path
            for key, records in snapshot.search_records.items()
            if key not in needed and self._may_go(records, own_until.get(key, NEVER))
            for path in records
        ]
        return going, searches, unfinished

    def _checkpoints(self, removed: Mapping[str, Manifest]) -> list[str]:
        """Return those of abandoned trainings, and those whose training has been published."""
        manifests = self.snapshot.manifests if self.policy.only is None else removed
        published: dict[str, float] = {}
        for path, manifest in manifests.items():
            published[manifest.key] = max(published.get(manifest.key, NEVER), self.snapshot.touched([path]))
        paths = [path for path in self.snapshot.entries if path.startswith("checkpoints/")]
        names = {path: path.removeprefix("checkpoints/").removesuffix(".bin") for path in paths}
        return [path for path in paths if self._may_go([path], published.get(names[path], NEVER))]

    def _pointers(self) -> list[str]:
        """Return leases whose holders are dead, and marks that a look at a cluster left."""
        entries = self.snapshot.entries
        dead = [lease.path for lease in self.snapshot.leases if not lease.live]
        marks = [path for path in entries if path.startswith("pointers/checks/")]
        return [path for path in (*dead, *marks) if path in entries and self._may_go([path])]

    def _reasons(self, marked: set[str], runs: Mapping[str, str], unfinished: int) -> Iterable[str]:
        loose = len(marked - self._reached(runs))
        if loose:
            yield f"{loose} artifacts that no finished run needs, not old enough or in use"
        if unfinished:
            runs_left = f"{unfinished} unfinished runs that were at work not long ago"
            yield f"{runs_left}: `memmcl search resume` goes on with them"
        for lease in self.snapshot.leases:
            if lease.live:
                yield f"whatever was used since run {lease.run_id[:8]} began, which is at work now"

    def _items(self, paths: Iterable[str], what: str) -> list[Item]:
        return [Item(what.format(kind=path.split("/")[1]), path, self.snapshot.entries[path].size) for path in paths]

    def _records(self, searches: Iterable[str]) -> list[str]:
        return [path for key in searches for path in self.snapshot.search_records.get(key, ())]


def _files(manifest: Manifest) -> list[str]:
    return [blob_path(info.sha256) for info in manifest.blobs.values()]


def _path(ref: ArtifactRef) -> str:
    return manifest_path(ref.kind, ref.key)
