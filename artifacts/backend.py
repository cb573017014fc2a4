"""The few verbs a backend must have, and how a store URL becomes one.

Every backend gives the same guarantees, which the rest of the store is built on:

* `put` and `put_file` are atomic: a reader sees the old object, the new one or none, never a part of one;
* `put(if_absent=True)` succeeds for exactly one of several racing writers, the others get `Conflict`;
* `put(if_match=etag)` succeeds only if the object still has that ETag, otherwise `Conflict`;
* only a missing object raises `NotFound`; every other failure is a `StoreUnavailable`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from artifacts.errors import NotFound, StoreError


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

    def get(self, key: str) -> Object:
        """Read a small object."""

    def get_many(self, keys: Iterable[str]) -> dict[str, Object | None]:
        """Read several small objects at once; None for those not found."""

    def put(self, key: str, data: bytes, *, if_absent: bool = False, if_match: str | None = None) -> str:
        """Write a small object and return its new ETag."""

    def get_file(self, key: str, path: Path) -> None:
        """Stream an object into the file `path`. The caller verifies the bytes."""

    def put_file(self, key: str, path: Path) -> None:
        """Stream the file `path` into an object."""

    def size(self, key: str) -> int | None:
        """Size in bytes, or None when there is no such object."""

    def list(self, prefix: str) -> Iterator[Entry]:
        """All objects whose key starts with `prefix`."""

    def delete(self, key: str) -> None:
        """Remove an object; a missing one is not an error."""


def get_each(backend: Backend, keys: Iterable[str]) -> dict[str, Object | None]:
    """`get_many` for a backend on which one read after the other is fast enough."""
    found: dict[str, Object | None] = {}
    for key in keys:
        try:
            found[key] = backend.get(key)
        except NotFound:
            found[key] = None
    return found


def open_backend(url: str) -> Backend:
    """The backend for a store URL: a local folder (a path or `file://`), `s3://bucket/prefix`, or `memory://name`.

    Raises:
        StoreError: the URL's scheme is not one of these.
    """
    scheme, separator, rest = url.partition("://")
    if not separator:
        from artifacts.local import LocalBackend

        return LocalBackend(Path(url))
    if scheme == "file":
        from artifacts.local import LocalBackend

        return LocalBackend(Path(rest))
    if scheme == "s3":
        from artifacts.s3 import S3Backend

        return S3Backend(rest)
    if scheme == "memory":
        from artifacts.memory import MemoryBackend

        return MemoryBackend.named(rest)
    raise StoreError(
        f"store {url!r}: unknown scheme {scheme!r}; expected a folder, file:///folder, s3://bucket/prefix or memory://name"
    )
