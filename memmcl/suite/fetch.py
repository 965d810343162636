"""Downloads the published files of SentiEval into a directory or a bucket, every digest checked.

    sentieval.json   which files there are: repository, commit, licence, and each file's sha256 and size

A file that is at the target with the right digest is not fetched again, so that the same call goes on after a crash.
Nothing wrong is ever at the target under its final name, and `LICENCE-NOTICE.txt` is there only when all files are.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from functools import cache, partial
from importlib.resources import files
from typing import Any, TypeVar

import httpx

from memmcl.errors import DataError, UsageError
from memmcl.suite.download import Unavailable, base_of, download, open_client, shown
from memmcl.suite.target import Target, open_target

T = TypeVar("T")
FileCallback = Callable[[int, int, str], None]
"""Called after each file that is at the target: how many are, their bytes, and the file's path."""

NOTICE = "LICENCE-NOTICE.txt"
HOPELESS = 5  # temporary failures without one file fetched, after which the source is given up
SHOWN_FAILURES = 3


@dataclass(frozen=True)
class Listed:
    """A published file: its path in the repository, its sha256 (hex) and its size in bytes."""

    path: str
    sha256: str
    size: int

    @property
    def place(self) -> str:
        """Its path at the target: that in the repository below `data/`."""
        return self.path.removeprefix("data/")


@dataclass(frozen=True)
class Listing:
    """The files of a repository at a commit, with the licence that is published beside them."""

    repository: str
    commit: str
    licence: str
    copyright: str
    files: tuple[Listed, ...]

    @property
    def size(self) -> int:
        """All files together, in bytes."""
        return sum(file.size for file in self.files)

    @property
    def base_url(self) -> str:
        """Where GitHub serves the files of this commit."""
        return f"https://raw.githubusercontent.com/{self.repository}/{self.commit}/"

    @property
    def notice(self) -> str:
        """What users of the files have to know, as text of a few lines."""
        return (
            f"SentiEval, from https://github.com/{self.repository} at commit {self.commit}.\n"
            f"Licence: {self.licence}.\n"
            f"{self.copyright}\n"
            "The texts come from data sets by others, among them SemEval, SST, TweetEval, Yelp and IMDb, and keep\n"
            "their original terms: research use. Read those before you pass on the texts or a model trained on them.\n"
        )


@dataclass(frozen=True)
class Fetched:
    """What a call did: all `files`, of `size` bytes, are at `target`; `present` of them were there before."""

    target: str
    files: int
    size: int
    present: int
    notice: str


@cache
def sentieval_listing() -> Listing:
    """Return the list of SentiEval's files that ships with memmcl."""
    values = json.loads(files("memmcl.suite").joinpath("sentieval.json").read_text(encoding="utf-8"))
    listed = tuple(Listed(path, **facts) for path, facts in values.pop("files").items())
    return Listing(**values, files=listed)


def fetch_sentieval(
    target: str,
    *,
    base_url: str | None = None,
    jobs: int = 8,
    storage: Mapping[str, Any] | None = None,
    progress: FileCallback | None = None,
    listing: Listing | None = None,
) -> Fetched:
    """Bring every file of `listing` (by default SentiEval's) to `target`, and last the licence notice.

    A file at the target that differs from the list is replaced.

    target: a directory, or a URL that fsspec can write to. base_url: http(s) address of the repository's files; by
    default GitHub's. jobs: so many files at a time. storage: fsspec options for s3://. progress: called in this thread.

    Raises:
        UsageError: an address that cannot be used; neither target nor network was touched.
        ConfigError: a target, or a `base_url`, that may not be opened.
        DataError: some files could not be fetched; the others are at the target, and the same call fetches the rest.
        StoreAccessError, StoreFull: the target cannot be read or written.
    """
    listing = listing or sentieval_listing()
    if jobs < 1:
        raise UsageError(f"jobs must be 1 or more, got {jobs}")
    base = base_of(base_url or listing.base_url)
    place = open_target(target, storage or {})
    place.prepare(file.place for file in listing.files)
    fetch = _Fetch(listing, base, place, progress)
    _each(fetch.is_good, listing.files, jobs, fetch.stop, lambda file, good: fetch.arrived(file) if good else None)
    fetch.present = len(fetch.there)
    missing = [file for file in listing.files if file not in fetch.there]
    if missing:
        place.remove(NOTICE)
        with open_client(jobs, checked=base_url is not None) as client:
            _each(partial(fetch.fetch, client), missing, jobs, fetch.stop, fetch.ended)
    if fetch.failures:
        raise fetch.incomplete()
    if place.read(NOTICE) != (notice := listing.notice.encode()):
        place.write(NOTICE, notice)
    return Fetched(place.shown, len(listing.files), listing.size, fetch.present, listing.notice)


@dataclass
class _Fetch:
    """One call of `fetch_sentieval`.

    there: the files that are at the target, of which `present` were there before. failures: of those that could not be
    fetched. stop: set when no more files are wanted.
    """

    listing: Listing
    base: httpx.URL
    place: Target
    progress: FileCallback | None
    present: int = 0
    there: set[Listed] = field(default_factory=set)
    failures: dict[Listed, Unavailable] = field(default_factory=dict)
    stop: threading.Event = field(default_factory=threading.Event)

    def is_good(self, file: Listed) -> bool:
        """Return whether the file is at the target with the right content."""
        data = self.place.read(file.place)
        return data is not None and len(data) == file.size and hashlib.sha256(data).hexdigest() == file.sha256

    def fetch(self, client: httpx.Client, file: Listed) -> Unavailable | None:
        """Download a file to the target; return why it is not to be had, None where it was."""
        try:
            data = download(client, self.base, file.path, file.sha256, file.size, self.stop)
        except Unavailable as failure:
            return failure
        self.place.write(file.place, data)
        return None

    def arrived(self, file: Listed) -> None:
        """Count a file that is at the target."""
        self.there.add(file)
        if self.progress is not None:
            self.progress(len(self.there), sum(one.size for one in self.there), file.place)

    def ended(self, file: Listed, failure: Unavailable | None) -> None:
        """Count a download; give up where the source does not serve at all."""
        if failure is None:
            self.arrived(file)
            return
        self.failures[file] = failure
        if len(self.there) == self.present and sum(one.passing for one in self.failures.values()) == HOPELESS:
            raise self.incomplete()

    def incomplete(self) -> DataError:
        """Return the error that says what is missing, and why."""
        files, failures = self.listing.files, list(self.failures.items())
        first = [f"{file.path}: {failure}" for file, failure in failures[:SHOWN_FAILURES]]
        more = f"; and {len(failures) - len(first)} more" if len(failures) > len(first) else ""
        untried = len(files) - len(self.there) - len(failures)
        rest = f" and {untried} were not tried" if untried else ""
        return DataError(
            f"{len(self.there)} of {len(files)} files are at {self.place.shown}; {len(failures)} could not be fetched "
            f"from {shown(self.base)}{rest}: {'; '.join(first)}{more}. Run the same command again to go on"
        )


def _each(
    call: Callable[[Listed], T],
    files: Iterable[Listed],
    jobs: int,
    stop: threading.Event,
    done: Callable[[Listed, T], None],
) -> None:
    """Run `call` for each file, `jobs` at a time; give results to `done` in this thread, as they come.

    Whatever ends this thread's wait, Ctrl-C too, sets `stop` and waits for the calls that run.
    """
    with ThreadPoolExecutor(jobs, thread_name_prefix="memmcl-fetch") as pool:
        futures = {pool.submit(call, file): file for file in files}
        try:
            for future in as_completed(futures):
                done(futures[future], future.result())
        except BaseException:
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise
