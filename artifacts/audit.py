"""Verification: everything that a store holds is read, or a sample of it, and compared with what its name and its
referrers say.

Small objects (records, trees, parts lists, runs, pins, checkpoints' manifests) are always all read. Blobs are streamed, a
few at a time, and hashed; a sample of them is the share whose digests lie in one window of all digests, and the next
seed's window begins where this one ends, so that ten nightly tenths are the whole. Sizes and presence are compared for
all of them. A blob whose bytes are wrong is read once more before it is called damaged. What is damaged is looked at once
more at the end, because a stage may have been made again, or collected, meanwhile.
"""

from __future__ import annotations

import contextlib
import json
import tempfile
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

from blake3 import blake3

from artifacts.audit_roots import STRAY, STRAY_KIND, check_roots
from artifacts.backend import Backend, read_many
from artifacts.digest import update_from
from artifacts.download import READINGS
from artifacts.errors import Damaged, NewerFormat, NotFound
from artifacts.mark import Tally, Where, by_digest, record_of, shown
from artifacts.packing import unpack
from artifacts.record import Record, is_withdrawn
from artifacts.store import Store
from artifacts.trees import File, Part, object_key, read_parts, read_tree
from artifacts.unreadable import NOT_READ, tolerant

AT_ONCE = 8
JOBS_AT_ONCE = 500
WRONG_BYTES = "does not match its digest"
WRONG_WHOLE = "its parts are intact, but do not make up the file that it is of"
CONTENT = (WRONG_BYTES, WRONG_WHOLE, NOT_READ)
"""Problems that only reading to the last byte shows."""

Progress = Callable[[int, int], None]
"""Gets the bytes that were read and the bytes to read."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One object that is not what it should be."""

    kind: str
    """`record`, `tree`, `parts list`, `blob`, `run`, `pin`, `checkpoint`, `condemned list`, `audit entry`; or `stray`: a file
    that belongs to nothing."""
    key: str
    """Of the object in the store."""
    problem: str

    def describe(self) -> dict[str, str]:
        """Plain data."""
        return {"kind": self.kind, "key": self.key, "problem": self.problem}


@dataclass(slots=True)
class Verification:
    """What was read, and what of it is damaged."""

    sample: float
    findings: list[Finding] = field(default_factory=list)
    checked: dict[str, Tally] = field(default_factory=dict)
    """By kind: what was read to the last byte."""
    not_read: Tally = field(default_factory=Tally)
    """Blobs outside the sample; that they are there, with the right size, was checked."""
    collected_inputs: int = 0
    """Trees that a record was made from and that are not there any more. That is no damage."""
    records: dict[Where, Record] = field(default_factory=dict)
    """Every readable record, without what only people read, for a repair."""
    newer: dict[Where, str] = field(default_factory=dict)
    """Records of a newer version of this program, which no repair may touch, and what to say of each."""

    @property
    def ok(self) -> bool:
        """True when nothing is damaged."""
        return not self.damage

    @property
    def damage(self) -> list[Finding]:
        """What is not what it should be."""
        return [finding for finding in self.findings if finding.kind != STRAY_KIND]

    @property
    def strays(self) -> list[Finding]:
        """Files that have no business in the store, and do it no harm."""
        return [finding for finding in self.findings if finding.kind == STRAY_KIND]

    def describe(self) -> dict[str, Any]:
        """Plain data for `--json`."""
        return {
            "ok": self.ok,
            "sample": self.sample,
            "checked": {kind: tally.describe() for kind, tally in self.checked.items()},
            "not_read": self.not_read.describe(),
            "collected_inputs": self.collected_inputs,
            "damage": [finding.describe() for finding in self.damage],
            "strays": [finding.describe() for finding in self.strays],
        }


def verify(
    store: Store, *, sample: float = 1.0, seed: int = 0, progress: Progress = lambda done, total: None
) -> Verification:
    """Check everything; of the blobs, the `seed`-th share of the size `sample` (0 to 1). Nothing is written.

    With a sample of 1/k, any k seeds in a row read every blob, and none twice.
    """
    return _Verifier(store, sample, seed, progress).run()


@dataclass(frozen=True, slots=True)
class _Job:
    """Something to read: a blob, or a file in parts."""

    size: int
    name: bytes
    parts: tuple[Part, ...] = ()


class _Verifier:
    def __init__(self, store: Store, sample: float, seed: int, progress: Progress) -> None:
        self._store, self._tolerant = tolerant(store)
        self._backend: Backend = self._tolerant
        self._seed = seed
        self._progress = progress
        self.result = Verification(sample)
        self._withdrawn: set[Where] = set()
        self._trees: set[str] = set()
        self._expected: dict[bytes, int] = {}
        """Files of trees, and the blobs of their parts, with the size that they should have."""
        self._whole: set[bytes] = set()
        """Those that have to exist as one blob."""
        self._lists: dict[bytes, tuple[Part, ...]] = {}

    def run(self) -> Verification:
        self._check_contents(self.check_papers())
        self._look_again()
        return self.result

    def check_papers(self) -> dict[bytes, int]:
        """Read all that is small, and compare what should be there with what is listed: the size of every blob."""
        self._check_records()
        self._check_trees()
        self._check_parts_lists()
        known = self.result.records.keys() | self.result.newer.keys() | self._withdrawn
        for kind, key, problem in check_roots(self._store, known, self._count):
            self._found(kind, key, problem)
        return self._check_presence()

    def _look_again(self) -> None:
        """Drop what was missing for a moment only, and what was damaged and is gone."""
        if not self.result.findings:
            return
        again = _Verifier(self._store, 0.0, 0, self._progress)
        again.check_papers()
        still = {(finding.kind, finding.key) for finding in again.result.findings}
        there = self._backend.sizes([finding.key for finding in self.result.findings])
        kept = {}
        for finding in self.result.findings:
            name = (finding.kind, finding.key)
            if name in still or (finding.problem.startswith(CONTENT) and there[finding.key] is not None):
                kept.setdefault(name, finding)
        self.result.findings = list(kept.values())

    def _found(self, kind: str, key: str, problem: str) -> None:
        self.result.findings.append(Finding(kind, key, self._tolerant.unreadable.get(key, problem)))

    def _count(self, kind: str, size: int) -> None:
        self.result.checked.setdefault(kind, Tally()).add(size)

    def _check_records(self) -> None:
        keys = {entry.key: record_of(entry.key) for entry in self._backend.list("v1/act/")}
        for key in [key for key, where in keys.items() if where is None]:
            self._found(STRAY_KIND, shown(key), STRAY)
            del keys[key]
        for key, stored in read_many(self._backend, list(keys)):
            where = keys[key]
            assert where is not None
            if stored is None:
                continue
            if is_withdrawn(stored.data):
                self._withdrawn.add(where)
                continue
            self._count("record", len(stored.data))
            try:
                record = Record.decode(stored.data, *where)
                slim = {"inputs": record.payload["inputs"]}
                self.result.records[where] = replace(record, payload=slim, symbols={}, environment={})
            except Damaged as error:
                self._found("record", key, str(error))
            except NewerFormat as error:
                self._found("record", key, str(error))
                self.result.newer[where] = str(error)

    def _check_trees(self) -> None:
        """Read every tree; those that are the output of a record have to be there."""
        url, records = self._backend.url, self.result.records
        outputs = {record.output: where for where, record in records.items()}
        listed = [digest for digest, _ in by_digest(self._store, "tree")]
        for key, stored in read_many(self._backend, [object_key("tree", digest) for digest in listed]):
            digest = key[-64:]
            if stored is None:
                continue
            self._count("tree", len(stored.data))
            self._trees.add(digest)
            try:
                files = read_tree(stored, digest, url).files
            except Damaged as error:
                self._found("tree", key, str(error))
                continue
            if digest in outputs:
                for file in files:
                    self._expect(file.digest, file.size, key)
                    self._whole.add(bytes.fromhex(file.digest))
        for digest in outputs.keys() - self._trees:
            stage, name = outputs[digest]
            self._found("tree", object_key("tree", digest), f"is missing; it is the output of {stage}/{name[:12]}")
        inputs = {str(digest) for record in records.values() for digest in record.payload["inputs"].values()}
        self.result.collected_inputs = len(inputs - self._trees)

    def _expect(self, digest: str, size: int, key: str) -> None:
        if self._expected.setdefault(bytes.fromhex(digest), size) != size:
            self._found("tree", key, f"gives another size for the file {digest[:12]} than another tree does")

    def _check_parts_lists(self) -> None:
        url = self._backend.url
        listed = [digest for digest, _ in by_digest(self._store, "parts")]
        for key, stored in read_many(self._backend, [object_key("parts", digest) for digest in listed]):
            file = bytes.fromhex(key[-64:])
            if stored is None:
                continue
            self._count("parts list", len(stored.data))
            self._whole.discard(file)
            try:
                parts = read_parts(stored, File("a file", self._size_of(file, stored.data), file.hex()), "", url)
            except Damaged as error:
                self._found("parts list", key, str(error))
                continue
            self._lists[file] = parts
            for part in parts:
                if file in self._expected:
                    self._expect(part.digest, part.stored, key)
                    self._whole.add(bytes.fromhex(part.digest))

    def _size_of(self, file: bytes, data: bytes) -> int:
        """The size that trees give for a file; for one that no tree names, what its parts list itself says."""
        if file in self._expected:
            return self._expected[file]
        try:
            return sum(size for size, *_ in json.loads(data)["parts"])
        except (ValueError, TypeError, KeyError, RecursionError):
            return 0

    def _check_presence(self) -> dict[bytes, int]:
        """Compare what is listed with what is expected; return the size of every blob."""
        sizes = {bytes.fromhex(digest): entry.size for digest, entry in by_digest(self._store, "cas")}
        for blob in self._whole:
            key = object_key("cas", blob.hex())
            if blob not in sizes:
                self._found("blob", key, "is missing")
            elif sizes[blob] != self._expected[blob]:
                self._found("blob", key, f"is {sizes.pop(blob)} bytes long; expected {self._expected[blob]}")
        return sizes

    def _check_contents(self, sizes: dict[bytes, int]) -> None:
        """Read the files in parts, with the parts in their order, and the other blobs; or a sample of both."""
        in_parts = {file: parts for file, parts in self._lists.items() if self._all_there(parts, sizes)}
        covered = {bytes.fromhex(part.digest) for parts in in_parts.values() for part in parts}
        jobs = [_Job(sum(part.stored for part in parts), file, parts) for file, parts in in_parts.items()]
        jobs += [_Job(size, blob) for blob, size in sizes.items() if blob not in covered]
        jobs.sort(key=lambda job: job.name)
        chosen = self._sampled(jobs)
        total, done = sum(job.size for job in chosen), 0
        with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(AT_ONCE) as pool:
            for start in range(0, len(chosen), JOBS_AT_ONCE):
                some = chosen[start : start + JOBS_AT_ONCE]
                for job, findings in zip(
                    some, pool.map(lambda job: self._check_job(job, Path(folder)), some), strict=True
                ):
                    self.result.findings += findings
                    self._count("blob", job.size)
                    done += job.size
                    self._progress(done, total)

    def _sampled(self, jobs: list[_Job]) -> list[_Job]:
        if self.result.sample >= 1:
            return jobs
        share = Fraction(self.result.sample).limit_denominator(1_000_000)
        begin = self._seed * share % 1
        chosen = []
        for job in jobs:
            place = Fraction(int.from_bytes(job.name[:8], "big"), 1 << 64)
            if (place - begin) % 1 < share:
                chosen.append(job)
            else:
                self.result.not_read.add(job.size)
        return chosen

    def _check_job(self, job: _Job, folder: Path) -> list[Finding]:
        """Read one blob, or all parts of a file."""
        if not job.parts:
            problem = self._problem(job.name.hex(), folder)
            return [Finding("blob", object_key("cas", job.name.hex()), problem)] if problem else []
        whole = blake3()
        found = []
        for part in job.parts:
            if (problem := self._problem(part.digest, folder, whole, part)) is not None:
                found.append(Finding("blob", object_key("cas", part.digest), problem))
        if not found and whole.digest() != job.name:
            key = object_key("parts", job.name.hex())
            found.append(Finding("parts list", key, WRONG_WHOLE))
        return found

    def _problem(self, digest: str, folder: Path, whole: Any = None, part: Part | None = None) -> str | None:
        """What is wrong with a blob; when nothing is, the bytes of the `part` that it holds go into `whole` too."""
        copy = folder / uuid.uuid4().hex
        try:
            for _ in range(READINGS):
                try:
                    if self._backend.get_file(object_key("cas", digest), copy) == digest:
                        if part is not None and part.packed:
                            with contextlib.suppress(ValueError):  # the whole tells that it is another part's
                                whole.update(unpack(copy.read_bytes(), part.size, part.width))
                        elif whole is not None:
                            update_from(whole, copy)
                        return None
                except NotFound:
                    return "is missing"
                except Damaged as error:
                    return str(error)
            return WRONG_BYTES
        finally:
            copy.unlink(missing_ok=True)

    def _all_there(self, parts: tuple[Part, ...], sizes: dict[bytes, int]) -> bool:
        return all(sizes.get(bytes.fromhex(part.digest)) == part.stored for part in parts)
