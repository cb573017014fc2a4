"""Collection and files in parts: a parts list leads to the blobs that are kept, so what it says is checked and followed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy
import pyarrow
import pytest

from artifacts import packing
from artifacts.backend import Backend
from artifacts.collect import collect
from artifacts.digest import canonical_json, seal, unseal
from artifacts.errors import Damaged
from artifacts.intent import CONDEMNED
from artifacts.record import Record, payload_key
from artifacts.store import Store, new_record
from tests.aging import DAY, AgingBackend

NUMBERS = 450_000


class Fleet:
    """Machines that publish one and the same checkpoint, each with a compression of its own, and a store that ages."""

    def __init__(self, backend: Backend, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.backend = AgingBackend(backend)
        self.store = Store(self.backend)
        self._folder = folder
        self._monkeypatch = monkeypatch
        self._made = 0
        weights = numpy.random.default_rng(0).normal(size=2 * NUMBERS).astype("<f4").tobytes()
        cuts = {name: [start, start + 4 * NUMBERS] for name, start in (("a", 0), ("b", 4 * NUMBERS))}
        header = {n: {"dtype": "F32", "shape": [NUMBERS], "data_offsets": cut} for n, cut in cuts.items()}
        encoded = json.dumps(header).encode()
        (folder / "made").mkdir(parents=True)
        (folder / "made" / "model.safetensors").write_bytes(len(encoded).to_bytes(8, "little") + encoded + weights)

    def publish(self, level: int) -> Record:
        """A stage run on a machine that packs at this level, named by a run."""
        self._monkeypatch.setattr(packing, "_codec", lambda: pyarrow.Codec("zstd", level))
        self._made += 1
        payload = {"algorithm": 1, "stage": "train", "code": "c", "config": {"n": self._made}, "inputs": {}}
        record = self.store.publish(
            self._folder / "made",
            lambda tree: new_record(
                stage="train", key=payload_key(payload), payload=payload, output=tree.digest, size=tree.size
            ),
        )
        nodes = {"n": {"stage": "train", "key": record.key, "output": record.output}}
        self.store.put_run({"experiment": f"e{self._made}", "config": {}, "nodes": nodes, "complete": True})
        return record

    def list_key(self) -> str:
        """The one parts list."""
        [entry] = self.backend.list("v1/parts/")
        return entry.key

    def blobs(self) -> set[str]:
        """What the parts list names."""
        return {row[1] for row in unseal(self.backend.get(self.list_key()).data)["parts"]}

    def readable(self, record: Record) -> bool:
        """True when its output comes back."""
        return self.store.materialise(record.output, self._folder / "back").size == record.size


@pytest.fixture
def fleet(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fleet:
    """Machines on each backend in turn."""
    return Fleet(store.backend, tmp_path / "fleet", monkeypatch)


@pytest.mark.parametrize("when", ["long after", "at the same moment"])
def test_a_list_that_is_replaced_while_a_collection_looks_keeps_its_blobs(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    """A machine with another compression replaces the parts list between the two looks: what it names now is kept.

    Also where the list is of the same size, and of the same time by the store's clock, as the one that was read.
    """
    first = fleet.publish(level=1)
    old = fleet.blobs()
    second = fleet.publish(level=9)
    assert not old <= fleet.blobs()
    fleet.backend.now += 8 * DAY
    assert collect(fleet.store).marked.objects > 0
    fleet.backend.now += 8 * DAY
    if when == "at the same moment":
        fleet.publish(level=1)
        fleet.publish(level=9)
    [standing] = fleet.backend.list("v1/parts/")
    put, third = fleet.backend.put, []

    def before_condemning(key: str, data: bytes, **conditions: Any) -> str:
        if key == CONDEMNED and not third:
            third.append(None)
            third[:] = [fleet.publish(level=1)]
        return put(key, data, **conditions)

    monkeypatch.setattr(fleet.backend, "put", before_condemning)
    collect(fleet.store)
    assert ([standing] == list(fleet.backend.list("v1/parts/"))) == (when == "at the same moment")
    assert fleet.blobs() == old
    assert all(fleet.readable(record) for record in (first, second, *third))


@pytest.mark.parametrize("harm", ["digit", "no check", "list of another file"])
def test_nothing_is_deleted_on_the_word_of_a_damaged_list(fleet: Fleet, harm: str) -> None:
    """A parts list with one wrong digit is damage of something in use, not the news that a blob is needed no more."""
    record = fleet.publish(level=1)
    key = fleet.list_key()
    good = fleet.backend.get(key).data
    body = unseal(good)
    digest = body["parts"][-1][1]
    other = ("1" if digest[0] != "1" else "3") + digest[1:]
    wrong = {
        "digit": good.replace(digest.encode(), other.encode()),
        "no check": canonical_json(body).replace(digest.encode(), other.encode()),
        "list of another file": seal({**body, "file": other}),
    }[harm]
    fleet.backend.put(key, wrong)
    for _ in range(2):
        fleet.backend.now += 8 * DAY
        with pytest.raises(Damaged, match=key):
            collect(fleet.store)
    fleet.backend.put(key, good)
    assert fleet.readable(record)


def test_a_copy_of_a_list_in_another_folder_is_no_list(fleet: Fleet) -> None:
    """An older parts list that somebody copied elsewhere says nothing of what the file consists of now."""
    fleet.publish(level=1)
    stray = f"v1/parts/zz/{fleet.list_key()[-64:]}"
    old = fleet.backend.get(fleet.list_key()).data
    record = fleet.publish(level=9)
    fleet.backend.put(stray, old)
    for _ in range(2):
        fleet.backend.now += 8 * DAY
        collect(fleet.store)
    assert fleet.readable(record) and fleet.backend.get(stray).data == old
