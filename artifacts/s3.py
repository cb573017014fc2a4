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
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from artifacts.backend import Entry, Object
from artifacts.errors import Conflict, NotFound, StoreUnavailable

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

    def get(self, key: str) -> Object:
        return self._run(self._get(key), key, "read")

    def get_many(self, keys: Iterable[str]) -> dict[str, Object | None]:
        keys = list(keys)

        async def one(key: str, slots: asyncio.Semaphore) -> Object | None:
            async with slots:
                try:
                    return await self._get(key)
                except FileNotFoundError:
                    return None

        async def every() -> list[Object | None]:
            slots = asyncio.Semaphore(GETS_AT_ONCE)
            return await asyncio.gather(*(one(key, slots) for key in keys))

        return dict(zip(keys, self._run(every(), f"{len(keys)} objects", "read"), strict=True))

    def put(self, key: str, data: bytes, *, if_absent: bool = False, if_match: str | None = None) -> str:
        condition = {"IfNoneMatch": "*"} if if_absent else {} if if_match is None else {"IfMatch": if_match}
        reply = self._run(self._call("put_object", Key=self._prefix + key, Body=data, **condition), key, "write")
        return str(reply["ETag"])

    def get_file(self, key: str, path: Path) -> None:
        call = self._fs._get_file(self._name(key), str(path), max_concurrency=PARTS_AT_ONCE)
        self._run(call, key, "read")

    def put_file(self, key: str, path: Path) -> None:
        call = self._fs._put_file(str(path), self._name(key), chunksize=PART_BYTES, max_concurrency=PARTS_AT_ONCE)
        self._run(call, key, "write")

    def size(self, key: str) -> int | None:
        try:
            reply = self._run(self._call("head_object", Key=self._prefix + key), key, "stat")
        except NotFound:
            return None
        return int(reply["ContentLength"])

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

    def _name(self, key: str) -> str:
        return f"{self.bucket}/{self._prefix}{key}"

    async def _call(self, method: str, **arguments: Any) -> dict[str, Any]:
        return await self._fs._call_s3(method, Bucket=self.bucket, **arguments)

    async def _get(self, key: str) -> Object:
        reply = await self._call("get_object", Key=self._prefix + key)
        async with reply["Body"] as body:
            return Object(await body.read(), str(reply["ETag"]))

    def _run(self, call: Any, key: str, verb: str) -> Any:
        from fsspec.asyn import sync

        async def run() -> Any:
            return await call

        try:
            return sync(self._fs.loop, run)
        except Exception as error:
            raise self._translate(error, key, verb) from error

    def _translate(self, error: Exception, key: str, verb: str) -> Exception:
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
