"""The store: put a folder as a tree of blobs, look up and commit action records, and read back verified.

Writing order is the whole protocol: blobs, then the tree, then the record, which is create-only. A crash between any two
leaves bytes that nothing refers to. A record that loses the race for its key adopts the winner's output.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from artifacts.backend import Backend, Object, local_file, open_backend, put_own, read_many
from artifacts.clock import SYSTEM, Clock
from artifacts.condemned import remove_damaged
from artifacts.digest import canonical_json, digest_bytes, is_digest, unseal
from artifacts.download import download, read_file, wrong_objects
from artifacts.errors import Conflict, Damaged, NewerFormat, NotFound, StoreError, TooLarge
from artifacts.intent import intent
from artifacts.probe import check
from artifacts.record import MAX_RECORD_BYTES, WITHDRAWN, Record, is_stage, is_withdrawn
from artifacts.trees import Tree, object_key, object_keys, read_tree
from artifacts.upload import Moved, uploaded

TRANSFERS_AT_ONCE = 16
"""Small objects that travel at once, see `artifacts.upload.Lanes`."""
RUN_FIELDS: dict[str, type] = {"experiment": str, "complete": bool, "nodes": dict, "config": dict}
"""What every run object holds besides its schema."""


class Store:
    """Artifacts and records on one backend."""

    def __init__(self, backend: Backend, *, clock: Clock = SYSTEM, at_once: int = TRANSFERS_AT_ONCE) -> None:
        """A store on `backend`. With `at_once=1` it starts no thread of its own, and moves one object after the other."""
        self.backend = backend
        self.clock = clock
        self.at_once = at_once
        self.say: Callable[[str], None] = lambda text: None
        """Told, for people, what is waited for and how long."""

    @classmethod
    def open(cls, url: str) -> Store:
        """Open the store at `url` (a folder, `s3://bucket/prefix`, `memory://name`). Nothing is written."""
        return cls(open_backend(url))

    def probe(self, cache: Path | None = None) -> None:
        """Check that the store can be written and gives every guarantee that running stages needs; see `check`."""
        check(self.backend, cache)

    # Trees and blobs

    def put_tree(self, folder: Path, progress: Moved | None = None) -> Tree:
        """Store every file under `folder`; return the tree. Blobs that are already there are not sent again.

        Raises:
            StoreError: the folder holds something that is not a plain file, or a name that is not portable.
        """
        with uploaded(self, folder, progress, announced=False) as tree:
            return tree

    def publish(
        self,
        folder: Path,
        make_record: Callable[[Tree], Record],
        progress: Moved | None = None,
        *,
        where: tuple[str, str] | None = None,
    ) -> Record:
        """Store `folder` and commit the record made for its tree; return the record that now stands for its key.

        What is being stored is announced first, so that a collection under way spares it. `where` is the (stage, key) that
        the record will have: with it, the record is announced in the same breath.

        Raises:
            StoreError: the folder holds something that is not a plain file, or a name that is not portable; or the record
                could not be read back.
        """
        names = [] if where is None else [_record_key(*where)]
        with uploaded(self, folder, progress, names=names) as tree:
            record = make_record(tree)
            return self.commit(record, announced=(record.stage, record.key) == where)

    def tree(self, digest: str) -> Tree:
        """The listing of a stored tree, checked against its digest and for unsafe paths."""
        key = object_key("tree", digest)
        return read_tree(self.backend.get_many([key])[key], digest, self.backend.url)

    def materialise(self, digest: str, into: Path, progress: Moved | None = None) -> Tree:
        """Write the files of a tree under the folder `into`, each verified against its digest.

        Raises:
            Damaged: a blob is missing or its bytes are wrong; nothing with a wrong digest is left under `into`.
            StoreUnavailable: the store does not answer, or `into` cannot be written.
        """
        tree = self.tree(digest)
        with local_file(into):
            into.mkdir(parents=True, exist_ok=True)
        download(self, tree, into, progress)
        return tree

    def read(self, digest: str, path: str) -> bytes:
        """The verified bytes of one file of a tree. For small files: they are read into memory."""
        tree = self.tree(digest)
        for file in tree.files:
            if file.path == path:
                return read_file(self, tree, file)
        raise StoreError(f"tree {digest[:12]} has no file {path!r}")

    # Action records

    def lookup(self, stage: str, key: str) -> Record | None:
        """The record of (`stage`, `key`), or None if there is none. Any failure other than "not found" is raised."""
        try:
            data = self.backend.get(_record_key(stage, key), limit=MAX_RECORD_BYTES).data
        except NotFound:
            return None
        except TooLarge as error:
            raise Damaged(str(error), record=(stage, key)) from error
        return None if is_withdrawn(data) else Record.decode(data, stage, key)

    def lookup_many(
        self, wanted: Iterable[tuple[str, str]], damaged: dict[tuple[str, str], Damaged] | None = None
    ) -> dict[tuple[str, str], Record | None]:
        """`lookup` for several (stage, key) pairs, in one round of concurrent reads.

        With `damaged`, a record that cannot be decoded is put there instead of being raised, and counts as none.
        """
        keys = {_record_key(stage, key): (stage, key) for stage, key in wanted}
        records: dict[tuple[str, str], Record | None] = {}
        for name, stored in self.backend.get_many(keys, limit=MAX_RECORD_BYTES).items():
            pair = keys[name]
            try:
                there = stored is not None and not is_withdrawn(stored.data)
                records[pair] = Record.decode(stored.data, *pair) if there else None
            except Damaged as error:
                if damaged is None:
                    raise
                records[pair], damaged[pair] = None, error
        return records

    def commit(self, record: Record, *, announced: bool = False) -> Record:
        """Publish `record` and return the record that now stands for its key: this one, or that of an earlier winner.

        The key is announced first, unless the caller says that an intent of his names it: a collection may be deleting
        what stood there before, and its request may arrive late.

        Raises:
            StoreError: the record could not be read back (a text too long or not printable, a number out of range);
                nothing was written.
        """
        name, data = _record_key(record.stage, record.key), _readable(record)
        with nullcontext() if announced else intent(self.backend, [name], self.clock, self.say):
            while True:
                try:
                    self.backend.put(name, data, if_absent=True)
                    return record
                except Conflict:
                    standing = self.lookup(record.stage, record.key)
                if standing is not None:
                    return standing
                if self._commit_anew(name, data):
                    return record

    def _commit_anew(self, name: str, data: bytes) -> bool:
        """Put a record in the place of one that was withdrawn; False if none such is there any more."""
        try:
            stored = self.backend.get(name, limit=MAX_RECORD_BYTES)
            if is_withdrawn(stored.data):
                self.backend.put(name, data, if_match=stored.etag)
                return True
        except (Conflict, NotFound):
            pass  # it changed meanwhile, or the refusal answers a retry of this very write
        return False

    def invalidate(self, record: Record, reason: str) -> bool:
        """Withdraw a record whose output cannot be read, keeping a copy with the reason under `v1/trash/`.

        Objects of the output whose bytes are wrong are removed: a blob is only written where none is, so a damaged one
        left in place would outlive the rerun. False, and nothing is changed, when the record does not stand any more.
        """
        standing = self.lookup(record.stage, record.key)
        if standing is None or standing.commit != record.commit:
            return False
        self._drop_damaged(record.output)
        return self.withdraw(record, {"reason": reason, "record": json.loads(record.encode())})

    def withdraw(self, record: Record, why: dict[str, Any]) -> bool:
        """Have this very record count as none from now on; `why` is kept under `v1/trash/`. False if it does not stand."""
        name = _record_key(record.stage, record.key)
        stored = self.backend.get_many([name])[name]
        try:
            if stored is None or Record.decode(stored.data, record.stage, record.key).commit != record.commit:
                return False
        except Damaged:
            return False
        note = f"v1/trash/{record.stage}-{record.key}-{uuid.uuid4().hex}.json"
        self.backend.put(note, canonical_json(why))
        return self._replace_withdrawn(name, note, stored.etag)

    def withdraw_damaged(self, stage: str, key: str, reason: str) -> bool:
        """Withdraw a record object that is not a record, keeping its bytes under `v1/trash/`; the stage is then a miss.

        Where none is, though something names it, that is said in its place. False, and nothing is changed, when it is a
        record after all or was withdrawn by somebody else.

        Raises:
            Damaged: it is no object at all, such as a folder in a local store; only a person can clear that.
        """
        name = _record_key(stage, key)
        try:
            stored = self.backend.get(name, limit=MAX_RECORD_BYTES)
        except NotFound:
            note = f"v1/trash/{stage}-{key}-{uuid.uuid4().hex}.json"
            self.backend.put(note, canonical_json({"reason": reason}))
            return self._replace_withdrawn(name, note, None)
        except TooLarge as error:
            # Nothing of use is lost with it, and it may be larger than what is left of the disk.
            stored, reason = Object(b"", error.etag), f"{reason} ({error}; its bytes were not kept)"
        try:
            if not is_withdrawn(stored.data):
                Record.decode(stored.data, stage, key)
            return False
        except Damaged:
            pass
        trash = f"v1/trash/{stage}-{key}-{uuid.uuid4().hex}"
        self.backend.put(f"{trash}.bytes", stored.data)
        self.backend.put(f"{trash}.json", canonical_json({"reason": reason, "bytes": f"{trash}.bytes"}))
        return self._replace_withdrawn(name, f"{trash}.json", stored.etag)

    def _replace_withdrawn(self, name: str, note: str, etag: str | None) -> bool:
        """Replace, never delete: a delete has no condition, and would take away what somebody has made anew meanwhile."""
        data = WITHDRAWN + note.encode()
        try:
            put_own(self.backend, name, data, if_absent=etag is None, if_match=etag)
        except (Conflict, NotFound):
            self.backend.delete(note)
            return False
        return True

    def _drop_damaged(self, digest: str) -> None:
        """Remove what would keep a rerun's writer from sending the right bytes: blobs of the right size, and parts lists."""
        try:
            tree = self.tree(digest)
        except Damaged:
            return  # a writer reads the tree that is there, and replaces it
        wrong = list(wrong_objects(self, tree))
        sizes = self.backend.sizes(wrong)
        try:
            expected = dict(object_keys(self, digest))
        except Damaged:
            expected = {}
        if there := [key for key in wrong if sizes[key] is not None and sizes[key] == expected.get(key, sizes[key])]:
            remove_damaged(
                self.backend,
                there,
                lambda key: key in set(wrong_objects(self, tree)),
                self.clock,
                spare_announced=False,
                say=self.say,
            )

    def records(self, stage: str) -> Iterator[Record]:
        """All readable records of a stage, newest first. For explaining misses and listing; never on the hit path."""
        entries = sorted(self.backend.list(f"v1/act/{stage}/"), key=lambda entry: -entry.modified)
        names = {entry.key.rpartition("/")[2].removesuffix(".json"): None for entry in entries}
        keys = {_record_key(stage, name): name for name in names if is_digest(name)}
        for key, stored in read_many(self.backend, keys):
            if stored is None:
                continue
            try:
                yield Record.decode(stored.data, stage, keys[key])
            except (Damaged, NewerFormat):
                continue

    # Runs

    def put_run(self, run: dict[str, object]) -> str:
        """Remember what a finished run consisted of; return its id, which follows from its content.

        Running the same again rewrites the same object, which makes it the newest.
        """
        data = canonical_json({"schema": 1, **run})
        name = digest_bytes(data)
        self.backend.put(f"v1/run/{name}.json", data)
        return name

    def runs(
        self, skipped: list[str] | None = None, *, under_way: bool = False
    ) -> Iterator[tuple[str, float, dict[str, object]]]:
        """(id, time of the last change, content) of every remembered run, newest first.

        With `under_way`, instead of the finished runs, those that are not, or were interrupted (see `flows.active`).
        A run object that does not parse, or lacks a field of `RUN_FIELDS`, is left out, and its id added to `skipped`.
        """
        entries = sorted(self.backend.list("v1/run/"), key=lambda entry: -entry.modified)
        times = {e.key: e.modified for e in entries if e.key.startswith("v1/run/active-") == under_way}
        for key, stored in read_many(self.backend, times):
            if stored is None:
                continue
            name = key.rpartition("/")[2].removesuffix(".json")
            try:
                content = parse_run(stored.data)
            except ValueError:
                if skipped is not None:
                    skipped.append(name if name.isprintable() else ascii(name))
                continue
            yield name, times[key], content


def parse_run(data: bytes) -> dict[str, Any]:
    """What a run object holds.

    Raises:
        ValueError: it is not one.
    """
    content = unseal(data)
    if content.get("schema") != 1:
        raise ValueError("not a run")
    for name, kind in RUN_FIELDS.items():
        if not isinstance(content.get(name), kind):
            raise ValueError(f"{name} is missing or not a {kind.__name__}")
    check_nodes(content["nodes"])
    if not content["experiment"].isprintable():
        raise ValueError("the experiment's name is not printable")
    return content


def check_nodes(nodes: object) -> None:
    """Check the outputs that a run or a pin names: name -> stage, key and digest.

    Raises:
        ValueError: they are not that.
    """
    if not isinstance(nodes, dict):
        raise ValueError("does not say which records it names")
    for name, node in nodes.items():
        if not (name.isprintable() and isinstance(node, dict) and is_stage(node.get("stage"))):
            raise ValueError(f"node {name[:80]!r} is not printable or names no stage")
        if not (is_digest(node.get("key")) and is_digest(node.get("output"))):
            raise ValueError(f"node {name[:80]!r}: key or output is not a digest")


def new_record(**fields: object) -> Record:
    """A record with a fresh commit id."""
    return replace(Record(commit="", **fields), commit=uuid.uuid4().hex)  # type: ignore[arg-type]


def _readable(record: Record) -> bytes:
    """The bytes of a record, held to everything that a reader of it will ask.

    Raises:
        StoreError: a reader would refuse them: the stage would be run, found damaged, and run again, for ever.
    """
    try:
        data = record.encode()
        Record.decode(data, record.stage, record.key)
    except (Damaged, TypeError) as error:
        raise StoreError(
            f"the record of {str(record.stage)[:64]!r} was not stored, because it could not be read back: {error}; correct "
            "what is named there, in the study or on this machine, then run the same command again"
        ) from error
    return data


def _record_key(stage: str, key: str) -> str:
    if not is_stage(stage):
        raise StoreError(f"{str(stage)[:100]!r} is not the name of a stage: expected letters, digits, '_', '.' and '-'")
    if not is_digest(key):
        raise StoreError(f"{str(key)[:100]!r} is not a key: expected 64 hexadecimal digits")
    return f"v1/act/{stage}/{key}.json"
