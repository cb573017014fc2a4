"""Checkpoints are stored in parts, one or more tensors each, which are shared and packed, and come back bit for bit."""

from __future__ import annotations

import json
import random
import struct
import threading
import time
from pathlib import Path
from typing import Any

import numpy
import pytest

from artifacts import tensors, upload
from artifacts.audit import verify
from artifacts.digest import digest_bytes, seal
from artifacts.errors import Damaged, StoreUnavailable
from artifacts.packing import pack, unpack
from artifacts.record import Record
from artifacts.repair import repair
from artifacts.store import Store
from artifacts.tensors import cuts
from artifacts.trees import object_key, object_keys, object_keys_of
from tests import model_folders
from tests.model_folders import LARGE, contents, model, parts_key, record_of, save_tensors, trained, weights
from tests.watched_backend import watch

_small_parts = model_folders.small_parts


def test_file_in_parts_comes_back(store: Store, tmp_path: Path) -> None:
    """A checkpoint is stored in parts, comes back byte for byte, and `object_keys` names exactly what is in the store."""
    source = model(tmp_path / "a")
    tree = store.put_tree(source)
    assert contents(source) == (store.materialise(tree.digest, tmp_path / "b"), contents(tmp_path / "b"))[1]
    assert store.read(tree.digest, "model.safetensors") == (source / "model.safetensors").read_bytes()
    stored = {
        entry.key: entry.size for prefix in ("cas", "tree", "parts") for entry in store.backend.list(f"v1/{prefix}/")
    }
    assert dict(object_keys(store, tree.digest)) == stored
    # header, five large tensors, the small ones together; config.json; the empty file
    assert len([key for key in stored if key.startswith("v1/cas/")]) == 9 and parts_key(tree) in stored


def test_equal_tensors_are_stored_once(store: Store, tmp_path: Path) -> None:
    """Of a checkpoint in which one layer changed, only that layer travels; the same tensor under two names is one object."""
    store.put_tree(model(tmp_path / "a"))
    backend = watch(store)
    store.put_tree(model(tmp_path / "b", layer3=1))
    assert backend.sent == LARGE
    own = weights(0)
    save_tensors(tmp_path / "c" / "tied.safetensors", {"head": own["layer0"], **own, "again": own["layer0"]})
    store.put_tree(tmp_path / "c")
    assert backend.sent < LARGE + 2000


def test_cuts_are_not_identity(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder has one tree digest however its files are stored."""
    source = model(tmp_path / "a")
    digests = set()
    for split, part in ((1 << 20, 100_000), (1 << 20, 1), (1 << 40, 1)):
        monkeypatch.setattr(tensors, "SPLIT_FROM", split)
        monkeypatch.setattr(tensors, "PART_FROM", part)
        digests.add(Store.open(f"{tmp_path}/{split}-{part}").put_tree(source).digest)
    assert len(digests) == 1


def comes_back_whole(store: Store, record: Record, source: Path, into: Path) -> bool:
    """True when an output whose record is withdrawn, and which is then stored again, can be read."""
    store.invalidate(record, "test")
    store.publish(source, record_of)
    store.materialise(record.output, into)
    return contents(into) == contents(source)


@pytest.mark.parametrize("harm", ["flip", "delete", "cut", "other list", "gap", "not a list"])
def test_damaged_parts_are_never_handed_out(store: Store, tmp_path: Path, harm: str) -> None:
    """A file with one bad part, or with a parts list that is not its own, is refused; withdrawn and stored again, it is whole."""
    source = model(tmp_path / "a")
    record = store.publish(source, record_of)
    tree = store.tree(record.output)
    paper = parts_key(tree)
    rows = json.loads(store.backend.get(paper).data)["parts"]
    victim = object_key("cas", rows[2][1])
    good = store.backend.get(victim).data
    new_list = {
        "other list": {"parts": [rows[0], rows[2], rows[1], *rows[3:]]},
        "gap": {"parts": rows[:-1]},
        "not a list": {"parts": [[rows[0][0], "../x"]]},
    }
    store.backend.delete(victim if harm in ("flip", "delete", "cut") else paper)
    if harm in new_list:
        store.backend.put(paper, seal({"file": paper[-64:], **new_list[harm]}))
    elif harm != "delete":
        store.backend.put(victim, good[:-1] if harm == "cut" else b"\0" + good[1:])
    with pytest.raises(Damaged) as caught:
        store.materialise(record.output, tmp_path / "back")
    assert caught.value.tree == record.output
    assert "model.safetensors" not in contents(tmp_path / "back") and not list((tmp_path / "back").rglob("*.part"))
    with pytest.raises(Damaged):
        store.read(record.output, "model.safetensors")
    assert comes_back_whole(store, record, source, tmp_path / "again")


def test_weights_are_packed(store: Store, tmp_path: Path) -> None:
    """Floating-point tensors take less room than they have bytes, are still shared, and come back bit for bit."""
    source = trained(tmp_path / "a", 1, 2, 3, 4, 5)
    backend = watch(store)
    tree = store.put_tree(source)
    assert backend.sent < 0.9 * tree.size
    assert {e.key: e.size for p in ("cas", "tree", "parts") for e in backend.list(f"v1/{p}/")} == dict(
        object_keys(store, tree.digest)
    )
    store.materialise(tree.digest, tmp_path / "back")
    assert contents(tmp_path / "back") == contents(source)
    assert store.read(tree.digest, "model.safetensors") == (source / "model.safetensors").read_bytes()
    backend.sent, backend.calls = 0, []
    store.put_tree(trained(tmp_path / "b", 1, 2, 9, 4, 5))
    assert len(backend.named("put_file")) == 1 and backend.sent < 0.9 * LARGE


@pytest.mark.parametrize("harm", ["flip", "width", "cut", "bomb", "not packed"])
def test_damaged_packed_parts_are_never_handed_out(store: Store, tmp_path: Path, harm: str) -> None:
    """A packed part that is wrong, or whose list lies about how it is packed, is refused; stored again, all is well."""
    source = trained(tmp_path / "a", 1, 2, 3, 4, 5)
    record = store.publish(source, record_of)
    paper = parts_key(store.tree(record.output))
    rows = json.loads(store.backend.get(paper).data)["parts"]
    size, digest, packed, _ = rows[2]
    victim = object_key("cas", digest)
    good = store.backend.get(victim).data
    store.backend.delete(victim if harm in ("flip", "cut") else paper)
    if harm in ("flip", "cut"):
        store.backend.put(victim, good[:-1] if harm == "cut" else good[:1000] + b"\0" + good[1001:])
    else:
        rows[2] = {
            "width": [size, digest, packed, 2],
            "bomb": [1 << 40, digest, packed, 4],
            "not packed": [packed, digest],
        }[harm]
        store.backend.put(paper, seal({"file": paper[-64:], "parts": rows}))
    with pytest.raises(Damaged):
        store.materialise(record.output, tmp_path / "back")
    assert not contents(tmp_path / "back")
    with pytest.raises(Damaged):
        store.read(record.output, "model.safetensors")
    assert comes_back_whole(store, record, source, tmp_path / "again")


def test_damaged_packed_parts_are_found_and_mended(tmp_path: Path) -> None:
    """Verification names the packed part that is wrong and nothing else, and a plain copy of the file mends it."""
    store = Store.open(str(tmp_path / "store"))
    source = trained(tmp_path / "a", 1, 2, 3, 4, 5)
    record = store.publish(source, record_of)
    assert verify(store).ok
    rows = json.loads(store.backend.get(parts_key(store.tree(record.output))).data)["parts"]
    victim = object_key("cas", rows[2][1])
    good = store.backend.get(victim).data
    store.backend.delete(victim)
    store.backend.put(victim, b"\0" + good[1:])
    assert [finding.key for finding in verify(store).findings] == [victim]
    repair(store, folders=[source])
    assert verify(store).ok and store.backend.get(victim).data == good
    store.materialise(record.output, tmp_path / "back")
    assert contents(tmp_path / "back") == contents(source)


def test_packed_bytes_in_memory_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However fast parts are packed, few wait in memory for a slow store; and a store that fails leaves nobody waiting."""
    monkeypatch.setattr(upload, "PACKED_BYTES", 2 * LARGE)
    monkeypatch.setattr(upload, "WINDOW_BYTES", LARGE)
    source = trained(tmp_path / "a", *range(12))
    store = Store.open("memory://slow")
    backend = watch(store)
    put, pack = backend.put, upload.pack
    waiting, most = [0], [0]

    def noting_pack(data: bytes, width: int) -> bytes | None:
        packed = pack(data, width)
        waiting[0] += 1
        most[0] = max(most[0], waiting[0])
        return packed

    def slow_put(key: str, data: bytes, **condition: Any) -> str:
        time.sleep(0.02)
        if key.startswith("v1/cas/"):
            waiting[0] -= 1
        return put(key, data, **condition)

    monkeypatch.setattr(upload, "pack", noting_pack)
    monkeypatch.setattr(backend, "put", slow_put)
    store.put_tree(source)
    assert 1 < most[0] <= 6
    backend.fails_after = len(backend.named("put_file")) + 2
    ended = []

    def failing() -> None:
        with pytest.raises(StoreUnavailable):
            store.put_tree(trained(tmp_path / "b", *range(20, 40)))
        ended.append(True)

    thread = threading.Thread(target=failing, daemon=True)
    thread.start()
    thread.join(30)
    assert ended


@pytest.mark.parametrize(("width", "dtype"), [(4, "<f4"), (2, "<f2")])
def test_packing_is_reversible(width: int, dtype: str) -> None:
    """Weights get smaller and come back; noise and odd lengths are left alone; other bytes are refused."""
    weights_ = numpy.random.default_rng(0).normal(0, 0.02, 100_000).astype(dtype).tobytes()
    packed = pack(weights_, width)
    assert (
        packed is not None and len(packed) < 0.95 * len(weights_) and unpack(packed, len(weights_), width) == weights_
    )
    noise = random.Random(0).randbytes(100_000)
    assert pack(noise, width) is None and pack(weights_[:-1], width) is None and pack(b"", width) is None
    for wrong in (b"", packed[:-10], noise):
        with pytest.raises(ValueError, match="not the packed form"):
            unpack(wrong, len(weights_), width)


def test_unreadable_lists_are_damage(store: Store, tmp_path: Path) -> None:
    """`object_keys` refuses a tree that is missing or whose parts list is not one, and the other trees are still told."""
    good = store.put_tree(model(tmp_path / "a", layer0=1))
    bad = store.put_tree(model(tmp_path / "b"))
    store.backend.put(parts_key(bad), b"[" * 100_000)
    found = dict(object_keys_of(store, [good.digest, bad.digest, "0" * 64]))
    assert isinstance(found[bad.digest], Damaged) and isinstance(found["0" * 64], Damaged)
    assert parts_key(good) in dict(found[good.digest])
    with pytest.raises(Damaged):
        object_keys(store, bad.digest)


def test_cuts_follow_the_tensors(tmp_path: Path) -> None:
    """Parts begin at tensors: a large one is alone, small neighbours are together, and the same tensors give the same parts."""
    path = tmp_path / "x.safetensors"
    save_tensors(
        path, {"a": b"1" * 40_000, "b": b"2" * 40_000, "c": b"3" * 1_500_000, "d": b"4" * 60_000, "e": b"5" * 70_000}
    )
    size = path.stat().st_size
    header = size - 40_000 * 2 - 1_500_000 - 130_000
    assert [start for start, _ in cuts(path, size)] == [0, header, header + 80_000, header + 1_580_000]
    assert cuts(path.rename(tmp_path / "x.bin"), size) == ()


def test_number_of_parts_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file of very many tensors is cut into larger groups instead of into more parts than there may be."""
    monkeypatch.setattr(tensors, "MAX_PARTS", 50)
    path = tmp_path / "x.safetensors"
    save_tensors(path, {f"t{n:04d}": bytes([n % 256]) * 110_000 for n in range(200)})
    found = cuts(path, path.stat().st_size)
    assert 10 < len(found) <= 50 and list(found) == sorted(set(found))


def header_of(text: str | bytes, length: int | None = None) -> bytes:
    encoded = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(encoded) if length is None else length) + encoded


@pytest.mark.parametrize(
    "start",
    [
        b"",
        header_of("{}", length=2**63),
        header_of("{}", length=0),
        header_of("not json"),
        header_of("[1]"),
        header_of('{"a": 1}'),
        header_of('{"a": {"data_offsets": [0, 1e9]}}'),
        header_of('{"a": {"data_offsets": [0, true]}}'),
        header_of('{"a": {"data_offsets": ["0", "9"]}}'),
        header_of('{"a": {"data_offsets": [5, 2]}}'),
        header_of('{"a": {"data_offsets": [-5, 2]}}'),
        header_of('{"a": {"data_offsets": [0, 10]}, "b": {"data_offsets": [5, 20]}}'),
        header_of('{"a": {"data_offsets": [0]}}'),
        header_of('{"a": {"data_offsets": [0, 99999999999]}}'),
        header_of(b"\xff\xfe\x00"),
        header_of("[" * 200_000),
        header_of('{"a":' * 200_000),
    ],
    ids=range(17),
)
def test_strange_headers_are_stored_whole(tmp_path: Path, start: bytes) -> None:
    """A file that only claims to be safetensors is stored whole, and comes back as it was."""
    source = tmp_path / "a"
    source.mkdir()
    (source / "x.safetensors").write_bytes(start + b"\0" * (2 << 20))
    assert cuts(source / "x.safetensors", (source / "x.safetensors").stat().st_size) == ()
    store = Store.open(f"memory://{tmp_path}")
    tree = store.put_tree(source)
    assert len(object_keys(store, tree.digest)) == 2
    assert digest_bytes(store.read(tree.digest, "x.safetensors")) == tree.files[0].digest


def test_random_headers_never_fail(tmp_path: Path) -> None:
    """Whatever bytes of a header are changed, the cuts are none, or increase from 0 and stay inside the file."""
    path = tmp_path / "x.safetensors"
    save_tensors(path, weights(0))
    good, random_ = path.read_bytes(), random.Random(20)
    for _ in range(300):
        data = bytearray(good)
        for _ in range(random_.choice((1, 1, 3, 30))):
            data[random_.randrange(600)] = random_.randrange(256)
        path.write_bytes(data)
        found = [start for start, _ in cuts(path, len(data))]
        assert found == [] or (found[0] == 0 and list(found) == sorted(set(found)) and found[-1] < len(data))
