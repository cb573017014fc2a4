"""The store's server, and the unreliable network before it, as a backend of the real protocol.

The server is strongly consistent, as S3 is: every effect is atomic. What can go wrong lies between it and the caller:
throttling (503), conflicts (409), errors with and without an effect (500), time-outs, lost replies, requests that arrive
twice or late, refusals (403, 412) without a reason, and minutes without any answer. Requests are sent again by the rules of
the real client, see `artifacts.retry`. ETags are digests of the content, as on S3, so that a value that comes back is taken
for the one that was seen before.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from artifacts.backend import MAX_OBJECT_BYTES, Entry, Object, Progress, wrong_size
from artifacts.digest import digest_bytes
from artifacts.errors import Conflict, NotFound, StoreUnavailable
from artifacts.retry import BRIEF, PATIENT, SHORTEST_PAUSE, Patience, persist
from artifacts.s3_client import READ_SECONDS
from artifacts.stamp import Stamp
from tests.simulation.scheduler import EPOCH, Process, World

PAGE = 7
"""Objects per page of a listing: between two pages anything may happen."""
LATE_SECONDS = 15.0
"""Longest time after which a request arrives that its sender had given up, or arrives for the second time."""
TIMEOUT_SECONDS = float(READ_SECONDS)
"""Time after which the client gives a request up."""


class Passing(Exception):
    """An answer, or the lack of one, after which the client sends the request again."""


class Watcher(Protocol):
    """Told of every change, by whom it was asked for."""

    def changed(self, key: str, before: bytes | None, after: bytes | None, by: Process) -> None:
        """An object was put (`after`) or deleted (None)."""

    def read(self, key: str, found: bool, by: Process) -> None:
        """An object was asked for."""


class Server:
    """Objects and their times of change, by the server's own clock."""

    def __init__(self, world: World, watcher: Watcher, objects: dict[str, tuple[bytes, str, float]]) -> None:
        self.objects = objects
        self.down_until = 0.0
        """Virtual time until which nobody gets an answer."""
        self._world = world
        self._watcher = watcher

    def get(self, key: str, by: Process) -> Object:
        """The object, or `NotFound`."""
        found = self.objects.get(key)
        self._watcher.read(key, found is not None, by)
        if found is None:
            raise NotFound(key)
        return Object(found[0], found[1])

    def put(self, key: str, data: bytes, by: Process, if_absent: bool = False, if_match: str | None = None) -> str:
        """Store the object if the condition allows it."""
        before = self.objects.get(key)
        if (if_absent and before is not None) or (if_match is not None and (before is None or before[1] != if_match)):
            raise Conflict(key)
        etag = digest_bytes(data)[:32]
        self.objects[key] = (bytes(data), etag, EPOCH + self._world.now)
        self._world.note(f"   PUT {short(key)}{' new' if before is None else ''} by {by.name}")
        self._watcher.changed(key, None if before is None else before[0], data, by)
        return etag

    def delete(self, key: str, by: Process) -> None:
        """Remove the object."""
        before = self.objects.pop(key, None)
        if before is not None:
            self._world.note(f"   DELETE {short(key)} by {by.name}")
            self._watcher.changed(key, before[0], None, by)


def short(key: str) -> str:
    """A key as a person reads it in a trace: long names are cut."""
    return "/".join(part if len(part) < 40 else part[:8] for part in key.split("/"))


class SimulatedBackend:
    """The backend protocol, with a point before and after every request, and its faults between."""

    url = "memory://simulation"

    def __init__(self, world: World, server: Server, draw: Callable[[str, str], str | None]) -> None:
        self._world = world
        self._server = server
        self._draw = draw
        """(verb, key) -> the fault of this request, if any."""
        self._one_by_one = world.rng.random() < 0.5
        """As a local folder does it; otherwise as S3 does."""

    def get(self, key: str, *, limit: int = MAX_OBJECT_BYTES) -> Object:
        by = self._world.current
        return self._call("get", key, lambda: self._server.get(key, by))

    def get_many(self, keys: Iterable[str], *, limit: int = MAX_OBJECT_BYTES) -> dict[str, Object | None]:
        return self._each(keys, self._get_or_none)

    def put(self, key: str, data: bytes, *, if_absent: bool = False, if_match: str | None = None) -> str:
        by = self._world.current
        verb = "create" if if_absent else "put" if if_match is None else "swap"
        return self._call(verb, key, lambda: self._server.put(key, data, by, if_absent, if_match))

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
        by = self._world.current
        self._call("put", key, lambda: self._server.put(key, data, by), PATIENT)
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
        data = self.get(key).data
        if size is not None and len(data) != size:
            raise wrong_size(key, self.url, size, len(data))
        if offset is None:
            path.write_bytes(data)
        else:
            with open(os.open(path, os.O_WRONLY | os.O_CREAT, 0o666), "wb") as file:
                file.seek(offset)
                file.write(data)
        if progress is not None:
            progress(len(data))
        return digest_bytes(data)

    def size(self, key: str) -> int | None:
        return self._call("head", key, lambda: self._size(key))

    def sizes(self, keys: Iterable[str]) -> dict[str, int | None]:
        return self._each(keys, self.size)

    def list(self, prefix: str) -> Iterator[Entry]:
        last = ""
        while True:
            page = self._call("list", prefix, lambda after=last: self._page(prefix, after))
            yield from page
            if len(page) < PAGE:
                return
            last = page[-1].key

    def delete(self, key: str) -> None:
        by = self._world.current
        self._call("delete", key, lambda: self._server.delete(key, by))

    def delete_many(self, keys: Iterable[str]) -> None:
        """Keys are drawn in the very moment in which they are sent: one by one, or all in one request.

        The objects of one request go in any order, and the rest of them even if the sender has died meanwhile.
        """
        world, by = self._world, self._world.current
        left = iter(keys)
        if self._one_by_one:
            while True:
                world.point("delete of the next object")
                if (key := next(left, None)) is None:
                    return
                self._call("delete", key, lambda key=key: self._server.delete(key, by), at_once=True)
        world.point("delete of many objects")
        some = sorted(left)

        def effect() -> None:
            waiting = set(some)

            def delete(key: str) -> None:
                self._server.delete(key, by)
                waiting.discard(key)

            for key in some:
                world.later(world.rng.uniform(0.0, 0.5), partial(delete, key))
            world.wait(lambda: not waiting, None)

        self._call("delete", "of many objects", effect, at_once=True)

    def sweep(self, older_than_seconds: float, *, dry_run: bool = False) -> list[Entry]:
        return []

    def free_bytes(self) -> int | None:
        return None

    def _get_or_none(self, key: str) -> Object | None:
        try:
            return self.get(key)
        except NotFound:
            return None

    def _each(self, keys: Iterable[str], one: Callable[[str], Any]) -> dict[str, Any]:
        """One request per key in any order: what a round of concurrent requests may look like."""
        wanted = list(dict.fromkeys(keys))
        order = wanted[:]
        self._world.rng.shuffle(order)
        found = {key: one(key) for key in order}
        return {key: found[key] for key in wanted}

    def _size(self, key: str) -> int | None:
        stored = self._server.objects.get(key)
        return None if stored is None else len(stored[0])

    def _page(self, prefix: str, after: str) -> list[Entry]:
        keys = sorted(k for k in self._server.objects if k.startswith(prefix) and k > after)[:PAGE]
        return [Entry(k, len(self._server.objects[k][0]), self._server.objects[k][2]) for k in keys]

    def _call(
        self, verb: str, key: str, effect: Callable[[], Any], patience: Patience = BRIEF, *, at_once: bool = False
    ) -> Any:
        """Send a request until it is answered, with the pauses and the patience of the S3 client.

        With `at_once` nothing comes between the call and its first request.
        """
        world = self._world
        world.counts["store calls"] += 1
        requests = 0

        def request() -> Any:
            nonlocal requests
            requests += 1
            if requests > 1 or not at_once:
                world.point(f"{verb} {key}")
            return self._send(verb, key, effect)

        try:
            answer = persist(request, lambda error: isinstance(error, Passing), patience)
        except (NotFound, Conflict):
            world.point(f"{verb} {key} answered")
            raise
        except Passing as error:
            raise StoreUnavailable(f"simulated: {error} for {verb} {key}") from error
        world.point(f"{verb} {key} answered")
        return answer

    def _send(self, verb: str, key: str, effect: Callable[[], Any]) -> Any:
        """One request."""
        world = self._world
        world.counts["requests"] += 1
        if world.now < self._server.down_until:
            world.counts["requests during an outage"] += 1
            self._pass(world.rng.uniform(0.0, 5.0))
            raise Passing("no connection")
        fault = self._draw(verb, key)
        if fault is None:
            if world.trace is not None:
                world.note(f"{verb} {short(key)}")
            return effect()
        world.note(f"{verb} {short(key)} !{fault}")
        return self._faulty(fault, verb, key, effect)

    def _faulty(self, fault: str, verb: str, key: str, effect: Callable[[], Any]) -> Any:
        world = self._world
        if fault == "slow":
            self._pass(world.rng.uniform(0.1, 40.0))
            return effect()
        if fault == "outage":
            self._server.down_until = world.now + world.rng.uniform(1.0, 90.0)
            raise Passing("no connection")
        if fault == "403":
            raise StoreUnavailable(f"simulated: HTTP 403 for {verb} {key}")
        if fault == "412":
            raise Conflict(f"simulated: HTTP 412 for {verb} {key}")
        if fault in ("409", "throttle"):
            raise Passing(f"HTTP {'409' if fault == '409' else '503 SlowDown'}")
        if fault == "500":
            if world.rng.random() < 0.5:
                self._ignoring(effect)
            raise Passing("HTTP 500")
        if fault == "time-out":
            self._give_up()
            raise Passing("no answer in time")
        if fault == "lost reply":
            self._ignoring(effect)
            self._give_up()
            raise Passing("the connection broke")
        if fault == "duplicate":
            world.later(world.rng.uniform(0.0, LATE_SECONDS), lambda: self._ignoring(effect))
            if verb == "delete":  # whatever sends a request twice does so because the first answer is slow in coming
                self._pass(SHORTEST_PAUSE)
            return effect()
        if fault == "late":
            world.later(world.rng.uniform(0.0, LATE_SECONDS), lambda: self._ignoring(effect))
            self._give_up()
            raise Passing("the connection broke")
        raise AssertionError(fault)

    def _give_up(self) -> None:
        """Wait until the connection breaks, which is soon, or until the client's patience with it is at its end."""
        rng = self._world.rng
        self._pass(rng.uniform(0.0, 1.0) if rng.random() < 0.5 else rng.uniform(0.0, TIMEOUT_SECONDS))

    def _pass(self, seconds: float) -> None:
        self._world.wait(None, seconds)
        self._world.point("after a pause")

    @staticmethod
    def _ignoring(effect: Callable[[], Any]) -> None:
        try:
            effect()
        except (Conflict, NotFound):
            pass
