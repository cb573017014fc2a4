"""A backend that stands in front of another and watches what a store asks of it."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from artifacts.backend import Object
from artifacts.errors import StoreUnavailable
from artifacts.store import Store


class Watched:
    """A backend that counts what goes through, and can be told to fail or to lie."""

    def __init__(self, backend: Any) -> None:
        self._backend = backend
        self._lock = threading.Lock()
        self.calls: list[tuple[str, Any]] = []
        self.sent = 0
        """Payload bytes put."""
        self.fails_after: int | None = None
        self.lies = 0
        """Times that a blob is read with other bytes than it has."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    def named(self, *names: str) -> list[Any]:
        """What the calls of these names were about."""
        return [about for name, about in self.calls if name in names]

    def sizes(self, keys: Iterable[str]) -> dict[str, int | None]:
        self.calls.append(("sizes", sorted(keys)))
        return self._backend.sizes(keys)

    def size(self, key: str) -> int | None:
        self.calls.append(("size", key))
        return self._backend.size(key)

    def put(self, key: str, data: bytes, **condition: Any) -> str:
        if key.startswith("v1/cas/"):
            self._count(key, len(data))
        else:
            self.calls.append(("put", key))
        return self._backend.put(key, data, **condition)

    def _count(self, key: str, size: int) -> None:
        with self._lock:
            if self.fails_after == len(self.named("put_file")):
                raise StoreUnavailable("the server went away")
            self.calls.append(("put_file", key))
            self.sent += size

    def put_file(self, key: str, path: Path, *, offset: int = 0, size: int | None = None, **options: Any) -> None:
        self._count(key, path.stat().st_size - offset if size is None else size)
        self._backend.put_file(key, path, offset=offset, size=size, **options)

    def get(self, key: str, **how: Any) -> Object:
        found: Object = self._backend.get(key, **how)
        if self.lies and key.startswith("v1/cas/"):
            self.lies -= 1
            return replace(found, data=found.data[:-1] + bytes([found.data[-1] ^ 1]))
        return found

    def get_file(self, key: str, path: Path, **how: Any) -> str:
        self.calls.append(("get_file", key))
        found = self._backend.get_file(key, path, **how)
        if self.lies:
            self.lies -= 1
            return "0" * 64
        return found


def watch(store: Store) -> Watched:
    """Have everything that a store does from now on counted."""
    store.backend = Watched(store.backend)
    return store.backend
