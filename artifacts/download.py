"""Reading stored files: verified while they arrive, several at once, in bounded memory.

A file gets its name only once its digest is right: it is written under a temporary name beside it, and renamed. Of a file
in parts every part is verified as it arrives, and the whole after them, in their order, while others still travel. A blob
whose bytes are wrong is read once more before it is called damaged, because a rerun of its stage costs more than that.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from blake3 import blake3

from artifacts.backend import Backend, local_file, write_at
from artifacts.digest import digest_bytes, update_from
from artifacts.errors import Damaged, NotFound, StoreError
from artifacts.local import LocalBackend
from artifacts.packing import unpack
from artifacts.space import require_space
from artifacts.trees import File, Part, Tree, object_key, read_parts, stored_parts
from artifacts.upload import Lanes, Meter, Moved

if TYPE_CHECKING:
    from artifacts.store import Store

MAX_READ_BYTES = 256 << 20
"""Most bytes of a file that is read into memory instead of a folder."""
READINGS = 2
"""Times that a blob is read before it is called damaged."""


def download(store: Store, tree: Tree, into: Path, listener: Moved | None = None) -> None:
    """Write the files of `tree` under the folder `into`.

    Raises:
        Damaged: an object is missing or its bytes are wrong; no file with wrong bytes is left under `into`.
        StoreUnavailable: the store does not answer, or `into` cannot be written, or lacks the room: then nothing is written.
    """
    lists = stored_parts(store, tree.files)
    # What a local store holds in one piece becomes another name of it, and needs no room.
    linked = isinstance(store.backend, LocalBackend)
    require_space(into, sum(file.size for file in tree.files if not linked or file.digest in lists))
    meter = Meter(tree.size, listener)
    files: list[_Arriving] = []
    try:
        with Lanes(store.at_once) as lanes:
            for file in tree.files:
                target = into / file.path
                with local_file(target):
                    target.parent.mkdir(parents=True, exist_ok=True)
                stored = lists.get(file.digest)
                parts = () if stored is None else read_parts(stored, file, tree.digest, store.backend.url)
                files.append(_Arriving(store.backend, file, parts, target, tree.digest, meter))
                for number, part in enumerate(parts):
                    lanes.run(part.size, files[-1].take_part, number)
                if not parts:
                    lanes.run(file.size, files[-1].take_whole)
    finally:
        for arriving in files:
            arriving.temporary.unlink(missing_ok=True)


class _Arriving:
    """One file on its way, under a temporary name."""

    def __init__(
        self, backend: Backend, file: File, parts: tuple[Part, ...], target: Path, tree: str, meter: Meter
    ) -> None:
        self._backend = backend
        self._file = file
        self._parts = parts
        self._target = target
        self._tree = tree
        self._meter = meter
        self.temporary = target.with_name(f".{uuid.uuid4().hex}.part")
        self._arrived: set[int] = set()
        self._whole = blake3()
        self._hashed = 0
        """Parts that are in `_whole`, which takes them in their order."""
        self._hashing = False
        self._lock = threading.Lock()

    def take_whole(self) -> None:
        """Receive a file that is one blob."""
        self._fetch(self._file.digest, self._file.size, None)
        with local_file(self._target):
            os.replace(self.temporary, self._target)

    def take_part(self, number: int) -> None:
        """Receive one part; the last one to be hashed completes the file."""
        part, plain = self._parts[number], None
        if part.packed:
            plain = self._fetch_packed(part)
        else:
            self._fetch(part.digest, part.size, part.offset)
        with self._lock:
            self._arrived.add(number)
            if self._hashing:
                return
            self._hashing = True
        while True:
            with self._lock:
                hashed = self._hashed
                if hashed not in self._arrived:
                    self._hashing = False
                    break
            if hashed == number and plain is not None:
                self._whole.update(plain)
            else:
                self._hash(self._parts[hashed])
            self._hashed += 1
        if hashed == len(self._parts):
            if self._whole.hexdigest() != self._file.digest:
                raise self._damaged("does not match its digest, though all of its parts do", self._file.digest)
            with local_file(self._target):
                os.replace(self.temporary, self._target)

    def _hash(self, part: Part) -> None:
        update_from(self._whole, self.temporary, part.offset, part.size)

    def _fetch(self, digest: str, size: int, offset: int | None) -> None:
        key = object_key("cas", digest)
        for reading in range(READINGS):
            counted = self._meter.add if reading == 0 else None
            try:
                found = self._backend.get_file(key, self.temporary, offset=offset, size=size, progress=counted)
            except NotFound as error:
                raise self._damaged("is missing", digest) from error
            except Damaged as error:
                raise self._damaged(f"has the wrong size ({error})", digest) from error
            if found == digest:
                return
        raise self._damaged("does not match its digest", digest)

    def _fetch_packed(self, part: Part) -> memoryview:
        """Receive one packed part; what it was before it was packed."""
        key = object_key("cas", part.digest)
        for _ in range(READINGS):
            try:
                packed = self._backend.get(key, limit=part.packed).data
            except NotFound as error:
                raise self._damaged("is missing", part.digest) from error
            except Damaged as error:
                raise self._damaged(f"has the wrong size ({error})", part.digest) from error
            if digest_bytes(packed) == part.digest:
                break
        else:
            raise self._damaged("does not match its digest", part.digest)
        try:
            plain = unpack(packed, part.size, part.width)
        except ValueError as error:
            raise self._damaged(f"cannot be unpacked ({error})", part.digest) from error
        with (
            local_file(self.temporary),
            open(os.open(self.temporary, os.O_WRONLY | os.O_CREAT, 0o600), "wb", buffering=0) as file,
        ):
            write_at(file.fileno(), plain, part.offset)
        self._meter.add(part.size)
        return plain

    def _damaged(self, what: str, digest: str) -> Damaged:
        where = f"{self._file.path} of tree {self._tree[:12]} in {self._backend.url}"
        return Damaged(f"{where}: object {digest[:12]} {what}", tree=self._tree)


def read_file(store: Store, tree: Tree, file: File) -> bytes:
    """The verified bytes of one file, in memory.

    Raises:
        Damaged: an object is missing or its bytes are wrong.
        StoreError: it is too large for that.
    """
    where = f"{file.path} of tree {tree.digest[:12]} in {store.backend.url}"
    stored = stored_parts(store, [file]).get(file.digest)
    parts: tuple[Part, ...] = (Part(0, file.size, file.digest),)
    if stored is not None:
        parts = read_parts(stored, file, tree.digest, store.backend.url)
    if file.size > MAX_READ_BYTES:
        raise StoreError(f"{where} has {file.size} bytes; at most {MAX_READ_BYTES} are read into memory")
    names = [object_key("cas", part.digest) for part in parts]
    found = store.backend.get_many(names, limit=max(part.stored for part in parts))
    pieces = [found[name] for name in names]
    if any(piece is None for piece in pieces):
        raise Damaged(f"{where} is missing", tree=tree.digest)
    try:
        plain = [
            unpack(piece.data, part.size, part.width) if part.packed else piece.data
            for part, piece in zip(parts, pieces, strict=True)
            if piece is not None
        ]
    except ValueError as error:
        raise Damaged(f"{where} cannot be unpacked: {error}", tree=tree.digest) from error
    data = b"".join(plain)
    if len(data) != file.size or digest_bytes(data) != file.digest:
        raise Damaged(f"{where} does not match its size or digest", tree=tree.digest)
    return data


def wrong_objects(store: Store, tree: Tree) -> Iterator[str]:
    """Keys of the objects below `tree` that are missing, or that are not what their name or the tree says."""
    lists = stored_parts(store, tree.files)
    with tempfile.TemporaryDirectory() as folder:
        for file in tree.files:
            parts: tuple[Part, ...] = (Part(0, file.size, file.digest),)
            paper = object_key("parts", file.digest)
            if (stored := lists.get(file.digest)) is not None:
                try:
                    parts = read_parts(stored, file, tree.digest, store.backend.url)
                except Damaged:
                    yield paper
                    continue
            whole, wrong = blake3(), []
            for part in parts:
                copy = Path(folder, part.digest)
                if not _is_right(store.backend, part, copy):
                    wrong.append(object_key("cas", part.digest))
                elif part.packed:
                    with contextlib.suppress(ValueError):
                        whole.update(unpack(copy.read_bytes(), part.size, part.width))
                else:
                    update_from(whole, copy)
                copy.unlink(missing_ok=True)
            yield from wrong
            if stored is not None and not wrong and whole.hexdigest() != file.digest:
                yield paper


def _is_right(backend: Backend, part: Part, copy: Path) -> bool:
    try:
        return backend.get_file(object_key("cas", part.digest), copy, size=part.stored) == part.digest
    except (NotFound, Damaged):
        return False
