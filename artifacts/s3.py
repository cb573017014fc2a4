"""A store in an S3 bucket, with the conditional writes that S3 itself enforces.

Small objects are single `PutObject` requests with `If-None-Match: *` or `If-Match: <etag>`; conditions are never put on
multipart uploads, which most servers ignore them on. A large object is uploaded in parts and becomes visible as a whole, or is
not there; what a killed upload leaves is removed by `sweep`. Nothing is cached, and only a reply that names the key as
missing is a miss. Credentials, endpoint and region come from the usual AWS settings (see `artifacts.s3_client`); none of
them is ever part of a URL, a record or an error message.

A request whose reply was lost is sent again, so a refused condition may be the answer to one's own first attempt:
`Conflict` means "read what is there", and every caller finds out from the content whether it is its own.

One instance belongs to one process: workers are forked from a process that never opens a store.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from email.utils import parsedate_to_datetime
from mmap import mmap
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from blake3 import blake3

from artifacts.backend import (
    MAX_OBJECT_BYTES,
    Entry,
    Object,
    Progress,
    check_named,
    local_file,
    named_digest,
    write_at,
    wrong_size,
)
from artifacts.digest import update_from
from artifacts.errors import NotFound, StoreError, TooLarge
from artifacts.parts import MAX_PARTS, PART_BYTES, Body, Part, Transfer, split
from artifacts.redact import harmless
from artifacts.retry import BRIEF, PATIENT, Patience, persist
from artifacts.s3_client import AT_ONCE, Connection
from artifacts.s3_errors import is_of_client, is_of_credentials, may_pass, reply_of, translate
from artifacts.stamp import Stamp

T = TypeVar("T")
K = TypeVar("K")
GET_PART_BYTES = 16 << 20
"""Length of the ranges of a large download; a smaller object is one request."""
RECEIVED_BYTES = 1 << 18
"""Taken from a connection at once: larger pieces are copied outside the processor's cache."""
THREADED_FROM = 1 << 20
"""A larger body is signed and sent by the thread that brings it; s3fs would do that for all of them in one thread."""
DELETES_AT_ONCE = 1000
"""Keys in one DeleteObjects request: the most that S3 takes."""


class S3Backend:
    """Objects under `bucket/prefix`."""

    def __init__(self, bucket_and_prefix: str) -> None:
        bucket, _, prefix = bucket_and_prefix.strip("/").partition("/")
        self.bucket = bucket
        self._prefix = f"{prefix}/" if prefix else ""
        self.url = f"s3://{bucket}/{prefix}".rstrip("/")
        self._connection = Connection(bucket)
        self._ranges_are_marked = True
        """Until the server answers a range with 200."""

    def get(self, key: str, *, limit: int = MAX_OBJECT_BYTES) -> Object:
        return self._ask(key, "read", lambda: self._read(key, limit))

    def get_many(self, keys: Iterable[str], *, limit: int = MAX_OBJECT_BYTES) -> dict[str, Object | None]:
        def one(key: str) -> Object | None:
            try:
                return self.get(key, limit=limit)
            except NotFound:
                return None
            except TooLarge as error:
                return Object(b"", error.etag)

        return self._each(keys, one)

    def put(self, key: str, data: bytes, *, if_absent: bool = False, if_match: str | None = None) -> str:
        condition = {"IfNoneMatch": "*"} if if_absent else {} if if_match is None else {"IfMatch": _bare(if_match)}
        if not condition and len(data) > THREADED_FROM:
            view = memoryview(data)
            body = Body(len(data), lambda start, count: view[start : start + count])
            return str(self._call("write", "put_object", key, patience=PATIENT, Body=body)["ETag"])
        return str(self._call("write", "put_object", key, Body=bytes(data), **condition)["ETag"])

    def size(self, key: str) -> int | None:
        import obstore

        try:
            return self._ask(
                key, "stat", lambda: int(obstore.head(self._connection.reader, self._prefix + key)["size"])
            )
        except NotFound:
            return None

    def sizes(self, keys: Iterable[str]) -> dict[str, int | None]:
        return self._each(keys, self.size)

    def put_file(
        self,
        key: str,
        path: Path,
        *,
        offset: int = 0,
        size: int | None = None,
        progress: Progress | None = None,
        hashed: Stamp | None = None,
    ) -> None:
        with local_file(path), open(path, "rb") as file:
            length = os.fstat(file.fileno()).st_size - offset if size is None else size
            self._upload(key, path, file.fileno(), offset, length, progress or _unwatched, hashed)

    def get_file(
        self,
        key: str,
        path: Path,
        *,
        offset: int | None = None,
        size: int | None = None,
        progress: Progress | None = None,
    ) -> str:
        report, total = progress or _unwatched, self.size(key) if size is None else size
        if total is None or total <= GET_PART_BYTES:
            data = self._whole(key, size)
            with local_file(path), _opened(path, offset) as file:
                write_at(file.fileno(), data, offset or 0)
            report(len(data))
            return blake3(data).hexdigest()
        with local_file(path), _opened(path, offset) as file:
            return self._download(key, file, offset or 0, total, report)

    def list(self, prefix: str) -> Iterator[Entry]:
        import obstore

        folder = (self._prefix + prefix).rpartition("/")[0]
        pages: Iterator[Any] | None = None
        last: str | None = None

        def following() -> list[dict[str, Any]] | None:
            nonlocal pages
            try:
                pages = pages or iter(obstore.list(self._connection.reader, folder, offset=last, chunk_size=1000))
                return next(pages, None)
            except Exception:
                pages = None
                raise

        while (page := self._ask(prefix, "list", following)) is not None:
            for row in page:
                last = str(row["path"])
                key = last[len(self._prefix) :]
                if key.startswith(prefix):
                    yield Entry(key, int(row["size"]), row["last_modified"].timestamp())

    def delete(self, key: str) -> None:
        self._call("delete", "delete_object", key)

    def delete_many(self, keys: Iterable[str]) -> None:
        every = sorted(set(keys))
        for start in range(0, len(every), DELETES_AT_ONCE):
            self._delete_batch(every[start : start + DELETES_AT_ONCE])

    def sweep(self, older_than_seconds: float, *, dry_run: bool = False) -> list[Entry]:
        """Abort multipart uploads; the parts of one that is not finished are kept, and paid for, until then."""
        left, marker = [], {}
        while True:
            page = self._call("list", "list_multipart_uploads", None, Prefix=self._prefix, **marker)
            now = parsedate_to_datetime(page["ResponseMetadata"]["HTTPHeaders"]["date"]).timestamp()
            for upload in page.get("Uploads", []):
                key, started = upload["Key"][len(self._prefix) :], upload["Initiated"].timestamp()
                if max(0.0, now - started) < older_than_seconds:  # the date of a reply has no fractions
                    continue
                try:
                    parts = self._call("list", "list_parts", key, UploadId=upload["UploadId"]).get("Parts", [])
                except NotFound:
                    continue  # it was finished or aborted meanwhile
                if not dry_run:
                    with contextlib.suppress(NotFound):  # it was, or the reply to the first request was lost
                        self._call("delete", "abort_multipart_upload", key, UploadId=upload["UploadId"])
                left.append(Entry(key, sum(part["Size"] for part in parts), started))
            if not page.get("IsTruncated"):
                return left
            marker = {"KeyMarker": page["NextKeyMarker"], "UploadIdMarker": page["NextUploadIdMarker"]}

    def free_bytes(self) -> int | None:
        return None

    # Requests

    def _ask(self, key: str, verb: str, request: Callable[[], T], patience: Patience = BRIEF) -> T:
        try:
            return persist(request, may_pass, patience)
        except Exception as error:
            if isinstance(error, StoreError) or not is_of_client(error):
                raise
            raise translate(error, self.url, key, verb) from (None if is_of_credentials(error) else harmless(error))

    def _call(self, verb: str, method: str, key: str | None, *, patience: Patience = BRIEF, **arguments: Any) -> Any:
        if key is not None:
            arguments["Key"] = self._prefix + key

        def request() -> Any:
            if isinstance(body := arguments.get("Body"), Body):
                body.seek(0)
                try:
                    return getattr(self._connection.client, method)(Bucket=self.bucket, **arguments)
                except Exception:
                    if body.failure is not None:
                        raise body.failure from None
                    raise
            return self._connection.call(method, **arguments)

        return self._ask(method if key is None else key, verb, request, patience)

    def _each(self, keys: Iterable[K], one: Callable[[K], T]) -> dict[K, T]:
        wanted = list(keys)
        if len(wanted) < 2:
            return {key: one(key) for key in wanted}
        pool = ThreadPoolExecutor(min(AT_ONCE, len(wanted)), thread_name_prefix="s3")
        try:
            return dict(zip(wanted, pool.map(one, wanted), strict=True))
        finally:
            pool.shutdown(cancel_futures=True)

    def _read(self, key: str, limit: int) -> Object:
        import obstore

        reply = obstore.get(self._connection.reader, self._prefix + key)
        etag, found = str(reply.meta["e_tag"]), int(reply.meta["size"])
        if found > limit:
            raise TooLarge(key, self.url, limit, found, etag)
        return Object(bytes(reply.bytes()), etag)

    def _delete_batch(self, keys: list[str]) -> None:
        wanted = {"Objects": [{"Key": self._prefix + key} for key in keys], "Quiet": True}
        try:
            failures = self._call("delete", "delete_objects", None, Delete=wanted).get("Errors", [])
        except StoreError as error:
            if reply_of(error.__cause__ or error).code not in ("NotImplemented", "MissingContentMD5"):
                raise
            failures = [{"Key": self._prefix + key} for key in keys]
        # One by one: what one key is refused for, its own request says.
        self._each((str(failure["Key"])[len(self._prefix) :] for failure in failures), self.delete)

    # Large objects

    def _upload(
        self, key: str, path: Path, file: int, offset: int, size: int, report: Progress, hashed: Stamp | None
    ) -> None:
        if size > PART_BYTES * MAX_PARTS:
            raise StoreError(f"{key}: {size} bytes are more than one object may have ({PART_BYTES * MAX_PARTS})")
        parts = split(size, PART_BYTES)
        if len(parts) < 2:
            body = _body(
                key, file, offset, size, mmap(-1, Body.PIECE_BYTES), lambda found: check_named(key, found, path)
            )
            content = body if size > THREADED_FROM else b"".join(bytes(piece) for piece in iter(body.read, b""))
            self._call("write", "put_object", key, patience=PATIENT, Body=content)
            report(size)
            return
        upload = self._call("write", "create_multipart_upload", key, patience=PATIENT)["UploadId"]

        def send(index: int, part: Part, buffer: mmap) -> dict[str, Any]:
            start, length = part
            body = _body(key, file, offset + start, length, buffer)
            number = {"UploadId": upload, "PartNumber": index + 1}
            etag = self._call("write", "upload_part", key, patience=PATIENT, Body=body, **number)["ETag"]
            return {"PartNumber": index + 1, "ETag": etag}

        hasher, before = blake3(), Stamp.of(file)
        # Where the file is what it was before it was hashed, and stays so, there is no need to hash it again.
        known = hashed is not None and hashed.settled and hashed == before

        def arrived(part: Part, number: dict[str, Any]) -> dict[str, Any]:
            if not known and named_digest(key) is not None:
                with contextlib.suppress(EOFError):  # then the digest is wrong
                    update_from(hasher, path, offset + part[0], part[1])
            report(part[1])
            return number

        try:
            sent = Transfer(parts, send, arrived, kept=False).run()
            # What was sent is what was hashed after it or long before, as the file has not changed since.
            after = Stamp.of(file)
            if not known:
                check_named(key, hasher.hexdigest() if after.written == before.written else "", path)
            elif after != before:
                check_named(key, "", path)
        except BaseException:
            self._abort(key, upload)
            raise
        self._complete(key, upload, sent, size)

    def _complete(self, key: str, upload: str, sent: list[dict[str, Any]], size: int) -> None:
        try:
            arguments = {"UploadId": upload, "MultipartUpload": {"Parts": sent}}
            self._call("write", "complete_multipart_upload", key, patience=PATIENT, **arguments)
        except StoreError as error:
            # An upload that is gone may be one that was completed, and whose reply was lost.
            if reply_of(error.__cause__ or error).code != "NoSuchUpload" or self.size(key) != size:
                self._abort(key, upload)
                raise

    def _abort(self, key: str, upload: str) -> None:
        try:
            self._connection.call("abort_multipart_upload", Key=self._prefix + key, UploadId=upload)
        except Exception:  # noqa: BLE001 - what stays is found by `sweep`; the failure that led here is the one to tell
            return

    def _whole(self, key: str, size: int | None) -> bytes:
        try:
            data = self.get(key, limit=GET_PART_BYTES).data
        except TooLarge as error:
            raise wrong_size(key, self.url, size or 0, error.found) from error
        if size is not None and len(data) != size:
            raise wrong_size(key, self.url, size, len(data))
        return data

    def _download(self, key: str, file: BinaryIO, offset: int, total: int, report: Progress) -> str:
        hasher = blake3()

        def fetch(index: int, part: Part, buffer: mmap) -> memoryview:
            data = self._ask(key, "read", lambda: self._read_range(key, part, buffer, total), PATIENT)
            write_at(file.fileno(), data, offset + part[0])
            return data

        def arrived(part: Part, data: memoryview) -> None:
            hasher.update(data)
            report(part[1])

        Transfer(split(total, GET_PART_BYTES), fetch, arrived).run()
        return hasher.hexdigest()

    def _read_range(self, key: str, part: Part, buffer: mmap, total: int) -> memoryview:
        """The bytes of a part of an object that has `total` of them; in `buffer`, or in memory of their own."""
        try:
            if self._ranges_are_marked:
                return self._read_marked(key, part, total)
            return self._read_unmarked(key, part, total, memoryview(buffer)[: part[1]])
        except Exception as error:
            if "NotPartial" in str(error):
                self._ranges_are_marked = False
                return self._read_range(key, part, buffer, total)
            if reply_of(error).status == 416:
                raise wrong_size(key, self.url, total, self.size(key) or 0) from error
            raise

    def _read_marked(self, key: str, part: Part, total: int) -> memoryview:
        import obstore

        wanted = {"range": (part[0], part[0] + part[1])}
        reply = obstore.get(self._connection.reader, self._prefix + key, options=wanted)
        found = int(reply.meta["size"])
        if found != total:
            raise wrong_size(key, self.url, total, found)
        data = memoryview(reply.bytes())
        if len(data) != part[1]:
            raise _wrong_length(self.url, part, len(data))
        return data

    def _read_unmarked(self, key: str, part: Part, total: int, view: memoryview) -> memoryview:
        """From a server that answers with the range, but calls it the whole object (200, not 206): obstore refuses that."""
        start, length = part
        arguments = {"Bucket": self.bucket, "Key": self._prefix + key, "Range": f"bytes={start}-{start + length - 1}"}
        reply = self._connection.client.get_object(**arguments)
        with reply["Body"] as body:
            whole = str(reply.get("ContentRange", "")).rpartition("/")[2]
            if whole.isdigit() and int(whole) != total:
                raise wrong_size(key, self.url, total, int(whole))
            if reply["ContentLength"] != length:
                raise _wrong_length(self.url, part, reply["ContentLength"])
            filled = 0
            while filled < length:
                count = body.readinto(view[filled : filled + RECEIVED_BYTES])
                if not count:
                    raise ConnectionError("the reply ended early")
                filled += count
        return view


def _wrong_length(url: str, part: Part, found: int) -> StoreError:
    return StoreError(f"{url} answered a request for {part[1]} bytes with {found}")


def _bare(etag: str) -> str:
    """Without its quotes, as in Amazon's own examples: Ceph's radosgw refuses a quoted ETag that is the right one."""
    return etag.strip('"') if etag.startswith('"') else etag


def _unwatched(moved: int) -> None:
    """Progress that nobody watches."""


def _opened(path: Path, offset: int | None) -> BinaryIO:
    """`path` for writing from `offset` on. Without one it is a new file: what it was may be a link to an object."""
    if offset is None:
        path.unlink(missing_ok=True)
    return open(os.open(path, os.O_WRONLY | os.O_CREAT, 0o666), "wb", buffering=0)


def _body(
    key: str, file: int, offset: int, size: int, buffer: mmap, check: Callable[[str], None] | None = None
) -> Body:
    """A range of a file, read by way of the first bytes of `buffer`. `check` gets its digest before the last piece is sent."""
    view = memoryview(buffer)
    hasher, hashed = blake3(), 0

    def take(start: int, count: int) -> memoryview:
        nonlocal hasher, hashed
        got = os.preadv(file, [view[:count]], offset + start) if count else 0
        try:
            if got == 0 < count:
                raise StoreError(f"{key}: the file to store became shorter while it was read")
            if check is not None and start in (0, hashed):
                hasher = blake3() if start == 0 else hasher
                hasher.update(view[:got])
                hashed = start + got
                if hashed == size:
                    check(hasher.hexdigest())
        except StoreError as error:
            body.failure = error
            raise
        return view[:got]

    body = Body(size, take)
    return body
