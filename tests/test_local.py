"""A store in a folder, where it is more than what every backend does: power cuts, locks, links, and who may write."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from artifacts.backend import Backend, Entry, open_backend
from artifacts.errors import Conflict, StoreError, StoreUnavailable
from artifacts.store import Store

DATA = b"x" * 100_000
WRITES: dict[str, Callable[[Backend, Path], object]] = {
    "put": lambda backend, source: backend.put("v1/cas/x", DATA),
    "put anew": lambda backend, source: backend.put("v1/old", DATA),
    "create": lambda backend, source: backend.put("v1/cas/x", DATA, if_absent=True),
    "swap": lambda backend, source: backend.put("v1/old", DATA, if_match=backend.get("v1/old").etag),
    "put_file": lambda backend, source: backend.put_file("v1/cas/x", source),
}


@pytest.mark.parametrize("write", WRITES)
def test_an_object_outlasts_a_power_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: str) -> None:
    """Its bytes are on the disk, all of them, before it gets its name, and the name is before the write returns."""
    backend = open_backend(str(tmp_path / "store"))
    backend.put("v1/old", b"1")
    (tmp_path / "source").write_bytes(DATA)
    synced: list[tuple[int, int]] = []
    """Inode of what was synced, and its size then."""
    named: list[tuple[int, int, int]] = []
    """Inode of an object and of its folder, when it got its name, and how much was synced before."""
    fsync, replace, link = os.fsync, os.replace, os.link

    def sync(descriptor: int) -> None:
        fsync(descriptor)
        synced.append((os.fstat(descriptor).st_ino, os.fstat(descriptor).st_size))

    def naming(really: Callable[[Path, Path], None], source: Path, target: Path) -> None:
        really(source, target)
        named.append((target.stat().st_ino, target.parent.stat().st_ino, len(synced)))

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(os, "replace", lambda source, target: naming(replace, source, target))
    monkeypatch.setattr(os, "link", lambda source, target: naming(link, source, target))
    WRITES[write](backend, tmp_path / "source")
    [(inode, folder, before)] = named
    assert (inode, len(DATA)) in synced[:before]
    assert folder in [number for number, _ in synced[before:]]


def test_a_stage_gets_its_inputs_read_only(tmp_path: Path) -> None:
    """They are the store's own files under another name, which nobody may write, whatever the umask and the source were."""
    store = Store.open(str(tmp_path / "store"))
    (tmp_path / "made").mkdir()
    (tmp_path / "made/x").write_bytes(b"1, 2, 3")
    (tmp_path / "made/x").chmod(0o777)
    before = os.umask(0)
    try:
        tree = store.put_tree(tmp_path / "made")
        store.materialise(tree.digest, tmp_path / "input")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "input/x").stat().st_mode) == 0o444
    assert (tmp_path / "input/x").stat().st_nlink == 2


def test_a_forked_process_holds_no_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process forked in the middle of a compare-and-swap keeps nobody from the next one, even if its parent dies there."""
    from artifacts import file_lock

    monkeypatch.setattr(file_lock, "LOCK_SECONDS", 1.0)
    backend = open_backend(str(tmp_path / "store"))
    etag, replace, children = backend.put("v1/x", b"1"), os.replace, []
    gate, held = os.pipe()
    forked, ready = os.pipe()

    def forking(*arguments: object) -> None:
        if not children and (child := os.fork()) == 0:
            os.close(held)
            os.write(ready, b"1")
            os.read(gate, 1)  # until the test ends
            os._exit(0)
        elif not children:
            children.append(child)
        replace(*arguments)

    monkeypatch.setattr(os, "replace", forking)
    etag = backend.put("v1/x", b"2", if_match=etag)
    try:
        os.read(forked, 1)
        held_open = [os.readlink(path) for path in Path(f"/proc/{children[0]}/fd").iterdir()]
        assert not [name for name in held_open if name.endswith(".lock")]
        backend.put("v1/x", b"3", if_match=etag)
    finally:
        os.close(held)
        os.waitpid(children[0], 0)
        for end in (gate, forked, ready):
            os.close(end)


def test_a_swap_unlocks_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The lock of a compare-and-swap is ended, also when it is refused, and not merely closed: others may have it open."""
    backend, done, flock = open_backend(str(tmp_path / "store")), [], fcntl.flock
    etag = backend.put("v1/x", b"1")
    monkeypatch.setattr(fcntl, "flock", lambda file, how: (done.append(how), flock(file, how)))
    backend.put("v1/x", b"2", if_match=etag)
    with pytest.raises(Conflict):
        backend.put("v1/x", b"3", if_match=etag)
    assert done == [fcntl.LOCK_EX | fcntl.LOCK_NB, fcntl.LOCK_UN] * 2


@pytest.mark.parametrize("when", ["before", "while it is linked"])
def test_a_target_that_is_gone_is_no_missing_blob(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str) -> None:
    """A folder that somebody removed while files are put into it is told as that, not as an object that the store lacks."""
    store = Store.open(str(tmp_path / "store"))
    (tmp_path / "source").mkdir()
    (tmp_path / "source/x").write_text("1")
    tree, link = store.put_tree(tmp_path / "source"), os.link

    def removing(source: Path, target: Path) -> None:
        if when == "before":
            target.parent.rmdir()
        link(source, target)
        if target.is_relative_to(tmp_path / "job"):
            shutil.rmtree(tmp_path / "job")

    monkeypatch.setattr(os, "link", removing)
    with pytest.raises(StoreUnavailable, match="/job/.*check its permissions"):
        store.materialise(tree.digest, tmp_path / "job")


def test_names_of_new_folders_are_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The entry of every folder of a new store is synced, and of one that another process made and may not have synced."""
    synced, fsync = set(), os.fsync

    def noting(descriptor: int) -> None:
        synced.add(Path(os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", noting)
    root = tmp_path / "above" / "store"
    open_backend(str(root)).put("v1/cas/ab/x", b"1")
    assert {tmp_path, root.parent, root, root / "v1", root / "v1/cas", root / "v1/cas/ab"} <= synced
    synced.clear()
    again = open_backend(str(root))
    again.put("v1/cas/ab/y", b"1")
    assert {root, root / "v1", root / "v1/cas", root / "v1/cas/ab"} <= synced
    synced.clear()
    again.put("v1/cas/ab/z", b"1")
    assert {path for path in synced if path.is_dir()} == {root / "v1/cas/ab"}


def test_local_leftovers(tmp_path: Path) -> None:
    """What a killed writer left in a folder is told, then removed once it is old enough, and locks stay."""
    backend = open_backend(str(tmp_path / "store"))
    backend.put("v1/cas/x", b"1")
    for name, age in (("old", 1000), ("young", 0), ("swap-00.lock", 1000)):
        path = tmp_path / "store" / ".tmp" / name
        path.write_bytes(b"12345")
        os.utime(path, (path.stat().st_mtime - age,) * 2)
    [told] = backend.sweep(500, dry_run=True)
    assert isinstance(told, Entry) and told.key == ".tmp/old" and told.size == 5
    assert backend.sweep(500) == [told] and backend.sweep(500) == []
    assert {p.name for p in (tmp_path / "store" / ".tmp").iterdir()} == {"young", "swap-00.lock"}


@pytest.mark.parametrize("what", ["pipe", "folder"])
def test_what_is_no_file_is_never_taken_for_an_object(tmp_path: Path, what: str) -> None:
    """Whoever reads it, or wants something else in its place, is told what it is, and waits for nothing."""
    store, key = Store.open(str(tmp_path / "store")), "0" * 64
    path = tmp_path / "store" / "v1" / "act" / "sft" / f"{key}.json"
    path.parent.mkdir(parents=True)
    os.mkfifo(path) if what == "pipe" else path.mkdir()
    for act in (lambda: store.lookup("sft", key), lambda: store.withdraw_damaged("sft", key, "a test")):
        with pytest.raises(StoreError, match=rf"{key}.*by hand"):
            act()


def test_a_file_system_without_locks_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever has to change an object there is told what is missing and what to do, and nothing was changed."""
    backend = open_backend(str(tmp_path / "store"))
    etag = backend.put("v1/x", b"1")

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    for act in (lambda: backend.put("v1/x", b"2", if_match=etag), lambda: backend.delete("v1/x")):
        with pytest.raises(StoreUnavailable, match="v1/x .* no locks .* --store"):
            act()
    assert backend.get("v1/x").data == b"1"
