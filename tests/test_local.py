"""A store in a folder, where it is more than the behaviour of every backend: what outlasts a power cut, and who may write."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from artifacts.backend import Backend, open_backend
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
