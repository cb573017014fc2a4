"""Hostile sizes, links, keys, names and files: of a local store, of models and tables, and of the scratch folder."""

from __future__ import annotations

import os
import resource
import stat
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest

from artifacts.backend import MAX_OBJECT_BYTES
from artifacts.checkpoints import StoredCheckpoints
from artifacts.errors import Damaged, StoreError, StoreUnavailable, TooLarge
from artifacts.intent import CONDEMNED, read_condemned
from artifacts.lease import Lease
from artifacts.pending import INDEX, Pending
from artifacts.scratch import finished_attempt, new_attempt
from artifacts.store import Store
from artifacts.tables import read_table
from artifacts.trees import object_key
from flows.export import ExportError, export_tree
from tasks.models import load_model
from tasks.stage import StageError
from tests.hostile import BLOB, DEEP, GOOD, KEY, LATEST, MALFORMED, changed, outside, put_listing, row, tree
from tests.tiny import save_tiny_model


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """A local store, with one blob in it."""
    made = Store.open(str(tmp_path / "store"))
    made.backend.put(object_key("cas", BLOB), b"one")
    return made


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
