"""Leases and checkpoints: one holder at a time, and nothing from a worker that is no longer the holder."""

from __future__ import annotations

import os
import subprocess
import unicodedata
from pathlib import Path
from typing import Any

import pytest

from artifacts import lease as leases
from artifacts.checkpoints import StoredCheckpoints
from artifacts.clock import Clock
from artifacts.errors import LeaseLost, StoreError
from artifacts.lease import Lease, is_gone, process_identity, this_process
from artifacts.memory import MemoryBackend
from artifacts.store import Store


class HandClock(Clock):
    """A clock that is set by hand."""

    seconds = 0.0

    def monotonic(self) -> float:
        return self.seconds


def folder(tmp_path: Path, **files: str) -> Path:
    made = tmp_path / "state"
    made.mkdir()
    for name, text in files.items():
        (made / name).write_text(text)
    return made


def test_lease_excludes_and_expires(store: Store) -> None:
    """A held lease excludes others until its time to live passes on the waiter's own clock; then its holder has lost it."""
    now = HandClock()
    elsewhere = {"machine": "another", "pid": 1, "started": 1}
    holder = Lease(store.backend, "k" * 64, 10.0, clock=now, holder=elsewhere)
    waiter = Lease(store.backend, "k" * 64, 10.0, clock=now)
    assert holder.try_acquire() and holder.fence == 1
    assert not waiter.try_acquire()
    now.seconds = 9.0
    holder.renew()
    now.seconds = 12.0
    assert not waiter.try_acquire()
    now.seconds = 23.0
    assert waiter.try_acquire() and waiter.fence == 2
    with pytest.raises(LeaseLost):
        holder.renew()
    holder.release()
    assert waiter.held
    waiter.release()
    assert holder.try_acquire() and holder.fence == 3


def test_lease_of_a_dead_process_is_free() -> None:
    """On one machine the lease of a process that is gone is taken at once, and that of a living one is not."""
    store = Store.open("memory://dead")
    child = subprocess.Popen(["sleep", "60"])
    holder = process_identity(child.pid)
    lease = Lease(store.backend, "k" * 64, 60.0, holder=holder)
    assert lease.try_acquire()
    other = Lease(store.backend, "k" * 64, 60.0)
    assert not other.try_acquire() and not is_gone(holder) and not is_gone(this_process())
    child.kill()
    child.wait()
    assert is_gone(holder) and other.try_acquire()


def test_checkpoints_survive_damage_and_refuse_the_dispossessed(store: Store, tmp_path: Path) -> None:
    """The newest intact checkpoint comes back; a damaged one costs one interval; an older fence cannot move the pointer."""
    state = tmp_path / "state"
    state.mkdir()
    checkpoints = StoredCheckpoints(store.backend, "k" * 64, fence=2)
    for step in (1, 2, 3):
        (state / "s.txt").write_text(str(step))
        checkpoints.save(step, state)
    into = tmp_path / "into"
    into.mkdir()
    assert StoredCheckpoints(store.backend, "k" * 64, fence=3).restore(into) == 3
    assert (into / "s.txt").read_text() == "3"
    newest = max(e.key for e in store.backend.list(f"v1/wip/{'k' * 64}/") if e.key.endswith("s.txt"))
    store.backend.delete(newest)
    store.backend.put(newest, b"damaged")
    again = tmp_path / "again"
    again.mkdir()
    assert StoredCheckpoints(store.backend, "k" * 64, fence=3).restore(again) == 2
    assert (again / "s.txt").read_text() == "2"
    with pytest.raises(LeaseLost):
        StoredCheckpoints(store.backend, "k" * 64, fence=1).save(9, state)
    checkpoints.discard()
    assert not list(store.backend.list(f"v1/wip/{'k' * 64}/"))


def test_damaged_lease_is_replaced(store: Store) -> None:
    """A lease object that is not a lease stops nobody; its fence goes on from the highest one seen elsewhere."""
    path = f"v1/lease/{'k' * 64}.json"
    for data in (b"", b"{}", b"[" * 100_000, b'{"state":"held","holder":{},"fence":"x"}'):
        store.backend.delete(path)
        store.backend.put(path, data)
        lease = Lease(store.backend, "k" * 64, last_fence=lambda: 6)
        assert lease.try_acquire() and lease.fence == 7
    store.backend.put(path, b"harm")
    with pytest.raises(LeaseLost, match="overwritten"):
        lease.renew()


def test_vanished_lease_names_no_other_worker(store: Store) -> None:
    """A holder whose lease object was removed is told so, not that another worker took it."""
    lease = Lease(store.backend, "k" * 64)
    assert lease.try_acquire()
    store.backend.delete(f"v1/lease/{'k' * 64}.json")
    with pytest.raises(LeaseLost, match="is gone from the store"):
        lease.renew()


def test_unreadable_process_is_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that exists but whose /proc entry may not be read is not gone."""
    child = subprocess.Popen(["sleep", "60"])
    holder, mine = process_identity(child.pid), this_process()
    with monkeypatch.context() as patch:
        patch.setattr(leases, "this_process", lambda: mine)
        patch.setattr(leases, "_status", lambda pid: None)
        assert not is_gone(holder)
    assert is_gone({**holder, "started": 1})
    child.kill()
    child.wait()
    assert is_gone(holder)


def test_claim_shuts_out_an_older_fence(store: Store, tmp_path: Path) -> None:
    """Once the new holder has claimed the checkpoints, the old one moves nothing, and leaves nothing behind."""
    state = folder(tmp_path, s="1")
    old = StoredCheckpoints(store.backend, "k" * 64, fence=1)
    old.save(1, state)
    new = StoredCheckpoints(store.backend, "k" * 64, fence=2)
    new.claim()
    before = {e.key for e in store.backend.list("v1/wip/")}
    with pytest.raises(LeaseLost):
        old.save(2, state)
    assert {e.key for e in store.backend.list("v1/wip/")} == before
    (tmp_path / "into").mkdir()
    assert new.restore(tmp_path / "into") == 1 and new.stored_fence() == 2


def test_dispossessed_worker_recreates_no_checkpoints(store: Store, tmp_path: Path) -> None:
    """After the winner has finished and discarded, a save under the lost lease writes nothing."""
    state = folder(tmp_path, s="1")
    lease = Lease(store.backend, "k" * 64, 0.0, holder={"machine": "another", "pid": 1, "started": 1})
    assert lease.try_acquire()
    old = StoredCheckpoints(store.backend, "k" * 64, lease.fence, confirm=lease.confirm)
    old.save(1, state)
    winner = Lease(store.backend, "k" * 64)
    assert winner.try_acquire()
    StoredCheckpoints(store.backend, "k" * 64, winner.fence).discard()
    winner.release()
    with pytest.raises(LeaseLost, match="another worker"):
        old.save(2, state)
    assert not list(store.backend.list("v1/wip/"))


def test_a_lease_that_is_lost_while_a_checkpoint_is_sent(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The winner takes over, finishes and discards in the middle of a save: it makes no pointer anew, and leaves nothing."""
    lease = Lease(store.backend, "k" * 64, 0.0, holder={"machine": "another", "pid": 1, "started": 1})
    assert lease.try_acquire()
    old = StoredCheckpoints(store.backend, "k" * 64, lease.fence, confirm=lease.confirm)
    put_file, winner = store.backend.put_file, Lease(store.backend, "k" * 64)

    def then_lose(key: str, path: Path, **more: Any) -> None:
        put_file(key, path, **more)
        assert winner.try_acquire()
        StoredCheckpoints(store.backend, "k" * 64, winner.fence).discard()
        winner.release()

    monkeypatch.setattr(store.backend, "put_file", then_lose)
    with pytest.raises(LeaseLost, match="another worker"):
        old.save(1, folder(tmp_path, s="1"))
    assert not list(store.backend.list("v1/wip/"))


def test_empty_checkpoint_is_refused(tmp_path: Path) -> None:
    """A checkpoint of a missing or empty folder is an error: it could not be resumed from."""
    checkpoints = StoredCheckpoints(Store.open("memory://empty-checkpoint").backend, "k" * 64, 1)
    (tmp_path / "empty").mkdir()
    for name in ("empty", "missing"):
        with pytest.raises(StoreError, match="holds no file"):
            checkpoints.save(1, tmp_path / name)


@pytest.mark.parametrize(
    "names",
    [
        ["step:1.bin"],
        ["a\\b"],
        ["tab\tname"],
        [unicodedata.normalize("NFD", "é")],
        ["x\u00a0y"],
        ["Twin", "twin"],
        ["A/x", "a/y"],
    ],
    ids=ascii,
)
def test_a_checkpoint_that_could_not_be_restored_is_refused(tmp_path: Path, names: list[str]) -> None:
    """File names that a manifest must not have are an error when the state is saved, which leaves the one before it alone."""
    state, backend = tmp_path / "state", MemoryBackend()
    state.mkdir()
    (state / "ok").write_text("1")
    checkpoints = StoredCheckpoints(backend, "k" * 64, 1)
    checkpoints.save(1, state)
    stored = [entry.key for entry in backend.list("")]
    for name in names:
        (state / name).parent.mkdir(exist_ok=True)
        (state / name).write_text("2")
    with pytest.raises(StoreError, match="step 2 could not be restored.*rename"):
        checkpoints.save(2, state)
    assert [entry.key for entry in backend.list("")] == stored
    (tmp_path / "into").mkdir()
    assert checkpoints.restore(tmp_path / "into") == 1


def test_a_checkpoint_is_not_written_while_it_is_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file of a checkpoint that changes between hashing and sending is an error, and the newest checkpoint stays."""
    state, backend = tmp_path / "state", MemoryBackend()
    state.mkdir()
    (state / "x").write_text("1")
    checkpoints, put_file = StoredCheckpoints(backend, "k" * 64, 1), backend.put_file
    checkpoints.save(1, state)

    def then_write(key: str, path: Path, **more: Any) -> None:
        put_file(key, path, **more)
        os.utime(path, ns=(1, 1))

    monkeypatch.setattr(backend, "put_file", then_write)
    with pytest.raises(StoreError, match="changed while it was saved"):
        checkpoints.save(2, state)
    (tmp_path / "into").mkdir()
    assert checkpoints.restore(tmp_path / "into") == 1
