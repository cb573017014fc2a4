"""Putting a folder into the store: hashed and sent at the same time, in bounded memory, and only what is missing.

A file is one blob, or several when `artifacts.tensors` cuts it, which are packed where that saves anything. The blobs are
packed and hashed one after the other, in windows; as soon as a window is hashed it is announced (see `artifacts.intent`), one
round of requests tells which of its blobs are missing, and those travel, several at once, while the next window is hashed.
Parts lists and the tree come last. A blob has its digest as its name, so whatever an interrupted upload had sent is found
there by the next one.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from blake3 import blake3

from artifacts.backend import MAX_OBJECT_BYTES
from artifacts.digest import digest_bytes, update_from
from artifacts.errors import StoreError
from artifacts.intent import intent
from artifacts.packing import MAX_BYTES, pack
from artifacts.stamp import Stamp
from artifacts.tensors import Cut, cuts
from artifacts.trees import File, Part, Tree, check_path, check_together, object_key, parts_list

if TYPE_CHECKING:
    from artifacts.store import Store

WINDOW_BYTES = 64 << 20
"""Bytes that are hashed before their blobs are looked for and sent."""
PACKED_BYTES = 96 << 20
"""Packed bytes that may wait in memory, a window and a little more."""
SMALL_BYTES = 1 << 20
"""Blobs up to this size travel beside the large ones, many at once: they cost a round trip, not bandwidth."""
LARGE_AT_ONCE = 4
"""Large blobs at once; each is moved in parts of its own, with some 64 MiB of memory."""

Moved = Callable[[int, int], None]
"""Called with bytes done and bytes in all; from any thread, but never from two at once."""


class Meter:
    """Adds up what the threads of a transfer have moved, for one listener."""

    def __init__(self, total: int, listener: Moved | None) -> None:
        self._total = total
        self._listener = listener
        self._done = 0
        self._lock = threading.Lock()

    def add(self, moved: int) -> None:
        """`moved` further bytes are where they belong."""
        if self._listener is not None:
            with self._lock:
                self._done += moved
                self._listener(self._done, self._total)


class Lanes:
    """Runs transfers beside each other, large and small ones in lanes of their own; in the caller's thread if `at_once` is 1.

    Leaving the block waits for them all. The first error is raised, there or by the next `run`, and what has not begun
    is dropped.
    """

    def __init__(self, at_once: int) -> None:
        self._pools = [] if at_once == 1 else [ThreadPoolExecutor(n) for n in (min(LARGE_AT_ONCE, at_once), at_once)]
        self._failures: list[BaseException] = []

    def run(
        self, size: int, action: Callable[..., None], *arguments: Any, at_end: Callable[[], None] = lambda: None
    ) -> None:
        """Run `action` soon; `size` is how many bytes it moves. `at_end` is called after it, failed or dropped."""
        if not self._pools:
            self._act(action, arguments, at_end)
        else:
            self._pools[size <= SMALL_BYTES].submit(self._act, action, arguments, at_end)
        self._raise_failure()

    def _act(self, action: Callable[..., None], arguments: tuple[Any, ...], at_end: Callable[[], None]) -> None:
        try:
            if not self._failures:
                action(*arguments)
        except BaseException as error:  # noqa: BLE001 - it is raised in the thread that waits
            self._failures.append(error)
        finally:
            at_end()

    def __enter__(self) -> Lanes:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        for pool in self._pools:
            pool.shutdown(cancel_futures=kind is not None)
        if kind is None:
            self._raise_failure()

    def _raise_failure(self) -> None:
        if self._failures:
            raise self._failures[0]


class _Budget:
    """Bounds the packed bytes that wait in memory for their turn to be sent."""

    def __init__(self, limit: int) -> None:
        self._left = limit
        self._changed = threading.Condition()

    def take(self, size: int) -> None:
        """Wait until there is room for `size` more bytes."""
        with self._changed:
            self._changed.wait_for(lambda: self._left >= 0)
            self._left -= size

    def give_back(self, size: int) -> None:
        """`size` bytes are not held any more."""
        with self._changed:
            self._left += size
            self._changed.notify_all()


@dataclass(slots=True)
class _Source:
    """One file of the folder."""

    path: str
    file: Path
    size: int
    cuts: tuple[Cut, ...]
    """Its parts; empty when it is one blob."""
    parts: list[Part] = field(default_factory=list)
    """Its blobs as far as they are hashed."""
    digest: str = ""
    stamp: Stamp | None = None
    """What the file was before it was hashed."""


@dataclass(frozen=True, slots=True)
class _Blob:
    """A part of a file whose digest is known."""

    source: _Source
    part: Part
    packed: bytes | None = None
    """Its bytes, where they are not simply those of the file."""

    @property
    def key(self) -> str:
        return object_key("cas", self.part.digest)


@contextmanager
def uploaded(
    store: Store,
    folder: Path,
    listener: Moved | None = None,
    *,
    announced: bool = True,
    names: Iterable[str] = (),
) -> Iterator[Tree]:
    """Store every file under `folder`, and keep the tree from collections for the length of the block if `announced`.

    `names` are further objects that the caller relies on in the block; they are announced with the last window.

    Raises:
        StoreError: the folder holds something that is not a plain file, or a name that is not portable.
    """
    with ExitStack() as held:
        yield _Upload(store, folder, listener, held if announced else None).run(names)


class _Upload:
    def __init__(self, store: Store, folder: Path, listener: Moved | None, held: ExitStack | None) -> None:
        self._store = store
        self._backend = store.backend
        self._sources = list(_scan(folder))
        try:
            check_together([source.path for source in self._sources])
        except ValueError as error:
            raise StoreError(f"the output {folder} cannot be stored: {error}") from error
        self._meter = Meter(sum(source.size for source in self._sources), listener)
        self._held = held
        self._known: set[str] = set()
        self._budget = _Budget(PACKED_BYTES)

    def run(self, names: Iterable[str] = ()) -> Tree:
        with Lanes(self._store.at_once) as lanes:
            window: list[_Blob] = []
            size = 0
            for blob in self._hashed():
                window.append(blob)
                size += blob.part.size
                if size >= WINDOW_BYTES:
                    self._send(lanes, window)
                    window, size = [], 0
            tree = Tree.of(File(source.path, source.size, source.digest) for source in self._sources)
            papers = {object_key("parts", s.digest): parts_list(s.digest, s.parts) for s in self._sources if s.cuts}
            papers[object_key("tree", tree.digest)] = tree.listing
            if max(map(len, papers.values())) > MAX_OBJECT_BYTES:
                raise StoreError(f"the output has {len(tree.files)} files: its listing is larger than a store may hold")
            self._send(lanes, window, [*papers, *names])
        self._put_papers(papers)
        return tree

    def _hashed(self) -> Iterator[_Blob]:
        """Every blob, in order, as soon as its digest is known; the digest of a file is known after its last blob."""
        for source in self._sources:
            source.stamp = Stamp.of(source.file)
            try:
                if source.cuts:
                    yield from self._hashed_parts(source)
                else:
                    hasher = blake3()
                    update_from(hasher, source.file, 0, source.size)
                    source.digest = hasher.hexdigest()
                    source.parts.append(Part(0, source.size, source.digest))
                    yield _Blob(source, source.parts[0])
            except EOFError as error:
                raise StoreError(f"output {source.path!r} became shorter while it was stored") from error

    def _hashed_parts(self, source: _Source) -> Iterator[_Blob]:
        whole = blake3()
        ends = [cut.start for cut in source.cuts[1:]] + [source.size]
        for cut, end in zip(source.cuts, ends, strict=True):
            size, packed = end - cut.start, None
            if cut.width and size <= MAX_BYTES:
                with open(source.file, "rb", buffering=0) as file:
                    file.seek(cut.start)
                    data = file.read(size)
                if len(data) != size:
                    raise EOFError
                whole.update(data)
                packed = pack(data, cut.width)
                digest = digest_bytes(data if packed is None else packed)
                del data
            else:
                piece = blake3()
                update_from(piece, source.file, cut.start, size)
                update_from(whole, source.file, cut.start, size)
                digest = piece.hexdigest()
            if packed is None:
                source.parts.append(Part(cut.start, size, digest))
            else:
                self._budget.take(len(packed))
                source.parts.append(Part(cut.start, size, digest, len(packed), cut.width))
            if end == source.size:
                source.digest = whole.hexdigest()
            yield _Blob(source, source.parts[-1], packed)

    def _send(self, lanes: Lanes, window: list[_Blob], papers: Iterable[str] = ()) -> None:
        """Announce what was hashed, ask once what of it is missing, and have that sent."""
        wanted: dict[str, _Blob] = {}
        for blob in window:
            if blob.key in self._known:
                self._has_arrived(blob)
            else:
                self._known.add(blob.key)
                wanted[blob.key] = blob
        if self._held is not None:
            self._held.enter_context(intent(self._backend, [*wanted, *papers], self._store.clock, self._store.say))
        there = self._backend.sizes(wanted)
        for key, blob in wanted.items():
            if there[key] == blob.part.stored:
                self._has_arrived(blob)
            else:
                lanes.run(
                    blob.part.size, self._put_blob, blob, at_end=partial(self._budget.give_back, blob.part.packed)
                )

    def _put_blob(self, blob: _Blob) -> None:
        source, part = blob.source, blob.part
        if blob.packed is None:
            where = {"offset": part.offset, "size": part.size}
            self._backend.put_file(blob.key, source.file, **where, progress=self._meter.add, hashed=source.stamp)
            return
        self._backend.put(blob.key, blob.packed)
        self._meter.add(part.size)

    def _has_arrived(self, blob: _Blob) -> None:
        """It is in the store, or on its way there, already."""
        self._meter.add(blob.part.size)
        self._budget.give_back(blob.part.packed)

    def _put_papers(self, papers: dict[str, bytes]) -> None:
        """Put the parts lists and then the tree. One that is there is read, not trusted: a damaged one is replaced."""
        there = self._backend.get_many(papers)
        for key, data in papers.items():
            stored = there[key]
            if stored is None or stored.data != data:
                self._backend.put(key, data)


def _scan(folder: Path) -> Iterator[_Source]:
    for path in sorted(folder.rglob("*"), key=lambda p: p.relative_to(folder).as_posix()):
        relative = path.relative_to(folder).as_posix()
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            raise StoreError(f"output {relative!r} is a link or a special file; only plain files can be stored")
        if path.is_file():
            check_path(relative)
            size = path.stat().st_size
            yield _Source(relative, path, size, cuts(path, size))
