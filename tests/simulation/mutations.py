"""Known ways to break the protocol. The simulation must see every one of them, or it proves nothing about the others.

Each mutation replaces one piece of the real code by one that lacks a single precaution.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

from artifacts import collect, condemned, discard, intent, lease, scratch, store, sweep, upload
from artifacts.checkpoints import StoredCheckpoints
from artifacts.digest import canonical_json, digest_bytes, digest_file
from artifacts.errors import Conflict, NotFound, StoreUnavailable
from artifacts.lease import Heartbeat, Lease, wait_for
from artifacts.mark import Marks
from artifacts.store import Store, _record_key
from artifacts.trees import File, Tree
from artifacts.upload import uploaded
from tasks import worker
from tasks.stage import StageStopped
from tests.simulation.scenario import Plan, Result, run_schedule


@dataclass(frozen=True, slots=True)
class Mutation:
    """One precaution less."""

    patch: Callable[[], AbstractContextManager[Any]]
    sees: str
    """The property, of those of the ledger, by which it is seen first."""
    accidents: tuple[str, ...]
    """What it takes to see it soon; any of the simulation's accidents and faults."""
    collectors: int = 0
    deaf: bool = False
    """True when the bodies have to ignore that they are asked to stop."""
    damage: bool = False
    """True when it takes rotting blobs, and repairs."""
    first: int = 0
    """Seed at which to begin: where it takes a rare coincidence, shortly before one that is known."""
    rate: float = 0.02
    """Chance of each of the accidents."""


def first_seed_that_sees(mutation: Mutation, number: int) -> Result | None:
    """The first of `number` schedules in which the mutated protocol violates a property; None if there is none."""
    rates = dict.fromkeys(mutation.accidents, mutation.rate)

    def change(plan: Plan) -> Plan:
        nodes = [replace(node, deaf=node.deaf or mutation.deaf) for node in plan.nodes]
        if mutation.collectors:
            short = {"steps": 1, "seconds": 0.05, "exact": True}
            nodes = [replace(node, config=node.config.model_copy(update=short)) for node in nodes]
        people = {"rots": 3, "repairs": 2, "forgets": 1}
        plan = replace(plan, **(people if mutation.damage else dict.fromkeys(people, 0)))
        return replace(
            plan,
            nodes=nodes,
            rates=rates,
            budget=12,
            restarts=4,
            collectors=mutation.collectors,
            brisk=plan.brisk or mutation.collectors > 0,
        )

    for seed in range(mutation.first, mutation.first + number):
        with mutation.patch():
            result = run_schedule(seed, change=change)
        if any(text.startswith(f"{mutation.sees}:") for text in result.violations):
            return result
    return None


def _replace(owner: Any, name: str, new: Any) -> Callable[[], AbstractContextManager[Any]]:
    return lambda: mock.patch.object(owner, name, new)


def _both(*patches: Callable[[], AbstractContextManager[Any]]) -> Callable[[], AbstractContextManager[Any]]:
    @contextmanager
    def all_of_them() -> Iterator[None]:
        with ExitStack() as stack:
            for patch in patches:
                stack.enter_context(patch())
            yield

    return all_of_them


# Records and blobs


def _publish_record_first(
    self: Store, folder: Path, make_record: Callable[[Tree], Any], progress: Any = None, **_: Any
) -> Any:
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    tree = Tree.of(File(p.relative_to(folder).as_posix(), p.stat().st_size, digest_file(p)) for p in paths)
    record = self.commit(make_record(tree))
    with uploaded(self, folder, progress):
        return record


def _commit_over_others(self: Store, record: Any, **_: Any) -> Any:
    self.backend.put(_record_key(record.stage, record.key), record.encode())
    return record


def _commit_believing(self: Store, record: Any, **_: Any) -> Any:
    try:
        self.backend.put(_record_key(record.stage, record.key), record.encode(), if_absent=True)
    except Conflict:
        pass
    return record


_lookup = Store.lookup


def _lookup_hopefully(self: Store, stage: str, key: str) -> Any:
    try:
        return _lookup(self, stage, key)
    except StoreUnavailable:
        return None


# Leases


def _write_over_others(self: Lease, fence: int, state: str, etag: str | None) -> bool:
    body = {"owner": self.owner, "fence": fence, "beat": uuid.uuid4().hex, "state": state}
    body |= {"time_to_live": self.time_to_live, "holder": self.holder}
    sent = self.clock.monotonic()
    self._etag = self.backend.put(self._path, canonical_json(body))
    self.fence, self._deadline = fence, sent + self.time_to_live
    return True


def _release_over_others(self: Lease) -> None:
    if self._etag is not None:
        _write_over_others(self, self.fence, "free", None)
        self._etag = None


def _write_forgetting_lost_replies(self: Lease, fence: int, state: str, etag: str | None) -> bool:
    body = {"owner": self.owner, "fence": fence, "beat": uuid.uuid4().hex, "state": state}
    data = canonical_json({**body, "time_to_live": self.time_to_live, "holder": self.holder})
    sent = self.clock.monotonic()
    try:
        self._etag = self.backend.put(self._path, data, if_absent=etag is None, if_match=etag)
    except (Conflict, NotFound):
        return False
    self.fence, self._deadline = fence, sent + self.time_to_live
    return True


_parse = lease._parse


def _parse_impatiently(data: bytes) -> dict[str, object] | None:
    body = _parse(data)
    return None if body is None else {**body, "time_to_live": 0.0}


def _parse_burying_neighbours(data: bytes) -> Any:
    body: Any = _parse(data)
    if body is not None and body["holder"].get("machine") == lease.this_process()["machine"]:
        return {**body, "state": "free"}
    return body


# Bodies and checkpoints

_pointers = StoredCheckpoints._pointers


def _pointers_without_fence(self: StoredCheckpoints) -> Any:
    etag, pointers, _ = _pointers(self)
    return etag, pointers, 0


def _save_pointer_first(self: StoredCheckpoints, step: int, directory: Path) -> None:
    self.confirm()
    name = f"{step:09d}-{uuid.uuid4().hex[:12]}"
    files = sorted((p.relative_to(directory).as_posix(), p) for p in directory.rglob("*") if p.is_file())
    rows = [[relative, path.stat().st_size, digest_file(path)] for relative, path in files]
    manifest = canonical_json({"step": step, "seconds": self.seconds, "files": rows})
    dropped = self._advance({"name": name, "step": step, "digest": digest_bytes(manifest)})
    for relative, path in files:
        self.backend.put_file(f"{self._root}/{name}/files/{relative}", path)
    self.backend.put(f"{self._root}/{name}/manifest.json", manifest)
    for old in dropped:
        self._delete(old)


_publish = worker._Attempt._publish


def _publish_after_discarding(self: Any, out: Path, seconds: float, held: Lease) -> Any:
    StoredCheckpoints(self.store.backend, self.spec.key, held.fence).discard()
    return _publish(self, out, seconds, held)


def _publish_after_release(self: Any, out: Path, seconds: float, held: Lease) -> Any:
    held.release()
    return _publish(self, out, seconds, held)


def _discard_unconfirmed(self: Any, held: Lease) -> None:
    try:
        StoredCheckpoints(self.store.backend, self.spec.key, held.fence).discard()
    except StoreUnavailable:
        pass


def _run_without_second_look(self: Any, held: Lease) -> Any:
    if not wait_for(held.try_acquire, self.stop, clock=self.clock):
        raise StageStopped("stopped")
    heartbeat = Heartbeat(held, self._on_lost)
    try:
        return self._execute(held)
    finally:
        heartbeat.stop()
        held.release()


class _Replaced:
    """An object with some attributes of its own before those of another."""

    def __init__(self, other: Any, **own: Any) -> None:
        self._other = other
        self.__dict__.update(own)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._other, name)


# Collection


@contextmanager
def _no_intent(backend: Any, keys: Any, *rest: Any) -> Iterator[None]:
    yield


_send = upload._Upload._send


def _send_looking_first(self: Any, lanes: Any, window: Any, papers: Any = ()) -> None:
    before = self._backend.sizes([blob.key for blob in window])
    with mock.patch.object(self, "_backend", _Replaced(self._backend, sizes=lambda keys: {k: before[k] for k in keys})):
        _send(self, lanes, window, papers)


_refresh = Marks.refresh


def _refresh_once(self: Marks) -> None:
    if not self.roots:
        _refresh(self)


class _NoList:
    def __init__(self, backend: Any, *rest: Any) -> None:
        self._backend = backend

    def put(self, keys: Any) -> None:
        pass

    def delete(self, batch: Any) -> None:
        self._backend.delete_many(batch)

    def free(self) -> None:
        pass


@contextmanager
def _proving_nothing() -> Iterator[None]:
    with mock.patch.object(sweep.CondemnedList, "prove", lambda self: None):
        with mock.patch.object(sweep.CondemnedList, "while_proven", lambda self, keys: iter(keys)):
            yield


# Damage


def _withdraw_by_deleting(self: Store, name: str, note: str, etag: str) -> bool:
    self.backend.delete(name)
    return True


def _remove_unseen(backend: Any, keys: Any, is_damaged: Any, clock: Any, **options: Any) -> list[str]:
    backend.delete_many(keys)
    return list(keys)


def _invalidate_whatever_stands(self: Store, record: Any, reason: str) -> bool:
    standing = self.lookup(record.stage, record.key)
    return standing is not None and self.withdraw(standing, {"reason": reason})


STOPS = ("stop", "long stop", "clock jumps")

MUTATIONS: dict[str, Mutation] = {
    "the record before the blobs": Mutation(_replace(Store, "publish", _publish_record_first), "complete", ("kill",)),
    "a record over a standing one": Mutation(_replace(Store, "commit", _commit_over_others), "one output", STOPS),
    "a refused record taken for the own one": Mutation(
        _replace(Store, "commit", _commit_believing), "one output", STOPS
    ),
    "an error taken for a miss": Mutation(
        _replace(Store, "lookup", _lookup_hopefully), "no rerun", ("403",), rate=0.15
    ),
    "a lease taken without a condition": Mutation(_replace(Lease, "_write", _write_over_others), "lease", STOPS),
    "a lease released without a condition": Mutation(_replace(Lease, "release", _release_over_others), "lease", STOPS),
    "a lost reply of a beat forgotten": Mutation(
        _replace(Lease, "_write", _write_forgetting_lost_replies), "gave up", ("lost reply", "500")
    ),
    "a lease taken without waiting": Mutation(_replace(lease, "_parse", _parse_impatiently), "lease", ()),
    "a living neighbour taken for gone": Mutation(_replace(lease, "_parse", _parse_burying_neighbours), "lease", ()),
    "the loss of a lease not heard of": Mutation(
        _replace(worker._Attempt, "_why_stop", lambda self, held: self.stop()), "stops", STOPS
    ),
    "a body that is never ended": Mutation(
        _replace(worker._Attempt, "_end_deaf_body", lambda self: None), "stops", STOPS, deaf=True
    ),
    "the record not looked for under the lease": Mutation(
        _replace(worker._Attempt, "_run_leased", _run_without_second_look), "no rerun", ()
    ),
    "the lease released before the commit": Mutation(
        _replace(worker._Attempt, "_publish", _publish_after_release), "once", ()
    ),
    "finished output of the dead not looked for": Mutation(
        _replace(scratch, "finished_attempt", lambda folder, key: None), "once", ("kill", "403")
    ),
    "no fence on the pointer": Mutation(
        _replace(StoredCheckpoints, "_pointers", _pointers_without_fence), "pointer", STOPS
    ),
    "no look at the lease before the pointer": Mutation(
        _replace(worker._Attempt, "_confirming", lambda self, held: lambda: None), "pointer", STOPS
    ),
    "the pointer before its checkpoint": Mutation(
        _replace(StoredCheckpoints, "save", _save_pointer_first), "resume", ("kill",)
    ),
    "checkpoints discarded before the commit": Mutation(
        _replace(worker._Attempt, "_publish", _publish_after_discarding), "resume", ("kill",)
    ),
    "checkpoints discarded by one who lost the lease": Mutation(
        _replace(worker._Attempt, "_discard_checkpoints", _discard_unconfirmed), "resume", ("clock jumps",)
    ),
    "a writer without an intent": Mutation(_replace(upload, "intent", _no_intent), "complete", (), 1),
    "a writer that does not wait": Mutation(
        _replace(intent, "wait_until_spared", lambda *arguments: False), "complete", (), 1
    ),
    "a writer that looks before it announces": Mutation(
        _replace(upload._Upload, "_send", _send_looking_first), "complete", (), 1
    ),
    "a collection without a list": Mutation(_replace(sweep, "CondemnedList", _NoList), "complete", (), 1),
    "a collection without a second look": Mutation(_replace(Marks, "refresh", _refresh_once), "in use", (), 1),
    "a collection that proves nothing": Mutation(_proving_nothing, "complete", ("long stop",), 1),
    "a batch that is proven once": Mutation(
        _replace(sweep.CondemnedList, "while_proven", lambda self, keys: iter(keys)),
        "complete",
        ("long stop",),
        1,
        first=920,
    ),
    "a list freed with requests under way": Mutation(
        _replace(condemned, "SHORTEST_PAUSE", float("inf")), "complete", ("late", "lost reply"), 1, first=300, rate=0.05
    ),
    "a lease made while it is being removed": Mutation(
        _replace(Lease, "_await_removal", lambda self: None), "lease", ("late", "lost reply"), 1, first=300, rate=0.05
    ),
    "records and blobs in one batch": Mutation(
        _replace(sweep, "_batches", lambda keys: [list(keys)] if keys else []), "complete", (), 1
    ),
    "a record withdrawn by deleting it": Mutation(
        _replace(Store, "_replace_withdrawn", _withdraw_by_deleting), "withdrawn", ("long stop",), damage=True
    ),
    "another record withdrawn than the damaged one": Mutation(
        _replace(Store, "invalidate", _invalidate_whatever_stands), "withdrawn", ("long stop",), damage=True, first=700
    ),
    "damaged objects removed without another look": Mutation(
        _both(_replace(store, "remove_damaged", _remove_unseen), _replace(discard, "remove_damaged", _remove_unseen)),
        "complete",
        ("stop", "long stop"),
        damage=True,
        first=90,
    ),
    "blobs deleted before their records": Mutation(
        _replace(collect, "KINDS", dict(reversed(collect.KINDS.items()))), "complete", (), 1
    ),
}
