"""Collection: finding what no root needs any more, and deleting it, while others write, without a lock.

It takes two visits. The first marks (see `artifacts.mark`) and notes what is unused and older than the grace period as
pending, with the store's time. A later one, at least a grace period after that, marks again and deletes what is still
unused. Deleting is announced and goes in rounds (see `artifacts.intent`): put the condemned list, look once more at what has
come to be in use, spare that, delete the rest; records first, then trees, parts lists and blobs, so that an interrupted
collection leaves unused objects and never a record without them. Being killed at any point costs nothing but time.

Ages are reckoned by the store's own clock. Nothing is deleted while anything that had to be read is damaged.
What has no referrer at all (checkpoints whose lease has not beaten, old notes) goes by age alone, if it was as old at the
visit before. So a clock that is set ahead makes nothing old that anybody uses: what counts is its time at both visits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from artifacts.backend import Backend, Entry
from artifacts.clock import SYSTEM, Clock
from artifacts.condemned import reset_damaged
from artifacts.errors import StoreUnavailable
from artifacts.leftovers import remove_leftovers
from artifacts.mark import Marks, Tally, by_digest, files_of, shown, unique
from artifacts.pending import Pending
from artifacts.store import Store
from artifacts.sweep import sweep
from artifacts.trees import object_key, parts_of

GRACE_SECONDS = 7 * 86400.0
"""Age below which nothing is touched. It must exceed the longest stage, and the time a person takes to change their mind."""
KINDS = {"act": "records", "tree": "trees", "parts": "parts lists", "cas": "blobs"}
"""In the order of deletion: what refers comes before what it refers to."""
NO_RECORD = "(no record)"
"""Stands for the stage of what no record names: left by writers that were killed."""


@dataclass(slots=True)
class Report:
    """What a collection found and did."""

    dry_run: bool
    grace: float
    roots: dict[str, int] = field(default_factory=dict)
    """How many `run`, `active`, `pin`, `intent` and `young` (records) kept something."""
    in_use: dict[str, Tally] = field(default_factory=dict)
    """By kind."""
    young: Tally = field(default_factory=Tally)
    """Not in use, and younger than the grace period."""
    unused: dict[str, Tally] = field(default_factory=dict)
    """Not in use and older, by kind."""
    by_stage: dict[str, Tally] = field(default_factory=dict)
    """The same, by the stage that made it."""
    marked: Tally = field(default_factory=Tally)
    """Found unused for the first time; a collection after the grace period deletes it."""
    waiting: Tally = field(default_factory=Tally)
    """Marked by an earlier collection, not long enough ago."""
    ready: Tally = field(default_factory=Tally)
    """Marked long enough ago."""
    deleted: Tally = field(default_factory=Tally)
    """What was deleted of that; the rest came into use in the last moment."""
    next_seconds: float | None = None
    """When there will be more to delete, from now."""
    leftovers: dict[str, Tally] = field(default_factory=dict)
    """What killed workers left, by kind: removed, or with `dry_run` to be removed."""
    strays: list[str] = field(default_factory=list)
    """Names among roots and records that the store never writes: they keep nothing, and are left alone."""

    def describe(self) -> dict[str, Any]:
        """Plain data for `--json`."""
        plain: dict[str, Any] = {"dry_run": self.dry_run, "grace_seconds": self.grace, "roots": self.roots}
        for name in ("in_use", "unused", "by_stage", "leftovers"):
            plain[name] = {kind: tally.describe() for kind, tally in getattr(self, name).items()}
        for name in ("young", "marked", "waiting", "ready", "deleted"):
            plain[name] = getattr(self, name).describe()
        return {**plain, "next_seconds": self.next_seconds, "strays": self.strays}


def collect(
    store: Store,
    *,
    grace: float = GRACE_SECONDS,
    dry_run: bool = False,
    clock: Clock = SYSTEM,
    say: Callable[[str], None] = lambda text: None,
) -> Report:
    """One visit: mark, delete what was marked at least `grace` seconds ago, remember the rest. Safe to interrupt.

    Raises:
        Damaged: a root or something in use cannot be read, so nothing is known to be unused; nothing was deleted.
        StoreError: another collection is at work; what it has not deleted is left.
    """
    backend = store.backend
    now = _time_of_dry_run(backend, clock, say) if dry_run else store_time(backend)
    if not dry_run and reset_damaged(backend, now, clock, say, wait=False):
        say("the damaged list of what is being deleted was cleared")
    say("marking what is in use")
    marks = Marks(store, now, now - grace)
    marks.refresh()
    marks.require_known()
    report = Report(dry_run, grace, roots=marks.roots, strays=sorted(map(shown, marks.strays)))
    unused = _unused(marks, report)
    _by_stage(marks, unused, report)
    pending = Pending(backend)
    surely = pending.surely(now)
    since = pending.since(unused, now)
    ready = _sort_out(unused, since, now, report, {time for time, _ in pending.shards})
    if not dry_run:
        pending.replace(since, now)
        marks.young_since = surely - grace  # what is in use counts by both clocks, see `Pending`
        _delete(marks, ready, unused, since, pending, report, clock, say)
    shards = [key for _, key in pending.shards]
    report.leftovers = remove_leftovers(backend, surely, grace, shards, clock, dry_run=dry_run, say=say)
    return report


def _time_of_dry_run(backend: Backend, clock: Clock, say: Callable[[str], None]) -> float:
    """The store's time, or this machine's for somebody who may only read: nothing is decided by it then."""
    try:
        return store_time(backend)
    except StoreUnavailable as error:
        say(f"ages are reckoned by this machine's clock, because nothing can be written to the store: {error}")
        return clock.time()


def store_time(backend: Backend) -> float:
    """The time by the store's own clock: that of an object written just now, which is removed again.

    Raises:
        StoreUnavailable: the listing does not show it.
    """
    key = unique("v1/probe/clock-")
    backend.put(key, b"")
    try:
        times = [entry.modified for entry in backend.list(key)]
    finally:
        with suppress(StoreUnavailable):  # a later collection removes it
            backend.delete(key)
    if not times:
        raise StoreUnavailable(
            f"the store {backend.url} does not list an object that was just written to it; with listings that lag "
            "behind, what is in use cannot be known; nothing was deleted"
        )
    return times[0]


def _unused(marks: Marks, report: Report) -> dict[str, int]:
    """Bytes of every object that is older than the grace period and not in use, from one listing of each kind."""
    unused: dict[str, int] = {}

    def judge(kind: str, entry: Entry, keeps: bool) -> None:
        if keeps:
            tally = report.in_use.setdefault(kind, Tally())
        elif entry.modified >= marks.young_since:
            tally = report.young
        else:
            tally = report.unused.setdefault(kind, Tally())
            unused[entry.key] = entry.size
        tally.add(entry.size)

    for where, seen in marks.records.items():
        judge("act", seen.entry, where in marks.live or seen.entry.key in marks.named)
    for where, entry in marks.withdrawn.items():
        judge("act", entry, where in marks.rooted or entry.key in marks.named)
    for digest, entry in by_digest(marks.store, "tree"):
        judge("tree", entry, bytes.fromhex(digest) in marks.trees or entry.key in marks.named)
    for file, entry in marks.parts.items():
        judge("parts", entry, file in marks.blobs or entry.key in marks.named)
    for digest, entry in by_digest(marks.store, "cas"):
        judge("cas", entry, bytes.fromhex(digest) in marks.blobs or entry.key in marks.named)
    return unused


def _by_stage(marks: Marks, unused: dict[str, int], report: Report) -> None:
    """Attribute what is unused to the stage whose record is unused too; a blob of several counts for the first."""
    stages: dict[str, str] = {}
    trees: dict[str, str] = {}
    for where, seen in sorted(marks.records.items()):
        if seen.entry.key in unused:
            stages[seen.entry.key] = where[0]
            tree = seen.output.hex()
            trees.setdefault(f"v1/tree/{tree[:2]}/{tree}", where[0])
    for key, stored in marks.read(key for key in trees if key in unused):
        stages[key] = trees[key]
        try:
            files = [digest.hex() for digest in files_of(stored.data, bytes.fromhex(key[-64:]))]
        except ValueError:
            continue
        for digest in files:
            for kind in ("cas", "parts"):
                stages.setdefault(f"v1/{kind}/{digest[:2]}/{digest}", trees[key])
    lists = {key: stage for key, stage in stages.items() if key.startswith("v1/parts/") and key in unused}
    for key, stored in marks.read(lists):
        try:
            parts = parts_of(stored.data, key[-64:])
        except ValueError:
            continue
        for part in parts:
            stages.setdefault(object_key("cas", part.digest), lists[key])
    for key, size in unused.items():
        report.by_stage.setdefault(stages.get(key, NO_RECORD), Tally()).add(size)


def _sort_out(
    unused: dict[str, int], since: dict[str, float], now: float, report: Report, known: set[float]
) -> list[str]:
    """What may be deleted now, in the order of deletion."""
    ready: list[str] = []
    waits: list[float] = []
    for key, size in unused.items():
        left = since[key] + report.grace - now
        if left <= 0 and since[key] in known:
            report.ready.add(size)
            ready.append(key)
            continue
        (report.waiting if since[key] in known else report.marked).add(size)
        waits.append(left)
    report.next_seconds = min(waits, default=None)
    order = {kind: rank for rank, kind in enumerate(KINDS)}
    return sorted(ready, key=lambda key: (order[key.split("/", 2)[1]], key))


def _delete(
    marks: Marks,
    ready: Sequence[str],
    unused: dict[str, int],
    since: dict[str, float],
    pending: Pending,
    report: Report,
    clock: Clock,
    say: Callable[[str], None],
) -> None:
    if not ready:
        return

    def on_deleted(batch: Sequence[str]) -> None:
        for key in batch:
            report.deleted.add(unused[key])
        say(f"deleted {report.deleted.objects} of {len(ready)} objects")

    sweep(marks, ready, clock, on_deleted, say)
    gone = set(ready)
    pending.replace({key: time for key, time in since.items() if key not in gone}, marks.now)
