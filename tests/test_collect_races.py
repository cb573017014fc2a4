"""What happens between two calls of a collection: it is stopped there, or others act, and nothing that they need is deleted."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from artifacts.backend import Backend, Entry
from artifacts.collect import collect
from artifacts.digest import canonical_json
from artifacts.errors import StoreUnavailable
from artifacts.intent import BEAT_LASTS_SECONDS, CONDEMNED, SETTLE_SECONDS, intent, read_condemned, set_free
from artifacts.lease import TIME_TO_LIVE, Lease
from artifacts.record import Record
from artifacts.retry import SHORTEST_PAUSE
from artifacts.store import Store
from artifacts.trees import object_keys
from tests import test_collect
from tests.aging import AgingBackend, FastClock
from tests.test_collect import Study, objects, pass_days

pytestmark = pytest.mark.parametrize("store", ["memory", "local"], indirect=True)
"""Every call goes through `Stalling`, so that it makes no difference what is behind it."""

KEY = "a" * 64
LATEST = f"v1/wip/{KEY}/LATEST"
study = test_collect.study


class Stalling(AgingBackend):
    """An aging backend that calls `stall` before and after each write and deletion, and after each listing."""

    def __init__(self, backend: Backend) -> None:
        super().__init__(backend)
        self.stall: Callable[[str, str], None] = lambda verb, key: None
        """Gets what was done, and the key or prefix that it was done to."""

    def put(self, key: str, data: bytes, **conditions: Any) -> str:
        self.stall("before put", key)
        etag = super().put(key, data, **conditions)
        self.stall("put", key)
        return etag

    def list(self, prefix: str) -> Iterator[Entry]:
        found = list(super().list(prefix))
        self.stall("list", prefix)
        return iter(found)

    def delete_many(self, keys: Iterable[str]) -> None:
        for key in keys:
            self.stall("before delete", key)
            self.delete(key)
            self.stall("delete", key)


@pytest.fixture
def aged(store: Store) -> Store:
    """A store whose calls the test can stall."""
    return Store(Stalling(store.backend))


def make_unused(study: Study, count: int = 1) -> list[Record]:
    """Outputs that no root names, which an earlier collection has found unused, and the next one may delete."""
    made = [study.make("sft", a=f"dropped {number}") for number in range(count)]
    pass_days(study.store, 8)
    collect(study.store)
    pass_days(study.store, 8)
    return made


def test_a_collection_that_stands_still_in_a_batch_deletes_nothing_of_the_rest(aged: Store, study: Study) -> None:
    """Longer than its beat lasts: others may have taken it for dead meanwhile, and rely on what it had not deleted yet."""
    make_unused(study, 3)
    before, clock, deleted = objects(aged), FastClock(), []

    def stall(verb: str, key: str) -> None:
        if verb == "delete" and key in before:
            deleted.append(key)
            clock.now += BEAT_LASTS_SECONDS

    aged.backend.stall = stall
    with pytest.raises(StoreUnavailable, match="stood still"):
        collect(aged, clock=clock)
    assert len(deleted) == 1 and objects(aged) == before - {*deleted}


def test_a_record_that_is_made_anew_waits_for_the_deletion_of_what_stands_there(aged: Store, study: Study) -> None:
    """The word that a record was withdrawn is being deleted: a record that took its place now would go with it."""
    record = study.make("sft", a="made")
    assert aged.withdraw(record, {"reason": "a test"})
    pass_days(aged, 8)
    collect(aged)
    pass_days(aged, 8)
    going_on = threading.Event()
    writer = Store(aged.backend, clock=FastClock(lambda: (going_on.set(), time.sleep(0.01))))

    def write() -> None:
        writer.commit(record)
        going_on.set()

    def stall(verb: str, key: str) -> None:
        if verb == "before delete" and key.startswith("v1/act/"):
            threads.append(threading.Thread(target=write))
            threads[-1].start()
            assert going_on.wait(20)

    threads: list[threading.Thread] = []
    aged.backend.stall = stall
    collect(aged)
    threads[0].join(20)
    assert aged.lookup("sft", record.key) == record


@pytest.mark.parametrize("pause", [0.0, SHORTEST_PAUSE], ids=["answered at once", "answered late"])
def test_a_deletion_that_may_be_sent_twice_stays_announced(
    aged: Store, study: Study, pause: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the answer was slow, later lists go on naming the objects, and the last is set free when no request can be left."""
    monkeypatch.setattr("artifacts.sweep.CONDEMN_AT_ONCE", 1)
    make_unused(study)
    clock, deleted = FastClock(), {}
    lists: list[tuple[float, dict[str, Any]]] = []

    def stall(verb: str, key: str) -> None:
        if verb == "delete" and key in unused:
            clock.now += pause
            deleted[key] = clock.now
        elif (verb, key) == ("put", CONDEMNED):
            lists.append((clock.now, json.loads(aged.backend.get(CONDEMNED).data)))

    unused, aged.backend.stall = objects(aged), stall
    collect(aged, clock=clock)
    assert deleted.keys() == unused and lists[-1][1]["state"] == "free"
    for at, body in lists:
        unsettled = {key for key, then in deleted.items() if then <= at < then + SETTLE_SECONDS}
        assert unsettled <= {*body["keys"]} if pause else len(body["keys"]) <= 1
    assert clock.now >= SETTLE_SECONDS if pause else clock.now == 0


def test_a_list_that_has_shown_life_is_not_set_free(aged: Store) -> None:
    """A beat between the last look of somebody who waits and his write: the collection is alive and keeps its list."""
    body = {"state": "held", "owner": "o", "holder": {"machine": "elsewhere"}, "keys": ["v1/cas/a"]}
    aged.backend.put(CONDEMNED, canonical_json({**body, "beat": "1"}))
    seen = read_condemned(aged.backend)
    aged.backend.put(CONDEMNED, canonical_json({**body, "beat": "2"}))
    assert seen is not None and not set_free(aged.backend, seen)
    standing = read_condemned(aged.backend)
    assert standing is not None and (standing.state, standing.beat) == ("held", "2")
    assert set_free(aged.backend, standing)


def test_a_record_that_is_made_anew_within_one_tick_of_the_clock(aged: Store, study: Study, tmp_path: Path) -> None:
    """Of the same size and time as the one before it, it is read again by the second look: its output is another one."""
    [old] = make_unused(study)
    young = study.make("dpo", a="other   0")
    made: list[Record] = []
    first = next(entry for entry in aged.backend.list("v1/act/dpo/"))

    def stall(verb: str, key: str) -> None:
        if (verb, key) == ("before put", CONDEMNED) and not made:
            made.append(replace(young, output=old.output, commit="0" * len(young.commit)))
            with intent(aged.backend, [key for key, _ in object_keys(aged, old.output)]):
                assert aged.withdraw(young, {"reason": "a test"}) and aged.commit(made[0]) == made[0]

    aged.backend.stall = stall
    collect(aged)
    assert aged.lookup("dpo", young.key) == made[0] and next(iter(aged.backend.list("v1/act/dpo/"))) == first
    aged.materialise(old.output, tmp_path / "back")


def leave_checkpoint(store: Store) -> None:
    """What a killed worker left long ago, and an earlier visit has found old."""
    assert Lease(store.backend, KEY, holder={"machine": "elsewhere"}).try_acquire()
    store.backend.put(LATEST, b"{}")
    store.backend.put(f"v1/wip/{KEY}/1-x/files/state", b"12345")
    pass_days(store, 8)
    collect(store)
    pass_days(store, 8)


def test_a_checkpoint_that_changes_while_its_lease_is_taken_stays(aged: Store) -> None:
    """It is not old any more when it is looked at with the lease in hand; the lease is given back."""
    leave_checkpoint(aged)

    def stall(verb: str, key: str) -> None:
        if verb == "put" and key.startswith("v1/lease/") and not changed:
            changed.append(aged.backend.put(LATEST, b"{ }"))

    changed: list[str] = []
    aged.backend.stall = stall
    assert "checkpoints and leases" not in collect(aged).leftovers
    assert aged.backend.get(LATEST).data == b"{ }" and aged.backend.size(f"v1/wip/{KEY}/1-x/files/state") == 5
    assert Lease(aged.backend, KEY).try_acquire()


@pytest.mark.parametrize("when", ["list", "delete"])
def test_a_collection_that_stands_still_over_a_checkpoint_leaves_it_to_the_next_worker(aged: Store, when: str) -> None:
    """It holds the lease for no longer than it lasts: who took it over meanwhile keeps its lease, and the pointer it wrote."""
    leave_checkpoint(aged)
    worker = Lease(aged.backend, KEY, clock=(clock := FastClock()))
    begun: list[str] = []

    def stall(verb: str, key: str) -> None:
        held = b'"held"' in aged.backend.get(f"v1/lease/{KEY}.json").data
        if verb == when and key.startswith(f"v1/wip/{KEY}/") and held and not begun:
            begun.append(key)
            assert not worker.try_acquire()
            clock.now += TIME_TO_LIVE
            assert worker.try_acquire()
            aged.backend.put(LATEST, b"{ }")

    aged.backend.stall = stall
    assert "checkpoints and leases" not in collect(aged).leftovers
    assert begun and aged.backend.get(LATEST).data == b"{ }"
    worker.renew()
