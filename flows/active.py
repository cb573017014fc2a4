"""A run under way, noted in the store: collections keep what it uses, and an interrupted run is not forgotten.

`v1/run/active-<uuid>.json` has the form of a finished run and holds the nodes that are done so far. It is written when the
run starts, again whenever a node is done, and removed once the finished run is noted. A run that is killed leaves it; it
then keeps its outputs from collection, and findable by name, for the grace period.
"""

from __future__ import annotations

import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from artifacts.digest import seal
from artifacts.errors import StoreUnavailable
from artifacts.intent import wait_until_spared
from artifacts.mark import ACTIVE_RUNS, record_key
from artifacts.sole_writer import SoleWriter
from flows.execute import Outcome, StudyRun
from flows.session import Study, records_of

if TYPE_CHECKING:
    from artifacts.store import Store


@contextmanager
def under_way(study: Study, run: StudyRun) -> Iterator[None]:
    """Note the run in the store for the length of the block, and leave the note there when the block fails.

    Raises:
        StoreError: the store cannot be written or its conditional writes do not hold. Nothing was run.
    """
    run.store.probe(run.scratch)
    note = ActiveRun(study)
    if note.start(run.outcomes):
        # A collection was deleting some of the hits: those that it did not spare have to be made again.
        for name in run.outcomes.keys() - records_of(run.store, run.outcomes).keys():
            del run.outcomes[name]
    run.on_outcome = note.add
    yield
    note.end()


class ActiveRun:
    """The note of one run."""

    def __init__(self, study: Study) -> None:
        self._study = study
        self._key = f"{ACTIVE_RUNS}{uuid.uuid4().hex}.json"
        self._note = SoleWriter(study.store.backend, self._key)
        self._outcomes: dict[str, Outcome] = {}
        self._lock = threading.Lock()

    def start(self, outcomes: dict[str, Outcome]) -> bool:
        """Write the note; True when a collection was deleting something that it names, and had to be waited for."""
        self._outcomes = dict(outcomes)
        self._write()
        return wait_until_spared(self._store.backend, frozenset(map(_record, outcomes.values())), say=self._store.say)

    def add(self, outcome: Outcome) -> None:
        """One more node is done."""
        with self._lock:
            self._outcomes[outcome.node] = outcome
            try:
                self._write()
            except StoreUnavailable:
                return  # the note is older then, and a record that is new needs none; the end of the run needs the store
        if not outcome.executed:
            wait_until_spared(self._store.backend, frozenset({_record(outcome)}), say=self._store.say)

    def end(self) -> None:
        """Remove the note: the finished run is in the store."""
        try:
            self._store.backend.delete(self._key)
        except StoreUnavailable:
            pass  # a later collection removes it

    @property
    def _store(self) -> Store:
        return self._study.store

    def _write(self) -> None:
        self._note.write(seal({"schema": 1, **self._study.describe(self._outcomes)}))


def _record(outcome: Outcome) -> str:
    return record_key(outcome.stage, outcome.key)
