"""The few verbs a backend must have, and how a store URL becomes one.

Every backend gives the same guarantees, which the rest of the store is built on:

* `put` and `put_file` are atomic: a reader sees the old object, the new one or none, never a part of one;
* `put(if_absent=True)` succeeds for exactly one of several racing writers, the others get `Conflict`;
* `put(if_match=etag)` succeeds only if the object still has that ETag, otherwise `Conflict`;
* only a missing object raises `NotFound`; every other failure is a `StoreUnavailable`.
"""

from __future__ import annotations

import os
import posixpath
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Protocol, TypeVar

from artifacts.digest import is_digest
from artifacts.errors import Conflict, Damaged, NotFound, StoreError, StoreUnavailable, TooLarge
from artifacts.stamp import Stamp

T = TypeVar("T")
MAX_OBJECT_BYTES = 16 << 20
"""Most bytes that are read into memory at once, so that no store can exhaust it. Blobs are streamed and have no limit."""
READ_AT_ONCE = 500
"""Small objects read in one round of concurrent requests."""
SMALL_BYTES = 256 << 10
"""Most bytes of an object that is read together with others."""
EXPECTED = "a folder, file:///folder, s3://bucket/prefix or memory://name"
Progress = Callable[[int], None]
"""Called with the number of further bytes that were moved; from any thread."""
BUCKET = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")
SCHEME = re.compile(r"(?:s3[an]?|gs|gcs|az|abfss?|adl|ftp|sftp|ssh|hdfs|https?|file|memory)")
"""Schemes that an error may repeat. Anything else before a colon may be a key."""


@dataclass(frozen=True, slots=True)
class Object:
    """Bytes of a small object and the ETag for a later compare-and-swap. An ETag is opaque: it is not a digest."""

    data: bytes
    etag: str


@dataclass(frozen=True, slots=True)
class Entry:
    """One row of a listing: key, size in bytes, time of last change (Unix seconds, the store's clock)."""

    key: str
    size: int
    modified: float


class Backend(Protocol):
    """A flat space of keys to bytes."""

    url: str
    """How a person would name this store again. Holds no credentials."""

    def get(self, key: str, *, limit: int = MAX_OBJECT_BYTES) -> Object:
        """Read a small object.

        Raises:
            TooLarge: it has more than `limit` bytes, which were not read.
        """

    def get_many(self, keys: Iterable[str], *, limit: int = MAX_OBJECT_BYTES) -> dict[str, Object | None]:
        """Read several small objects at once; None for those not found.

        One of more than `limit` bytes comes without its bytes, which no reader takes for a valid object.
        """

    def put(self, key: str, data: bytes, *, if_absent: bool = False, if_match: str | None = None) -> str:
        """Write a small object and return its new ETag."""

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
        """Stream `size` bytes of the file `path` from `offset` (default: all from there on) into an object.

        `hashed` is what the file was before its digest was taken: a backend need not take the digest again where that
        tells that it was not written since.

        Raises:
            StoreError: the key is a blob's, and these are not the bytes that it names: the file changed; nothing is stored.
        """

    def get_file(
        self,
        key: str,
        path: Path,
        *,
        offset: int | None = None,
        size: int | None = None,
        progress: Progress | None = None,
    ) -> str:
        """Stream an object into the file `path`; return the BLAKE3 digest of the bytes received.

        The digest is computed while the bytes arrive; the caller compares it. Without `offset` the file becomes exactly
        the object, and may be a read-only link to it; with one, the object is written from there on, and the bytes
        outside that range stay as they are.

        Raises:
            Damaged: the object is not `size` bytes long; nothing was written.
        """

    def size(self, key: str) -> int | None:
        """Size in bytes, or None when there is no such object."""

    def sizes(self, keys: Iterable[str]) -> dict[str, int | None]:
        """`size` of several objects at once."""

    def list(self, prefix: str) -> Iterator[Entry]:
        """All objects whose key starts with `prefix`."""

    def delete(self, key: str) -> None:
        """Remove an object; a missing one is not an error."""

    def delete_many(self, keys: Iterable[str]) -> None:
        """Remove several objects; missing ones are no error."""

    def sweep(self, older_than_seconds: float, *, dry_run: bool = False) -> list[Entry]:
        """Remove what killed writers left unfinished longer ago than this, and return it. None of it is an object."""

    def free_bytes(self) -> int | None:
        """Space left, or None where that cannot be told."""


def wrong_size(key: str, url: str, expected: int, found: int) -> Damaged:
    """The error of an object that is longer or shorter than it must be."""
    return Damaged(f"{key} in the store {url} is {found} bytes long; expected {expected}")


def named_digest(key: str) -> str | None:
    """The digest that the bytes of an object must have by its key; None where the key says nothing of them."""
    kind, _, name = key.rpartition("/")
    return name if kind.startswith("v1/cas/") and is_digest(name) else None


def check_named(key: str, digest: str, path: Path) -> None:
    """Refuse bytes of the file `path` that are not those which the key of a blob names.

    Raises:
        StoreError: the file is not any more what it was when its digest was taken.
    """
    if named_digest(key) not in (None, digest):
        raise StoreError(
            f"the file {path} was changed while it was being stored, so it is not stored under the digest that it had; "
            "look for what still writes it (a thread or a process of the stage's body), then run the same command again"
        )


@contextmanager
def local_file(path: Path) -> Iterator[None]:
    """Around work on a file that is not the store's: a full or unreadable disk of this machine is no error of the store."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise StoreUnavailable(f"the file {path}: {reason}; check its permissions and the free space") from error


def write_at(file: int, data: bytes | memoryview, offset: int) -> None:
    """Write all of `data`: a disk that fills up takes some bytes, and says so only when it is asked to take the rest."""
    view = memoryview(data)
    while view:
        count = os.pwrite(file, view, offset)
        view, offset = view[count:], offset + count


def put_own(backend: Backend, key: str, data: bytes, *, if_absent: bool = False, if_match: str | None = None) -> None:
    """A conditional `put` of bytes that nobody else would put there.

    The refusal may answer a second attempt after the reply to the first was lost, so it counts only if other bytes
    stand there.

    Raises:
        Conflict: the object exists, or changed, and is not this one.
    """
    try:
        backend.put(key, data, if_absent=if_absent, if_match=if_match)
    except Conflict:
        standing = backend.get_many([key])[key]
        if standing is None or standing.data != data:
            raise


def get_each(backend: Backend, keys: Iterable[str], limit: int) -> dict[str, Object | None]:
    """`get_many` for a backend on which one read after the other is fast enough."""
    found: dict[str, Object | None] = {}
    for key in keys:
        try:
            found[key] = backend.get(key, limit=limit)
        except NotFound:
            found[key] = None
        except TooLarge as error:
            found[key] = Object(b"", error.etag)
    return found


def rounds(names: Iterable[T]) -> Iterator[list[T]]:
    """`names`, as many at a time as one round of requests asks for, each once in a round."""
    left = iter(names)
    while some := list(dict.fromkeys(islice(left, READ_AT_ONCE))):
        yield some


def read_many(backend: Backend, keys: Iterable[str]) -> Iterator[tuple[str, Object | None]]:
    """`get_many` of any number of keys, in their order, a round at a time.

    What is not small is read by itself, so that no store can fill the memory with one round of what is just not too large:
    it takes at most `READ_AT_ONCE * SMALL_BYTES`, or one object of `MAX_OBJECT_BYTES`.
    """
    for some in rounds(keys):
        found = backend.get_many(some, limit=SMALL_BYTES)
        for key in some:
            stored = found.pop(key)
            if stored is not None and not stored.data:
                stored = backend.get_many([key])[key]
            yield key, stored


def open_backend(url: str) -> Backend:
    """The backend for a store URL: a local folder (a path or `file://`), `s3://bucket/prefix`, or `memory://name`.

    A URL holds no credentials, and one that seems to is refused without being repeated; nor is any that is no URL.

    Raises:
        StoreError: the URL is not one of these.
    """
    scheme, separator, rest = url.partition("://")
    if not separator:
        _check_folder(url)
        from artifacts.local import LocalBackend

        return LocalBackend(Path(url))
    if "@" in scheme or "@" in (rest.partition("/")[0] if scheme == "file" else rest):
        raise StoreError(
            "the store's URL contains '@', as if it held a user or a password (it is not repeated here); "
            f"credentials belong in AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY or AWS_PROFILE. Expected {EXPECTED}"
        )
    if scheme in ("file", "s3") and ("?" in rest or "#" in rest):
        raise StoreError(f"the store's {scheme}:// URL has a query or a fragment; expected {EXPECTED}")
    if scheme == "file":
        if not rest.startswith("/"):
            raise StoreError(
                "the store's file:// URL does not go on with '/'; it names a folder on this machine: expected file:///folder"
            )
        from artifacts.local import LocalBackend

        return LocalBackend(Path(rest))
    if scheme == "s3":
        _check_bucket(rest)
        from artifacts.redact import guard_logs
        from artifacts.s3 import S3Backend

        guard_logs()

        return S3Backend(rest)
    if scheme == "memory":
        from artifacts.memory import MemoryBackend

        return MemoryBackend.named(rest)
    known = repr(scheme) if SCHEME.fullmatch(scheme) else "before '://' (not repeated here: it may be a key)"
    raise StoreError(f"the store's URL has an unknown scheme, {known}; expected {EXPECTED}")


def _check_folder(name: str) -> None:
    """Refuse what was meant as a URL. Of that only the scheme may be repeated: what follows may be a key and a secret."""
    if not name:
        raise StoreError(f"the store is named by ''; expected {EXPECTED}")
    meant = re.match(rf"({SCHEME.pattern})(:|//)", name, re.IGNORECASE)
    if meant:
        raise StoreError(f"the store's name begins with {meant[0]!r}: a URL needs '://'; expected {EXPECTED}")
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:", name):
        raise StoreError(
            "the store's name has a ':' as after a URL's scheme (it is not repeated here, as it may hold a password): "
            f"a URL needs '://'; expected {EXPECTED} (write ./ before the name of a folder)"
        )


def _check_bucket(bucket_and_prefix: str) -> None:
    bucket, _, prefix = bucket_and_prefix.partition("/")
    if not BUCKET.fullmatch(bucket):
        named = (
            repr(bucket) if re.fullmatch(r"[A-Za-z0-9._-]{0,16}", bucket) else "what follows s3:// (not repeated here)"
        )
        raise StoreError(
            f"the store's URL: {named} is not a bucket's name (3 to 63 lower-case letters, digits, '.' and '-'); "
            "expected s3://bucket/prefix"
        )
    segments = prefix.removesuffix("/").split("/") if prefix else []
    if {"", ".", ".."} & set(segments):
        # One client would take them as they are, the other out: reads and writes would go to different places.
        meant = posixpath.normpath(f"/{prefix}").strip("/")
        raise StoreError(
            f"the prefix of the store s3://{bucket}/{prefix} has an empty, '.' or '..' part; "
            f"write {f's3://{bucket}/{meant}'.rstrip('/')}"
        )
