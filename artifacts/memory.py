"""A store in this process's memory, for tests and for reading the protocol: the backend contract in its smallest form."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from artifacts.backend import Entry, Object, get_each
from artifacts.errors import Conflict, NotFound

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

    def get(self, key: str) -> Object:
        with self._lock:
            if key not in self._objects:
                raise NotFound(key)
            data, etag, _ = self._objects[key]
            return Object(data, etag)

    def get_many(self, keys: Iterable[str]) -> dict[str, Object | None]:
        return get_each(self, keys)

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

    def get_file(self, key: str, path: Path) -> None:
        path.write_bytes(self.get(key).data)

    def put_file(self, key: str, path: Path) -> None:
        self.put(key, path.read_bytes())

    def size(self, key: str) -> int | None:
        with self._lock:
            return len(self._objects[key][0]) if key in self._objects else None

    def list(self, prefix: str) -> Iterator[Entry]:
        with self._lock:
            rows = [Entry(k, len(d), t) for k, (d, _, t) in sorted(self._objects.items()) if k.startswith(prefix)]
        yield from rows

    def delete(self, key: str) -> None:
        with self._lock:
            self._objects.pop(key, None)
