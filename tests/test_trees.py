"""Trees travel whole, verified, once, and in parts where parts are shared; whatever is interrupted goes on from there."""

from __future__ import annotations

import io
import json
import random
import resource
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy
import pytest

from artifacts import tensors, upload
from artifacts.audit import verify
from artifacts.digest import digest_bytes, seal
from artifacts.errors import Damaged, StoreUnavailable
from artifacts.packing import pack, unpack
from artifacts.record import payload_key
from artifacts.repair import repair
from artifacts.store import Store, new_record
from artifacts.tensors import cuts
from artifacts.trees import Tree, object_key, object_keys, object_keys_of
from flows import display
from tasks.transfers import reporting

LARGE = 300_000
"""Bytes of the larger tensors here: five of them make a file that may be stored in parts."""


class Watched:
    """A backend that counts what goes through, and can be told to fail or to lie."""

    def __init__(self, backend: Any) -> None:
        self._backend = backend
        self._lock = threading.Lock()
        self.calls: list[tuple[str, Any]] = []
        self.sent = 0
        """Payload bytes put."""
        self.fails_after: int | None = None
        self.lies = 0
        """Times that a read is answered with another digest."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    def named(self, *names: str) -> list[Any]:
        return [about for name, about in self.calls if name in names]

    def sizes(self, keys: Iterable[str]) -> dict[str, int | None]:
        self.calls.append(("sizes", sorted(keys)))
        return self._backend.sizes(keys)

    def size(self, key: str) -> int | None:
        self.calls.append(("size", key))
        return self._backend.size(key)

    def put(self, key: str, data: bytes, **condition: Any) -> str:
        if key.startswith("v1/cas/"):
            self._count(key, len(data))
        else:
            self.calls.append(("put", key))
        return self._backend.put(key, data, **condition)

    def _count(self, key: str, size: int) -> None:
        with self._lock:
            if self.fails_after == len(self.named("put_file")):
                raise StoreUnavailable("the server went away")
            self.calls.append(("put_file", key))
            self.sent += size

    def put_file(self, key: str, path: Path, *, offset: int = 0, size: int | None = None, progress: Any = None) -> None:
        self._count(key, path.stat().st_size - offset if size is None else size)
        self._backend.put_file(key, path, offset=offset, size=size, progress=progress)

    def get_file(self, key: str, path: Path, **how: Any) -> str:
        self.calls.append(("get_file", key))
        found = self._backend.get_file(key, path, **how)
        if self.lies:
            self.lies -= 1
            return "0" * 64
        return found


@pytest.fixture(autouse=True)
def _small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut files of test size."""
    monkeypatch.setattr(tensors, "SPLIT_FROM", 1 << 20)
    monkeypatch.setattr(tensors, "PART_FROM", 100_000)


def watch(store: Store) -> Watched:
    store.backend = Watched(store.backend)
    return store.backend


def weights(seed: int, **changed: int) -> dict[str, bytes]:
    """Tensors of a small checkpoint; `changed` draws some of them from another seed."""
    sizes = {f"layer{n}": LARGE for n in range(5)} | {f"norm{n}": 500 for n in range(4)}
    return {name: random.Random(f"{name}/{changed.get(name, seed)}").randbytes(n) for name, n in sizes.items()}


def numbers(seed: int, count: int = 75_000) -> bytes:
    """fp32 numbers as weights are distributed."""
    return numpy.random.default_rng(seed).normal(0, 0.02, count).astype("<f4").tobytes()


def trained(folder: Path, *seeds: int) -> Path:
    """A folder with a checkpoint of fp32 tensors, one of each seed."""
    save_tensors(folder / "model.safetensors", {f"layer{n}": numbers(s) for n, s in enumerate(seeds)}, dtype="F32")
    return folder


def save_tensors(path: Path, tensors_: dict[str, bytes], dtype: str = "U8", **metadata: str) -> None:
    """A safetensors file, as the format says: length of the header, header, tensors without gaps."""
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    end = 0
    for name, data in tensors_.items():
        header[name] = {"dtype": dtype, "shape": [len(data)], "data_offsets": [end, end + len(data)]}
        end += len(data)
    encoded = json.dumps(header).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(struct.pack("<Q", len(encoded)) + encoded + b"".join(tensors_.values()))


def model(folder: Path, seed: int = 0, **changed: int) -> Path:
    """A folder with a checkpoint and two small files."""
    save_tensors(folder / "model.safetensors", weights(seed, **changed))
    (folder / "config.json").write_text("{}")
    (folder / "sub").mkdir(exist_ok=True)
    (folder / "sub" / "empty").write_text("")
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def record_of(tree: Tree) -> Any:
    payload = {"algorithm": 1, "stage": "toy", "code": "c", "config": {}, "inputs": {}}
    return new_record(stage="toy", key=payload_key(payload), payload=payload, output=tree.digest, size=tree.size)


def parts_key(tree: Tree) -> str:
    [file] = [file for file in tree.files if file.path == "model.safetensors"]
    return object_key("parts", file.digest)


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


def test_put_again_sends_nothing(store: Store, tmp_path: Path) -> None:
    """Storing what is there costs one round of sizes and no payload byte, and asks for no object by itself."""
    source = model(tmp_path / "a")
    first = store.put_tree(source)
    backend = watch(store)
    assert store.put_tree(source) == first
    assert backend.sent == 0 and not backend.named("put", "put_file", "size") and len(backend.named("sizes")) == 1


def test_interrupted_upload_goes_on(store: Store, tmp_path: Path) -> None:
    """After an upload that broke off, only the blobs that are missing travel, and nothing refers to the torn tree."""
    source = model(tmp_path / "a")
    backend = watch(store)
    backend.fails_after = 4
    with pytest.raises(StoreUnavailable):
        store.publish(source, record_of)
    there = {entry.key for entry in backend.list("v1/cas/")}
    assert len(there) == 4 and not list(backend.list("v1/tree/")) and not list(backend.list("v1/act/"))
    backend.fails_after, backend.calls = None, []
    record = store.publish(source, record_of)
    assert not there & set(backend.named("put_file")) and len(backend.named("put_file")) == 5
    store.materialise(record.output, tmp_path / "back")
    assert contents(tmp_path / "back") == contents(source)


def test_publish_announces_before_it_asks(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the tree consists of is named in an intent before anybody asks whether it exists, window by window."""
    monkeypatch.setattr(upload, "WINDOW_BYTES", LARGE)
    announced: set[str] = set()
    asked: set[str] = set()
    backend = watch(store)
    put, sizes, get_many = backend.put, backend.sizes, backend.get_many

    def noting_put(key: str, data: bytes, **condition: Any) -> str:
        if key.startswith("v1/intent/"):
            announced.update(json.loads(data)["keys"])
        return put(key, data, **condition)

    def noting(ask: Any) -> Any:
        def call(keys: Iterable[str]) -> Any:
            assert announced.issuperset(keys)
            asked.update(keys)
            return ask(keys)

        return call

    monkeypatch.setattr(backend, "put", noting_put)
    monkeypatch.setattr(backend, "sizes", noting(sizes))
    monkeypatch.setattr(backend, "get_many", noting(get_many), raising=False)
    record = store.publish(model(tmp_path / "a"), record_of)
    monkeypatch.undo()
    assert asked == {key for key, _ in object_keys(store, record.output)}
    assert not list(backend.list("v1/intent/"))


def test_hashing_and_sending_overlap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first blob travels while the next is hashed: here its upload ends only once that has begun."""
    source = tmp_path / "a"
    source.mkdir()
    for name in ("first", "second"):
        (source / name).write_bytes(random.Random(name).randbytes(2 << 20))
    store = Store.open("memory://overlap")
    backend = watch(store)
    second_begun, waited = threading.Event(), []
    hashed, send = upload.update_from, backend.put_file

    def noting_hash(hasher: Any, path: Path, *where: int) -> None:
        if path.name == "second":
            second_begun.set()
        hashed(hasher, path, *where)

    def waiting_put(key: str, path: Path, **how: Any) -> None:
        waited.append(second_begun.wait(20))
        send(key, path, **how)

    monkeypatch.setattr(upload, "WINDOW_BYTES", 1)
    monkeypatch.setattr(upload, "update_from", noting_hash)
    monkeypatch.setattr(backend, "put_file", waiting_put)
    store.put_tree(source)
    assert waited == [True, True]


def test_equal_files_travel_once(store: Store, tmp_path: Path) -> None:
    """Two files of the same bytes in one folder are one blob, sent once."""
    source = tmp_path / "a"
    source.mkdir()
    for name in ("one", "two"):
        (source / name).write_bytes(b"x" * 1000)
    backend = watch(store)
    tree = store.put_tree(source)
    assert backend.sent == 1000 and len(object_keys(store, tree.digest)) == 2


def test_progress_reaches_the_end(store: Store, tmp_path: Path) -> None:
    """Progress grows from transfer to transfer up to the bytes of the tree, for new, known and read trees alike."""
    source = model(tmp_path / "a")
    for move in (
        lambda seen: store.put_tree(source, seen),
        lambda seen: store.publish(source, record_of, seen),
        lambda seen: store.materialise(store.put_tree(source).digest, tmp_path / "back", seen),
    ):
        reports: list[tuple[int, int]] = []
        move(lambda done, total, reports=reports: reports.append((done, total)))
        total = sum(len(data) for data in contents(source).values())
        assert reports == sorted(reports) and reports[-1] == (total, total) and {t for _, t in reports} == {total}


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
    store.invalidate(record, "test")
    store.publish(source, record_of)
    store.materialise(record.output, tmp_path / "again")
    assert contents(tmp_path / "again") == contents(source)


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
    store.invalidate(record, "test")
    store.publish(source, record_of)
    store.materialise(record.output, tmp_path / "again")
    assert contents(tmp_path / "again") == contents(source)


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


def test_one_wrong_answer_is_read_again(store: Store, tmp_path: Path) -> None:
    """A blob whose bytes arrive wrong once is read again; only one that stays wrong is called damaged."""
    tree = store.put_tree(model(tmp_path / "a"))
    backend = watch(store)
    backend.lies = 1
    store.materialise(tree.digest, tmp_path / "b")
    assert contents(tmp_path / "b") == contents(tmp_path / "a")
    backend.lies = 100
    with pytest.raises(Damaged):
        store.materialise(tree.digest, tmp_path / "c")


def test_one_at_a_time_starts_no_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A store that moves one object at a time runs in the caller's thread alone."""
    monkeypatch.setattr(threading.Thread, "start", lambda thread: pytest.fail("a thread was started"))
    store = Store(Store.open("memory://alone").backend, at_once=1)
    record = store.publish(model(tmp_path / "a"), record_of)
    store.materialise(record.output, tmp_path / "b")
    assert contents(tmp_path / "b") == contents(tmp_path / "a")


KILLED = """
import os, signal, sys
from pathlib import Path
from artifacts.local import LocalBackend
from artifacts.store import Store
whole = LocalBackend.get_file
def half(self, key, path, **how):
    if self.size(key) == int(sys.argv[4]):
        path.write_bytes(b"x" * 1000)
        os.kill(os.getpid(), signal.SIGKILL)
    return whole(self, key, path, **how)
LocalBackend.get_file = half
Store.open(sys.argv[1]).materialise(sys.argv[2], Path(sys.argv[3]))
"""


def test_killed_read_leaves_no_torn_file(tmp_path: Path) -> None:
    """A process killed while it reads a tree leaves files that are whole, or have no final name."""
    store = Store.open(str(tmp_path / "store"))
    source = model(tmp_path / "a")
    tree = store.put_tree(source)
    command = [sys.executable, "-c", KILLED, str(tmp_path / "store"), tree.digest, str(tmp_path / "back"), str(LARGE)]
    assert subprocess.run(command, cwd=Path(__file__).parent.parent).returncode == -signal.SIGKILL
    left = contents(tmp_path / "back")
    assert "model.safetensors" not in left and any(name.endswith(".part") for name in left)
    assert {name: data for name, data in contents(source).items() if name in left}.items() <= left.items()


BOUNDED = """
import resource, sys
from pathlib import Path
from artifacts.store import Store
store = Store.open(sys.argv[1])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
tree = store.put_tree(Path(sys.argv[2]))
store.materialise(tree.digest, Path(sys.argv[3]))
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10)
"""


def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    """Storing and reading a file of 768 MiB takes a small part of that in memory."""
    source = tmp_path / "a"
    source.mkdir()
    with open(source / "zeros", "wb") as file:
        file.truncate(768 << 20)
    command = [sys.executable, "-c", BOUNDED, str(tmp_path / "store"), str(source), str(tmp_path / "back")]
    done = subprocess.run(command, cwd=Path(__file__).parent.parent, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 128, f"{done.stdout} MiB; this process: {resource.getrusage(resource.RUSAGE_SELF)}"


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


def test_large_transfers_are_reported_now_and_then() -> None:
    """A large transfer gives an event at its start, at intervals and at its end; a small one gives none."""
    times = iter([0.0, 0.1, 0.6, 0.7, 0.8])
    events: list[dict[str, Any]] = []
    listener = reporting(events.append, "storing", lambda: next(times))
    for done in (10 << 20, 20 << 20, 30 << 20, 40 << 20, 100 << 20):
        listener(done, 100 << 20)
    assert [event["done"] >> 20 for event in events] == [10, 30, 100]
    assert {(event["event"], event["what"], event["total"] >> 20) for event in events} == {("transfer", "storing", 100)}
    reporting(events.append, "storing")(1000, 1000)
    assert len(events) == 3


def test_display_shows_transfers(monkeypatch: pytest.MonkeyPatch) -> None:
    """While a stage's output is stored its line tells bytes; afterwards it tells steps again. An export tells its own."""
    monkeypatch.setattr(display, "LINE_SECONDS", 0.0)
    out = io.StringIO()
    shown = display.Display([], {}, 1, out)  # type: ignore[arg-type]
    shown("a", {"event": "transfer", "what": "storing", "done": 0, "total": 8_000_000_000})
    shown("a", {"event": "transfer", "what": "storing", "done": 2_000_000_000, "total": 8_000_000_000})
    shown("a", {"event": "transfer", "what": "storing", "done": 8_000_000_000, "total": 8_000_000_000})
    shown("a", {"event": "progress", "done": 1, "total": 2, "metrics": {}})
    first, second, third, fourth = out.getvalue().splitlines()
    assert "a: storing 0.0 of 8.0 GB (0 %)" in first and "2.0 of 8.0 GB (25 %)" in second and "left" in second
    assert "(100 %)" in third and "1/2 (50 %)" in fourth
    out = io.StringIO()
    line = display.TransferLine(out)
    line({"event": "transfer", "what": "reading a", "done": 1_500_000_000, "total": 3_000_000_000})
    assert out.getvalue() == "reading a 1.5 of 3.0 GB (50 %)\n"
