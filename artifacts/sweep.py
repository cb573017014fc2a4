"""The deleting half of a collection: rounds that spare what has come to be in use. See `artifacts.intent` for why it is safe."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import groupby

from artifacts.clock import Clock
from artifacts.condemned import CondemnedList
from artifacts.intent import Say
from artifacts.mark import Marks

CONDEMN_AT_ONCE = 10_000
"""Objects in one condemned list, which writers read while it stands."""
DELETE_AT_ONCE = 1000


def sweep(
    marks: Marks,
    keys: Sequence[str],
    clock: Clock,
    on_deleted: Callable[[Sequence[str]], None],
    say: Say = lambda text: None,
) -> None:
    """Delete those of `keys`, in this order, that are still not in use; report every batch.

    Raises:
        SweepStopped: another collection is deleting, or this one was taken for dead.
        Damaged: something that has come since cannot be read, so that what it needs is not known.
    """
    backend = marks.store.backend
    condemned = CondemnedList(backend, clock, say)
    try:
        for start in range(0, len(keys), CONDEMN_AT_ONCE):
            some = keys[start : start + CONDEMN_AT_ONCE]
            condemned.put(some)
            marks.refresh()
            marks.require_known()
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
