"""Putting a folder into the store: hashed and sent at the same time, in bounded memory, and only what is missing.

A file is one blob, or several when `artifacts.tensors` cuts it. The blobs are hashed one after the other, in windows; as
soon as a window is hashed it is announced (see `artifacts.intent`), one round of requests tells which of its blobs are
missing, and those travel, several at once, while the next window is hashed. Parts lists and the tree come last. A blob has
its digest as its name, so whatever an interrupted upload had sent is found there by the next one.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from blake3 import blake3

from artifacts.backend import MAX_OBJECT_BYTES
from artifacts.digest import update_from
from artifacts.errors import StoreError
from artifacts.intent import intent
from artifacts.tensors import cuts
from artifacts.trees import File, Part, Tree, check_path, check_together, object_key, parts_list

if TYPE_CHECKING:
    from artifacts.store import Store

WINDOW_BYTES = 256 << 20
"""Bytes that are hashed before their blobs are looked for and sent."""
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
        self._running: list[Future[None]] = []

    def run(self, size: int, action: Callable[..., None], *arguments: Any) -> None:
        """Run `action` soon; `size` is how many bytes it moves."""
        if not self._pools:
            action(*arguments)
            return
        self._raise_failure()
        self._running.append(self._pools[size <= SMALL_BYTES].submit(action, *arguments))

    def __enter__(self) -> Lanes:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                wait(self._running, return_when=FIRST_EXCEPTION)
                self._raise_failure()
        finally:
            for pool in self._pools:
                pool.shutdown(cancel_futures=True)
        if kind is None:
            self._raise_failure()

    def _raise_failure(self) -> None:
        for future in self._running:
            if future.done() and not future.cancelled() and (error := future.exception()) is not None:
                raise error


@dataclass(slots=True)
class _Source:
    """One file of the folder."""

    path: str
    file: Path
    size: int
    starts: tuple[int, ...]
    """Where its parts begin; empty when it is one blob."""
    parts: list[Part] = field(default_factory=list)
    """Its blobs as far as they are hashed."""
    digest: str = ""


@contextmanager
def uploaded(store: Store, folder: Path, listener: Moved | None = None, *, announced: bool = True) -> Iterator[Tree]:
    """Store every file under `folder`, and keep the tree from collections for the length of the block if `announced`.

    Raises:
        StoreError: the folder holds something that is not a plain file, or a name that is not portable.
    """
    with ExitStack() as held:
        yield _Upload(store, folder, listener, held if announced else None).run()


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

    def run(self) -> Tree:
        with Lanes(self._store.at_once) as lanes:
            window: list[tuple[_Source, Part]] = []
            for blob in _hashed(self._sources):
                window.append(blob)
                if sum(part.size for _, part in window) >= WINDOW_BYTES:
                    self._send(lanes, window)
                    window = []
            tree = Tree.of(File(source.path, source.size, source.digest) for source in self._sources)
            papers = {object_key("parts", s.digest): parts_list(s.parts) for s in self._sources if s.starts}
            papers[object_key("tree", tree.digest)] = tree.listing
            if max(map(len, papers.values())) > MAX_OBJECT_BYTES:
                raise StoreError(f"the output has {len(tree.files)} files: its listing is larger than a store may hold")
            self._send(lanes, window, papers)
        self._put_papers(papers)
        return tree

    def _send(self, lanes: Lanes, window: list[tuple[_Source, Part]], papers: Iterable[str] = ()) -> None:
        """Announce what was hashed, ask once what of it is missing, and have that sent."""
        wanted: dict[str, tuple[_Source, Part]] = {}
        for source, part in window:
            if (key := object_key("cas", part.digest)) in self._known:
                self._meter.add(part.size)
            else:
                self._known.add(key)
                wanted[key] = (source, part)
        if self._held is not None:
            self._held.enter_context(intent(self._backend, [*wanted, *papers], self._store.clock))
        there = self._backend.sizes(wanted)
        for key, (source, part) in wanted.items():
            if there[key] == part.size:
                self._meter.add(part.size)
            else:
                lanes.run(part.size, self._put_blob, key, source, part)

    def _put_blob(self, key: str, source: _Source, part: Part) -> None:
        self._backend.put_file(key, source.file, offset=part.offset, size=part.size, progress=self._meter.add)

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


def _hashed(sources: Iterable[_Source]) -> Iterator[tuple[_Source, Part]]:
    """Every blob, in order, as soon as its digest is known; the digest of a file is known after its last blob."""
    for source in sources:
        whole = blake3()
        for start, end in pairwise([*(source.starts or (0,)), source.size]):
            piece = blake3()
            try:
                update_from(piece, source.file, start, end - start)
                if source.starts:
                    update_from(whole, source.file, start, end - start)
            except EOFError as error:
                raise StoreError(f"output {source.path!r} became shorter while it was stored") from error
            source.parts.append(Part(start, end - start, piece.hexdigest()))
            source.digest = (whole if source.starts else piece).hexdigest() if end == source.size else ""
            yield source, source.parts[-1]
