"""Collections in a schedule: a store with a past, collecting processes beside the workers, and a last look at what is left.

The past is made by the real worker before anything goes wrong: outputs that no run needs, some of which have the very bytes
that the schedule's own stages will leave, or are records of its own stages; one output that a run needs; and a first visit
of the collection, which marked all that is unused. So a second visit, during the schedule, deletes what the workers come to
rely on in the same moment.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from artifacts.collect import collect
from artifacts.errors import StoreError
from artifacts.intent import TAKEOVER_SECONDS
from tests.simulation.runs import Run
from tests.simulation.stages import CountingConfig

if TYPE_CHECKING:
    from tests.simulation.scenario import Node, Schedule

GRACE = 20_000.0
"""Virtual seconds; longer than any schedule, as the real one is longer than any stage."""
LONGEST_WAIT = TAKEOVER_SECONDS + 60.0
"""Longest wait of a writer for a collection that died."""


class Collections:
    """What a schedule does about collection."""

    def __init__(self, schedule: Schedule) -> None:
        self._schedule = schedule
        self._world = schedule.world

    def make_past(self) -> None:
        """The store before the schedule: unused outputs and a used one, marked by a first visit."""
        rng = self._schedule.rng
        unused: list[Node] = []
        for node in self._schedule.plan.nodes:
            twin = replace(node, config=node.config.model_copy(update={"twin": 1, "exact": True}))
            unused.append(node if rng.random() < 0.4 else twin)
        used = replace(unused[0], name="used", config=CountingConfig(seed=99, steps=1), above=())
        self._alone("past", lambda: Run(self._schedule, unused, remember=False).run())
        self._alone("past, used", lambda: Run(self._schedule, [used], remember=True).run())
        self._grow_old()
        self._alone("first visit", self.visit)
        self._grow_old()

    def start(self) -> None:
        """Collecting processes beside the workers."""
        for index in range(self._schedule.plan.collectors):
            delay, number = self._schedule.delay(60.0), 1 + index % self._schedule.plan.machines
            self._schedule.start(f"c{index}", f"m{number}", self.visit, delay, self._schedule.skews[number])

    def finish(self) -> None:
        """Collections with nobody else at work leave what a run needs, and nothing else."""
        plan, ledger = self._schedule.plan, self._schedule.ledger
        names = {f"v1/act/{stage}/{key}.json" for stage, key in self._schedule.named}
        ledger.relied &= names  # the notes of interrupted runs have their time
        for _ in range(3 if plan.rots or plan.forgets else 2):  # what is withdrawn is kept for a grace period more
            self._grow_old()
            self._alone("last visit", self.visit)
        ledger.check_collected(names)

    def visit(self) -> None:
        """One visit of the real collection."""
        try:
            report = collect(self._schedule.store, grace=GRACE, clock=self._schedule.store.clock)
        except StoreError as error:
            self._world.note(f"collection: {type(error).__name__}: {error}")
            self._world.counts["collections that failed"] += 1
            return
        self._world.counts["collections that finished"] += 1
        self._world.counts["objects collected"] += report.deleted.objects

    def _alone(self, name: str, life: Callable[[], None]) -> None:
        process = self._schedule.start(name, "elsewhere", life, 0.0)
        self._world.run(until=lambda: not process.alive)

    def _grow_old(self) -> None:
        self._world.now += GRACE + 10.0
