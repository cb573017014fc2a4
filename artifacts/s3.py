"""A store in an S3 bucket, through s3fs, with the conditional writes that S3 itself enforces.

Small objects go through single `PutObject` requests with `If-None-Match: *` or `If-Match: <etag>`, never through file
objects: an exception inside a `with fs.open(...)` publishes the torn object, and an empty exclusive create overwrites.
Listings are never cached. Credentials, endpoint and region come from the usual AWS settings (environment, profile,
instance role); none of them is ever part of a URL, a record or an error message.

One instance belongs to one process: s3fs refuses to be used after a fork, and a new instance hangs in a child forked
from a process that already used one. Workers are therefore forked from a process that never opens a store.
"""

from __future__ import annotations

import asyncio
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from email.utils import parsedate_to_datetime
from itertools import islice
from pathlib import Path
from typing import Any

from blake3 import blake3

from artifacts.backend import MAX_OBJECT_BYTES, Entry, Object, Progress, wrong_size
from artifacts.errors import Conflict, NotFound, StoreError, StoreUnavailable, TooLarge

PART_BYTES = 16 << 20
"""Size of one part of a large transfer; four at a time keep the memory near 64 MiB."""
PARTS_AT_ONCE = 4
GETS_AT_ONCE = 64


class S3Backend:
    """Objects under `bucket/prefix`."""

    def __init__(self, bucket_and_prefix: str) -> None:
        import s3fs

        bucket, _, prefix = bucket_and_prefix.strip("/").partition("/")
        self.bucket = bucket
        self._prefix = f"{prefix}/" if prefix else ""
        self.url = f"s3://{bucket}/{prefix}".rstrip("/")
        self._fs = s3fs.S3FileSystem(
            use_listings_cache=False,
            skip_instance_cache=True,
            max_concurrency=PARTS_AT_ONCE,
            default_block_size=PART_BYTES,
            config_kwargs={
                "max_pool_connections": GETS_AT_ONCE,
                "connect_timeout": 5,
                "read_timeout": 60,
                "retries": {"mode": "standard", "max_attempts": 3},
            },
        )

    def get(self, key: str, *, limit: int = MAX_OBJECT_BYTES) -> Object:
        return self._run(self._get(key, limit), key, "read")

    def get_many(self, keys: Iterable[str], *, limit: int = MAX_OBJECT_BYTES) -> dict[str, Object | None]:
        async def one(key: str) -> Object | None:
            try:
                return await self._get(key, limit)
            except FileNotFoundError:
                return None
            except TooLarge as error:
                return Object(b"", error.etag)

        return self._gather(one, keys, "read")

    def put(self, key: str, data: bytes, *, if_absent: bool = False, if_match: str | None = None) -> str:
        condition = {"IfNoneMatch": "*"} if if_absent else {} if if_match is None else {"IfMatch": if_match}
        reply = self._run(self._call("put_object", Key=self._prefix + key, Body=data, **condition), key, "write")
        return str(reply["ETag"])

    def put_file(
        self, key: str, path: Path, *, offset: int = 0, size: int | None = None, progress: Progress | None = None
    ) -> None:
        length = path.stat().st_size - offset if size is None else size
        self._run(self._upload(key, path, offset, length, progress or _ignore), key, "write")

    def get_file(
        self,
        key: str,
        path: Path,
        *,
        offset: int | None = None,
        size: int | None = None,
        progress: Progress | None = None,
    ) -> str:
        if offset is None:
            path.unlink(missing_ok=True)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT, 0o666)
        try:
            return self._run(self._download(key, descriptor, offset or 0, size, progress or _ignore), key, "read")
        finally:
            os.close(descriptor)

    def size(self, key: str) -> int | None:
        try:
            reply = self._run(self._call("head_object", Key=self._prefix + key), key, "stat")
        except NotFound:
            return None
        return int(reply["ContentLength"])

    def sizes(self, keys: Iterable[str]) -> dict[str, int | None]:
        async def one(key: str) -> int | None:
            try:
                return int((await self._call("head_object", Key=self._prefix + key))["ContentLength"])
            except FileNotFoundError:
                return None

        return self._gather(one, keys, "stat")

    def list(self, prefix: str) -> Iterator[Entry]:
        token: dict[str, str] = {}
        while True:
            request = self._call("list_objects_v2", Prefix=self._prefix + prefix, **token)
            page = self._run(request, prefix, "list")
            for row in page.get("Contents", []):
                key = str(row["Key"])[len(self._prefix) :]
                yield Entry(key, int(row["Size"]), row["LastModified"].timestamp())
            if not page.get("IsTruncated"):
                return
            token = {"ContinuationToken": page["NextContinuationToken"]}

    def delete(self, key: str) -> None:
        self._run(self._call("delete_object", Key=self._prefix + key), key, "delete")

    def delete_many(self, keys: Iterable[str]) -> None:
        async def one(batch: tuple[str, ...]) -> None:
            wanted = {"Objects": [{"Key": self._prefix + key} for key in batch], "Quiet": True}
            reply = await self._call("delete_objects", Delete=wanted)
            for failure in reply.get("Errors", []):
                raise OSError(f"{failure.get('Code')} for {failure.get('Key')}")

        every = sorted(set(keys))
        self._gather(one, [tuple(every[n : n + 1000]) for n in range(0, len(every), 1000)], "delete", at_once=4)

    def sweep(self, older_than_seconds: float, *, dry_run: bool = False) -> list[Entry]:
        """Abort multipart uploads; the bytes of one that is not finished are kept, and paid for, until then."""
        marker: dict[str, str] = {}
        left = []
        while True:
            page = self._run(self._call("list_multipart_uploads", Prefix=self._prefix, **marker), "uploads", "list")
            now = parsedate_to_datetime(page["ResponseMetadata"]["HTTPHeaders"]["date"]).timestamp()
            for upload in page.get("Uploads", []):
                if now - upload["Initiated"].timestamp() < older_than_seconds:
                    continue
                name = {"Key": upload["Key"], "UploadId": upload["UploadId"]}
                key = upload["Key"][len(self._prefix) :]
                parts = self._run(self._call("list_parts", **name), key, "list").get("Parts", [])
                left.append(Entry(key, sum(part["Size"] for part in parts), upload["Initiated"].timestamp()))
                if not dry_run:
                    self._run(self._call("abort_multipart_upload", **name), key, "delete")
            if not page.get("IsTruncated"):
                return left
            marker = {"KeyMarker": page["NextKeyMarker"], "UploadIdMarker": page["NextUploadIdMarker"]}

    def free_bytes(self) -> int | None:
        return None

    async def _upload(self, key: str, path: Path, offset: int, size: int, progress: Progress) -> None:
        name = self._prefix + key
        with open(path, "rb") as file:
            if size <= PART_BYTES:
                await self._call("put_object", Key=name, Body=os.pread(file.fileno(), size, offset))
                progress(size)
                return
            upload = (await self._call("create_multipart_upload", Key=name))["UploadId"]
            slots = asyncio.Semaphore(PARTS_AT_ONCE)

            async def part(number: int, start: int) -> dict[str, Any]:
                async with slots:
                    length = min(PART_BYTES, size - start)
                    body = await asyncio.to_thread(os.pread, file.fileno(), length, offset + start)
                    reply = await self._call("upload_part", Key=name, UploadId=upload, PartNumber=number, Body=body)
                    progress(length)
                    return {"PartNumber": number, "ETag": reply["ETag"]}

            try:
                async with asyncio.TaskGroup() as tasks:
                    starts = range(0, size, PART_BYTES)
                    parts = [tasks.create_task(part(n, start)) for n, start in enumerate(starts, 1)]
                done = {"Parts": [task.result() for task in parts]}
                await self._call("complete_multipart_upload", Key=name, UploadId=upload, MultipartUpload=done)
            except BaseException:
                await self._call("abort_multipart_upload", Key=name, UploadId=upload)
                raise

    async def _download(self, key: str, file: int, offset: int, size: int | None, progress: Progress) -> str:
        name = self._prefix + key
        head = await self._call("head_object", Key=name)
        total = int(head["ContentLength"])
        if size is not None and total != size:
            raise wrong_size(key, self.url, size, total)
        hasher = blake3()

        async def part(start: int) -> bytes:
            last = min(start + PART_BYTES, total) - 1
            reply = await self._call("get_object", Key=name, Range=f"bytes={start}-{last}", IfMatch=head["ETag"])
            async with reply["Body"] as body:
                data = await body.read()
            await asyncio.to_thread(os.pwrite, file, data, offset + start)
            return data

        waiting: deque[asyncio.Task[bytes]] = deque()
        starts = iter(range(0, total, PART_BYTES))
        try:
            waiting.extend(asyncio.create_task(part(start)) for start in islice(starts, PARTS_AT_ONCE))
            while waiting:
                data = await waiting.popleft()
                await asyncio.to_thread(hasher.update, data)
                progress(len(data))
                waiting.extend(asyncio.create_task(part(start)) for start in islice(starts, 1))
        finally:
            for task in waiting:
                task.cancel()
            await asyncio.gather(*waiting, return_exceptions=True)
        return hasher.hexdigest()

    def _gather(self, one: Callable[[Any], Any], items: Iterable[Any], verb: str, at_once: int = GETS_AT_ONCE) -> Any:
        items = list(items)

        async def slot(item: Any, slots: asyncio.Semaphore) -> Any:
            async with slots:
                return await one(item)

        async def every() -> list[Any]:
            slots = asyncio.Semaphore(at_once)
            return await asyncio.gather(*(slot(item, slots) for item in items))

        return dict(zip(items, self._run(every(), f"{len(items)} objects", verb), strict=True))

    async def _call(self, method: str, **arguments: Any) -> dict[str, Any]:
        return await self._fs._call_s3(method, Bucket=self.bucket, **arguments)

    async def _get(self, key: str, limit: int) -> Object:
        reply = await self._call("get_object", Key=self._prefix + key)
        async with reply["Body"] as body:
            if (found := int(reply["ContentLength"])) > limit:
                body.close()
                raise TooLarge(key, self.url, limit, found, str(reply["ETag"]))
            return Object(await body.read(), str(reply["ETag"]))

    def _run(self, call: Any, key: str, verb: str) -> Any:
        from fsspec.asyn import sync

        async def run() -> Any:
            return await call

        try:
            return sync(self._fs.loop, run)
        except StoreError:
            raise
        except Exception as error:
            raise self._translate(error, key, verb) from error

    def _translate(self, error: Exception, key: str, verb: str) -> Exception:
        while isinstance(error, ExceptionGroup):
            error = error.exceptions[0]
        status = _http_status(error)
        if status in (409, 412) or (status is None and isinstance(error, FileExistsError)):
            return Conflict(f"{key} in {self.url} exists or changed since it was read")
        if status == 404 or (status is None and isinstance(error, FileNotFoundError)):
            if _error_code(error) == "NoSuchBucket":
                return StoreUnavailable(
                    f"the bucket {self.bucket!r} of the store {self.url} does not exist; create it first"
                )
            return NotFound(f"{key} in {self.url}")
        if status in (401, 403) or isinstance(error, PermissionError) or "Credentials" in type(error).__name__:
            advice = "check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY or AWS_PROFILE, and the bucket's policy"
        else:
            advice = "check AWS_ENDPOINT_URL and the network, then run the same command again; nothing was lost"
        reason = f"HTTP {status} {_error_code(error)}" if status else f"{type(error).__name__}: {error}"
        return StoreUnavailable(f"cannot {verb} {key} in the store {self.url}: {reason.strip()}; {advice}")


def _ignore(moved: int) -> None:
    """Progress that nobody watches."""


def _response(error: BaseException) -> dict[str, Any]:
    seen: BaseException | None = error
    while seen is not None:
        response = getattr(seen, "response", None)
        if isinstance(response, dict):
            return response
        seen = seen.__cause__
    return {}


def _http_status(error: BaseException) -> int | None:
    status = _response(error).get("ResponseMetadata", {}).get("HTTPStatusCode")
    return int(status) if status else None


def _error_code(error: BaseException) -> str:
    return str(_response(error).get("Error", {}).get("Code", ""))
