"""Objects in an S3 bucket, or a folder of one, through fsspec's S3 file system."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from memmcl.files.failures import code_of
from memmcl.store.backends import PIECE, Entry, below

TO_DELETE = 1000  # paths in one request
CONDITION_FAILED = {"PreconditionFailed", "412", "NoSuchKey", "404"}


class S3Backend:
    """A bucket, or a folder of one, through fsspec's S3 file system.

    Conditions are the server's own (If-None-Match, If-Match, also on delete); tokens are ETags. On a server
    that ignores conditional headers the last writer wins. More than 100 MB are a multipart
    upload: a killed one is aborted by a garbage collection, or by a lifecycle rule of the bucket.
    """

    parallel = 16

    def __init__(self, fs: Any, root: str) -> None:
        self.fs = fs
        self.bucket, _, folder = root.strip("/").partition("/")
        self.folder = f"{folder}/" if folder else ""

    def check(self) -> None:
        """List at most one object: fails for a wrong bucket, endpoint or credential."""
        self.fs.call_s3("list_objects_v2", Bucket=self.bucket, Prefix=self.folder, MaxKeys=1)

    def read(self, path: str) -> tuple[bytes, str]:
        """Get bytes and ETag in one request, so that they belong together."""
        from fsspec.asyn import sync

        answer = self.fs.call_s3("get_object", **self._object(path))
        data: bytes = sync(self.fs.loop, _whole, answer["Body"])
        return data, _token(answer)

    def stream(self, path: str, take: Callable[[bytes], object]) -> None:
        from fsspec.asyn import sync

        body = self.fs.call_s3("get_object", **self._object(path))["Body"]
        try:
            while piece := sync(self.fs.loop, _piece, body):
                take(piece)
        finally:
            sync(self.fs.loop, body.aclose)

    def write(self, path: str, source: bytes | Path) -> None:
        target = f"{self.bucket}/{self.folder}{path}"
        if isinstance(source, bytes):
            self.fs.pipe_file(target, source)
        else:
            self.fs.put_file(str(source), target)

    def create(self, path: str, data: bytes) -> str | None:
        """Put with If-None-Match."""
        return self._put(path, data, IfNoneMatch="*")

    def replace(self, path: str, data: bytes, token: str) -> str | None:
        """Put with If-Match."""
        return self._put(path, data, IfMatch=token)

    def remove(self, path: str, token: str) -> bool:
        """Delete with If-Match."""
        return self._if_met("delete_object", path, IfMatch=token) is not None

    def entries(self, folder: str, start: str = "") -> dict[str, Entry]:
        return {
            one["Key"][len(self.folder) :]: Entry(one["Size"], one["LastModified"].timestamp(), one.get("ETag", ""))
            for page in self._pages(below(folder) + start)
            for one in page.get("Contents", ())
        }

    def folders(self, folder: str) -> list[str]:
        prefix = below(folder)
        cut = len(self.folder) + len(prefix)
        names = [one["Prefix"] for page in self._pages(prefix, Delimiter="/") for one in page.get("CommonPrefixes", ())]
        return sorted(name[cut:].rstrip("/") for name in names)

    def touch(self, path: str) -> bool:
        """Let the server copy the object onto itself; the ETag stays unless it is too large for one copy."""
        place = self._object(path)
        try:
            self.fs.call_s3("copy_object", **place, CopySource=place, MetadataDirective="REPLACE")
        except FileNotFoundError:
            return False
        except OSError as error:
            if code_of(error) not in {"InvalidRequest", "EntityTooLarge"}:
                raise
            target = f"{self.bucket}/{self.folder}{path}"
            self.fs.cp_file(target, target)  # above 5 GB: a multipart copy
        return True

    def delete(self, paths: Sequence[str]) -> None:
        """Delete a thousand at a time. Raises OSError when the server refuses one of them."""
        for first in range(0, len(paths), TO_DELETE):
            keys = [{"Key": f"{self.folder}{path}"} for path in paths[first : first + TO_DELETE]]
            answer = self.fs.call_s3("delete_objects", Bucket=self.bucket, Delete={"Objects": keys, "Quiet": True})
            for refused in answer.get("Errors") or ():
                raise OSError(f"{refused.get('Key')} could not be deleted ({refused.get('Code')})")

    def unfinished(self) -> dict[str, Entry]:
        """List the multipart uploads that were begun in this folder and neither completed nor aborted."""
        uploads = {}
        for page in self._pages("", call="list_multipart_uploads"):
            for one in page.get("Uploads") or ():
                key, upload = one["Key"], one["UploadId"]
                if key.startswith(self.folder):
                    parts = self.fs.call_s3("list_parts", Bucket=self.bucket, Key=key, UploadId=upload).get("Parts")
                    size = sum(part["Size"] for part in parts or ())
                    uploads[f"{key}?{upload}"] = Entry(size, one["Initiated"].timestamp(), upload)
        return uploads

    def discard(self, unfinished: str) -> None:
        """Abort the upload; one that is gone is passed over."""
        key, _, upload = unfinished.rpartition("?")
        with suppress(FileNotFoundError):  # completed or aborted since it was listed
            self.fs.call_s3("abort_multipart_upload", Bucket=self.bucket, Key=key, UploadId=upload)

    def _pages(self, prefix: str, call: str = "list_objects_v2", **more: str) -> Iterator[dict[str, Any]]:
        """Yield the pages of a listing below the store's folder."""
        tokens: dict[str, str] = {}
        while True:
            page = self.fs.call_s3(call, Bucket=self.bucket, Prefix=f"{self.folder}{prefix}", **more, **tokens)
            yield page
            if not page.get("IsTruncated"):
                return
            markers = ("ContinuationToken", "KeyMarker", "UploadIdMarker")
            tokens = {name: page[f"Next{name}"] for name in markers if page.get(f"Next{name}")}

    def _object(self, path: str) -> dict[str, str]:
        return {"Bucket": self.bucket, "Key": f"{self.folder}{path}"}

    def _put(self, path: str, data: bytes, **condition: str) -> str | None:
        answer = self._if_met("put_object", path, Body=data, **condition)
        return None if answer is None else _token(answer)

    def _if_met(self, call: str, path: str, **more: Any) -> Mapping[str, Any] | None:
        """Return the answer to a conditional call; None where the object is there, changed, or gone."""
        try:
            answer: Mapping[str, Any] = self.fs.call_s3(call, **self._object(path), **more)
        except OSError as error:
            if isinstance(error, FileExistsError) or code_of(error) in CONDITION_FAILED:
                return None
            raise
        return answer


async def _whole(body: Any) -> bytes:
    """Read all of an answer."""
    try:
        return bytes(await body.read())
    finally:
        await body.aclose()  # or the connection stays taken: the client has ten, and a request for one more waits


async def _piece(body: Any) -> bytes:
    """Read up to PIECE bytes; fewer at the end only."""
    read = bytearray()
    while len(read) < PIECE and (more := await body.read(PIECE - len(read))):
        read += more
    return bytes(read)


def _token(answer: Mapping[str, Any]) -> str:
    """Return the ETag of an answer as If-Match takes it; empty where a server or a proxy left it out."""
    return str(answer.get("ETag") or "").removeprefix("W/")  # proxies that compress an answer mark its ETag as weak
