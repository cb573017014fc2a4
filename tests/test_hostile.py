"""A store whose content somebody else chose: refused with one clear error, nothing written outside, memory bounded."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path

import pytest

from artifacts.checkpoints import StoredCheckpoints
from artifacts.digest import canonical_json, digest_bytes, seal
from artifacts.errors import Damaged, LeaseLost, NotFound, StoreError
from artifacts.intent import CONDEMNED, read_condemned
from artifacts.lease import Lease
from artifacts.pending import INDEX, Pending
from artifacts.record import Record, payload_key
from artifacts.store import Store, new_record
from artifacts.trees import check_path, object_key
from flows.catalogue import find_output
from tests.hostile import BLOB, GOOD, KEY, LATEST, MALFORMED, PAYLOAD, changed, outside, put_listing, row, tree


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """A local store, with one blob in it."""
    made = Store.open(str(tmp_path / "store"))
    made.backend.put(object_key("cas", BLOB), b"one")
    return made


LISTINGS: dict[str, bytes] = {
    **MALFORMED,
    "a path to above": tree([row("../x")]),
    "a path through above": tree([row("a/../../x")]),
    "an absolute path": tree([row("/etc/passwd")]),
    "a backslash": tree([row("a\\..\\x")]),
    "a drive": tree([row("C:x")]),
    "a NUL": b'[["a\\u0000b",3,"' + BLOB.encode() + b'"]]',
    "a line feed": tree([row("a\\nb")]).replace(b"\\\\n", b"\\n"),
    "an escape sequence for the terminal": b'[["\\u001b[31mred",3,"' + BLOB.encode() + b'"]]',
    "text that is written from right to left": tree([row("a\u202egnp.exe")]),
    "no name": tree([row("")]),
    "the folder itself": tree([row(".")]),
    "a part without name": tree([row("a//b")]),
    "a trailing slash": tree([row("a/")]),
    "a long part": tree([row("x" * 256)]),
    "a long path": tree([row("/".join(["x" * 100] * 11))]),
    "a path of a million parts": tree([row("a/" * 1_000_000 + "a")]),
    "a name that Unicode writes in two ways": tree([row("e\u0301")]),
    "two names that differ in case": tree([row("A"), row("a")]),
    "two folders that differ in case": tree([row("A/x"), row("a/y")]),
    "a name twice": tree([row("a"), row("a")]),
    "file and folder": tree([row("a"), row("a/b")]),
    "file and folder in other case": tree([row("A"), row("a/b")]),
    "another order": tree([row("b"), row("a")]),
    "a negative size": tree([row("a", -1)]),
    "a size of 10^18": tree([row("a", 10**18)]),
    "a size with a point": tree([row("a", 3.0)]),
    "a size that is true": tree([row("a", True)]),
    "a size in text": tree([row("a", "3")]),
    "a path that is a number": tree([row(7)]),
    "a digest of another length": tree([row("a", 3, BLOB[:63])]),
    "a digest in capitals": tree([row("a", 3, BLOB.upper())]),
    "a digest with a path": tree([row("a", 3, "../" * 21 + "x")]),
    "a short row": tree([["a", 3]]),
    "a long row": tree([["a", 3, BLOB, 0]]),
    "rows of text": tree(["abc"]),
    "a mapping": tree({"a": [3, BLOB]}),
}


@pytest.mark.parametrize("harm", LISTINGS)
def test_hostile_tree(harm: str, store: Store, tmp_path: Path) -> None:
    """A listing that is not one is refused by name, whatever its digest, and not a single file is written."""
    digest = put_listing(store, LISTINGS[harm])
    for act in (lambda: store.materialise(digest, tmp_path / "into"), lambda: store.read(digest, "a")):
        with pytest.raises(Damaged, match=f"tree {digest[:12]}") as caught:
            act()
        assert caught.value.tree == digest and len(str(caught.value)) < 2000
    assert outside(tmp_path) <= {"into"}


def test_honest_trees_are_accepted(store: Store, tmp_path: Path) -> None:
    """The refusals above do not touch names that differ plainly, Unicode in its one form, or equal content."""
    rows = [
        row(path) for path in sorted(["A/x", "a.txt", "b/c/d", "b/c2", "\u00e9", "with space", "x" * 255, "\u4e2d"])
    ]
    digest = put_listing(store, tree(rows))
    store.materialise(digest, tmp_path / "into")
    assert {p.read_bytes() for p in (tmp_path / "into").rglob("*") if p.is_file()} == {b"one"}


def test_the_same_names_are_refused_when_storing(store: Store, tmp_path: Path) -> None:
    """What could not be read back is not stored: names that collide, or that other file systems cannot hold."""
    for names in (["A", "a"], ["e\u0301"], ["a\nb"], ["A/x", "a/y"]):
        folder = tmp_path / digest_bytes(repr(names).encode())
        for name in names:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text("x")
        with pytest.raises(StoreError):
            store.put_tree(folder)


@pytest.mark.parametrize("size", [0, 2, 4, 1 << 20, 1 << 50])
def test_a_size_that_is_a_lie(size: int, store: Store, tmp_path: Path) -> None:
    """A listing that gives a blob another size is refused, and nothing of that size is written."""
    digest = put_listing(store, tree([row("a", size)]))
    with pytest.raises((Damaged, StoreError), match="a of tree"):
        store.materialise(digest, tmp_path / "into")
    with pytest.raises((Damaged, StoreError), match="a of tree"):
        store.read(digest, "a")
    assert outside(tmp_path) <= {"into"}


LARGE = 2 << 20
FILE = "f" * 64
HALVES = [[LARGE // 2, "a" * 64], [LARGE // 2, "b" * 64]]
PARTS: dict[str, bytes] = {
    **MALFORMED,
    "no parts": seal({"file": FILE, "parts": []}),
    "a negative part": seal({"file": FILE, "parts": [[LARGE + 3, BLOB], [-3, BLOB]]}),
    "an empty part": seal({"file": FILE, "parts": [[0, BLOB], [LARGE, BLOB]]}),
    "a huge part": seal({"file": FILE, "parts": [[10**18, BLOB]]}),
    "parts that are too few": seal({"file": FILE, "parts": [[3, BLOB]]}),
    "a part that is the file": seal({"file": FILE, "parts": [[LARGE, "f" * 64]]}),
    "parts of parts": seal({"file": FILE, "parts": [{"parts": []}]}),
    "another field": seal({"file": FILE, "more": 1, "parts": [[LARGE, BLOB]]}),
    "a digest with a path": seal({"file": FILE, "parts": [[LARGE, "../" * 21 + "x"]]}),
    "wrong blobs of the right sizes": seal({"file": FILE, "parts": HALVES}),
    "a list without its check": canonical_json({"file": FILE, "parts": HALVES}),
    "the list of another file": seal({"file": "e" * 64, "parts": HALVES}),
}


@pytest.mark.parametrize("harm", PARTS)
def test_hostile_parts_list(harm: str, store: Store, tmp_path: Path) -> None:
    """A parts list that is not one, or whose parts are not the file, is damage of the tree, and leaves no file."""
    digest = put_listing(store, tree([row("a", LARGE, FILE)]))
    store.backend.put(object_key("parts", FILE), PARTS[harm])
    for blob in ("a", "b"):
        store.backend.put(object_key("cas", blob * 64), bytes(LARGE // 2))
    with pytest.raises(Damaged) as caught:
        store.materialise(digest, tmp_path / "into")
    assert caught.value.tree == digest
    assert outside(tmp_path) <= {"into"}


OTHER = {**PAYLOAD, "config": {"x": 2}}
RECORDS: dict[str, bytes] = {
    **MALFORMED,
    "another key": changed(key="1" * 64),
    "another payload": changed(payload=OTHER),
    "another stage": changed(stage="other"),
    "a payload of another stage": changed(payload={**PAYLOAD, "stage": "other"}),
    "a whole record of another key": seal({"schema": 1, **{
        n: v for n, v in asdict(new_record(stage="toy", key=payload_key(OTHER), payload=OTHER, output="0" * 64, size=1)).items()
        if v is not None}}),
    "an extra field": changed(extra=1),
    "no output": changed(output=None),
    "another schema": changed(schema=0),
    "an output with a path": changed(output="../" * 21 + "x"),
    "a negative size": changed(size=-1),
    "a huge size": changed(size=2**60),
    "a size that is true": changed(size=True),
    "a payload that is a list": changed(payload=[]),
    "a config that is a list": changed(payload={**PAYLOAD, "config": []}),
    "seconds in text": changed(seconds="1"),
    "an end in a year that no calendar has": changed(finished=1e30),
    "a node with an escape sequence": changed(node="\x1b]0;x\x07"),
    "an environment that is text": changed(environment="x"),
    "versions that are a list": changed(environment={"versions": ["torch"]}),
    "symbols that are numbers": changed(symbols={"a": 1}),
    "an inner record of a mapping": changed(commit={}),
}  # fmt: skip


@pytest.mark.parametrize("harm", RECORDS)
def test_hostile_record(harm: str, store: Store) -> None:
    """What is not the record of this key is damage: never a hit, never a miss, and withdrawn by name."""
    store.backend.put(f"v1/act/toy/{KEY}.json", RECORDS[harm])
    for act in (lambda: store.lookup("toy", KEY), lambda: store.lookup_many([("toy", KEY)])):
        with pytest.raises(Damaged, match=f"v1/act/toy/{KEY}.json") as caught:
            act()
        assert caught.value.record == ("toy", KEY) and len(str(caught.value)) < 1000
    damaged: dict[tuple[str, str], Damaged] = {}
    assert store.lookup_many([("toy", KEY)], damaged) == {("toy", KEY): None} and damaged
    assert [*store.records("toy")] == []
    with pytest.raises(Damaged):
        store.commit(GOOD)
    assert store.withdraw_damaged("toy", KEY, "test") and store.commit(GOOD) == GOOD


def test_the_good_record_is_good(store: Store) -> None:
    """The record that the others are made from is a hit."""
    assert Record.decode(changed(), "toy", KEY) == GOOD


@pytest.mark.parametrize("stage", ["../../../etc", "a/b", "", ".", "..", "a\0b", "x" * 65, "-\n", "a b"])
def test_hostile_names_of_stages(stage: str, store: Store) -> None:
    """A stage's name that would lead elsewhere is refused before any object is read."""
    with pytest.raises(StoreError, match="not the name of a stage"):
        store.lookup(stage, KEY)
    nodes = {"model": {"stage": stage, "key": KEY, "output": BLOB}}
    store.backend.put("v1/run/x.json", canonical_json(
        {"schema": 1, "experiment": "e", "complete": True, "config": {}, "nodes": nodes}))  # fmt: skip
    skipped: list[str] = []
    assert [*store.runs(skipped)] == [] and skipped == ["x"]


RUN = {"schema": 1, "experiment": "e", "complete": True, "config": {}, "nodes": {}}
NODE = {"stage": "toy", "key": KEY, "output": BLOB}
RUNS: dict[str, bytes] = {
    **MALFORMED,
    "no nodes": canonical_json({**RUN, "nodes": None}),
    "nodes that are a list": canonical_json({**RUN, "nodes": []}),
    "a node that is text": canonical_json({**RUN, "nodes": {"a": "b"}}),
    "a node without key": canonical_json({**RUN, "nodes": {"a": {"stage": "toy", "output": BLOB}}}),
    "an output with a path": canonical_json({**RUN, "nodes": {"a": {**NODE, "output": "../../x"}}}),
    "a node with an escape sequence": canonical_json({**RUN, "nodes": {"\x1b[2J": NODE}}),
    "an experiment with an escape sequence": canonical_json({**RUN, "experiment": "\x1b[2J"}),
    "complete is a number": canonical_json({**RUN, "complete": 1}),
    "a config that is a list": canonical_json({**RUN, "config": []}),
}


@pytest.mark.parametrize("harm", RUNS)
def test_hostile_run(harm: str, store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    """A run that is not one hides no other, and is named without what could steer a terminal."""
    store.backend.put(f"v1/run/{'0' * 64}.json", canonical_json({**RUN, "nodes": {"a": NODE}}))
    store.backend.put("v1/run/bad.json", RUNS[harm])
    skipped: list[str] = []
    assert [name for name, _, _ in store.runs(skipped)] == ["0" * 64] and skipped == ["bad"]
    with pytest.raises(Exception, match="no output is called") as caught:
        find_output(store.backend.url, "nothing")
    assert "\x1b" not in str(caught.value) + "".join(capsys.readouterr())


LEASES: dict[str, bytes] = {
    **MALFORMED,
    "no state": canonical_json({"owner": "x"}),
    "an unknown state": canonical_json({
        "state": "mine", "owner": "x", "fence": 1, "beat": "b", "holder": {}, "time_to_live": 1.0}),
    "a fence that is text": canonical_json({
        "state": "held", "owner": "x", "fence": "many", "beat": "b", "holder": {}, "time_to_live": 1.0}),
    "a holder that is a list": canonical_json({
        "state": "held", "owner": "x", "fence": 1, "beat": "b", "holder": [], "time_to_live": 1.0}),
}  # fmt: skip


@pytest.mark.parametrize("harm", LEASES)
def test_hostile_lease(harm: str, store: Store) -> None:
    """A lease that is not one protects nobody and needs nobody: it is taken over, renewed and released."""
    store.backend.put(f"v1/lease/{KEY}.json", LEASES[harm])
    lease = Lease(store.backend, KEY)
    assert lease.try_acquire()
    lease.renew()
    lease.confirm()
    store.backend.put(f"v1/lease/{KEY}.json", LEASES[harm])
    for act in (lease.renew, lease.confirm):
        with pytest.raises(LeaseLost):
            act()


NAME = "000000005-0123456789ab"
LATESTS: dict[str, bytes] = {
    **MALFORMED,
    "a name with a path": seal({"fence": 1, "checkpoints": [{"name": "../../../x", "step": 1, "digest": BLOB}]}),
    "a name that is a number": seal({"fence": 1, "checkpoints": [{"name": 7, "step": 1, "digest": BLOB}]}),
    "a fence that is a list": seal({"fence": [], "checkpoints": []}),
    "checkpoints that are a mapping": seal({"fence": 1, "checkpoints": {"a": 1}}),
    "ten thousand checkpoints": seal({"fence": 1, "checkpoints": [{"name": NAME, "step": 1, "digest": BLOB}] * 10_000}),
}


@pytest.mark.parametrize("harm", LATESTS)
def test_hostile_checkpoint_pointer(harm: str, store: Store, tmp_path: Path) -> None:
    """A pointer that is not one means no checkpoint, soon; the next save replaces it, and restores."""
    (tmp_path / "into").mkdir()
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "a").write_text("state")
    store.backend.put(LATEST, LATESTS[harm])
    checkpoints = StoredCheckpoints(store.backend, KEY, 2)
    assert checkpoints.restore(tmp_path / "into") is None
    checkpoints.claim()
    checkpoints.save(7, tmp_path / "state")
    assert checkpoints.restore(tmp_path / "into") == 7 and (tmp_path / "into" / "a").read_text() == "state"


MANIFEST = {"step": 5, "seconds": 1.0, "files": []}
MANIFESTS: dict[str, bytes] = {
    **MALFORMED,
    **{f"files: {name}": canonical_json({**MANIFEST, "files": rows}) for name, rows in {
        "a path to above": [row("../../x")], "an absolute path": [row("/tmp/x")], "a size of 10^18": [row("a", 10**18)],
        "file and folder": [row("a"), row("a/b")], "a mapping": {"a": 1}, "a wrong size": [row("a", 4)],
        "a missing file": [row("b")],
    }.items()},
    "a negative step": canonical_json({**MANIFEST, "step": -1}),
    "a step that is text": canonical_json({**MANIFEST, "step": "5"}),
    "seconds without end": canonical_json({**MANIFEST, "seconds": 1e300}),
}  # fmt: skip


@pytest.mark.parametrize("harm", MANIFESTS)
def test_hostile_checkpoint_manifest(harm: str, store: Store, tmp_path: Path) -> None:
    """A manifest that is not one is no checkpoint, though its digest is right; nothing is written outside the folder."""
    (tmp_path / "into").mkdir()
    manifest = MANIFESTS[harm]
    store.backend.put(f"v1/wip/{KEY}/{NAME}/manifest.json", manifest)
    store.backend.put(f"v1/wip/{KEY}/{NAME}/files/a", b"one")
    pointer = {"name": NAME, "step": 5, "digest": digest_bytes(manifest)}
    store.backend.put(LATEST, seal({"fence": 1, "checkpoints": [pointer]}))
    assert StoredCheckpoints(store.backend, KEY, 2).restore(tmp_path / "into") is None
    assert outside(tmp_path) == {"into"}


@pytest.mark.parametrize("harm", MALFORMED)
def test_hostile_lists_of_collections(harm: str, store: Store) -> None:
    """A condemned list that is not one counts as unknown, a pending list as none, and neither is an error."""
    store.backend.put(CONDEMNED, MALFORMED[harm])
    store.backend.put(INDEX, MALFORMED[harm])
    condemned = read_condemned(store.backend)
    assert condemned is not None and condemned.state == "damaged"
    assert Pending(store.backend).shards == []


def test_a_pending_list_cannot_have_records_deleted(store: Store) -> None:
    """The shards that a collection will delete can only be shards."""
    store.commit(GOOD)
    store.backend.put(INDEX, canonical_json({"schema": 1, "shards": [[1.0, f"v1/act/toy/{KEY}.json"]]}))
    pending = Pending(store.backend)
    pending.replace({}, 0.0)
    assert store.lookup("toy", KEY) == GOOD


def test_refusals_take_no_time(store: Store, tmp_path: Path) -> None:
    """The hostile listings above, all together, cost the processor less than a study's smallest stage."""
    digests = [put_listing(store, listing) for listing in LISTINGS.values()]
    began = time.process_time()
    for digest in digests:
        with pytest.raises(Damaged):
            store.tree(digest)
    assert time.process_time() - began < 30


def test_paths_are_checked_by_one_function() -> None:
    """The rule for names is public, and takes nothing but text."""
    check_path("a/b")
    for path in (None, 7, b"a", ["a"]):
        with pytest.raises(StoreError):
            check_path(path)  # type: ignore[arg-type]
    with pytest.raises(NotFound):
        Store.open("memory://nothing-there").backend.get("v1/x")
