"""Verification finds every damage, and repair undoes it or withdraws exactly the stages that cannot be helped."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from artifacts.audit import verify
from artifacts.backend import Backend, Object
from artifacts.checkpoints import StoredCheckpoints
from artifacts.collect import collect
from artifacts.digest import canonical_json, digest_bytes, seal
from artifacts.errors import Damaged
from artifacts.keep import forget, pin, pins
from artifacts.record import Record, payload_key
from artifacts.repair import Repair, repair
from artifacts.store import Store, new_record
from artifacts.trail import note, read_trail
from artifacts.trees import object_key
from artifacts.withdrawn import withdrawals

HALF = 600 << 10
"""Bytes of each of a model's two tensors."""


def model(seed: int, frozen: int = 7) -> bytes:
    """A safetensors file: a tensor that depends on `frozen`, and one that depends on `seed`."""
    size = HALF
    header = {
        "a": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]},
        "b": {"dtype": "U8", "shape": [size], "data_offsets": [size, 2 * size]},
    }
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + bytes([frozen]) * size + bytes([seed]) * size


class Made:
    """A store with two studies' worth of outputs."""

    def __init__(self, store: Store, folder: Path) -> None:
        self.store = store
        self.folder = folder
        self.base = self.make("pretrain", weights=model(1), config=b"{}")
        self.tuned = self.make("sft", {"model": self.base.output}, weights=model(2), config=b"{}")
        self.numbers = self.make("evaluate", {"model": self.tuned.output}, table=b"1, 2, 3")
        nodes = {
            r.stage: {"stage": r.stage, "key": r.key, "output": r.output} for r in (self.base, self.tuned, self.numbers)
        }
        self.run = store.put_run({"experiment": "e", "config": {}, "nodes": nodes, "complete": True})
        checkpoints = StoredCheckpoints(store.backend, "c" * 64, 1)
        state = folder / "state"
        state.mkdir()
        for step in (1, 2):
            (state / "state.bin").write_bytes(bytes([step]) * 100)
            checkpoints.save(step, state)

    def make(self, stage: str, inputs: dict[str, str] | None = None, **files: bytes) -> Record:
        source = self.folder / stage
        source.mkdir()
        for name, data in files.items():
            (source / f"{name}.safetensors" if name == "weights" else source / name).write_bytes(data)
        payload = {"algorithm": 1, "stage": stage, "code": "c", "config": {}, "inputs": inputs or {}}

        def record(tree):
            key = payload_key(payload)
            return new_record(
                stage=stage, key=key, payload=payload, output=tree.digest, size=tree.size, seconds=10.0, node=stage
            )

        return self.store.publish(source, record)

    def files(self, record: Record) -> dict[str, str]:
        return {file.path: file.digest for file in self.store.tree(record.output).files}

    def objects(self, kind: str) -> list[str]:
        """Keys of the objects of a kind, in order."""
        prefix = {"record": "act", "parts list": "parts", "blob": "cas", "checkpoint": "wip"}.get(kind, kind)
        return sorted(entry.key for entry in self.store.backend.list(f"v1/{prefix}/"))


@pytest.fixture
def made(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Made:
    """Three stages, a run, checkpoints, on each backend in turn. Models of more than a megabyte are stored in parts."""
    monkeypatch.setattr("artifacts.tensors.SPLIT_FROM", 1 << 20)
    monkeypatch.setattr("artifacts.tensors.PART_FROM", HALF // 2)
    (tmp_path / "made").mkdir()
    return Made(store, tmp_path / "made")


def harm(store: Store, key: str, other: str, how: str, seed: int = 0) -> None:
    """Damage one object as `how` says."""
    data = store.backend.get(key).data
    middle = (len(data) * (seed + 1)) // (seed + 2)
    wrong = {"flip": data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :], "truncate": data[:-1]}
    if how == "swap":
        wrong["swap"] = store.backend.get(other).data
    store.backend.delete(key)
    if how != "delete":
        store.backend.put(key, wrong[how])


def test_an_intact_store_verifies(made: Made) -> None:
    """Nothing is found, and every byte was read."""
    result = verify(made.store)
    assert result.ok, result.findings
    plain = json.loads(json.dumps(result.describe()))
    assert plain["checked"]["record"]["objects"] == 3 and plain["checked"]["run"]["objects"] == 1
    assert plain["checked"]["blob"]["bytes"] >= 2 * len(model(1))
    assert plain["not_read"]["objects"] == 0 and plain["collected_inputs"] == 0


@pytest.mark.parametrize("how", ["flip", "truncate", "delete", "swap"])
@pytest.mark.parametrize("kind", ["record", "tree", "parts list", "blob"])
def test_every_damage_is_found(made: Made, kind: str, how: str) -> None:
    """One object of a kind is harmed, each in turn: it is found, and nothing intact is accused."""
    keys = made.objects(kind)
    assert len(keys) >= 2
    for number, key in enumerate(keys):
        before = made.store.backend.get(key).data
        harm(made.store, key, keys[number - 1], how, number)
        result = verify(made.store)
        named = {finding.key for finding in result.findings}
        if kind == "parts list" and how in ("delete", "flip") and key not in named:
            # A list that is gone, or names another blob, shows as something that is missing.
            assert {finding.problem for finding in result.findings} == {"is missing"}
        else:
            assert named == {key}, result.findings
        made.store.backend.put(key, before)
    assert verify(made.store).ok


@pytest.mark.parametrize("kind", ["run", "checkpoint"])
@pytest.mark.parametrize("how", ["flip", "truncate", "swap"])
def test_damage_of_roots_is_found(made: Made, kind: str, how: str) -> None:
    """A run, a checkpoint's pointer, manifest or file that was changed is found."""
    keys = made.objects(kind)
    other = made.objects("record")[0]
    for number, key in enumerate(keys):
        before = made.store.backend.get(key).data
        harm(made.store, key, other, how, number)
        found = verify(made.store).findings
        assert found and all(finding.kind == kind for finding in found), (key, found)
        assert key.startswith(found[0].key) or found[0].key == key
        made.store.backend.put(key, before)
    if kind == "checkpoint":
        for key in [key for key in keys if not key.endswith("LATEST")]:
            before = made.store.backend.get(key).data
            made.store.backend.delete(key)
            assert [finding.kind for finding in verify(made.store).findings] == ["checkpoint"]
            made.store.backend.put(key, before)


def test_a_sample_reads_its_share(made: Made) -> None:
    """As many seeds in a row as there are shares read every blob once; sizes and presence are checked for all."""
    whole = verify(made.store).checked["blob"].describe()
    for shares, first in ((2, 0), (3, -1), (10, 20_000)):
        read = [verify(made.store, sample=1 / shares, seed=first + number) for number in range(shares)]
        tallies = [result.checked["blob"] for result in read if "blob" in result.checked]
        assert sum(tally.objects for tally in tallies) == whole["objects"]
        assert sum(tally.bytes for tally in tallies) == whole["bytes"]
        assert all(result.ok and result.not_read.objects for result in read)
    found = []
    key = object_key("cas", digest_bytes(bytes([2]) * HALF))
    harm(made.store, key, key, "flip")
    for seed in range(12):
        found.append(bool(verify(made.store, sample=0.3, seed=seed).findings))
    assert any(found) and not all(found)
    assert verify(made.store, sample=0.3, seed=3).findings == verify(made.store, sample=0.3, seed=3).findings
    made.store.backend.delete(key)
    assert verify(made.store, sample=0.01).findings


def test_verification_keeps_up_with_changes(made: Made) -> None:
    """A stage that is withdrawn and made again while it is verified is not called damaged."""
    backend = made.store.backend
    first = made.objects("blob")[0]
    harm(made.store, first, first, "delete")

    class Healing:
        def __getattr__(self, name):
            return getattr(backend, name)

        def get_file(self, key, *arguments, **options):
            if not backend.size(first):
                for record in (made.base, made.tuned, made.numbers):
                    made.store.put_tree(made.folder / record.stage)
            return backend.get_file(key, *arguments, **options)

    assert verify(Store(Healing())).ok


def withdrawn(result: Repair) -> set[str]:
    return {record.stage for record, _ in result.withdrawn}


def test_repair_of_an_intact_store_does_nothing(made: Made) -> None:
    """Not even the trail is written."""
    before = {entry.key for entry in made.store.backend.list("v1/")}
    assert repair(made.store).describe()["withdrawn"] == []
    assert {entry.key for entry in made.store.backend.list("v1/")} == before


@pytest.mark.parametrize("source", ["folder", "store"])
@pytest.mark.parametrize("kind", ["tree", "parts list", "blob"])
def test_everything_comes_back_from_a_copy(made: Made, tmp_path: Path, kind: str, source: str) -> None:
    """With an intact copy in a folder or another store, no stage runs again, whatever was damaged and how."""
    other = Store.open(f"{tmp_path}/other")
    for record in (made.base, made.tuned, made.numbers):
        other.put_tree(made.folder / record.stage)
    where = {"folders": [made.folder]} if source == "folder" else {"stores": [other]}
    hows = ["flip", "truncate", "delete", "swap"]
    keys = made.objects(kind)
    for number, key in enumerate(keys):
        harm(made.store, key, keys[number - 2], hows[number % 4], number)
    before = {entry.key: entry for entry in made.store.backend.list("v1/")}
    told = repair(made.store, dry_run=True, **where)
    assert {entry.key: entry for entry in made.store.backend.list("v1/")} == before
    done = repair(made.store, **where)
    assert told.fixed.keys() == done.fixed.keys() and not done.withdrawn and not done.unreadable
    result = verify(made.store)
    assert result.ok, result.findings
    for record in (made.base, made.tuned, made.numbers):
        made.store.materialise(record.output, tmp_path / "back" / record.stage)
        for path in (made.folder / record.stage).iterdir():
            assert (tmp_path / "back" / record.stage / path.name).read_bytes() == path.read_bytes()


def test_without_a_copy_only_the_stages_that_lost_something_are_withdrawn(made: Made) -> None:
    """The others stand; the message says what a rerun costs; the rerun then stores what is missing."""
    own = object_key("cas", digest_bytes(bytes([2]) * HALF))
    harm(made.store, own, own, "flip")
    told = repair(made.store, dry_run=True)
    assert withdrawn(told) == {"sft"} and told.seconds == 10.0
    assert made.store.lookup("sft", made.tuned.key) is not None
    done = repair(made.store)
    assert withdrawn(done) == {"sft"} and own in done.removed
    assert made.store.lookup("sft", made.tuned.key) is None
    assert made.store.lookup("pretrain", made.base.key) and made.store.lookup("evaluate", made.numbers.key)
    assert verify(made.store).ok
    assert made.store.put_tree(made.folder / "sft").digest == made.tuned.output
    made.store.materialise(made.tuned.output, made.folder / "back")


def test_a_shared_part_is_cut_out_of_any_copy(made: Made, tmp_path: Path) -> None:
    """A tensor that two models share comes back from a copy of one of them."""
    shared = object_key("cas", digest_bytes(bytes([7]) * HALF))
    made.store.backend.delete(shared)
    done = repair(made.store, folders=[made.folder / "sft"])
    assert done.fixed.keys() == {shared} and not done.withdrawn
    assert verify(made.store).ok


def test_damaged_records_and_roots(made: Made, tmp_path: Path) -> None:
    """A record comes back from another store, else it is withdrawn; a damaged run goes to the trash; then all is well."""
    other = Store.open(f"{tmp_path}/other")
    other.put_tree(made.folder / "sft")
    other.commit(made.tuned)
    keys = {stage: f"v1/act/{stage}/{r.key}.json" for stage, r in (("sft", made.tuned), ("evaluate", made.numbers))}
    for key in [*keys.values(), f"v1/run/{made.run}.json"]:
        harm(made.store, key, key, "flip")
    done = repair(made.store, stores=[other])
    assert done.fixed.keys() == {keys["sft"]} and done.unreadable == [keys["evaluate"]]
    assert done.removed.keys() == {f"v1/run/{made.run}.json"}
    assert made.store.lookup("sft", made.tuned.key) == made.tuned
    assert made.store.lookup("evaluate", made.numbers.key) is None
    assert verify(made.store).ok


def test_a_deleted_record_is_explained_once(made: Made) -> None:
    """After repair has said that a stage of a run is gone, verification does not say so again."""
    made.store.backend.delete(f"v1/act/sft/{made.tuned.key}.json")
    assert [finding.kind for finding in verify(made.store).findings] == ["record"]
    assert repair(made.store).unreadable
    assert verify(made.store).ok


def test_a_record_that_was_made_anew_is_missed(made: Made) -> None:
    """That it was withdrawn once does not explain why it is not there now: a run names it."""
    record, key = made.tuned, f"v1/act/sft/{made.tuned.key}.json"
    forget(made.store, record, "wrong data")
    assert verify(made.store).ok
    assert made.store.commit(record) == record and verify(made.store).ok
    made.store.backend.delete(key)
    assert [(finding.key, finding.problem[:10]) for finding in verify(made.store).findings] == [(key, "is missing")]
    assert repair(made.store).unreadable == [key] and verify(made.store).ok
    assert "withdrawn" in str(withdrawals(made.store)[0]) and "is missing" in withdrawals(made.store)[0].reason
    assert made.store.commit(record) == record and verify(made.store).ok


def test_a_copy_in_another_folder_is_no_damage(made: Made) -> None:
    """What somebody copied to where no reader looks is not taken for the object itself, nor for a second one."""
    for kind in ("tree", "parts list", "blob"):
        key = made.objects(kind)[0]
        made.store.backend.put(f"{key[:-67]}zz/{key[-64:]}", b"something else")
    assert verify(made.store).ok
    assert not repair(made.store).removed and verify(made.store).ok


def test_what_was_withdrawn_in_earlier_days_is_no_damage(made: Made) -> None:
    """Collections removed the word `withdrawn` then; the trail says who withdrew the record, unless it was brought back."""
    record, key = made.tuned, f"v1/act/sft/{made.tuned.key}.json"
    body = {"schema": 1, "action": "forget", "because": "wrong", "by": "me@here", "at": 1e9, "records": [key]}
    made.store.backend.put("v1/audit/000-early.json", seal(body))
    made.store.backend.delete(key)
    assert verify(made.store).ok and not repair(made.store).unreadable
    assert made.store.commit(record) == record
    note(made.store.backend, "restore", records=[key])
    made.store.backend.delete(key)
    assert [(finding.key, finding.problem[:10]) for finding in verify(made.store).findings] == [(key, "is missing")]


def test_another_kind_of_object_in_the_place_of_a_record_is_damage(made: Made) -> None:
    """Whatever lies there, nobody is told to update this program for it, and repair clears it."""
    pin(made.store, "paper", {"tuned": made.tuned})
    key = f"v1/act/sft/{made.tuned.key}.json"
    for kind in ("tree", "parts", "run", "pin", "audit", "wip"):
        other = next(iter(made.store.backend.list(f"v1/{kind}/"))).key
        made.store.backend.put(key, made.store.backend.get(other).data)
        assert [finding.key for finding in verify(made.store).findings] == [key], kind
        assert repair(made.store).unreadable == [key] and verify(made.store).ok
        assert made.store.commit(made.tuned) == made.tuned


class Weighing:
    """Knows the most bytes that one round of reads brought."""

    def __init__(self, below: Backend) -> None:
        self._below = below
        self.most = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._below, name)

    def get_many(self, keys: Iterable[str], **options: Any) -> dict[str, Object | None]:
        found = self._below.get_many(keys, **options)
        self.most = max(self.most, sum(len(stored.data) for stored in found.values() if stored is not None))
        return found


def test_objects_that_are_just_not_too_large_do_not_fill_the_memory(tmp_path: Path) -> None:
    """What is not small is read by itself, whole, wherever many objects are read."""
    (tmp_path / "made").mkdir()
    made = Made(Store.open(f"memory://{tmp_path.name}"), tmp_path / "made")
    below = made.store.backend
    note(below, "forget", "x" * 3_000_000, records=[])
    for number in range(12):
        name = f"{number:064x}"
        for key in (
            f"act/sft/{name}.json",
            f"tree/00/{name}",
            f"parts/00/{name}",
            f"run/{name}.json",
            f"pin/{number}.json",
        ):
            below.put(f"v1/{key}", bytes(3_000_000))
        below.put(f"v1/trash/sft-{name}-0.json", canonical_json({"reason": "y" * 3_000_000}))
    weighing = Weighing(below)
    store = Store(weighing)  # type: ignore[arg-type]
    assert len(verify(store).findings) == 5 * 12
    with pytest.raises(Damaged, match="and 35 more"):
        collect(store, grace=0.0)
    assert len(withdrawals(store)) == 12 and [*store.records("sft")] == [made.tuned] and not pins(store)
    assert len(next(read_trail(weighing)).because) == 3_000_000
    assert 3_000_000 <= weighing.most < 3_300_000


@pytest.mark.parametrize("what", ["newest", "pointer"])
def test_damaged_checkpoints_are_dropped(made: Made, tmp_path: Path, what: str) -> None:
    """The stage goes on from the checkpoint before, or from its start when the pointer itself is lost."""
    files = [key for key in made.objects("checkpoint") if "/files/" in key]
    key = max(files) if what == "newest" else f"v1/wip/{'c' * 64}/LATEST"
    harm(made.store, key, key, "flip")
    repair(made.store)
    assert verify(made.store).ok
    (tmp_path / "restored").mkdir()
    step = StoredCheckpoints(made.store.backend, "c" * 64, 9).restore(tmp_path / "restored")
    assert step == (1 if what == "newest" else None)
