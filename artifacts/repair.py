"""Repair: what a verification found is put back from an intact copy, or else exactly the stages that lost their output are
withdrawn, so that they alone run again.

In this order: records and trees from another store; then, file by file, damaged and missing blobs, from a copy of the blob
or of a file that holds it. What has no copy costs the records whose output needs it, and no other; each is kept in the
trash with the reason. Damaged objects that no output needs are removed: a blob is only ever sent where none is, so one left
in place would harm the next stage that makes the same bytes. Everything that is done is noted in the audit trail.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from blake3 import blake3

from artifacts.audit import Finding, Progress, Verification, verify
from artifacts.backend import Object, put_own
from artifacts.collect import store_time
from artifacts.condemned import remove_damaged, reset_damaged
from artifacts.copies import Copies
from artifacts.digest import digest_bytes, update_from
from artifacts.discard import Discard, note_unpinned
from artifacts.errors import Conflict, Damaged, NewerFormat, NotFound
from artifacts.intent import CONDEMNED, intent
from artifacts.mark import Where, record_key, record_of
from artifacts.packing import packed_run
from artifacts.record import MAX_RECORD_BYTES, Record, is_withdrawn
from artifacts.store import Store
from artifacts.trail import note
from artifacts.trees import File, Part, Tree, object_key, object_keys_of, read_parts, read_tree, stored_parts
from artifacts.unreadable import Tolerant, tolerant

TREES_AT_ONCE = 200


@dataclass(slots=True)
class Repair:
    """What was done, or with `dry_run` would be."""

    dry_run: bool
    verification: Verification
    fixed: dict[str, str] = field(default_factory=dict)
    """Key of an object -> where the intact copy is from."""
    removed: dict[str, str] = field(default_factory=dict)
    """Key of an object that was removed -> why."""
    withdrawn: list[tuple[Record, str]] = field(default_factory=list)
    """Records whose output cannot be read -> why. Their stages run again when they are needed."""
    unreadable: list[str] = field(default_factory=list)
    """Records that could not be read themselves: what they cost is not known."""

    @property
    def seconds(self) -> float:
        """What the withdrawn stages took when they ran: what running them again will cost."""
        return sum(record.seconds for record, _ in self.withdrawn)

    def describe(self) -> dict[str, Any]:
        """Plain data for `--json`."""
        return {
            "dry_run": self.dry_run,
            "damage": [finding.describe() for finding in self.verification.damage],
            "strays": [finding.describe() for finding in self.verification.strays],
            "fixed": self.fixed,
            "removed": self.removed,
            "withdrawn": [
                {"stage": r.stage, "key": r.key, "node": r.node, "seconds": r.seconds, "reason": reason}
                for r, reason in self.withdrawn
            ],
            "unreadable": self.unreadable,
            "rerun_seconds": self.seconds,
        }


def repair(
    store: Store,
    *,
    folders: Sequence[Path] = (),
    stores: Sequence[Store] = (),
    dry_run: bool = False,
    progress: Progress = lambda done, total: None,
    say: Callable[[str], None] = lambda text: None,
) -> Repair:
    """Verify everything, and repair what is damaged from copies in `folders` and `stores`."""
    say("reading everything in the store")
    store, backend = tolerant(store)
    found = verify(store, progress=progress)
    with tempfile.TemporaryDirectory() as scratch:
        copies = Copies(folders, [tolerant(other)[0] for other in stores], Path(scratch))
        return _Repairer(store, backend, copies, Repair(dry_run, found), say).run()


class _Repairer:
    def __init__(
        self, store: Store, backend: Tolerant, copies: Copies, result: Repair, say: Callable[[str], None]
    ) -> None:
        self._store = store
        self._tolerant = backend
        self._copies = copies
        self._discard = Discard(store, backend, copies.scratch, say)
        self._say = say
        self._bad: dict[str, Finding] = {}
        self._left: set[str] = set()
        """Keys that nothing was done about yet."""
        self._restored: set[str] = set()
        """Outputs of records that were put back: nobody has asked yet what they need."""
        self._lost: list[tuple[Record, str]] = []
        """What is still to be withdrawn."""
        self.result = result

    def run(self) -> Repair:
        """Mend what was found, then what only shows now that records and runs are back, until nothing new does."""
        verification, seen = self.result.verification, set[str]()
        while new := {f.key: f for f in verification.damage if f.key not in seen}:
            self._bad, self._left = new, set(new)
            seen.update(new)
            if verification.newer:
                # What their outputs need is not known, so nothing is known to be of no use.
                raise NewerFormat(next(iter(verification.newer.values())))
            self._mend()
            if self.result.dry_run:
                break
            again = verify(self._store, sample=0.0)
            verification.records, verification.newer = again.records, again.newer
            verification.findings += [finding for finding in again.damage if finding.key not in seen]
        return self.result

    def _mend(self) -> None:
        self._say(f"damaged: {len(self._bad):,}; looking for intact copies")
        self._reset_condemned()
        for finding in list(self._bad.values()):
            if finding.kind == "record":
                self._mend_record(finding)
        self._mend_outputs()
        for key in sorted(self._left):
            self._mend_run(self._bad[key])
        if not self.result.dry_run:
            self._note()
            self._withdraw()
        for key in sorted(self._left):
            self._drop(self._bad[key])

    def _note(self) -> None:
        """Say in the trail what was put back, and what is about to be withdrawn and removed: a repair may be killed."""
        withdrawn = [record_key(record.stage, record.key) for record, _ in self.result.withdrawn]
        left = [self._bad[key] for key in self._left]
        there = {finding.key for finding in left if not finding.problem.startswith("is missing")}
        note(
            self._store.backend,
            "repair",
            "damage was found",
            fixed=sorted(self.result.fixed),
            removed=sorted(there | self.result.removed.keys()),
            records=sorted({*withdrawn, *self.result.unreadable}),
        )

    def _withdraw(self) -> None:
        for key in sorted(self._bad.keys() & set(self.result.unreadable)):
            if (where := record_of(key)) is not None:
                self._store.withdraw_damaged(*where, self._bad[key].problem)
        for record, reason in self._lost:
            standing = self._store.lookup(record.stage, record.key)
            if standing is not None and standing.commit == record.commit:
                self._store.invalidate(standing, reason)
        self._lost = []

    def _reset_condemned(self) -> None:
        """First of all: everything else that is done here would wait for it."""
        if CONDEMNED in self._left:
            self._left.discard(CONDEMNED)
            self.result.removed[CONDEMNED] = self._bad[CONDEMNED].problem
            if not self.result.dry_run:
                backend, clock = self._store.backend, self._store.clock
                reset_damaged(backend, store_time(backend), clock, self._say, wait=True)

    def _fixed(self, key: str, source: str) -> None:
        self._left.discard(key)
        self.result.fixed[key] = source

    def _put(self, key: str, data: bytes, source: str) -> None:
        if not self.result.dry_run:
            self._store.backend.put(key, data)
        self._fixed(key, source)

    # Records

    def _mend_record(self, finding: Finding) -> None:
        """Put another store's record in the place of a damaged one, unless somebody has made it anew or withdrawn it."""
        where, key, backend = record_of(finding.key), finding.key, self._store.backend
        self._left.discard(key)
        while where is not None:
            stored = backend.get_many([key], limit=MAX_RECORD_BYTES)[key]
            if stored is not None and key in self._tolerant.unreadable and not self.result.dry_run:
                self._remove_unreadable(key)
                continue
            if stored is not None and is_withdrawn(stored.data):
                break
            if stored is not None and (made := _record_in(stored, where)) is not None:
                self.result.verification.records[where] = made
                return
            copy = self._copies.object(key)
            record = None if copy is None else _record_in(copy[0], where)
            if copy is None or record is None:
                break
            etag = None if stored is None else stored.etag
            try:
                if not self.result.dry_run:
                    with intent(backend, [key], self._store.clock, self._say):
                        put_own(backend, key, copy[0].data, if_absent=etag is None, if_match=etag)
            except (Conflict, NotFound):
                continue  # somebody else was here meanwhile
            self._fixed(key, copy[1])
            self.result.verification.records[where] = record
            self._restored.add(record.output)
            return
        self.result.unreadable.append(key)

    def _remove_unreadable(self, key: str) -> None:
        """Make room where nothing can be compared and swapped, because what is there cannot be read."""
        remove_damaged(self._tolerant, [key], self._tolerant.is_unreadable, self._store.clock, spare_announced=False)
        self._tolerant.unreadable.pop(key, None)

    # Outputs

    def _mend_outputs(self) -> None:
        """Put back what the outputs of the records need; withdraw the records of those that cannot be helped."""
        outputs: dict[str, list[Record]] = {}
        for record in self.result.verification.records.values():
            outputs.setdefault(record.output, []).append(record)
        names = sorted(outputs)
        for start in range(0, len(names), TREES_AT_ONCE):
            for digest, keys in object_keys_of(self._store, names[start : start + TREES_AT_ONCE]):
                known = [] if isinstance(keys, Damaged) else [key for key, _ in keys]
                if known and digest not in self._restored and self._bad.keys().isdisjoint(known):
                    continue
                if digest in self._restored and not self.result.dry_run:
                    with intent(self._store.backend, known, self._store.clock, self._say):
                        pass  # what was being deleted, before anybody knew that it is needed again, is gone now
                if (reason := self._mend_tree(digest)) is not None:
                    for record in outputs[digest]:
                        self._lose(record, reason)

    def _mend_tree(self, digest: str) -> str | None:
        """Why an output cannot be read; None when it can, now."""
        key = object_key("tree", digest)
        stored = self._store.backend.get_many([key])[key]
        try:
            tree = read_tree(stored, digest, self._store.backend.url)
        except Damaged as error:
            if (copy := self._copies.tree(digest)) is None:
                return str(error)
            self._put(key, *copy)
            tree = read_tree(Object(copy[0], ""), digest, copy[1])
        lists = stored_parts(self._store, tree.files)
        reasons = [self._mend_file(file, lists.get(file.digest), tree) for file in tree.files]
        return next((reason for reason in reasons if reason is not None), None)

    def _mend_file(self, file: File, paper: Object | None, tree: Tree) -> str | None:
        """Why a file cannot be read; None when it can, now. What was found damaged may have been made anew since."""
        blob, list_key = object_key("cas", file.digest), object_key("parts", file.digest)
        parts: tuple[Part, ...] = (Part(0, file.size, file.digest),)
        list_is_bad = paper is not None and self._is_still_bad(list_key)
        if paper is not None and not list_is_bad:
            parts = read_parts(paper, file, tree.digest, self._store.backend.url)
        names = {object_key("cas", part.digest): part for part in parts}
        sizes = self._store.backend.sizes(names)
        bad = {
            key: part
            for key, part in names.items()
            if key not in self.result.fixed and (sizes[key] != part.stored or self._is_still_bad(key))
        }
        if not list_is_bad and all(self._mend_blob(key, part) for key, part in bad.items()):
            return None
        copy = self._whole(file, blob) or self._copies.file(file.digest, file.size)
        if copy is None:
            key = list_key if list_is_bad else next(key for key in bad if key not in self.result.fixed)
            return f"{file.path}: {key} {self._bad[key].problem if key in self._bad else 'is missing'}"
        if list_is_bad or not all(_cut(copy[0], part) == part.digest for part in bad.values()):
            bad = {}
        self._put_from(copy, bad, file, list_key)
        return None

    def _is_still_bad(self, key: str) -> bool:
        return key in self._bad and key not in self.result.fixed and self._discard.is_damaged(key)

    def _whole(self, file: File, blob: str) -> tuple[Path, str] | None:
        """A file in parts that this store has as one blob too."""
        copy = self._copies.scratch / file.digest
        try:
            if blob not in self._bad and self._store.backend.get_file(blob, copy, size=file.size) == file.digest:
                return copy, self._store.backend.url
        except (NotFound, Damaged):
            pass
        copy.unlink(missing_ok=True)
        return None

    def _mend_blob(self, key: str, part: Part) -> bool:
        copy = self._copies.file(part.digest, part.stored)
        if copy is None:
            return False
        if not self.result.dry_run:
            self._store.backend.put_file(key, copy[0])
        self._copies.done(copy[0])
        self._fixed(key, copy[1])
        return True

    def _put_from(self, copy: tuple[Path, str], bad: dict[str, Part], file: File, list_key: str) -> None:
        """Put the bad parts of a file from a copy of all of it; without any, all of it in place of its parts."""
        path, source = copy
        blob = object_key("cas", file.digest)
        if not self.result.dry_run:
            for key, part in bad.items():
                if part.packed:
                    self._store.backend.put(key, packed_run(path, part.offset, part.size, part.width))
                else:
                    self._store.backend.put_file(key, path, offset=part.offset, size=part.size)
            if not bad:
                self._store.backend.put_file(blob, path)
                self._store.backend.delete(list_key)
        self._copies.done(path)
        for key in bad or (blob,):
            self._fixed(key, source)
        if not bad:
            self._left.discard(list_key)
            self.result.removed[list_key] = "the file is stored as a whole instead of in parts"

    def _lose(self, record: Record, reason: str) -> None:
        self._lost.append((record, reason))
        self.result.withdrawn.append((record, reason))
        self.result.fixed.pop(record_key(record.stage, record.key), None)

    # What no record needs

    def _mend_run(self, finding: Finding) -> None:
        """Put a run back from another store: its name verifies it."""
        copy = self._copies.object(finding.key) if finding.kind == "run" else None
        if copy is not None and digest_bytes(copy[0].data) == finding.key[-69:-5]:
            self._put(finding.key, copy[0].data, copy[1])

    def _drop(self, finding: Finding) -> None:
        key, backend, dry_run = finding.key, self._store.backend, self.result.dry_run
        if finding.problem.startswith("is missing"):
            if finding.kind == "pin" and not dry_run and backend.size(key) is None:
                note_unpinned(backend, finding)
            return
        self.result.removed[key] = finding.problem
        if dry_run:
            return
        if finding.kind == "checkpoint":
            if not self._discard.checkpoints(key):
                self.result.removed[key] = "left to the worker that is running its stage"
        elif not self._discard.damaged(finding):
            del self.result.removed[key]
            self._say(f"{key}: was made anew, or is being made; left as it is")


def _record_in(stored: Object, where: Where) -> Record | None:
    try:
        return Record.decode(stored.data, *where)
    except Damaged:
        return None


def _cut(path: Path, part: Part) -> str:
    if part.packed:
        return digest_bytes(packed_run(path, part.offset, part.size, part.width))
    hasher = blake3()
    try:
        update_from(hasher, path, part.offset, part.size)
    except EOFError:
        return ""
    return hasher.hexdigest()
