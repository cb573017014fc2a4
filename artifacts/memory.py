"""A store in this process's memory, for tests and for reading the protocol: the backend contract in its smallest form."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from artifacts.backend import MAX_OBJECT_BYTES, Entry, Object, Progress, check_named, get_each, wrong_size
from artifacts.digest import digest_bytes
from artifacts.errors import Conflict, NotFound, TooLarge
from artifacts.stamp import Stamp

_NAMED: dict[str, MemoryBackend] = {}


class MemoryBackend:
    """Keys to bytes in a dict, behind one lock."""

    def __init__(self, name: str = "") -> None:
        self.url = f"memory://{name}"
        self._lock = threading.Lock()
        self._objects: dict[str, tuple[bytes, str, float]] = {}
        self._writes = 0

    @classmethod
    def named(cls, name: str) -> MemoryBackend:
        """The one backend of this name in this process."""
        return _NAMED.setdefault(name, cls(name))

    def get(self, key: str, *, limit: int = MAX_OBJECT_BYTES) -> Object:
        with self._lock:
            if key not in self._objects:
                raise NotFound(key)
            data, etag, _ = self._objects[key]
            if len(data) > limit:
                raise TooLarge(key, self.url, limit, len(data), etag)
            return Object(data, etag)

    def get_many(self, keys: Iterable[str], *, limit: int = MAX_OBJECT_BYTES) -> dict[str, Object | None]:
        return get_each(self, keys, limit)

    def put(self, key: str, data: bytes, *, if_absent: bool = False, if_match: str | None = None) -> str:
        with self._lock:
            current = self._objects.get(key)
            if if_absent and current is not None:
                raise Conflict(key)
            if if_match is not None and (current is None or current[1] != if_match):
                raise Conflict(key)
            self._writes += 1
            etag = str(self._writes)
            self._objects[key] = (bytes(data), etag, time.time())
            return etag

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
        with open(path, "rb") as file:
            file.seek(offset)
            data = file.read(-1 if size is None else size)
        check_named(key, digest_bytes(data), path)
        self.put(key, data)
        if progress is not None:
            progress(len(data))

    def get_file(
        self,
        key: str,
        path: Path,
        *,
        offset: int | None = None,
        size: int | None = None,
        progress: Progress | None = None,
    ) -> str:
        data = self.get(key, limit=sys.maxsize).data
        if size is not None and len(data) != size:
            raise wrong_size(key, self.url, size, len(data))
        if offset is None:
            path.unlink(missing_ok=True)
            path.write_bytes(data)
        else:
            with open(os.open(path, os.O_WRONLY | os.O_CREAT, 0o666), "wb") as file:
                file.seek(offset)
                file.write(data)
        if progress is not None:
            progress(len(data))
        return digest_bytes(data)

    def size(self, key: str) -> int | None:
        with self._lock:
            return len(self._objects[key][0]) if key in self._objects else None

    def sizes(self, keys: Iterable[str]) -> dict[str, int | None]:
        return {key: self.size(key) for key in keys}

    def list(self, prefix: str) -> Iterator[Entry]:
        with self._lock:
            found = sorted(key for key in self._objects if key.startswith(prefix))
            rows = [Entry(key, len(self._objects[key][0]), self._objects[key][2]) for key in found]
        yield from rows

    def delete(self, key: str) -> None:
        with self._lock:
            self._objects.pop(key, None)

    def delete_many(self, keys: Iterable[str]) -> None:
        for key in keys:
            self.delete(key)

    def sweep(self, older_than_seconds: float, *, dry_run: bool = False) -> list[Entry]:
        return []

    def free_bytes(self) -> int | None:
        return None
