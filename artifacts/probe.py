"""What a store really guarantees, found out by trying it: leases and records are only as good as its conditional writes.

A server may accept a condition and ignore it, check it before the write and not with it, or know one condition and not
the other; it says so in no version number. Sixteen writers that race for one key several times tell a condition that
is checked atomically from one that merely looks right when tried once.

Blobs need none of this: they are named by their content, and writing one twice is harmless.
"""

from __future__ import annotations

import os
import threading
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from artifacts.backend import Backend
from artifacts.digest import digest_bytes
from artifacts.errors import Conflict, NotFound, NotSupported, StoreError, StoreUnavailable

RACERS = 16
ROUNDS = 5
"""Races per condition on a server."""
REMEMBER_SECONDS = 86400.0
CREATE_ONLY, SWAP, ONE_CREATOR, ONE_SWAPPER = "create-only", "compare-and-swap", "one creator", "one swapper"
READS, LISTS = "read after write", "list after write"


@dataclass(frozen=True, slots=True)
class Guarantee:
    """One thing that a store must do, and what it did."""

    name: str
    holds: bool
    seen: str
    """What was tried and what came of it."""
    without: str
    """What could go wrong if it did not hold."""


WITHOUT = {
    CREATE_ONLY: "a second worker could replace the one record of a stage",
    SWAP: "two workers could hold the lease of one stage",
    ONE_CREATOR: "two workers could each believe that theirs is the one record of a stage",
    ONE_SWAPPER: "two workers could take over the lease of one stage at once",
    READS: "a finished stage could look unfinished and run again",
    LISTS: "collection could overlook what a worker relies on",
}


@dataclass(slots=True)
class _Probe:
    backend: Backend
    races: int
    root: str = field(default_factory=lambda: f"v1/probe/{uuid.uuid4().hex}")
    found: list[Guarantee] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)

    def key(self, name: str) -> str:
        self.keys.append(f"{self.root}/{name}")
        return self.keys[-1]

    def note(self, name: str, complaints: list[str], fine: str) -> None:
        seen = "; ".join(complaints) if complaints else fine
        self.found.append(Guarantee(name, not complaints, seen, WITHOUT[name]))

    def run(self) -> list[Guarantee]:
        try:
            self._one_writer()
            sound = {guarantee.name for guarantee in self.found if guarantee.holds}
            if self.races and CREATE_ONLY in sound:
                self._race_to_create()
            if self.races and SWAP in sound:
                self._race_to_swap()
            return self.found
        finally:
            with suppress(StoreUnavailable):  # a later collection removes them; an error above says more
                self.backend.delete_many(self.keys)

    def _one_writer(self) -> None:
        key = self.key("one")
        self._create(key, b"first")
        complaints = []
        for data, what in ((b"second", "a second create"), (b"", "a second create without content")):
            if self._accepts(lambda data=data: self.backend.put(key, data, if_absent=True)):  # type: ignore[misc]
                complaints.append(f"{what} of the same key was accepted")
        self.note(CREATE_ONLY, complaints, "a second create was refused, with content and without")
        self._swap(key)
        self._see(key)

    def _create(self, key: str, data: bytes) -> str:
        try:
            return self.backend.put(key, data, if_absent=True)
        except Conflict:
            stored = self.backend.get(key)  # the reply to the first attempt may have been lost
            if stored.data != data:
                raise
            return stored.etag

    def _swap(self, key: str) -> None:
        etag = self.backend.get(key).etag
        complaints = []
        try:
            if not self._accepts(lambda: self.backend.put(key, b"swapped", if_match=etag)):
                if self.backend.get(key).data != b"swapped":
                    complaints.append("a write with the present ETag was refused")
            if self._accepts(lambda: self.backend.put(key, b"stale", if_match=etag)):
                complaints.append("a write with an outdated ETag was accepted")
        except NotSupported:
            complaints.append("the server does not implement If-Match")
        self.note(SWAP, complaints, "a write with the present ETag was accepted, one with an outdated ETag refused")

    def _see(self, key: str) -> None:
        written = uuid.uuid4().hex.encode()
        self.backend.put(key, written)
        try:
            complaints = [] if self.backend.get(key).data == written else ["a read returned the previous content"]
        except NotFound:
            complaints = ["a read did not find what was just written"]
        self.note(READS, complaints, "a read returned what was just written")
        listed = [entry.key for entry in self.backend.list(f"{self.root}/")]
        complaints = [] if key in listed else ["a listing did not show what was just written"]
        self.note(LISTS, complaints, "a listing showed what was just written")

    def _accepts(self, write: Callable[[], str]) -> bool:
        try:
            write()
        except Conflict:
            return False
        return True

    def _race_to_create(self) -> None:
        complaints = []
        for number in range(self.races):
            key = self.key(f"create-{number}")
            complaints += self._race(key, lambda data, key=key: self.backend.put(key, data, if_absent=True))  # type: ignore[misc]
        fine = f"{self.races} x {RACERS} writers raced to create a key, one won each time"
        self.note(ONE_CREATOR, complaints[:1], fine)

    def _race_to_swap(self) -> None:
        complaints = []
        for number in range(self.races):
            key = self.key(f"swap-{number}")
            etag = self._create(key, b"start")
            swap = lambda data, key=key, etag=etag: self.backend.put(key, data, if_match=etag)  # noqa: E731
            complaints += self._race(key, swap)
        self.note(
            ONE_SWAPPER, complaints[:1], f"{self.races} x {RACERS} writers raced to swap a key, one won each time"
        )

    def _race(self, key: str, write: Callable[[bytes], str]) -> list[str]:
        won: list[bytes] = []
        failed: list[Exception] = []
        start = threading.Barrier(RACERS)

        def racer(name: bytes) -> None:
            start.wait()
            try:
                write(name)
                won.append(name)
            except Conflict:
                pass
            except Exception as error:  # noqa: BLE001 - raised below, by the thread that can be caught
                failed.append(error)

        racers = [threading.Thread(target=racer, args=(b"racer %d" % number,)) for number in range(RACERS)]
        for thread in racers:
            thread.start()
        for thread in racers:
            thread.join()
        if failed:
            raise failed[0]
        if len(won) > 1:
            return [f"{len(won)} of {RACERS} writers that raced for one key were all told that they had won"]
        # Nobody knows of having won when the winner's reply was lost; its content stands all the same.
        standing = self.backend.get(key).data
        if won and standing != won[0] or not standing.startswith(b"racer"):
            return ["the content after a race is not the winner's"]
        return []


def examine(backend: Backend, races: int = ROUNDS) -> list[Guarantee]:
    """Try every guarantee that the store's protocol relies on. What it writes is removed again.

    Races are only run when the simple tries came out right.

    Raises:
        StoreUnavailable: the store cannot be written or read at all.
    """
    return _Probe(backend, races).run()


def check(backend: Backend, cache: Path | None = None) -> None:
    """Refuse a store on which running stages would not be safe.

    There are races on a server only: in a folder the kernel decides. A server that was found good is noted in the folder
    `cache`, as a hint, and not raced again for a day.

    Raises:
        StoreError: a guarantee does not hold; the message says which, what it is needed for and what still works.
        StoreUnavailable: the store cannot be written or read at all.
    """
    note = None
    races = ROUNDS if backend.url.startswith("s3://") else 0
    if cache is not None and races:
        endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or ""
        note = cache / "probed" / digest_bytes(f"{endpoint} {backend.url}".encode())[:32]
        races = 0 if _is_fresh(note) else races
    lacking = [guarantee for guarantee in examine(backend, races) if not guarantee.holds]
    if lacking:
        raise StoreError(explain(backend.url, lacking))
    if note is not None and races:
        try:
            note.parent.mkdir(parents=True, exist_ok=True)
            note.touch()
        except OSError:
            return  # only a hint


def explain(url: str, lacking: list[Guarantee]) -> str:
    """Why no stage may run on a store that lacks these guarantees, and what to do."""
    listed = "; ".join(f"{one.name} does not hold ({one.seen}), so {one.without}" for one in lacking)
    return (
        f"no stage can be run on the store {url}: {listed}. "
        "Reading, planning and exporting from it still work, and so do its blobs, which are named by their content. "
        "To run stages use a local folder or an S3 server with atomic If-None-Match and If-Match, such as Amazon's, with --store"
    )


def _is_fresh(note: Path) -> bool:
    try:
        return 0 <= time.time() - note.stat().st_mtime < REMEMBER_SECONDS
    except OSError:
        return False
