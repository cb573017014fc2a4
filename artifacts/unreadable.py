"""Going on past the objects that the disk of a local store cannot read: for verification and repair alone.

To everybody else such an object is a store that does not answer, because nothing can be concluded from it; least of all
that a stage has to run again.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from artifacts.backend import MAX_OBJECT_BYTES, Backend, Object
from artifacts.errors import Damaged, Unreadable
from artifacts.store import Store

NOT_READ = "cannot be read by this machine"
"""What is wrong with such an object begins so."""


class Tolerant:
    """A backend to which an object that cannot be read is a damaged one."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self.url = backend.url
        self.unreadable: dict[str, str] = {}
        """Key -> why it cannot be read."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    def get(self, key: str, *, limit: int = MAX_OBJECT_BYTES) -> Object:
        """As `Backend.get`; `Damaged` where the object cannot be read."""
        try:
            return self._backend.get(key, limit=limit)
        except Unreadable as error:
            raise Damaged(self._note(key, error)) from error

    def get_many(self, keys: Iterable[str], *, limit: int = MAX_OBJECT_BYTES) -> dict[str, Object | None]:
        """As `Backend.get_many`; an object that cannot be read comes without bytes, and without an ETag."""
        keys = list(keys)
        try:
            return self._backend.get_many(keys, limit=limit)
        except Unreadable:
            found: dict[str, Object | None] = {}
            for key in keys:
                try:
                    found.update(self._backend.get_many([key], limit=limit))
                except Unreadable as error:
                    self._note(key, error)
                    found[key] = Object(b"", "")
            return found

    def is_unreadable(self, key: str) -> bool:
        """Whether the object cannot be read now, whatever was so before."""
        self.unreadable.pop(key, None)
        self.get_many([key])
        return key in self.unreadable

    def get_file(self, key: str, path: Path, **options: Any) -> str:
        """As `Backend.get_file`; `Damaged` where the object cannot be read."""
        try:
            return self._backend.get_file(key, path, **options)
        except Unreadable as error:
            raise Damaged(self._note(key, error)) from error

    def _note(self, key: str, error: Unreadable) -> str:
        self.unreadable[key] = f"{NOT_READ}: {error.reason}"
        return self.unreadable[key]


def tolerant(store: Store) -> tuple[Store, Tolerant]:
    """The same store, seen through a `Tolerant` backend."""
    backend = store.backend if isinstance(store.backend, Tolerant) else Tolerant(store.backend)
    seen = Store(backend, clock=store.clock, at_once=store.at_once)
    seen.say = store.say
    return seen, backend
