"""A writer's intent and a collection's list keep out of each other's way: one of the two always sees the other."""

from __future__ import annotations

import json

import pytest

from artifacts import intent as module
from artifacts.digest import canonical_json
from artifacts.intent import CONDEMNED, INTENTS, intent, read_condemned, wait_until_spared
from artifacts.lease import this_process
from artifacts.store import Store
from tests.aging import FastClock


def condemn(store: Store, *keys: str, state: str = "held", holder: dict | None = None) -> str:
    """Put a list as a collection does; a holder of another machine unless told."""
    body = {"state": state, "owner": "o", "beat": "b", "holder": holder or {"machine": "elsewhere"}, "keys": list(keys)}
    return store.backend.put(CONDEMNED, canonical_json(body))


def names(store: Store) -> list[str]:
    return [entry.key for entry in store.backend.list(INTENTS)]


def test_an_intent_stands_for_the_length_of_its_block(store: Store) -> None:
    """The keys can be read by a collection inside the block, and nothing is left after it, even when it fails."""
    with intent(store.backend, ["v1/cas/b", "v1/cas/a"]):
        (name,) = names(store)
        assert json.loads(store.backend.get(name).data)["keys"] == ["v1/cas/a", "v1/cas/b"]
    assert names(store) == []
    with pytest.raises(RuntimeError), intent(store.backend, ["v1/cas/a"]):
        raise RuntimeError
    assert names(store) == []


def test_a_writer_waits_for_what_is_being_deleted(store: Store) -> None:
    """It waits, with its intent in place, until the list is free; and not at all for objects that no list names."""
    condemn(store, "v1/cas/a")
    during: list[list[str]] = []

    def free() -> None:
        during.append(names(store))
        condemn(store, state="free")

    clock = FastClock(free)
    with intent(store.backend, ["v1/cas/z"], clock):
        assert clock.sleeps == 0
    with intent(store.backend, ["v1/cas/a", "v1/cas/z"], clock):
        assert clock.sleeps == 1
    assert [len(found) for found in during] == [1]
    assert wait_until_spared(store.backend, frozenset({"v1/cas/a"}), clock) is False


@pytest.mark.parametrize("harm", ["stale", "damaged"])
def test_a_dead_collection_needs_no_person(store: Store, harm: str) -> None:
    """A list that nobody beats any more, or that is not one, is set free after the takeover time, no sooner."""
    condemn(store, "v1/cas/a")
    if harm == "damaged":
        store.backend.put(CONDEMNED, b"[[[")
    clock = FastClock()
    assert wait_until_spared(store.backend, frozenset({"v1/cas/a"}), clock) is True
    assert module.TAKEOVER_SECONDS <= clock.now <= module.TAKEOVER_SECONDS + 3
    found = read_condemned(store.backend)
    assert found is not None and found.state == "free" and not found.keys


def test_a_living_collection_is_waited_for(store: Store) -> None:
    """Every beat starts the takeover time again."""
    condemn(store, "v1/cas/a")

    def beat() -> None:
        clock.now += module.TAKEOVER_SECONDS / 2
        if clock.sleeps < 8:
            condemn(store, "v1/cas/a", holder={"machine": "elsewhere", "beat": clock.sleeps})
        else:
            condemn(store, state="free")

    clock = FastClock(beat)
    wait_until_spared(store.backend, frozenset({"v1/cas/a"}), clock)
    assert clock.sleeps == 8


def test_a_collection_killed_on_this_machine_costs_little(store: Store) -> None:
    """Only requests that it had sent are waited for."""
    gone = {**this_process(), "pid": 2**22 + 1}
    condemn(store, "v1/cas/a", holder=gone)
    clock = FastClock()
    wait_until_spared(store.backend, frozenset({"v1/cas/a"}), clock)
    assert module.SETTLE_SECONDS <= clock.now <= module.SETTLE_SECONDS + 3


def test_announce_first_look_second(store: Store) -> None:
    """The intent is in the store before the list is read: otherwise each side could miss the other."""
    order: list[str] = []
    backend = store.backend
    get, put = backend.get, backend.put

    class Spy:
        def __getattr__(self, name):
            return getattr(backend, name)

        def get(self, key):
            order.append(f"get {key}")
            return get(key)

        def put(self, key, data, **conditions):
            order.append(f"put {key.rpartition('/')[0]}")
            return put(key, data, **conditions)

    with intent(Spy(), ["v1/cas/a"]):
        order.append("block")
    assert order == ["put v1/intent", f"get {CONDEMNED}", "block"]
