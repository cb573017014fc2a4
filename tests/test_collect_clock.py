"""The clock by which a collection reckons ages may be set ahead, and back again: what is in use stays in use."""

from __future__ import annotations

import threading
import time
import uuid

import pytest

from artifacts.checkpoints import StoredCheckpoints
from artifacts.collect import collect
from artifacts.digest import canonical_json, seal
from artifacts.intent import INTENTS, SETTLE_SECONDS
from artifacts.keep import forget
from artifacts.lease import Lease, lease_key
from artifacts.mark import ACTIVE_RUNS
from artifacts.pending import INDEX, Pending
from artifacts.store import Store
from tests import test_collect
from tests.aging import FastClock
from tests.test_collect import Study, keys, objects, pass_days

aged, study = test_collect.aged, test_collect.study

YEAR = 365


def test_a_clock_that_is_set_ahead_ends_nothing_that_is_under_way(aged: Store, study: Study) -> None:
    """A lease, its checkpoints, a run, an intent and what was forgotten yesterday are not old because a clock says so."""
    collect(aged)
    lease = Lease(aged.backend, "a" * 64)
    assert lease.try_acquire()
    source = study.folder / uuid.uuid4().hex
    source.mkdir(parents=True)
    (source / "state").write_text("half way")
    StoredCheckpoints(aged.backend, lease.key, lease.fence).save(5, source)
    aged.backend.put(f"{ACTIVE_RUNS}x.json", seal({"schema": 1, "nodes": {}}))
    aged.backend.put(f"{INTENTS}0f.json", canonical_json({"schema": 1, "keys": []}))
    forget(aged, study.make("sft", a="forgotten"), "a test")
    before = {key for key in keys(aged) if "/trash/pending" not in key}
    pass_days(aged, YEAR)
    assert not collect(aged).leftovers
    assert before <= keys(aged)
    lease.renew()


@pytest.mark.parametrize("root", ["record", "active", "intent", "trash"])
def test_a_clock_that_is_set_ahead_makes_nothing_unused(aged: Store, study: Study, root: str) -> None:
    """What was marked, and has come into use since by nothing but something young, is spared whatever the clock says."""
    old = study.make("sft", a="one", b="two")
    pass_days(aged, 8)
    assert collect(aged).marked.objects == 4
    pass_days(aged, 0.1)
    wanted = objects(aged)
    if root == "intent":
        aged.backend.put(f"{INTENTS}0f.json", canonical_json({"schema": 1, "keys": sorted(wanted)}))
    else:
        test_collect.root_put(aged, study, old, root)
    pass_days(aged, YEAR)
    assert collect(aged).deleted.objects == (1 if root in ("record", "trash") else 0)
    aged.materialise(old.output, study.folder / "back")


def test_a_clock_that_is_set_back_costs_a_grace_period(aged: Store, study: Study) -> None:
    """What a visit marked while the clock was ahead counts as marked by the next one."""
    study.make("sft", a="dropped")
    pass_days(aged, YEAR)
    assert collect(aged).marked.objects == 3
    pass_days(aged, 30 - YEAR)
    assert collect(aged).deleted.objects == 0
    pass_days(aged, 8)
    assert collect(aged).deleted.objects == 3


def test_a_memory_that_does_not_say_when_it_was_written(aged: Store) -> None:
    """It is as old as the newest marks in it; where there are none, it is not known, and nothing is surely old."""
    shards = [[5.0, "v1/trash/pending-" + "0" * 32], [7.0, "v1/trash/pending-" + "1" * 32]]
    for some, visited in ((shards, 7.0), ([], None)):
        aged.backend.put(INDEX, canonical_json({"schema": 1, "shards": some}))
        pending = Pending(aged.backend)
        assert pending.visited == visited and pending.surely(9.0) == (visited or float("-inf"))
        assert pending.surely(3.0) == (3.0 if visited else float("-inf"))


def test_a_late_deletion_takes_no_new_lease(aged: Store) -> None:
    """Who comes back to a stage whose lease is being removed has it only when no request of that can arrive any more."""
    key, name = "a" * 64, lease_key("a" * 64)
    assert Lease(aged.backend, key, holder={"machine": "elsewhere"}).try_acquire()
    pass_days(aged, 8)
    assert not collect(aged).leftovers
    pass_days(aged, 8)
    waited, done, collecting = threading.Event(), threading.Event(), FastClock()
    writing = FastClock(lambda: (waited.set(), time.sleep(0.01)))  # type: ignore[arg-type, return-value]
    mine = Lease(aged.backend, key, clock=writing)
    worker = threading.Thread(target=lambda: (mine.try_acquire(), done.set()))

    def answered_late() -> None:
        collecting.now += 1.0

    def settling() -> None:
        worker.start()
        while not (waited.is_set() or done.is_set()):
            time.sleep(0.01)
        aged.backend.delete(name)

    aged.backend.hooks.append(("delete", name, answered_late))
    collecting.then = settling
    assert collect(aged, clock=collecting).leftovers["checkpoints and leases"].objects == 1
    worker.join()
    mine.confirm()
    assert waited.is_set() and collecting.now >= SETTLE_SECONDS
