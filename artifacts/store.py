"""The store: put a folder as a tree of blobs, look up and commit action records, and read back verified.

Writing order is the whole protocol: blobs, then the tree, then the record, which is create-only. A crash between any two
leaves bytes that nothing refers to. A record that loses the race for its key adopts the winner's output.
"""

from __future__ import annotations

import json
import os
import tempfile
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

from artifacts.backend import MAX_OBJECT_BYTES, Backend, Object, Progress, open_backend
from artifacts.clock import SYSTEM, Clock
from artifacts.digest import canonical_json, digest_bytes, digest_file, is_digest, parse_canonical
from artifacts.errors import Conflict, Damaged, NotFound, StoreError, TooLarge
from artifacts.intent import intent
from artifacts.record import MAX_RECORD_BYTES, Record, is_stage
from artifacts.trees import File, Tree, check_path, check_together, object_key, read_tree

TRANSFERS_AT_ONCE = 4
RUN_FIELDS: dict[str, type] = {"experiment": str, "complete": bool, "nodes": dict, "config": dict}
"""What every run object holds besides its schema."""


class Store:
    """Artifacts and records on one backend."""

    def __init__(self, backend: Backend, *, clock: Clock = SYSTEM, at_once: int = TRANSFERS_AT_ONCE) -> None:
        """A store on `backend`. With `at_once=1` it starts no thread of its own, and moves one object after the other."""
        self.backend = backend
        self.clock = clock
        self.at_once = at_once

    @classmethod
    def open(cls, url: str) -> Store:
        """Open the store at `url` (a folder, `s3://bucket/prefix`, `memory://name`). Nothing is written."""
        return cls(open_backend(url))

    def probe(self) -> None:
        """Check that the store can be written and that its conditional writes hold.

        Raises:
            StoreError: a create-only write or a compare-and-swap that must be refused was accepted, so two workers could
                both believe that they hold a lease or the one record of a key.
            StoreUnavailable: the store cannot be written at all.
        """
        key = f"v1/probe/{uuid.uuid4().hex}"
        etag = self.backend.put(key, b"first", if_absent=True)
        try:
            for condition in ({"if_absent": True}, {"if_match": "0" * 32 if etag != "0" * 32 else "1" * 32}):
                try:
                    self.backend.put(key, b"second", **condition)  # type: ignore[arg-type]
                except Conflict:
                    continue
                raise StoreError(
                    f"the store {self.backend.url} accepted a write that its condition {condition} forbids; "
                    "records and leases would not be safe on it. Use a store with conditional writes."
                )
        finally:
            self.backend.delete(key)

    # Trees and blobs

    def put_tree(self, folder: Path) -> Tree:
        """Store every file under `folder`; return the tree. Blobs that are already there are not sent again.

        Raises:
            StoreError: the folder holds something that is not a plain file, or a name that is not portable.
        """
        tree = self._describe(folder)
        self._put_tree(tree, folder, None)
        return tree

    def publish(self, folder: Path, make_record: Callable[[Tree], Record], progress: Progress | None = None) -> Record:
        """Store `folder` and commit the record of it; return the record that now stands for its key.

        What a writer is about to rely on is announced first, so that a collection under way spares it.
        """
        tree = self._describe(folder)
        keys = [object_key("tree", tree.digest), *(object_key("cas", file.digest) for file in tree.files)]
        with intent(self.backend, keys, self.clock):
            self._put_tree(tree, folder, progress)
            return self.commit(make_record(tree))

    def tree(self, digest: str) -> Tree:
        """The listing of a stored tree, checked against its digest and for unsafe paths."""
        key = object_key("tree", digest)
        return read_tree(self.backend.get_many([key])[key], digest, self.backend.url)

    def materialise(self, digest: str, into: Path) -> Tree:
        """Write the files of a tree under the folder `into`, each verified against its digest.

        Raises:
            Damaged: a blob is missing or its bytes are wrong; nothing with a wrong digest is left under `into`.
        """
        tree = self.tree(digest)
        into.mkdir(parents=True, exist_ok=True)

        def one(file: File) -> None:
            target = into / file.path
            target.parent.mkdir(parents=True, exist_ok=True)
            self._get_blob(file, target, digest)

        self._each(one, tree.files)
        return tree

    def read(self, digest: str, path: str) -> bytes:
        """The verified bytes of one file of a tree. For small files: they are read into memory."""
        for file in self.tree(digest).files:
            if file.path == path:
                try:
                    data = self.backend.get(object_key("cas", file.digest)).data
                except NotFound as error:
                    raise Damaged(f"{path} of tree {digest[:12]} is missing", tree=digest) from error
                if digest_bytes(data) != file.digest:
                    raise Damaged(f"{path} of tree {digest[:12]} does not match its digest", tree=digest)
                return data
        raise StoreError(f"tree {digest[:12]} has no file {path!r}")

    def _describe(self, folder: Path) -> Tree:
        tree = Tree.of(_describe(folder))
        try:
            check_together([file.path for file in tree.files])
            if len(tree.listing) > MAX_OBJECT_BYTES:
                raise ValueError(f"a listing of {len(tree.listing)} bytes; expected at most {MAX_OBJECT_BYTES}")
        except ValueError as error:
            raise StoreError(f"the output {folder} cannot be stored: {error}") from error
        return tree

    def _put_tree(self, tree: Tree, folder: Path, progress: Progress | None) -> None:
        blobs = {object_key("cas", file.digest): file for file in tree.files}
        there = self.backend.sizes(blobs)
        missing = [(key, file) for key, file in blobs.items() if there[key] != file.size]

        def put(item: tuple[str, File]) -> None:
            self.backend.put_file(item[0], folder / item[1].path, progress=progress)

        self._each(put, missing)
        try:
            self.backend.put(object_key("tree", tree.digest), tree.listing, if_absent=True)
        except Conflict:
            pass

    def _each(self, one: Callable[[Any], None], items: Sequence[Any]) -> None:
        if self.at_once == 1 or len(items) < 2:
            for item in items:
                one(item)
            return
        with ThreadPoolExecutor(self.at_once) as pool:
            list(pool.map(one, items))

    def _get_blob(self, file: File, target: Path, tree: str) -> None:
        temporary = target.with_name(f".{uuid.uuid4().hex}.part")
        try:
            try:
                found = self.backend.get_file(object_key("cas", file.digest), temporary)
            except NotFound as error:
                raise Damaged(
                    f"{file.path} of tree {tree[:12]} is missing from {self.backend.url}", tree=tree
                ) from error
            if found != file.digest:
                raise Damaged(
                    f"{file.path} of tree {tree[:12]} in {self.backend.url} does not match its digest {file.digest[:12]}",
                    tree=tree,
                )
            os.replace(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)

    # Action records

    def lookup(self, stage: str, key: str) -> Record | None:
        """The record of (`stage`, `key`), or None if there is none. Any failure other than "not found" is raised."""
        try:
            data = self.backend.get(_record_key(stage, key), limit=MAX_RECORD_BYTES).data
        except NotFound:
            return None
        except TooLarge as error:
            raise Damaged(str(error), record=(stage, key)) from error
        return Record.decode(data, stage, key)

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
                records[pair] = None if stored is None else Record.decode(stored.data, *pair)
            except Damaged as error:
                if damaged is None:
                    raise
                records[pair], damaged[pair] = None, error
        return records

    def commit(self, record: Record) -> Record:
        """Publish `record` and return the record that now stands for its key: this one, or that of an earlier winner."""
        try:
            self.backend.put(_record_key(record.stage, record.key), record.encode(), if_absent=True)
        except Conflict:
            standing = self.lookup(record.stage, record.key)
            if standing is None:
                return self.commit(record)
            return standing
        return record

    def invalidate(self, record: Record, reason: str) -> None:
        """Withdraw a record whose output cannot be read, keeping a copy with the reason under `v1/trash/`.

        Objects of the output whose bytes are wrong are removed: a blob is only written where none is, so a damaged one
        left in place would outlive the rerun.
        """
        self._drop_damaged(record.output)
        note = {"reason": reason, "record": json.loads(record.encode())}
        self.backend.put(f"v1/trash/{record.stage}-{record.key}-{uuid.uuid4().hex}.json", canonical_json(note))
        self.backend.delete(_record_key(record.stage, record.key))

    def withdraw_damaged(self, stage: str, key: str, reason: str) -> bool:
        """Withdraw a record object that is not a record, keeping its bytes under `v1/trash/`; the stage is then a miss.

        False, and nothing is changed, when it is a record after all or was withdrawn by somebody else.
        """
        name = _record_key(stage, key)
        try:
            stored = self.backend.get(name, limit=MAX_RECORD_BYTES)
            Record.decode(stored.data, stage, key)
            return False
        except NotFound:
            return False
        except TooLarge as error:
            # Nothing of use is lost with it, and it may be larger than what is left of the disk.
            stored, reason = Object(b"", error.etag), f"{reason} ({error}; its bytes were not kept)"
        except Damaged:
            pass
        trash = f"v1/trash/{stage}-{key}-{uuid.uuid4().hex}"
        self.backend.put(f"{trash}.bytes", stored.data)
        self.backend.put(f"{trash}.json", canonical_json({"reason": reason, "bytes": f"{trash}.bytes"}))
        try:
            # Only one of several withdrawers goes on to the delete, so that none removes what another has remade.
            self.backend.put(name, b"withdrawn " + trash.encode(), if_match=stored.etag)
        except (Conflict, NotFound):
            return False
        self.backend.delete(name)
        return True

    def _drop_damaged(self, digest: str) -> None:
        try:
            tree = self.tree(digest)
        except Damaged:
            self.backend.delete(object_key("tree", digest))
            return
        with tempfile.TemporaryDirectory() as folder:
            for file in tree.files:
                copy = Path(folder, file.digest)
                try:
                    self._get_blob(file, copy, digest)
                    copy.unlink()
                except Damaged:
                    self.backend.delete(object_key("cas", file.digest))

    def records(self, stage: str) -> Iterator[Record]:
        """All readable records of a stage, newest first. For explaining misses and listing; never on the hit path."""
        entries = sorted(self.backend.list(f"v1/act/{stage}/"), key=lambda entry: -entry.modified)
        keys = [entry.key.rpartition("/")[2].removesuffix(".json") for entry in entries]
        found = self.backend.get_many([_record_key(stage, key) for key in keys], limit=MAX_RECORD_BYTES)
        for key in keys:
            stored = found[_record_key(stage, key)]
            if stored is None:
                continue
            try:
                yield Record.decode(stored.data, stage, key)
            except Damaged:
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

    def runs(self, skipped: list[str] | None = None) -> Iterator[tuple[str, float, dict[str, object]]]:
        """(id, time of the last change, content) of every remembered run, newest first.

        A run object that does not parse, or lacks a field of `RUN_FIELDS`, is left out, and its id added to `skipped`.
        """
        for entry in sorted(self.backend.list("v1/run/"), key=lambda entry: -entry.modified):
            name = entry.key.rpartition("/")[2].removesuffix(".json")
            if name.startswith("active-"):
                continue  # under way, or interrupted
            try:
                content = _parse_run(self.backend.get(entry.key).data)
            except NotFound:
                continue
            except (ValueError, TooLarge):
                if skipped is not None:
                    skipped.append(name if name.isprintable() else ascii(name))
                continue
            yield name, entry.modified, content


def _parse_run(data: bytes) -> dict[str, object]:
    content = parse_canonical(data)
    if not isinstance(content, dict) or content.get("schema") != 1:
        raise ValueError("not a run")
    for name, kind in RUN_FIELDS.items():
        if not isinstance(content.get(name), kind):
            raise ValueError(f"{name} is missing or not a {kind.__name__}")
    for name, node in content["nodes"].items():
        if not (name.isprintable() and isinstance(node, dict) and is_stage(node.get("stage"))):
            raise ValueError(f"node {name[:80]!r} is not printable or names no stage")
        if not (is_digest(node.get("key")) and is_digest(node.get("output"))):
            raise ValueError(f"node {name[:80]!r}: key or output is not a digest")
    if not content["experiment"].isprintable():
        raise ValueError("the experiment's name is not printable")
    return content


def new_record(**fields: object) -> Record:
    """A record with a fresh commit id."""
    return replace(Record(commit="", **fields), commit=uuid.uuid4().hex)  # type: ignore[arg-type]


def _record_key(stage: str, key: str) -> str:
    if not is_stage(stage):
        raise StoreError(f"{str(stage)[:100]!r} is not the name of a stage: expected letters, digits, '_', '.' and '-'")
    if not is_digest(key):
        raise StoreError(f"{str(key)[:100]!r} is not a key: expected 64 hexadecimal digits")
    return f"v1/act/{stage}/{key}.json"


def _describe(folder: Path) -> Iterator[File]:
    for path in sorted(folder.rglob("*"), key=lambda p: p.relative_to(folder).as_posix()):
        relative = path.relative_to(folder).as_posix()
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            raise StoreError(f"output {relative!r} is a link or a special file; only plain files can be stored")
        if path.is_file():
            check_path(relative)
            yield File(relative, path.stat().st_size, digest_file(path))
