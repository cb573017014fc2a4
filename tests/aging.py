"""A backend that stands in front of another and has a clock of its own, so that tests can let days pass on any store."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from artifacts.backend import Backend, Entry
from artifacts.clock import Clock

DAY = 86400.0


class AgingBackend:
    """Objects get the time of `now` when they are written; hooks run before a call with a key that has their prefix."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self.url = backend.url
        self.now = 1e9
        self.times: dict[str, float] = {}
        self.hooks: list[tuple[str, str, Callable[[], None]]] = []
        """(verb, prefix of the key, what to do, once, after the call)."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    def put(self, key: str, data: bytes, **conditions: Any) -> str:
        etag = self._backend.put(key, data, **conditions)
        self.times[key] = self.now
        self._run("put", key)
        return etag

    def put_file(self, key: str, *arguments: Any, **options: Any) -> None:
        self._backend.put_file(key, *arguments, **options)
        self.times[key] = self.now

    def delete_many(self, keys: list[str]) -> None:
        keys = list(keys)
        self._backend.delete_many(keys)
        self._run("delete", keys[0] if keys else "")

    def list(self, prefix: str) -> Iterator[Entry]:
        for entry in self._backend.list(prefix):
            yield replace(entry, modified=self.times.get(entry.key, self.now))

    def _run(self, verb: str, key: str) -> None:
        for hook in [h for h in self.hooks if h[0] == verb and key.startswith(h[1])]:
            self.hooks.remove(hook)
            hook[2]()


class FastClock(Clock):
    """Sleeping takes no time; the hours go by on a counter. `then` is called after each sleep."""

    def __init__(self, then: Callable[[], None] = lambda: None) -> None:
        self.now = 0.0
        self.sleeps = 0
        self.then = then

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.sleeps += 1
        self.then()
