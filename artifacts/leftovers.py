"""What goes by age alone, because nothing refers to it: checkpoints and leases that nobody beats, old notes, unfinished
uploads.

A checkpoint or a lease is old when nothing of its key has changed for the grace period by the store's clock. A worker may
come back to it in that very moment, so both are removed with the lease in hand: the worker waits for it as for any other
holder, then finds no checkpoint and no lease, and starts anew; once the condemned list does not name its lease any more, as a
deletion that was not answered may arrive late.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from artifacts.backend import Backend, Entry
from artifacts.checkpoints import StoredCheckpoints
from artifacts.clock import Clock
from artifacts.condemned import CondemnedList
from artifacts.errors import LeaseLost, NotFound, StoreUnavailable
from artifacts.intent import CONDEMNED, INTENT, INTENTS, Say
from artifacts.lease import Lease, lease_key
from artifacts.mark import ACTIVE_RUNS, Tally
from artifacts.pending import INDEX

PROBE_SECONDS = 3600.0
AT_ONCE = 1000
"""Leases that are condemned together."""


@dataclass(slots=True)
class Abandoned:
    """The checkpoints and the lease of one key."""

    changed: float = 0.0
    size: Tally = field(default_factory=Tally)

    def add(self, entry: Entry) -> None:
        """One more object of the key."""
        self.changed = max(self.changed, entry.modified)
        self.size.add(entry.size)


def remove_leftovers(
    backend: Backend,
    surely: float,
    grace: float,
    pending: Iterable[str],
    clock: Clock,
    *,
    dry_run: bool,
    say: Say = lambda text: None,
) -> dict[str, Tally]:
    """Remove what is left over and return how much of each kind it was.

    `surely` is a time that has passed (see `artifacts.pending`), `pending` are the shards that are in use.
    """
    found: dict[str, Tally] = {}
    cutoff = surely - grace
    for kind, entry in _old(backend, surely, cutoff, set(pending)):
        found.setdefault(kind, Tally()).add(entry.size)
        if not dry_run:
            backend.delete(entry.key)
    tally = Tally()
    for abandoned in _remove_abandoned(backend, cutoff, clock, say, dry_run=dry_run):
        tally.objects += abandoned.size.objects
        tally.bytes += abandoned.size.bytes
    if tally.objects:
        found["checkpoints and leases"] = tally
    try:
        unfinished = backend.sweep(grace, dry_run=dry_run)
    except StoreUnavailable as error:
        if not dry_run:
            raise
        say(f"unfinished uploads are left out, because they cannot be looked at: {error}")
        unfinished = []
    for entry in unfinished:
        found.setdefault("unfinished uploads", Tally()).add(entry.size)
    return found


def _old(backend: Backend, surely: float, cutoff: float, pending: set[str]) -> Iterator[tuple[str, Entry]]:
    """Objects with names that nobody uses twice, whose time is over."""
    for kind, prefix, latest in (
        ("probes", "v1/probe/", surely - PROBE_SECONDS),
        ("intents", INTENTS, cutoff),
        ("interrupted runs", ACTIVE_RUNS, cutoff),
        ("trash", "v1/trash/", cutoff),
    ):
        for entry in backend.list(prefix):
            stray = not (INTENT.fullmatch(entry.key) if prefix == INTENTS else entry.key.isprintable())
            if (
                entry.modified < latest
                and not stray
                and entry.key not in (CONDEMNED, INDEX)
                and entry.key not in pending
            ):
                yield kind, entry


def _abandoned(backend: Backend, cutoff: float) -> dict[str, Abandoned]:
    found: dict[str, Abandoned] = {}
    for prefix in ("v1/wip/", "v1/lease/"):
        for entry in backend.list(prefix):
            key = entry.key.removeprefix(prefix).partition("/")[0].removesuffix(".json")
            found.setdefault(key, Abandoned()).add(entry)
    return {key: abandoned for key, abandoned in found.items() if abandoned.changed < cutoff}


def _remove_abandoned(backend: Backend, cutoff: float, clock: Clock, say: Say, *, dry_run: bool) -> Iterator[Abandoned]:
    """Remove what nobody has touched for long; who comes back to it waits until every deletion of it is over."""
    waiting = list(_abandoned(backend, cutoff).items())
    if dry_run:
        yield from (abandoned for _, abandoned in waiting)
        return
    while some := waiting[:AT_ONCE]:
        del waiting[:AT_ONCE]
        condemned = CondemnedList(backend, clock, say)
        try:
            condemned.put(lease_key(key) for key, _ in some)
            yield from (abandoned for key, abandoned in some if _remove(backend, key, cutoff, clock, condemned))
        finally:
            condemned.free()


def _remove(backend: Backend, key: str, cutoff: float, clock: Clock, condemned: CondemnedList) -> bool:
    """Remove a key's checkpoints, the pointer first, and its lease, with the lease in hand; False if somebody has it."""
    lease = Lease(backend, key, clock=clock, last_fence=StoredCheckpoints(backend, key, 0).stored_fence)
    if not lease.take_over(lambda entry: entry.modified < cutoff):
        return False
    try:
        entries = list(backend.list(f"v1/wip/{key}/"))
        if any(entry.modified >= cutoff for entry in entries):
            lease.release()
            return False
        lease.confirm()
        condemned.delete([pointer := f"v1/wip/{key}/LATEST"])
        # Under names that nobody uses twice, unlike the pointer, which may be a new worker's by then.
        backend.delete_many([entry.key for entry in entries if entry.key != pointer])
        lease.confirm()
        lease.remove(lambda path: condemned.delete([path]))
    except (LeaseLost, NotFound):
        return False
    return True
