"""One behaviour on every backend: in memory, in a folder, and on real S3 servers, each as far as the server can."""

from __future__ import annotations

import os
import random
import threading
import uuid
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest

from artifacts import s3, stamp
from artifacts.backend import Backend, open_backend
from artifacts.digest import digest_bytes, update_from
from artifacts.errors import Conflict, Damaged, NotFound, StoreError, StoreUnavailable, TooLarge
from artifacts.parts import BUFFERS_OF_PROCESS, PART_BYTES
from artifacts.s3 import GET_PART_BYTES
from tests.conftest import use

EVERYWHERE = ("memory", "local", "moto", "swift", "rclone") + (("radosgw",) if "RADOSGW_ENDPOINT" in os.environ else ())
CANNOT = {
    ("swift", "create-only race"): "Swift looks before it writes, without a lock",
    ("swift", "compare-and-swap"): "Swift's S3 API does not implement If-Match",
    ("rclone", "create-only"): "rclone ignores every condition",
    ("rclone", "create-only race"): "rclone ignores every condition",
    ("rclone", "compare-and-swap"): "rclone ignores every condition",
    (
        "rclone",
        "odd keys",
    ): "rclone keeps objects as files, where a name cannot be a file and a folder, or end in a dot",
}


@pytest.fixture(params=EVERYWHERE)
def backend(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Backend:
    """A fresh, empty backend of each kind; a test is left out where `needs` names what the server cannot do."""
    kind = request.param
    marker = request.node.get_closest_marker("needs")
    for need in marker.args if marker else ():
        if (kind, need) in CANNOT:
            pytest.skip(CANNOT[kind, need])
    if kind == "memory":
        return open_backend(f"memory://{uuid.uuid4().hex}")
    if kind == "local":
        return open_backend(str(tmp_path / "store"))
    server = request.getfixturevalue({"moto": "s3_server"}.get(kind, kind))
    return open_backend(use(server, monkeypatch))


def some_bytes(count: int, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(count)


def race(work: Callable[[int], object], count: int = 16) -> list[int]:
    """The numbers of those for whom `work` did not raise Conflict, when all start at once."""
    won, start = [], threading.Barrier(count)

    def one(number: int) -> None:
        start.wait()
        try:
            work(number)
            won.append(number)
        except Conflict:
            pass

    threads = [threading.Thread(target=one, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return won


def test_small_objects(backend: Backend) -> None:
    """What was written is read back, replaced and removed, and what is not there is NotFound, never empty."""
    for data in (b"", b"one", some_bytes(100_000)):
        backend.put("v1/x", data)
        assert backend.get("v1/x").data == data and backend.size("v1/x") == len(data)
    backend.delete("v1/x")
    backend.delete("v1/x")
    assert backend.size("v1/x") is None
    with pytest.raises(NotFound):
        backend.get("v1/x")


def test_many_at_once(backend: Backend) -> None:
    """Many keys are read, sized and removed in one call, missing ones among them."""
    keys = [f"v1/many/{number:03d}" for number in range(40)]
    for key in keys:
        backend.put(key, key.encode())
    wanted = [*keys, "v1/many/none"]
    found = backend.get_many(wanted)
    assert [None if o is None else o.data for o in found.values()] == [*(key.encode() for key in keys), None]
    assert list(found) == wanted
    assert backend.sizes(wanted) == {**dict.fromkeys(keys, len(keys[0])), "v1/many/none": None}
    assert backend.get_many([]) == {} and backend.sizes(iter([])) == {}
    backend.delete_many(iter(wanted))
    backend.delete_many([])
    assert not list(backend.list("v1/many/"))


def test_listing(backend: Backend) -> None:
    """A listing holds exactly the keys that begin with the prefix, whether it ends with a slash or not."""
    for name in ("v1/a/1", "v1/a/2", "v1/ab", "v1/b/1"):
        backend.put(name, name.encode())
    assert sorted(entry.key for entry in backend.list("v1/a/")) == ["v1/a/1", "v1/a/2"]
    assert sorted(entry.key for entry in backend.list("v1/a")) == ["v1/a/1", "v1/a/2", "v1/ab"]
    assert sorted(entry.key for entry in backend.list("v1/")) == ["v1/a/1", "v1/a/2", "v1/ab", "v1/b/1"]
    assert not list(backend.list("v1/none/")) and not list(backend.list("v1/a/1/"))
    [entry] = backend.list("v1/b/")
    assert entry.size == 6 and entry.modified > 1.7e9


def test_a_listing_is_never_stale(backend: Backend) -> None:
    """What is written or removed after a listing shows in the next one, and in reads."""
    backend.put("v1/l/1", b"1")
    assert len(list(backend.list("v1/l/"))) == 1 and backend.size("v1/l/2") is None
    other = type(backend).named(backend.url[9:]) if backend.url.startswith("memory") else open_backend(backend.url)
    other.put("v1/l/2", b"2")
    other.delete("v1/l/1")
    assert [entry.key for entry in backend.list("v1/l/")] == ["v1/l/2"]
    assert backend.get("v1/l/2").data == b"2" and backend.size("v1/l/1") is None


@pytest.mark.needs("odd keys")
def test_odd_keys(backend: Backend) -> None:
    """File names as people write them are kept apart, read, listed and removed under their own name."""
    names = [
        "a b",
        "a+b",
        "a%20b",
        "ü",
        "#1",
        "x?y=1",
        "tilde~",
        "quote'",
        "dot.",
        "équipe",
        "100%",
        "a=b&c",
        "[x]",
        "日本",
    ]
    keys = [f"v1/odd/{name}" for name in names]
    for number, key in enumerate(keys):
        backend.put(key, str(number).encode())
    assert sorted(entry.key for entry in backend.list("v1/odd/")) == sorted(keys)
    assert [o.data for o in backend.get_many(keys).values() if o] == [str(n).encode() for n in range(len(keys))]
    backend.delete_many(keys[:7])
    for key in keys[7:]:
        backend.delete(key)
    assert not list(backend.list("v1/odd/"))


@pytest.mark.needs("create-only")
def test_create_only(backend: Backend) -> None:
    """A second create is refused whatever the content, also an empty one, and changes nothing."""
    backend.put("v1/x", b"one", if_absent=True)
    for data in (b"two", b"", b"one"):
        with pytest.raises(Conflict):
            backend.put("v1/x", data, if_absent=True)
    assert backend.get("v1/x").data == b"one"
    backend.delete("v1/x")
    backend.put("v1/x", b"", if_absent=True)
    with pytest.raises(Conflict):
        backend.put("v1/x", b"one", if_absent=True)


@pytest.mark.needs("compare-and-swap")
def test_compare_and_swap(backend: Backend) -> None:
    """A write with the ETag that stands succeeds, one with any other is refused and changes nothing."""
    first = backend.put("v1/x", b"one", if_absent=True)
    second = backend.put("v1/x", b"two", if_match=first)
    assert backend.get("v1/x").etag == second != first
    with pytest.raises(Conflict):
        backend.put("v1/x", b"three", if_match=first)
    assert backend.get("v1/x").data == b"two"
    with pytest.raises((Conflict, NotFound)):
        backend.put("v1/absent", b"four", if_match=first)
    assert backend.size("v1/absent") is None


@pytest.mark.needs("create-only race")
def test_one_creator_wins(backend: Backend) -> None:
    """Of sixteen writers that create one key at once, one is told that it did, and its content stands."""
    for number in range(3):
        key = f"v1/race/{number}"
        [winner] = race(lambda n, key=key: backend.put(key, b"%d" % n, if_absent=True))
        assert backend.get(key).data == b"%d" % winner


@pytest.mark.needs("compare-and-swap")
def test_one_swapper_wins(backend: Backend) -> None:
    """Of sixteen writers that hold one ETag, one may use it."""
    for number in range(3):
        key = f"v1/race/{number}"
        etag = backend.put(key, b"start")
        [winner] = race(lambda n, key=key, etag=etag: backend.put(key, b"%d" % n, if_match=etag))
        assert backend.get(key).data == b"%d" % winner


@pytest.mark.parametrize("count", [0, 1, GET_PART_BYTES + 1, PART_BYTES + 12_345])
def test_files(backend: Backend, tmp_path: Path, count: int) -> None:
    """A range of a file becomes an object and comes back, whole and into a range, with its digest and full progress."""
    data = some_bytes(count, seed=count)
    (tmp_path / "source").write_bytes(b"before" + data + b"after")
    moved: list[int] = []
    backend.put_file("v1/cas/x", tmp_path / "source", offset=6, size=count, progress=moved.append)
    assert sum(moved) == count == backend.size("v1/cas/x")
    moved.clear()
    (tmp_path / "whole").write_bytes(b"longer than some of the objects")
    assert backend.get_file("v1/cas/x", tmp_path / "whole", progress=moved.append) == digest_bytes(data)
    assert sum(moved) == count and (tmp_path / "whole").read_bytes() == data
    (tmp_path / "within").write_bytes(bytes(count + 10))
    assert backend.get_file("v1/cas/x", tmp_path / "within", offset=4, size=count) == digest_bytes(data)
    assert (tmp_path / "within").read_bytes() == bytes(4) + data + bytes(6)


def test_whole_files(backend: Backend, tmp_path: Path) -> None:
    """Without a range a whole file is stored, and replacing an object leaves copies made before as they were."""
    (tmp_path / "source").write_bytes(b"one")
    backend.put_file("v1/cas/x", tmp_path / "source")
    backend.get_file("v1/cas/x", tmp_path / "copy")
    (tmp_path / "source").write_bytes(b"two!")
    backend.put_file("v1/cas/x", tmp_path / "source")
    assert (tmp_path / "copy").read_bytes() == b"one" and backend.get("v1/cas/x").data == b"two!"
    backend.put_file("v1/cas/y", tmp_path / "source", offset=2)
    assert backend.get("v1/cas/y").data == b"o!"


def test_a_copy_is_no_way_into_the_store(backend: Backend, tmp_path: Path) -> None:
    """Getting a second object over a file that may be a link to a first one leaves the first object alone."""
    backend.put("v1/cas/a", b"first")
    backend.put("v1/cas/b", b"second one")
    backend.get_file("v1/cas/a", tmp_path / "copy")
    backend.get_file("v1/cas/b", tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == b"second one" and backend.get("v1/cas/a").data == b"first"


@pytest.mark.parametrize("found", [3, GET_PART_BYTES + 5])
@pytest.mark.parametrize("expected", [0, 4, GET_PART_BYTES + 4, 3 * GET_PART_BYTES])
def test_wrong_length(backend: Backend, tmp_path: Path, found: int, expected: int) -> None:
    """An object of another length than expected is damage, told with both lengths."""
    (tmp_path / "source").write_bytes(bytes(found))
    backend.put_file("v1/cas/x", tmp_path / "source")
    with pytest.raises(Damaged, match=f"{found} bytes.* {expected}|{expected}.* {found}"):
        backend.get_file("v1/cas/x", tmp_path / "copy", size=expected)


@pytest.mark.parametrize("count", [5, (1 << 20) + 1, PART_BYTES + 12_345])
@pytest.mark.parametrize("change", ["other bytes", "shorter"])
def test_bytes_that_a_blob_does_not_name(backend: Backend, tmp_path: Path, count: int, change: str) -> None:
    """A file that is not what it was when it was hashed is not stored under that digest: an error, at once, and no object."""
    data = some_bytes(count)
    key = f"v1/cas/{digest_bytes(data)[:2]}/{digest_bytes(data)}"
    (tmp_path / "source").write_bytes(data[:-1] + bytes([data[-1] ^ 1]) if change == "other bytes" else data[:-2])
    with pytest.raises(StoreError, match="changed while|became shorter") as caught:
        backend.put_file(key, tmp_path / "source", size=count)
    assert not isinstance(caught.value, StoreUnavailable)
    assert backend.size(key) is None and list(backend.list("v1/cas/")) == []
    (tmp_path / "source").write_bytes(data)
    backend.put_file(key, tmp_path / "source", size=count)
    assert backend.size(key) == count


def test_a_file_that_changes_while_it_is_sent(s3_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes that change after a request was signed end it at once: it is not taken for a broken connection and sent again."""
    data, passes, preadv = some_bytes((1 << 20) + 1), [], os.preadv
    key = f"v1/cas/{digest_bytes(data)[:2]}/{digest_bytes(data)}"
    (tmp_path / "source").write_bytes(data)

    def changing(file: int, buffers: list[memoryview], offset: int) -> int:
        passes.append(offset == 0)
        if sum(passes) == 2:
            (tmp_path / "source").write_bytes(data[::-1])
        return preadv(file, buffers, offset)

    monkeypatch.setattr(os, "preadv", changing)
    backend = open_backend(s3_url)
    with pytest.raises(StoreError, match="changed while"):
        backend.put_file(key, tmp_path / "source", size=len(data))
    assert sum(passes) == 2 and backend.size(key) is None


@pytest.mark.parametrize("settled", [True, False])
@pytest.mark.parametrize("when", ["never", "before it is sent", "while it is sent"])
def test_a_large_file_that_was_hashed_before(
    s3_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settled: bool, when: str
) -> None:
    """It is hashed again only if it may have been written since, and what was written since is not stored as what it was."""
    data, path, again = some_bytes(PART_BYTES + 12_345), tmp_path / "source", []
    key = f"v1/cas/{digest_bytes(data)[:2]}/{digest_bytes(data)}"
    path.write_bytes(data)
    monkeypatch.setattr(stamp, "SETTLED_SECONDS", -1.0 if settled else 1e6)
    monkeypatch.setattr(s3, "update_from", lambda *read: (again.append(read), update_from(*read)))
    hashed, backend = stamp.Stamp.of(path), open_backend(s3_url)

    def change(*moved: int) -> None:
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))

    if when == "before it is sent":
        change()
    with nullcontext() if when == "never" else pytest.raises(StoreError, match="changed while"):
        backend.put_file(
            key, path, size=len(data), hashed=hashed, progress=change if when == "while it is sent" else None
        )
    assert backend.size(key) == (len(data) if when == "never" else None)
    assert bool(again) == (not settled or when == "before it is sent")


def test_files_that_are_not_there(backend: Backend, tmp_path: Path) -> None:
    """A missing object is NotFound, with and without an expected size; a missing file is an error that names it."""
    for size in (None, 5, 3 * GET_PART_BYTES):
        with pytest.raises(NotFound):
            backend.get_file("v1/cas/none", tmp_path / "copy", size=size)
    with pytest.raises((StoreError, OSError), match="no-such-file"):
        backend.put_file("v1/cas/x", tmp_path / "no-such-file")
    assert backend.size("v1/cas/x") is None


def test_limits(backend: Backend) -> None:
    """An object larger than the caller allows is not read into memory."""
    backend.put("v1/x", bytes(1000))
    with pytest.raises(TooLarge, match="1000"):
        backend.get("v1/x", limit=999)
    assert backend.get("v1/x", limit=1000).data == bytes(1000)
    assert backend.get_many(["v1/x", "v1/none"], limit=10)["v1/none"] is None


def test_transfers_side_by_side(backend: Backend, tmp_path: Path) -> None:
    """Several large transfers at once share the buffers, and none waits for ever or mixes up bytes."""
    count = GET_PART_BYTES * 2 + 77

    def one(number: int) -> None:
        data = some_bytes(count, seed=number)
        path = tmp_path / f"source{number}"
        path.write_bytes(data)
        backend.put_file(f"v1/cas/{number}", path)
        assert backend.get_file(f"v1/cas/{number}", path, size=count) == digest_bytes(data)
        path.unlink()

    assert sorted(race(one, 4)) == [0, 1, 2, 3]
    assert len(BUFFERS_OF_PROCESS._free) <= 8


def test_nothing_is_left_over(backend: Backend, tmp_path: Path) -> None:
    """After transfers that went well there is nothing to sweep, and space is a number or unknown."""
    (tmp_path / "source").write_bytes(bytes(PART_BYTES + 1))
    backend.put_file("v1/cas/x", tmp_path / "source")
    assert backend.sweep(0.0) == []
    assert [entry.key for entry in backend.list("")] == ["v1/cas/x"]
    free = backend.free_bytes()
    assert free is None or free > 0
