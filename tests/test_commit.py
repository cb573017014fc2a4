"""Committing a record: announced before it is put, adopted whole where one stands, and refused where nobody could read it."""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from artifacts.clock import Clock
from artifacts.collect import collect
from artifacts.digest import canonical_json
from artifacts.errors import StoreError
from artifacts.intent import INTENTS, SETTLE_SECONDS
from artifacts.keep import accept, forget, restore, wanted_record
from artifacts.mark import record_key
from artifacts.record import Record
from artifacts.repair import repair
from artifacts.store import Store, new_record
from artifacts.trees import Tree
from tests import test_collect
from tests.aging import FastClock
from tests.counting import CountingBackend
from tests.test_collect import Study, objects, pass_days

aged, study = test_collect.aged, test_collect.study

ROWS = {"rows": "0" * 64}
"""Inputs by which the same output gets another key."""


def folder_of(study: Study, **files: str) -> Path:
    source = study.folder / uuid.uuid4().hex
    source.mkdir(parents=True)
    for name, text in files.items():
        (source / name).write_text(text)
    return source


def like(record: Record, **changes: Any) -> Callable[[Tree], Record]:
    """What makes the record of another run of the same stage."""

    def make(tree: Tree) -> Record:
        fields = {"stage": record.stage, "key": record.key, "payload": record.payload, "size": tree.size}
        return new_record(**{**fields, "output": tree.digest, **changes})

    return make


def commit_again(how: str, store: Store, study: Study, gone: Record, twin: Record) -> None:
    """Have the record that is gone stand again; `twin` is one of the same output under another key."""
    if how == "publish":
        store.publish(folder_of(study, a="one"), like(gone), where=(gone.stage, gone.key))
    elif how == "publish, not told where":
        store.publish(folder_of(study, a="one"), like(gone))
    elif how == "commit":
        store.commit(gone)
    elif how == "accept":
        accept(store, twin, wanted_record(gone.stage, gone.payload, {}, ""), "no matter")
    elif how == "restore":
        restore(store, gone.key[:12])
    else:
        copy = Store.open(f"memory://{uuid.uuid4().hex}")
        copy.put_tree(folder_of(study, a="one"))
        copy.commit(gone)
        assert record_key(gone.stage, gone.key) in repair(store, stores=[copy]).fixed


WAYS = ["publish", "publish, not told where", "commit", "accept", "restore", "repair"]


@pytest.mark.parametrize("how", WAYS)
def test_a_record_is_announced_while_it_is_put(aged: Store, study: Study, how: str) -> None:
    """Whatever puts a record names it in an intent that stands until it is there."""
    twin, gone = study.make("sft", a="one"), study.make("sft", inputs=ROWS, a="one")
    name = record_key(gone.stage, gone.key)
    if how == "restore":
        forget(aged, gone, "a test")
    elif how == "repair":
        study.run(gone)
        aged.backend.put(name, b"[1, 2")
    else:
        aged.backend.delete(name)
    announced: list[bool] = []

    def look() -> None:
        intents = aged.backend.get_many([entry.key for entry in aged.backend.list(INTENTS)])
        announced.append(any(name.encode() in stored.data for stored in intents.values()))

    aged.backend.hooks.append(("put", name, look))
    commit_again(how, aged, study, gone, twin)
    assert announced == [True] and study.readable(gone)
    assert not list(aged.backend.list(INTENTS))


@pytest.mark.parametrize("how", ["publish", "commit", "accept"])
def test_a_late_deletion_takes_no_new_record(aged: Store, study: Study, how: str) -> None:
    """A deletion that is carried out after it was answered meets the record of before, or none: the new one waits."""
    twin, gone = study.make("sft", a="one"), study.make("sft", inputs=ROWS, a="one")
    study.run(twin)
    pass_days(aged, 8)
    collect(aged)
    pass_days(aged, 8)
    name = record_key(gone.stage, gone.key)
    collecting, writing = FastClock(), FastClock()
    waited, done = threading.Event(), threading.Event()
    writing.then = lambda: (waited.set(), time.sleep(0.01))  # type: ignore[assignment, return-value]
    at_once: list[float] = []

    def write() -> None:
        commit_again(how, Store(aged.backend, clock=writing), study, gone, twin)
        done.set()

    writer = threading.Thread(target=write)

    def answered_late() -> None:
        collecting.now += 1.0

    def settling() -> None:
        at_once.append(collecting.now)
        writer.start()
        while not (waited.is_set() or done.is_set()):
            time.sleep(0.01)
        aged.backend.delete(name)

    aged.backend.hooks.append(("delete", name, answered_late))
    collecting.then = settling
    assert collect(aged, clock=collecting).deleted.objects == 1
    writer.join()
    assert len(at_once) == 1 and at_once[0] >= SETTLE_SECONDS
    assert study.readable(gone) and waited.is_set()


def test_a_record_that_is_announced_keeps_its_output(aged: Store, study: Study) -> None:
    """A writer that announces a record may find one there, and adopt it: it stays whole, with what it was made from."""
    base = study.make("pretrain", w="base")
    tuned = study.make("sft", inputs={"model": base.output}, w="tuned")
    wanted = objects(aged)
    pass_days(aged, 8)
    collect(aged)
    pass_days(aged, 8)
    intent = canonical_json({"schema": 1, "keys": [record_key("sft", tuned.key)]})
    aged.backend.hooks.append(("put", "v1/trash/condemned.json", lambda: aged.backend.put(f"{INTENTS}0f.json", intent)))
    report = collect(aged)
    assert report.ready.objects == len(wanted) and report.deleted.objects == 0 and objects(aged) == wanted


UNREADABLE: dict[str, dict[str, Any]] = {
    "host": {"environment": {"host": "h" * 2000}},
    "version": {"environment": {"versions": {"torch": "2.1\u00a0"}}},
    "clock": {"finished": -1.0},
    "seconds": {"seconds": float("nan")},
    "node": {"node": "a\u00adb"},
    "size": {"symbols": {f"f{number}": "0" * 64 for number in range(70_000)}},
    "other key": {"key": "e" * 64},
}


@pytest.mark.parametrize("what", UNREADABLE)
def test_a_record_that_nobody_could_read_is_not_stored(aged: Store, study: Study, what: str) -> None:
    """It would be found damaged and its stage run again, for ever: it is refused with the reason, and nothing is left."""
    made = study.make("sft", a="one")
    before = objects(aged)
    with pytest.raises(StoreError, match="could not be read back"):
        aged.publish(folder_of(study, a="one"), like(made, **UNREADABLE[what]))
    assert objects(aged) == before and not list(aged.backend.list(INTENTS))


def test_a_person_of_any_name_can_accept(aged: Store, study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the system calls a person goes into the record in a form that can be read back."""
    monkeypatch.setenv("LOGNAME", "me\tand you")
    old = study.make("sft", a="one")
    payload = {**old.payload, "code": "d"}
    made = accept(aged, old, wanted_record("sft", payload, {}, ""), "no matter")
    assert study.readable(made) and made.equivalent is not None and "and you" in made.equivalent["by"]


def test_announcing_the_record_costs_no_request(tmp_path: Path) -> None:
    """A publication that knows its record's key announces it with its last blobs: one intent for both."""
    backend = CountingBackend(Store.open(f"memory://{uuid.uuid4().hex}").backend)
    study = Study(Store(backend), tmp_path)
    record = study.make("sft", a="one")
    backend.delete(record_key("sft", record.key))
    calls: list[SimpleNamespace] = []
    for where in (("sft", record.key), None):
        backend.reset()
        Store(backend, clock=Clock()).publish(folder_of(study, a="one"), like(record), where=where)
        calls.append(SimpleNamespace(**backend.calls))
        backend.delete(record_key("sft", record.key))
    told, untold = calls
    assert (told.put, told.get, told.delete) == (2, 1, 1)
    assert (untold.put, untold.get, untold.delete) == (3, 2, 2)
