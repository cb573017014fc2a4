"""Damage in a schedule, and people who act while workers run: blobs rot, records are forgotten and brought back, repairs run.

A blob that rots keeps its ETag, as it does at rest on a disk. What the ledger then asks for is that nobody takes away what
is good: an intact object that a record needs, or a record that was intact all the time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from artifacts.errors import StoreError
from artifacts.keep import forget, restore
from artifacts.mark import record_of
from artifacts.repair import repair

if TYPE_CHECKING:
    from tests.simulation.scenario import Schedule


class Damage:
    """What a schedule does about damage and people."""

    def __init__(self, schedule: Schedule) -> None:
        self._schedule = schedule
        self._world = schedule.world

    def start(self) -> None:
        """Rot, and the people who act, at random times."""
        plan, rng = self._schedule.plan, self._schedule.rng
        for _ in range(plan.rots):
            self._world.later(self._schedule.delay(120.0), self._rot)
        for index in range(plan.repairs):
            self._person(f"r{index}", self._repair)
        for index in range(plan.forgets):
            self._person(f"f{index}", self._forget)
        self._pauses = [rng.uniform(0.0, 30.0) for _ in range(plan.forgets)]

    def finish(self) -> None:
        """A last repair with nobody else at work leaves nothing damaged."""
        process = self._schedule.start("repair, last", "elsewhere", self._repair, 0.0)
        self._world.run(until=lambda: not process.alive)

    def _person(self, name: str, life: object) -> None:
        self._schedule.start(name, "desk", life, self._schedule.delay(120.0), self._schedule.skews[0])  # type: ignore[arg-type]

    def _rot(self) -> None:
        """One object of the output of a standing record is changed, shortened or lost."""
        ledger, rng, objects = self._schedule.ledger, self._schedule.rng, self._schedule.server.objects
        there = sorted({part for record in ledger.standing.values() for part in record.parts if part in objects})
        if not there:
            return
        key, kind = rng.choice(there), rng.choice(("changed", "shortened", "lost"))
        self._world.counts[f"objects {kind}"] += 1
        self._world.note(f"** {kind}: {key[:30]}")
        ledger.rots(key)
        data, etag, modified = objects.pop(key)
        if kind != "lost":
            rotten = bytes([data[0] ^ 1]) + data[1:] if kind == "changed" else data[:-1]
            objects[key] = (rotten, etag, modified)

    def _repair(self) -> None:
        try:
            done = repair(self._schedule.store)
        except StoreError as error:
            self._world.note(f"repair: {type(error).__name__}: {error}")
            self._world.counts["repairs that failed"] += 1
            return
        self._world.counts["repairs that finished"] += 1
        self._world.counts["records withdrawn by repairs"] += len(done.withdrawn)
        self._world.counts["objects removed by repairs"] += len(done.removed)

    def _forget(self) -> None:
        """Forget one record, and sometimes bring it back."""
        store, rng = self._schedule.store, self._schedule.rng
        try:
            entries = [where for entry in store.backend.list("v1/act/") if (where := record_of(entry.key)) is not None]
            if not entries:
                return
            record = store.lookup(*rng.choice(entries))
            if record is None:
                return
            self._schedule.ledger.forgetting[self._world.current] = record.commit
            forget(store, record, "it is wrong")
            self._world.counts["records forgotten"] += 1
            if rng.random() < 0.5:
                self._schedule.store.clock.sleep(rng.uniform(0.0, 30.0))
                restore(store, record.key)
                self._world.counts["records restored"] += 1
        except StoreError as error:
            self._world.note(f"forget: {type(error).__name__}: {error}")
            self._world.counts["decisions of people that failed"] += 1
