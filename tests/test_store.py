"""The store keeps its contract on every backend: atomic, create-only, verified, and never mistaking an error for a miss."""

from __future__ import annotations

import json
import threading
import uuid
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from artifacts.backend import open_backend
from artifacts.clock import SYSTEM
from artifacts.condemned import remove_damaged
from artifacts.digest import canonical_json, digest_bytes, digest_file
from artifacts.errors import Conflict, Damaged, NotFound, StoreError, StoreUnavailable
from artifacts.intent import intent
from artifacts.record import WITHDRAWN, Record, payload_key
from artifacts.sole_writer import SoleWriter
from artifacts.store import Store, new_record
from artifacts.trees import Tree, check_path, object_key, object_keys
from tests.counting import CountingBackend

PAYLOAD = {"algorithm": 1, "stage": "toy", "code": "c", "config": {"x": 1}, "inputs": {}}


def record(output: str = "0" * 64, payload: dict | None = None):
    payload = payload or PAYLOAD
    return new_record(stage="toy", key=payload_key(payload), payload=payload, output=output, size=1)


def folder(tmp_path: Path, **files: str) -> Path:
    made = tmp_path / "tree"
    for name, text in files.items():
        path = made / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return made


def blob_key(digest: str) -> str:
    return f"v1/cas/{digest[:2]}/{digest}"


def test_conditional_writes(store: Store) -> None:
    """Create-only and compare-and-swap refuse exactly what they must, and a missing key is NotFound."""
    backend = store.backend
    with pytest.raises(NotFound):
        backend.get("v1/x")
    etag = backend.put("v1/x", b"", if_absent=True)
    with pytest.raises(Conflict):
        backend.put("v1/x", b"two", if_absent=True)
    assert backend.get("v1/x").data == b""
    newer = backend.put("v1/x", b"three", if_match=etag)
    assert backend.get("v1/x").etag == newer
    with pytest.raises(Conflict):
        backend.put("v1/x", b"four", if_match=etag)
    with pytest.raises((Conflict, NotFound)):
        backend.put("v1/absent", b"five", if_match=etag)
    assert backend.get("v1/x").data == b"three"
    assert backend.size("v1/x") == 5 and backend.size("v1/absent") is None
    store.probe()


def test_one_winner_of_a_race(store: Store) -> None:
    """Of sixteen threads that create the same key, one succeeds."""
    wins = []

    def create(number: int) -> None:
        try:
            store.backend.put("v1/race", str(number).encode(), if_absent=True)
            wins.append(number)
        except Conflict:
            pass

    threads = [threading.Thread(target=create, args=(n,)) for n in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(wins) == 1
    assert store.backend.get("v1/race").data == str(wins[0]).encode()


def test_listing_and_get_many(store: Store) -> None:
    """A listing holds exactly the keys under its prefix, and reading many keys tells the missing ones."""
    for name in ("v1/a/1", "v1/a/2", "v1/ab", "v1/b/1"):
        store.backend.put(name, name.encode())
    assert sorted(entry.key for entry in store.backend.list("v1/a/")) == ["v1/a/1", "v1/a/2"]
    found = store.backend.get_many(["v1/a/1", "v1/none"])
    assert found["v1/a/1"].data == b"v1/a/1" and found["v1/none"] is None
    store.backend.delete("v1/a/1")
    store.backend.delete("v1/a/1")
    assert [entry.key for entry in store.backend.list("v1/a/")] == ["v1/a/2"]


def test_tree_round_trip(store: Store, tmp_path: Path) -> None:
    """A folder comes back byte for byte, under a digest that depends on its content alone."""
    source = folder(tmp_path, a="one", b__c="two", empty="", large="x" * 100_000)
    tree = store.put_tree(source)
    assert store.put_tree(source).digest == tree.digest
    store.materialise(tree.digest, tmp_path / "back")
    back = {
        p.relative_to(tmp_path / "back").as_posix(): p.read_text()
        for p in (tmp_path / "back").rglob("*")
        if p.is_file()
    }
    assert back == {"a": "one", "b/c": "two", "empty": "", "large": "x" * 100_000}
    assert store.read(tree.digest, "b/c") == b"two"


@pytest.mark.parametrize("harm", ["flip", "truncate", "delete", "swap"])
def test_damage_is_found(store: Store, tmp_path: Path, harm: str) -> None:
    """A flipped, cut, missing or exchanged blob is never handed out."""
    tree = store.put_tree(folder(tmp_path, a="one", b="two"))
    first, second = (blob_key(file.digest) for file in tree.files)
    store.backend.delete(first)
    if harm != "delete":
        wrong = {"flip": b"onf", "truncate": b"on", "swap": store.backend.get(second).data}[harm]
        store.backend.put(first, wrong)
    with pytest.raises(Damaged) as caught:
        store.materialise(tree.digest, tmp_path / "back")
    assert caught.value.tree == tree.digest
    assert not (tmp_path / "back" / "a").exists()


def test_commit_once(store: Store) -> None:
    """The first record of a key stands; a later writer is handed the winner's; a lost reply is recognised."""
    first, second = record("1" * 64), record("2" * 64)
    assert store.lookup("toy", first.key) is None
    assert store.commit(first) == first
    assert store.commit(second).output == first.output
    assert store.commit(first) == first
    assert store.lookup("toy", first.key) == first
    assert [r.output for r in store.records("toy")] == ["1" * 64]
    store.invalidate(first, "test")
    assert store.lookup("toy", first.key) is None


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{}",
        b"[1]",
        b"\xff",
        b"[" * 100_000,
        json.dumps({"schema": 1}).encode(),
        json.dumps({"schema": 2}).encode(),
    ],
)
def test_bad_record_is_refused(data: bytes) -> None:
    """Bytes that are not a record of this key raise Damaged, and are never a hit or a miss."""
    store = Store.open("memory://bad-record")
    key = payload_key(PAYLOAD)
    store.backend.put(f"v1/act/toy/{key}.json", data)
    with pytest.raises(Damaged):
        store.lookup("toy", key)


def test_record_of_another_key_is_refused() -> None:
    """A record copied to another key is not served for it."""
    store = Store.open("memory://other-key")
    other = payload_key({**PAYLOAD, "config": {"x": 2}})
    store.backend.put(f"v1/act/toy/{other}.json", record().encode())
    with pytest.raises(Damaged, match="expected toy"):
        store.lookup("toy", other)


@pytest.mark.parametrize(
    "path", ["/etc/passwd", "../x", "a/../../x", "", ".", "a//b", "a\\b", "C:/x", "a\nb", "x" * 2000]
)
def test_unsafe_tree_paths(path: str, tmp_path: Path) -> None:
    """A listing that names a path outside its folder is refused before anything is written."""
    with pytest.raises(StoreError):
        check_path(path)
    store = Store.open("memory://unsafe")
    listing = canonical_json([[path, 1, "0" * 64]])
    digest = digest_bytes(listing)
    store.backend.put(f"v1/tree/{digest[:2]}/{digest}", listing)
    with pytest.raises(Damaged):
        store.materialise(digest, tmp_path / "out")
    assert not list(tmp_path.rglob("*.part"))


def test_links_are_not_stored(tmp_path: Path) -> None:
    """A link in an output is refused, so that nothing outside the output folder is ever read into the store."""
    made = folder(tmp_path, a="one")
    (made / "link").symlink_to("/etc/hostname")
    with pytest.raises(StoreError, match="link"):
        Store.open("memory://links").put_tree(made)


def test_unwritable_store(tmp_path: Path) -> None:
    """A store that cannot be written says so, with its name and what to do, before any work."""
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreUnavailable, match="--store"):
        Store.open(f"{tmp_path}/file/store").probe()


def test_s3_without_its_server(monkeypatch: pytest.MonkeyPatch) -> None:
    """An S3 server that does not answer is an error, not an empty store."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "very-secret-value")
    with pytest.raises(StoreUnavailable) as caught:
        Store.open("s3://bucket/prefix").lookup("toy", payload_key(PAYLOAD))
    assert "very-secret-value" not in str(caught.value)


def test_s3_missing_bucket(s3_url: str) -> None:
    """A bucket that does not exist is an error that says so, not a miss."""
    with pytest.raises(StoreUnavailable, match="does not exist"):
        Store.open("s3://no-such-bucket-here/x").lookup("toy", payload_key(PAYLOAD))


def test_unknown_scheme() -> None:
    """A store URL of an unknown kind names the kinds there are."""
    with pytest.raises(StoreError, match="s3://bucket/prefix"):
        open_backend("ftp://host/x")


def test_local_files_are_complete_or_absent(tmp_path: Path) -> None:
    """Putting a blob leaves no temporary file behind, and its bytes match its name."""
    store = Store.open(str(tmp_path / "store"))
    tree = store.put_tree(folder(tmp_path, a="one"))
    [blob] = (tmp_path / "store" / "v1" / "cas").rglob("?" * 64)
    assert digest_file(blob) == blob.name == tree.files[0].digest
    assert not [p for p in (tmp_path / "store" / ".tmp").iterdir() if p.suffix != ".lock"]


def test_stopped_lock_holder_blocks_nobody_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A compare-and-swap that cannot get its lock gives up with an error that says what to look for."""
    import fcntl

    from artifacts import file_lock

    monkeypatch.setattr(file_lock, "LOCK_SECONDS", 0.2)
    backend = open_backend(str(tmp_path / "store"))
    etag = backend.put("v1/x", b"1")
    backend.put("v1/x", b"2", if_match=etag)
    [guard] = (tmp_path / "store" / ".tmp").glob("*.lock")
    with open(guard, "ab") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(StoreUnavailable, match="stopped process"):
            backend.put("v1/x", b"3", if_match=backend.get("v1/x").etag)
    backend.put("v1/x", b"3", if_match=backend.get("v1/x").etag)


@pytest.mark.parametrize("how", ["delete and create", "replace"])
def test_nothing_changes_between_comparing_and_swapping(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """Who deletes or replaces an object while another swaps it comes before or after: what is told to stand, stands."""
    import os

    mine, other = open_backend(str(tmp_path / "store")), open_backend(str(tmp_path / "store"))
    etag, rename = mine.put("v1/x", b"old"), os.replace

    def change() -> None:
        if how == "replace":
            other.put("v1/x", b"other")
        else:
            other.delete("v1/x")
            other.put("v1/x", b"other", if_absent=True)

    beside = threading.Thread(target=change)

    def renaming(*paths: Any) -> None:
        if threading.current_thread() is not beside and not beside.ident:
            beside.start()
            beside.join(0.3)
        rename(*paths)

    monkeypatch.setattr(os, "replace", renaming)
    mine.put("v1/x", b"mine", if_match=etag)
    beside.join()
    assert mine.get("v1/x").data == b"other"


def test_old_temporary_files_are_swept(tmp_path: Path) -> None:
    """The first write removes temporary files of a day ago, and neither fresh ones nor locks."""
    import os

    temporary = tmp_path / "store" / ".tmp"
    temporary.mkdir(parents=True)
    for name in ("old", "fresh", "swap-00.lock"):
        (temporary / name).write_text("")
        if name != "fresh":
            os.utime(temporary / name, (1, 1))
    open_backend(str(tmp_path / "store")).put("v1/cas/x", b"1")
    assert {p.name for p in temporary.iterdir()} == {"fresh", "swap-00.lock"}


def test_impossible_write_is_not_a_miss(tmp_path: Path) -> None:
    """A write whose parent cannot exist is an error with advice, never NotFound."""
    (tmp_path / "store" / "v1").mkdir(parents=True)
    (tmp_path / "store" / "v1" / "act").symlink_to("/proc/nowhere/at/all")
    with pytest.raises(StoreUnavailable, match="--store"):
        Store.open(str(tmp_path / "store")).backend.put("v1/act/toy/x.json", b"1", if_absent=True)
    with pytest.raises(StoreUnavailable, match="--store"):
        Store.open("/proc/no-such-store").probe()


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("s3://AKIA:hunter2@bucket/x", "credentials"),
        ("https://me:hunter2@host/x", "credentials"),
        ("me:hunter2@s3://bucket", "credentials"),
        ("s3://bucket/x?secret=hunter2", "s3://bucket/prefix"),
        ("s3://", "s3://bucket/prefix"),
        ("s3:///x", "s3://bucket/prefix"),
        ("s3://Not_A_Bucket/x", "s3://bucket/prefix"),
        ("s3:bucket", "s3://bucket/prefix"),
        ("file://host/x", "file:///folder"),
        ("file://", "file:///folder"),
        ("", "a folder"),
    ],
)
def test_bad_store_urls(url: str, says: str) -> None:
    """A URL that names no store is refused with the form expected, and a secret in it is not repeated."""
    with pytest.raises(StoreError, match=says) as caught:
        open_backend(url)
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    ("prefix", "meant"),
    [("/a", "a"), ("a//b", "a/b"), ("a/../b", "b"), ("./a/", "a"), ("a//", "a"), ("/", ""), ("..", "")],
)
def test_prefixes_that_clients_read_differently(prefix: str, meant: str) -> None:
    """A prefix of which one client would make another is refused when the store is opened, with the URL to write instead."""
    with pytest.raises(StoreError, match="'\\.\\.' part") as caught:
        open_backend(f"s3://bucket/{prefix}")
    assert str(caught.value).endswith(f"write s3://bucket/{meant}".rstrip("/"))
    assert open_backend("s3://bucket/a/").url == "s3://bucket/a"


def test_unreadable_runs_are_left_out(store: Store) -> None:
    """A run object that is not a run hides no other run, and its id is handed to the caller."""
    good = store.put_run({"experiment": "e", "complete": True, "nodes": {}, "config": {}})
    for name, data in {"a": b"", "b": b"[]", "c": b'{"schema":1}', "d": b"\xff"}.items():
        store.backend.put(f"v1/run/{name}.json", data)
    skipped: list[str] = []
    assert [name for name, _, _ in store.runs(skipped)] == [good]
    assert sorted(skipped) == ["a", "b", "c", "d"]


def test_only_the_record_that_was_meant_is_withdrawn(store: Store) -> None:
    """Who found a record damaged long ago takes nothing away from the one that was made since, even in the last moment."""
    first = record("1" * 64)
    store.commit(first)
    assert store.withdraw(first, {"reason": "test"}) and store.lookup("toy", first.key) is None
    assert not store.withdraw(first, {"reason": "test"}) and not store.invalidate(first, "test")
    second = record("2" * 64)
    assert store.commit(second) == second and store.lookup_many([("toy", second.key)])["toy", second.key] == second
    assert not store.withdraw(first, {"reason": "test"}) and not store.invalidate(first, "test")
    assert store.lookup("toy", first.key) == second and [r.output for r in store.records("toy")] == ["2" * 64]
    put = store.backend.put

    def late(key: str, data: bytes, **condition: object) -> str:
        if key.startswith("v1/act/") and data.startswith(WITHDRAWN):
            put(key, record("3" * 64).encode())
        return put(key, data, **condition)

    with mock.patch.object(store.backend, "put", late):
        assert not store.withdraw(second, {"reason": "too late"})
    standing = store.lookup("toy", first.key)
    assert standing is not None and standing.output == "3" * 64
    notes = [store.backend.get(entry.key).data for entry in store.backend.list("v1/trash/")]
    assert len(notes) == 1 and b"too late" not in notes[0]


def test_a_blob_that_was_put_anew_is_not_removed(store: Store, tmp_path: Path) -> None:
    """Between the look that finds a blob damaged and its removal somebody may have put the right bytes."""
    tree = store.put_tree(folder(tmp_path, a="one", b="two", c="three"))
    keys = [object_key("cas", file.digest) for file in tree.files]
    good = store.backend.get(keys[0]).data
    for key in keys:
        store.backend.put(key, b"!" + store.backend.get(key).data[1:])
    looked: list[str] = []

    def is_damaged(key: str) -> bool:
        looked.append(key)
        store.backend.put(keys[0], good)
        return digest_bytes(store.backend.get(key).data) != key[-64:]

    held = intent(store.backend, [keys[-1]])
    with held:
        assert remove_damaged(store.backend, keys, is_damaged, SYSTEM, spare_announced=True) == keys[1:-1]
    assert looked == keys[:-1] and store.backend.get(keys[0]).data == good
    assert remove_damaged(store.backend, keys[-1:], is_damaged, SYSTEM, spare_announced=False) == keys[-1:]


def test_damaged_record_is_withdrawn(store: Store) -> None:
    """A record object that is not a record is moved to the trash with its bytes; a good one is never touched."""
    good = record()
    store.commit(good)
    assert not store.withdraw_damaged("toy", good.key, "test")
    store.backend.delete(f"v1/act/toy/{good.key}.json")
    store.backend.put(f"v1/act/toy/{good.key}.json", b"torn")
    with pytest.raises(Damaged) as caught:
        store.commit(good)
    assert caught.value.record == ("toy", good.key) and caught.value.tree is None
    assert store.withdraw_damaged("toy", good.key, "test") and not store.withdraw_damaged("toy", good.key, "test")
    assert store.lookup("toy", good.key) is None and store.commit(good) == good
    [kept] = [e.key for e in store.backend.list("v1/trash/") if e.key.endswith(".bytes")]
    assert store.backend.get(kept).data == b"torn"
    for stray in (".DS_Store", "notes.json"):
        store.backend.put(f"v1/act/toy/{stray}", b"junk")
    assert list(store.records("toy")) == [good]


def test_publish_commits_what_it_stored(store: Store, tmp_path: Path) -> None:
    """Publishing stores the folder, commits the record made for its tree, and leaves no intent behind."""
    made: list[str] = []

    def make_record(tree: Tree) -> Record:
        made.append(tree.digest)
        return record(tree.digest)

    standing = store.publish(folder(tmp_path, a="one"), make_record)
    assert [standing.output] == made and store.lookup("toy", standing.key) == standing
    assert store.read(standing.output, "a") == b"one"
    assert not list(store.backend.list("v1/intent/"))
    [(_, size), blob] = object_keys(store, standing.output)
    assert store.backend.size(f"v1/tree/{standing.output[:2]}/{standing.output}") == size and blob[1] == 3


def test_an_earlier_write_that_comes_back_undoes_nothing() -> None:
    """A writer that is alone is told when an older write of its own stands there again, and writes anew."""
    backend = Store.open("memory://sole-writer").backend
    writer = SoleWriter(backend, "v1/run/active-1.json")
    for data in (b"1", b"2", b"2"):
        writer.write(data)
    with pytest.raises(Conflict):
        backend.put("v1/run/active-1.json", b"1", if_absent=True)  # the first write, carried out again
    backend.put("v1/run/active-1.json", b"1")
    writer.write(b"3")
    assert backend.get("v1/run/active-1.json").data == b"3"
    backend.delete("v1/run/active-1.json")
    writer.write(b"4")
    assert backend.get("v1/run/active-1.json").data == b"4"


def test_runs_are_read_in_one_round() -> None:
    """Telling forty runs costs as many requests as telling one."""
    backend = CountingBackend(Store.open(f"memory://{uuid.uuid4().hex}").backend)
    for number in range(40):
        Store(backend).put_run({"experiment": f"e{number}", "complete": True, "nodes": {}, "config": {}})
    backend.reset()
    assert len(list(Store(backend).runs())) == 40
    assert backend.calls == {"list": 1, "get_many": 1}
