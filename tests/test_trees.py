"""Trees travel whole, verified, once; whatever is interrupted goes on from there. Parts are in `test_packing`."""

from __future__ import annotations

import io
import json
import random
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from artifacts import upload
from artifacts.errors import Damaged, StoreUnavailable
from artifacts.store import Store
from artifacts.trees import object_keys
from flows import display
from tasks.transfers import reporting
from tests import model_folders
from tests.model_folders import LARGE, contents, model, record_of, trained
from tests.watched_backend import watch

_small_parts = model_folders.small_parts


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


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "packed"])
def test_one_wrong_answer_is_read_again(store: Store, tmp_path: Path, packed: bool) -> None:
    """A blob whose bytes arrive wrong once is read again; only one that stays wrong is called damaged, by its name."""
    source = trained(tmp_path / "a", 1, 2, 3, 4, 5) if packed else model(tmp_path / "a")
    tree = store.put_tree(source)
    backend = watch(store)
    backend.lies = 1
    store.materialise(tree.digest, tmp_path / "b")
    assert contents(tmp_path / "b") == contents(source)
    backend.lies = 100
    with pytest.raises(Damaged, match="object [0-9a-f]{12} does not match its digest$"):
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
