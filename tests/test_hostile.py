"""A store whose content somebody else chose: refused with one clear error, nothing written outside, memory bounded."""

from __future__ import annotations

import json
import os
import resource
import stat
import struct
import time
import tracemalloc
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from artifacts.backend import MAX_OBJECT_BYTES
from artifacts.checkpoints import StoredCheckpoints
from artifacts.digest import canonical_json, digest_bytes, seal
from artifacts.errors import Damaged, LeaseLost, NotFound, StoreError, StoreUnavailable, TooLarge
from artifacts.intent import CONDEMNED, read_condemned
from artifacts.lease import Lease
from artifacts.pending import INDEX, Pending
from artifacts.record import Record, payload_key
from artifacts.scratch import finished_attempt, new_attempt
from artifacts.store import Store, new_record
from artifacts.tables import read_table
from artifacts.trees import check_path, object_key
from flows.catalogue import find_output
from flows.export import ExportError, export_tree
from tasks.models import load_model
from tasks.stage import StageError
from tests.tiny import save_tiny_model

BLOB = digest_bytes(b"one")
PAYLOAD = {"algorithm": 1, "stage": "toy", "code": "c", "config": {"x": 1}, "inputs": {}}
KEY = payload_key(PAYLOAD)
DEEP = b"[" * 100_000 + b"]" * 100_000

MALFORMED: dict[str, bytes] = {
    "empty": b"",
    "a byte order mark": b"\xef\xbb\xbf[]",
    "not UTF-8": b'["\xff"]',
    "UTF-16": "[]".encode("utf-16"),
    "half a surrogate pair": b'["\\ud800"]',
    "nested 100,000 deep": DEEP,
    "nested deep in mappings": b'{"a":' * 50_000 + b"1" + b"}" * 50_000,
    "an integer of a million digits": b"[" + b"9" * 1_000_000 + b"]",
    "an integer of 70 bits": b"[1180591620717411303424]",
    "infinity": b"[1e999]",
    "NaN": b"[NaN]",
    "a repeated key": b'{"schema":1,"schema":1}',
    "spaces": b"[ ]",
    "text after it": b"[]x",
    "a number": b"7",
    "a pickle": b"\x80\x04\x95\x00.",
    "zeros": bytes(1000),
}
"""Bytes that are no object of any kind."""


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """A local store, with one blob in it."""
    made = Store.open(str(tmp_path / "store"))
    made.backend.put(object_key("cas", BLOB), b"one")
    return made


def put_listing(store: Store, listing: bytes) -> str:
    """Store a tree object under its right name."""
    digest = digest_bytes(listing)
    store.backend.put(object_key("tree", digest), listing)
    return digest


def tree(rows: Any) -> bytes:
    """The listing of these rows."""
    return json.dumps(rows, separators=(",", ":"), ensure_ascii=False).encode()


def row(path: Any, size: Any = 3, digest: Any = BLOB) -> list[Any]:
    """A row of a listing, right but for what is given."""
    return [path, size, digest]


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


def outside(tmp_path: Path) -> set[str]:
    """Every file beside the store."""
    return {p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*") if not p.is_relative_to(tmp_path / "store")}


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
PARTS: dict[str, bytes] = {
    **MALFORMED,
    "no parts": canonical_json({"parts": []}),
    "a negative part": canonical_json({"parts": [[LARGE + 3, BLOB], [-3, BLOB]]}),
    "an empty part": canonical_json({"parts": [[0, BLOB], [LARGE, BLOB]]}),
    "a huge part": canonical_json({"parts": [[10**18, BLOB]]}),
    "parts that are too few": canonical_json({"parts": [[3, BLOB]]}),
    "a part that is the file": canonical_json({"parts": [[LARGE, "f" * 64]]}),
    "parts of parts": canonical_json({"parts": [{"parts": []}]}),
    "another field": canonical_json({"more": 1, "parts": [[LARGE, BLOB]]}),
    "a digest with a path": canonical_json({"parts": [[LARGE, "../" * 21 + "x"]]}),
    "wrong blobs of the right sizes": canonical_json({"parts": [[LARGE // 2, "a" * 64], [LARGE // 2, "b" * 64]]}),
}


@pytest.mark.parametrize("harm", PARTS)
def test_hostile_parts_list(harm: str, store: Store, tmp_path: Path) -> None:
    """A parts list that is not one, or whose parts are not the file, is damage of the tree, and leaves no file."""
    file = "f" * 64
    digest = put_listing(store, tree([row("a", LARGE, file)]))
    store.backend.put(object_key("parts", file), PARTS[harm])
    for blob in ("a", "b"):
        store.backend.put(object_key("cas", blob * 64), bytes(LARGE // 2))
    with pytest.raises(Damaged) as caught:
        store.materialise(digest, tmp_path / "into")
    assert caught.value.tree == digest
    assert outside(tmp_path) <= {"into"}


GOOD = new_record(stage="toy", key=KEY, payload=PAYLOAD, output="0" * 64, size=1, finished=1.0)


def changed(**fields: Any) -> bytes:
    """The good record with other fields; None removes one."""
    body = {"schema": 1, **{name: value for name, value in asdict(GOOD).items() if value is not None}, **fields}
    return seal({name: value for name, value in body.items() if value is not None})


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
    "another schema": changed(schema=2),
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


LATEST = f"v1/wip/{KEY}/LATEST"
NAME = "000000005-0123456789ab"
LATESTS: dict[str, bytes] = {
    **MALFORMED,
    "a name with a path": seal({"fence": 1, "checkpoints": [{"name": "../../../x", "step": 1, "digest": BLOB}]}),
    "a name that is a number": seal({"fence": 1, "checkpoints": [{"name": 7, "step": 1, "digest": BLOB}]}),
    "a fence that is a list": seal({"fence": [], "checkpoints": []}),
    "checkpoints that are a mapping": seal({"fence": 1, "checkpoints": {"a": 1}}),
    "ten thousand checkpoints": seal(
        {"fence": 1, "checkpoints": [{"name": NAME, "step": 1, "digest": BLOB}] * 10_000}
    ),
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
    pending.replace({})
    assert store.lookup("toy", KEY) == GOOD


OBJECTS: dict[str, Callable[[Store, Path], object]] = {
    f"v1/act/toy/{KEY}.json": lambda store, into: store.lookup("toy", KEY),
    object_key("tree", "0" * 64): lambda store, into: store.materialise("0" * 64, into),
    LATEST: lambda store, into: StoredCheckpoints(store.backend, KEY, 2).restore(into),
    f"v1/lease/{KEY}.json": lambda store, into: Lease(store.backend, KEY).try_acquire(),
    "v1/run/x.json": lambda store, into: [*store.runs()],
    CONDEMNED: lambda store, into: read_condemned(store.backend),
    INDEX: lambda store, into: Pending(store.backend),
}


@pytest.mark.parametrize("key", OBJECTS)
def test_objects_of_absurd_size_are_not_read(key: str, store: Store, tmp_path: Path) -> None:
    """An object of 256 MiB where a few hundred bytes belong is refused, replaced or passed over, in little memory."""
    path = tmp_path / "store" / key
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as file:
        file.truncate(256 << 20)
    (tmp_path / "into").mkdir()
    tracemalloc.start()
    try:
        OBJECTS[key](store, tmp_path / "into")
    except Damaged as error:
        assert key.startswith(("v1/act", "v1/tree")) and len(str(error)) < 1000
    finally:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert peak < 3 * MAX_OBJECT_BYTES
    if key.startswith("v1/act"):
        assert store.withdraw_damaged("toy", KEY, "test") and store.lookup("toy", KEY) is None


def test_reads_have_a_limit_on_every_backend(tmp_path: Path, s3_url: str) -> None:
    """One byte more than the limit is refused by `get`, and comes without its bytes from `get_many`."""
    for url in ("memory://limits", str(tmp_path / "limits"), s3_url):
        backend = Store.open(url).backend
        etag = backend.put("v1/x", b"12345")
        assert backend.get("v1/x", limit=5).data == b"12345"
        with pytest.raises(TooLarge) as caught:
            backend.get("v1/x", limit=4)
        assert caught.value.etag == etag
        found = backend.get_many(["v1/x", "v1/y"], limit=4)
        assert found["v1/x"].data == b"" and found["v1/x"].etag == etag and found["v1/y"] is None
        backend.put("v1/x", b"1", if_match=caught.value.etag)


def test_a_tree_of_millions_of_files_is_refused(store: Store, tmp_path: Path) -> None:
    """A listing that is longer than any study's is not parsed, and a short one of nothing but brackets costs little."""
    many = tree([row(f"{n:07d}") for n in range(300_000)])
    assert len(many) > MAX_OBJECT_BYTES
    brackets = b"[" + b"[]," * (1 << 20) + b"[]]"
    for listing in (many, brackets):
        digest = put_listing(store, listing)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        with pytest.raises(Damaged, match=digest[:12]):
            store.materialise(digest, tmp_path / "into")
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1 << 20  # KiB


def test_links_and_pipes_inside_a_local_store(store: Store, tmp_path: Path) -> None:
    """A link or a pipe where an object belongs is not followed, linked to or waited for."""
    (tmp_path / "secret").write_bytes(b"one")
    blob = tmp_path / "store" / object_key("cas", BLOB)
    digest = put_listing(store, tree([row("a")]))
    blob.unlink()
    blob.symlink_to(tmp_path / "secret")
    with pytest.raises(StoreUnavailable, match=f"{BLOB} in the store .* is a link"):
        store.materialise(digest, tmp_path / "into")
    assert not (tmp_path / "into" / "a").exists() and BLOB not in {e.key[-64:] for e in store.backend.list("v1/cas/")}
    blob.unlink()
    os.mkfifo(blob)
    with pytest.raises(Damaged):
        store.materialise(digest, tmp_path / "into")
    with pytest.raises((Damaged, StoreUnavailable)):
        store.backend.get(object_key("cas", BLOB))
    blob.unlink()
    blob.mkdir()
    with pytest.raises((Damaged, StoreUnavailable)):
        store.backend.get(object_key("cas", BLOB))


def test_a_folder_of_the_store_that_is_a_link(store: Store, tmp_path: Path) -> None:
    """Nothing is read, written, listed or deleted through a folder of the store that leads elsewhere."""
    elsewhere = tmp_path / "elsewhere"
    (elsewhere / "toy").mkdir(parents=True)
    (elsewhere / "toy" / f"{KEY}.json").write_bytes(changed())
    (tmp_path / "store" / "v1" / "act").symlink_to(elsewhere)
    backend = store.backend
    for act in (
        lambda: store.lookup("toy", KEY),
        lambda: backend.put(f"v1/act/toy/{KEY}.json", b"x"),
        lambda: backend.delete(f"v1/act/toy/{KEY}.json"),
        lambda: backend.size(f"v1/act/toy/{KEY}.json"),
    ):
        with pytest.raises(StoreUnavailable, match="v1/act in the store .* is a link"):
            act()
    assert not [e for e in backend.list("v1/") if KEY in e.key]
    with pytest.raises(StoreUnavailable, match="is a link"):
        [*backend.list("v1/act/")]
    assert (elsewhere / "toy" / f"{KEY}.json").read_bytes() == changed()


@pytest.mark.parametrize("key", ["../x", "v1/../../x", "/etc/passwd", "v1//x", "v1/./x", "", "a\0b", "x" * 2000])
def test_keys_stay_inside_a_local_store(key: str, store: Store, tmp_path: Path) -> None:
    """No key leads out of the store's folder, for any operation."""
    backend = store.backend
    (tmp_path / "x").write_text("mine")
    for act in (
        lambda: backend.get(key), lambda: backend.put(key, b"x"), lambda: backend.delete(key), lambda: backend.size(key),
        lambda: backend.put_file(key, tmp_path / "x"), lambda: backend.get_file(key, tmp_path / "y"),
    ):  # fmt: skip
        with pytest.raises(StoreError):
            act()
    assert outside(tmp_path) == {"x"} and (tmp_path / "x").read_text() == "mine"


@pytest.mark.parametrize("name", [".bashrc", "a/.ssh/config", "con", "aux.json", "a/NUL.txt", "dot.", "space /x"])
def test_export_of_strange_names(name: str, store: Store, tmp_path: Path) -> None:
    """Files that would be hidden, or be devices, are not written into a person's folder; the tree is named."""
    digest = put_listing(store, tree([row(name)]))
    with pytest.raises((ExportError, Damaged), match=digest[:12]):
        export_tree(store, digest, tmp_path / "exported")
    assert outside(tmp_path) == set()


HEADERS: dict[str, bytes] = {
    "empty": b"",
    "a header longer than the file": struct.pack("<Q", 1 << 60) + b"{}",
    "a header that is not JSON": struct.pack("<Q", 2) + b"xx",
    "a deep header": struct.pack("<Q", len(DEEP)) + DEEP,
    "tensors that overlap": struct.pack("<Q", 118) + (
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"b":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'.ljust(118)
    ) + bytes(4),
    "a tensor of 10^18 elements": struct.pack("<Q", 64) + (
        b'{"a":{"dtype":"F32","shape":[999999999999999999],"data_offsets":[0,4]}}'.ljust(64)
    ) + bytes(4),
    "a pickle": b"\x80\x04\x95\x0b\x00\x00\x00\x00\x00\x00\x00\x8c\x07os.exit\x94.",
}  # fmt: skip


@pytest.mark.parametrize("harm", HEADERS)
def test_hostile_weights(harm: str, tmp_path: Path) -> None:
    """Weights with a hostile header are one clear error that names the model."""
    source = save_tiny_model(tmp_path / "model")
    (source / "model.safetensors").write_bytes(HEADERS[harm])
    with pytest.raises(StageError, match="model: does not load"):
        load_model(source)


@pytest.mark.parametrize(
    "data", [b"", b"PAR1", b"PAR1" + bytes(100) + b"PAR1", b"\x80\x04.", b"PAR1\xff\xff\xff\x7fPAR1"]
)
def test_hostile_table(data: bytes, tmp_path: Path) -> None:
    """A Parquet file that is none is one clear error that names the file."""
    (tmp_path / "rows.parquet").write_bytes(data)
    with pytest.raises(StoreError, match="rows.parquet: expected a Parquet table"):
        read_table(tmp_path / "rows.parquet")


@pytest.mark.parametrize("harm", MALFORMED)
def test_hostile_scratch(harm: str, tmp_path: Path) -> None:
    """An attempt whose notes are not notes is neither finished nor an error."""
    attempt = new_attempt(tmp_path, KEY, "1-x")
    (attempt.folder / "finished.json").write_bytes(MALFORMED[harm])
    assert finished_attempt(tmp_path, KEY) is None
    (attempt.folder / "holder.json").write_bytes(MALFORMED[harm])
    assert not attempt.is_mine() and not attempt.is_abandoned()


def test_only_the_owner_can_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a careless umask too, nobody else can write into what the local store and the scratch folder consist of."""
    before = os.umask(0)
    try:
        store = Store.open(str(tmp_path / "deep" / "store"))
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "a").write_text("one")
        digest = store.put_tree(tmp_path / "out").digest
        store.commit(GOOD)
        etag = store.backend.put("v1/x", b"1")
        store.backend.put("v1/x", b"2", if_match=etag)
        StoredCheckpoints(store.backend, KEY, 1).save(1, tmp_path / "out")
        attempt = new_attempt(tmp_path / "scratch", KEY, "1-x")
        (attempt.out / "a").write_text("one")
        attempt.finish(1.0)
        store.materialise(digest, attempt.folder / "input")
    finally:
        os.umask(before)
    others = stat.S_IWGRP | stat.S_IWOTH
    made = [
        tmp_path / "deep",
        *(tmp_path / "deep").rglob("*"),
        tmp_path / "scratch",
        *(tmp_path / "scratch").rglob("*"),
    ]
    private = attempt.folder
    assert private.stat().st_mode & 0o077 == 0
    assert [p for p in made if p.stat().st_mode & others and not p.is_relative_to(private)] == []
    assert len(made) > 12


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
