"""What keeps an output from collection, and what only lies where roots do: a stray file, a note that cannot be read."""

from __future__ import annotations

import os
import threading
import time
import uuid
from pathlib import Path

import pytest

from artifacts.audit import verify
from artifacts.collect import collect
from artifacts.digest import canonical_json
from artifacts.errors import Damaged, StoreError
from artifacts.intent import CONDEMNED, INTENTS
from artifacts.keep import forget, pin, pins
from artifacts.lineage import lineage
from artifacts.mark import record_key
from artifacts.repair import repair
from artifacts.store import Store
from tests import test_collect
from tests.aging import AgingBackend, FastClock
from tests.counting import CountingBackend
from tests.test_collect import Study, collect_twice, keys, objects, pass_days

aged, study = test_collect.aged, test_collect.study

STRAYS = [
    b"v1/intent/.DS_Store",
    b"v1/intent/x.json/y",
    b"v1/intent/\xff\xfe.json",
    b"v1/run/a\nb.json",
    b"v1/run/\xff\xfe.json",
    b"v1/run/active-a\nb.json",
    b"v1/pin/a\nb.json",
    b"v1/act/copy/sft/%s.json" % (b"0" * 64),
    b"v1/pin/\xff\xfe.json",
]


@pytest.mark.parametrize("name", STRAYS)
def test_a_stray_file_is_no_root(tmp_path: Path, name: bytes) -> None:
    """A name that the store never writes stops no collection, is told, and stays; a repair after it ends as well."""
    store = Store(AgingBackend(Store.open(f"{tmp_path}/store").backend))
    study = Study(store, tmp_path / "made")
    study.run(kept := study.make("sft", a="kept"))
    dropped = study.make("sft", a="dropped")
    file = os.path.join(os.fsencode(f"{tmp_path}/store"), name)
    os.makedirs(os.path.dirname(file), exist_ok=True)
    with open(file, "wb") as stray:
        stray.write(b"junk")
    store.backend.times[os.fsdecode(name)] = store.backend.now
    pass_days(store, 8)
    report = collect_twice(store)
    assert report.deleted.objects == 3 and study.readable(kept) and store.lookup("sft", dropped.key) is None
    [told] = report.describe()["strays"]
    assert told.isprintable() and told[:7] == os.fsdecode(name)[:7]
    assert [finding.kind for finding in verify(store).findings] == ["stray"]
    assert not repair(store).removed and os.path.exists(file)


def test_an_intent_that_cannot_be_read_counts_while_it_is_young(aged: Store, study: Study) -> None:
    """Nobody knows what its writer relies on: nothing is deleted until it has aged; the error says when that is."""
    study.make("sft", a="dropped")
    pass_days(aged, 8)
    collect(aged)
    pass_days(aged, 8)
    name = f"{INTENTS}abc.json"
    aged.backend.put(name, b"")
    before = objects(aged)
    with pytest.raises(
        Damaged, match=f"{name}, .* run gc again after 2001-10-0.* delete that object by hand"
    ) as refused:
        collect(aged)
    assert "repair" not in str(refused.value) and objects(aged) == before
    pass_days(aged, 7.1)
    assert collect(aged).deleted.objects == 3
    assert collect(aged).leftovers["intents"].objects == 1 and name not in keys(aged)


def test_an_intent_that_cannot_be_read_can_be_deleted_by_hand(aged: Store, study: Study) -> None:
    """The other way out that the error names; and one that comes while objects are condemned is seen in time."""
    study.make("sft", a="dropped")
    pass_days(aged, 8)
    collect(aged)
    pass_days(aged, 8)
    name, before = f"{INTENTS}abc.json", objects(aged)
    aged.backend.hooks.append(("put", "v1/trash/condemned.json", lambda: aged.backend.put(name, b'{"schema":1}')))
    with pytest.raises(Damaged, match="names no keys"):
        collect(aged)
    assert objects(aged) == before
    aged.backend.delete(name)
    assert collect(aged).deleted.objects == 3


def test_a_pin_keeps_its_own_lineage_whatever_is_made_later(aged: Store, study: Study) -> None:
    """Another study that makes the bytes of an input in another way takes nothing from it, any number of levels up."""
    data = study.make("world", a="rows")
    base = study.make("pretrain", inputs={"rows": data.output}, w="base")
    tuned = study.make("sft", inputs={"model": base.output}, w="tuned")
    pin(aged, "paper", {"tuned": tuned})
    pass_days(aged, 1)
    study.make("pretrain2", w="base")
    pass_days(aged, 8)
    collect_twice(aged)
    assert study.readable(tuned) and study.readable(base) and study.readable(data)
    with pytest.raises(StoreError, match="is kept by the pin 'paper'"):
        forget(aged, base, "a test")


def test_a_pin_that_is_set_beside_a_collection_keeps_its_lineage(aged: Store, study: Study) -> None:
    """Announced while all of it is condemned, it is spared, and the collection deletes the rest."""
    base = study.make("pretrain", w="base")
    tuned = study.make("sft", inputs={"model": base.output}, w="tuned")
    study.make("dpo", w="dropped")
    pass_days(aged, 8)
    collect(aged)
    pass_days(aged, 8)
    waited, made = threading.Event(), list[object]()
    clock = FastClock(lambda: (waited.set(), time.sleep(0.01)))  # type: ignore[arg-type, return-value]
    beside = threading.Thread(target=lambda: made.append(pin(Store(aged.backend, clock=clock), "paper", {"t": tuned})))

    def begin() -> None:
        beside.start()
        assert waited.wait(20)

    aged.backend.hooks.append(("put", CONDEMNED, begin))
    report = collect(aged)
    beside.join()
    assert report.ready.objects == 9 and report.deleted.objects == 3
    assert made == pins(aged) and study.readable(tuned) and study.readable(base)


def test_a_pin_waits_for_all_of_its_lineage(aged: Store, study: Study) -> None:
    """Where only the record far above is being deleted, it waits for that, looks again, and refuses what is not whole."""
    base = study.make("pretrain", w="base")
    tuned = study.make("sft", inputs={"model": base.output}, w="tuned")
    name = record_key("pretrain", base.key)
    held = {"owner": "o", "beat": "b", "holder": {"machine": "elsewhere"}}
    aged.backend.put(CONDEMNED, canonical_json({**held, "state": "held", "keys": [name]}))

    def deleted() -> None:
        aged.backend.delete(name)
        aged.backend.put(CONDEMNED, canonical_json({**held, "state": "free", "keys": []}))

    aged.clock = FastClock(deleted)
    with pytest.raises(StoreError, match="pretrain .* was deleted meanwhile"):
        pin(aged, "paper", {"tuned": tuned})
    assert aged.clock.sleeps == 1 and not pins(aged) and not list(aged.backend.list(INTENTS))


def test_a_pin_asks_in_rounds(tmp_path: Path) -> None:
    """What it keeps is looked at all at once: a long lineage costs no more requests than a short one."""
    calls = []
    for length in (2, 12):
        backend = CountingBackend(Store.open(f"memory://{uuid.uuid4().hex}").backend)
        study = Study(Store(backend), tmp_path)
        record = study.make("stage", a="0")
        for step in range(1, length):
            record = study.make("stage", inputs={"above": record.output}, a=str(step))
        backend.reset()
        pin(study.store, "paper", {"last": record})
        calls.append(dict(backend.calls))
    assert calls[0] == calls[1]


def test_a_lineage_meets_each_input_once() -> None:
    """However many records made the same bytes, and however many read them."""
    asked: list[str] = []
    makers = {tree: [("stage", f"{tree}{number}") for number in range(30)] for tree in "ab"}

    def makers_of(tree: str) -> list[tuple[str, str]]:
        asked.append(tree)
        return makers[tree]

    found = lineage([("stage", "last")], lambda where: ["a", "b"] if where[1] == "last" else ["b"], makers_of)
    assert sorted(asked) == ["a", "b"] and len(found) == 61
