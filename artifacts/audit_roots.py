"""Verification of what is not reached from records: runs, pins, the checkpoints of unfinished stages, the audit trail."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from pathlib import Path

from artifacts.backend import Backend, Entry, read_many
from artifacts.checkpoints import read_manifest, read_pointers
from artifacts.digest import digest_bytes, is_digest, unseal
from artifacts.errors import Damaged, NotFound, StoreError
from artifacts.intent import CONDEMNED, INTENT, INTENTS, TAKEOVER_SECONDS, read_condemned
from artifacts.keep import read_pin
from artifacts.mark import ACTIVE_RUNS, Where, record_key, shown
from artifacts.store import Store, parse_run
from artifacts.trail import PINS, TRAIL, Action, read_trail

RUNS = "v1/run/"
DAMAGED_LIST = f"is not a list of what is being deleted; writers wait {TAKEOVER_SECONDS / 60:.0f} minutes for it"
Problem = tuple[str, str, str]
"""(kind, key, what is wrong)."""
Count = Callable[[str, int], None]


STRAY_KIND = "stray"
STRAY = "does not belong here, and is left alone; remove it by hand"


def check_roots(store: Store, records: Container[Where], count: Count) -> Iterator[Problem]:
    """What is wrong with runs, pins, checkpoints and the trail, given the records that are readable or withdrawn.

    What a run or a pin names is there: the record, or the word that it was withdrawn.
    """
    backend = store.backend
    trail = list(read_trail(backend))
    explained = _withdrawn_without_a_word(trail)
    strays = [e for prefix in (RUNS, PINS, TRAIL) for e in backend.list(prefix) if not e.key.isprintable()]
    strays += [entry for entry in backend.list(INTENTS) if not INTENT.fullmatch(entry.key)]
    for key, data in _objects(backend, _entries(backend, RUNS)):
        count("run", len(data))
        yield from _check_run(key, data, records, explained)
    yield from _check_pins(backend, records, explained, trail, count)
    if (condemned := read_condemned(backend)) is not None and condemned.state == "damaged":
        yield "condemned list", CONDEMNED, DAMAGED_LIST
    names: dict[str, None] = {}
    for entry in backend.list("v1/wip/"):
        key, _, below = entry.key.removeprefix("v1/wip/").partition("/")
        if is_digest(key) and below:
            names[key] = None
        else:
            strays.append(entry)
    for key in sorted(names):
        yield from _check_checkpoints(backend, key, count)
    yield from ((STRAY_KIND, shown(entry.key), STRAY) for entry in strays)
    for key, data in _objects(backend, _entries(backend, TRAIL)):
        count("audit entry", len(data))
        if (problem := root_problem(key, data)) is not None:
            yield "audit entry", key, problem


def root_problem(key: str, data: bytes) -> str | None:
    """What is wrong with the bytes of a run, a pin or an entry of the trail; None when nothing is."""
    try:
        if key.startswith(PINS):
            if (label := read_pin(data).label) != key.removeprefix(PINS).removesuffix(".json"):
                raise ValueError(f"is the pin {label!r}")
        elif key.startswith(RUNS):
            parse_run(data)
            if not key.startswith(ACTIVE_RUNS) and digest_bytes(data) != key.rpartition("/")[2].removesuffix(".json"):
                raise ValueError("does not match its digest")
        elif key.startswith(TRAIL):
            unseal(data)
    except ValueError as error:
        return str(error)
    return None


def _entries(backend: Backend, prefix: str) -> list[Entry]:
    return [entry for entry in backend.list(prefix) if entry.key.isprintable()]


def _objects(backend: Backend, entries: Sequence[Entry]) -> Iterator[tuple[str, bytes]]:
    for key, stored in read_many(backend, [entry.key for entry in entries]):
        if stored is not None:
            yield key, stored.data


def _withdrawn_without_a_word(trail: Iterable[Action]) -> set[str]:
    """Keys of records that somebody withdrew when collections still removed what is said in the place of such a record."""
    found: set[str] = set()
    for action in trail:
        keys = map(str, action.details.get("records", ()))
        if action.action == "restore":
            found.difference_update(keys)
        elif action.form == 1:
            found.update(keys)
    return found


def _check_run(key: str, data: bytes, records: Container[Where], explained: Container[str]) -> Iterator[Problem]:
    if (problem := root_problem(key, data)) is not None:
        yield "run", key, problem
        return
    for name, node in parse_run(data)["nodes"].items():
        where = (node["stage"], node["key"])
        if where not in records and record_key(*where) not in explained:
            yield "record", record_key(*where), f"is missing; it is {name} of {key}, and nobody withdrew it"


def _check_pins(
    backend: Backend, records: Container[Where], explained: Container[str], trail: Iterable[Action], count: Count
) -> Iterator[Problem]:
    standing = set()
    for key, data in _objects(backend, _entries(backend, PINS)):
        count("pin", len(data))
        standing.add(key)
        if (problem := root_problem(key, data)) is not None:
            yield "pin", key, problem
            continue
        for node in read_pin(data).nodes.values():
            where = (node["stage"], node["key"])
            if where not in records and record_key(*where) not in explained:
                yield "record", record_key(*where), f"is missing; {key} keeps it"
    pinned: dict[str, bool] = {}
    for entry in trail:
        if entry.action in ("pin", "unpin"):
            pinned[f"{PINS}{entry.details.get('label')}.json"] = entry.action == "pin"
    for key in sorted(key for key, stands in pinned.items() if stands and key not in standing):
        yield "pin", key, "is missing, and nobody removed it"


def _check_checkpoints(backend: Backend, key: str, count: Count) -> Iterator[Problem]:
    """The checkpoints that a stage's pointer names. A worker may replace them meanwhile: then nothing is said."""
    latest = f"v1/wip/{key}/LATEST"
    try:
        stored = backend.get(latest)
    except NotFound:
        return  # not pointed to yet, or no more
    except StoreError as error:
        yield "checkpoint", latest, str(error)
        return
    count("checkpoint", len(stored.data))
    found: list[Problem] = []
    try:
        for pointer in read_pointers(stored.data)[0]:
            base = f"v1/wip/{key}/{pointer['name']}"
            try:
                _read_checkpoint(backend, base, str(pointer["digest"]), count)
            except NotFound as error:
                found.append(("checkpoint", base, f"is not complete: {error}"))
            except Damaged as error:
                found.append(("checkpoint", base, str(error)))
    except ValueError as error:
        found.append(("checkpoint", latest, f"cannot be read: {error}"))
    if found:
        now = backend.get_many([latest])[latest]
        if now is not None and now.etag == stored.etag:
            yield from found


def _read_checkpoint(backend: Backend, base: str, digest: str, count: Count) -> None:
    manifest = backend.get(f"{base}/manifest.json").data
    if digest_bytes(manifest) != digest:
        raise Damaged(f"{base}/manifest.json does not match its digest")
    with tempfile.TemporaryDirectory() as folder:
        for number, file in enumerate(read_manifest(manifest)[2]):
            copy = Path(folder, str(number))
            if backend.get_file(f"{base}/files/{file.path}", copy, size=file.size) != file.digest:
                raise Damaged(f"{base}/files/{file.path} does not match its digest")
            count("checkpoint", file.size)
            copy.unlink()
