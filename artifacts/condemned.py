"""The condemned list: a hold on objects that are about to be deleted, for collections, and for the removal of damaged ones.

It belongs to one process at a time, and writers that want something on it wait (see `artifacts.intent`). Every change of it
is a compare-and-swap, so a process that was taken for dead is told so by its next beat and deletes nothing more.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence

from artifacts.backend import Backend, read_many
from artifacts.clock import Clock
from artifacts.digest import canonical_json, unseal
from artifacts.errors import Conflict, NotFound, StoreError, StoreUnavailable
from artifacts.intent import (
    BEAT_LASTS_SECONDS,
    CONDEMNED,
    INTENTS,
    SETTLE_SECONDS,
    TAKEOVER_SECONDS,
    Condemned,
    Say,
    read_condemned,
    set_free,
)
from artifacts.lease import this_process
from artifacts.retry import SHORTEST_PAUSE

BEAT_SECONDS = 10.0
"""A batch begins only under a beat that is younger than this."""


class SweepStopped(StoreError):
    """The condemned list was taken from this collection, or is another's; nothing more was deleted."""


def remove_damaged(
    backend: Backend,
    keys: Iterable[str],
    is_damaged: Callable[[str], bool],
    clock: Clock,
    *,
    spare_announced: bool,
    say: Say = lambda text: None,
) -> list[str]:
    """Delete those of `keys` that are still damaged, while nobody can come to rely on them; return which they were.

    Who found them may have looked long ago, and a writer may have put them anew since. With `spare_announced` those are
    left that a writer relies on now: he may be about to put them.
    """
    condemned, removed = CondemnedList(backend, clock, say), []
    try:
        condemned.put_patiently(keys := list(keys))
        spared = _announced(backend) if spare_announced else frozenset()
        for key in keys:
            if key not in spared and is_damaged(key):
                condemned.delete([key])
                removed.append(key)
    finally:
        condemned.free()
    return removed


def _announced(backend: Backend) -> frozenset[str]:
    """What writers rely on."""
    found: set[str] = set()
    for _, stored in read_many(backend, [entry.key for entry in backend.list(INTENTS)]):
        try:
            found.update(map(str, unseal(stored.data)["keys"] if stored is not None else ()))
        except (ValueError, TypeError, KeyError):
            continue
    return frozenset(found)


def reset_damaged(backend: Backend, now: float, clock: Clock, say: Say, *, wait: bool) -> bool:
    """Set a damaged list free, once no deletion can be under way that was announced on it; say whether that was done.

    That is so when it has not changed for the takeover time by the store's clock, which shows `now`. With `wait`, the rest
    of that time is waited for.
    """
    found = read_condemned(backend)
    if found is None or found.state != "damaged":
        return False
    changed = [entry.modified for entry in backend.list(CONDEMNED) if entry.key == CONDEMNED]
    left = TAKEOVER_SECONDS - (now - max(changed, default=now))
    if left > 0:
        if not wait:
            return False
        say(found.reason_to_wait(backend.url, clock))
        clock.sleep(left)
    return set_free(backend, found)


class CondemnedList:
    """This collection's hold on the list."""

    def __init__(self, backend: Backend, clock: Clock, say: Say = lambda text: None) -> None:
        self._backend = backend
        self._clock = clock
        self._say = say
        self._owner = uuid.uuid4().hex
        self._etag: str | None = None
        self._keys: list[str] = []
        self._sent = 0.0
        self._unsettled: list[tuple[float, Sequence[str]]] = []
        """Deletions of which a request may still be on its way, and until when."""

    def put_patiently(self, keys: Iterable[str]) -> None:
        """`put`, once whoever else is deleting has ended."""
        keys = list(keys)
        while True:
            try:
                return self.put(keys)
            except SweepStopped:
                self._clock.sleep(1.0)

    def put(self, keys: Iterable[str]) -> None:
        """Announce that these objects are about to be deleted, and no others any more but those that still settle."""
        now = self._clock.monotonic()
        self._unsettled = [row for row in self._unsettled if row[0] > now]
        self._keys = sorted({*keys, *(key for _, batch in self._unsettled for key in batch)})
        if self._etag is not None:
            self._beat()
            return
        while not self._write("held", self._await_free()):
            pass

    def delete(self, batch: Sequence[str]) -> None:
        """Delete these, which the list has to name.

        A request that was not answered at once may have been sent again, and the first one may be carried out after the
        second was answered. So the list goes on naming its objects for a while.
        """
        self.prove()
        sent = self._clock.monotonic()
        try:
            self._backend.delete_many(self.while_proven(batch))
        finally:
            now = self._clock.monotonic()
            if now - sent >= SHORTEST_PAUSE:
                self._unsettled.append((now + SETTLE_SECONDS, batch))

    def prove(self) -> None:
        """Make sure that the list is still this collection's, before a batch is deleted."""
        if self._clock.monotonic() - self._sent >= BEAT_SECONDS:
            self._beat()
        self._require_beat()

    def while_proven(self, keys: Iterable[str]) -> Iterator[str]:
        """Each key, if the last beat still lasts when it is asked for, which is when its deletion is sent.

        A process that was stopped within a batch, for longer than others wait for it, deletes nothing of the rest.
        """
        for key in keys:
            self._require_beat()
            yield key

    def _require_beat(self) -> None:
        if self._clock.monotonic() - self._sent >= BEAT_LASTS_SECONDS:
            raise StoreUnavailable(
                f"this collection stood still, or the store {self._backend.url} took more than "
                f"{BEAT_LASTS_SECONDS:.0f} s to answer; nothing more was deleted; run the same command again"
            )

    def free(self) -> None:
        """Let waiting writers go on. A list that was lost is left to whoever has it now."""
        if self._etag is not None:
            if self._unsettled:
                self._clock.sleep(max(0.0, self._unsettled[-1][0] - self._clock.monotonic()))
            self._keys = []
            self._write("free", self._etag)
            self._etag = None

    def _beat(self) -> None:
        assert self._etag is not None
        if not self._write("held", self._etag):
            self._etag = None
            raise SweepStopped(
                f"this collection was taken for dead, because it stood still for too long; the store "
                f"{self._backend.url} has all that is in use, and the next collection goes on"
            )

    def _await_free(self) -> str | None:
        """The ETag over which the list may be written; None when it does not exist."""
        seen: tuple[str, float] | None = None
        while (found := read_condemned(self._backend)) is not None and found.state != "free":
            now = self._clock.monotonic()
            if seen is not None and seen[0] != found.etag:
                raise SweepStopped(
                    f"another collection is deleting in the store {self._backend.url}; run it again later"
                )
            if seen is None:
                self._say(found.reason_to_wait(self._backend.url, self._clock))
                seen = (found.etag, now)
            if now - seen[1] >= found.patience:
                break
            self._clock.sleep(min(1.0, found.patience / 10))
        return None if found is None else found.etag

    def _write(self, state: str, etag: str | None) -> bool:
        body = {"state": state, "owner": self._owner, "beat": uuid.uuid4().hex, "holder": this_process()}
        data = canonical_json({"schema": 1, **body, "keys": self._keys})
        sent = self._clock.monotonic()
        try:
            self._etag = self._backend.put(CONDEMNED, data, if_absent=etag is None, if_match=etag)
        except (Conflict, NotFound):
            # The refusal may answer a retry of our own write whose first reply was lost: the nonce tells.
            found: Condemned | None = read_condemned(self._backend)
            if found is None or found.beat != body["beat"]:
                return False
            self._etag = found.etag
        self._sent = sent
        return True
