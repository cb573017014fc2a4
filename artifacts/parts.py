"""Moving a large object in parts, several at once, through a bounded number of reusable buffers.

Parts may arrive in any order; they are handed on in order, which is what a digest needs. All transfers of a process
share the buffers, so that its memory does not grow with the size of an object or with the number of transfers. A part is
begun only with a buffer in hand and in order, so the buffer of the part that a transfer waits for is never missing. A
buffer stands for the memory of its part, wherever that is: what is sent takes only its first pages, see `Body`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from mmap import mmap
from typing import Any

PART_BYTES = 16 << 20
"""Length of a part, and of a buffer. S3 takes 5 MiB to 5 GiB and 10,000 parts: 156 GiB in one object."""
PARTS_AT_ONCE = 4
"""Threads of one transfer."""
BUFFERS = 8
"""Parts in memory in all: 128 MiB."""
MAX_PARTS = 10_000

Part = tuple[int, int]
"""Start and length in bytes."""


class Buffers:
    """A fixed number of buffers, made when first needed and kept."""

    def __init__(self, count: int = BUFFERS) -> None:
        self._slots = threading.Semaphore(count)
        self._free: list[mmap] = []

    def take(self) -> mmap:
        """A buffer of `PART_BYTES`; waits until one is free."""
        self._slots.acquire()
        return self._free.pop() if self._free else mmap(-1, PART_BYTES)

    def give(self, buffer: mmap) -> None:
        """Return a buffer."""
        self._free.append(buffer)
        self._slots.release()


BUFFERS_OF_PROCESS = Buffers()


class Body:
    """Bytes as the body of a request, which is read once to be signed, once to be sent, and again for each retry.

    A client that copies a part before it sends it, or reads it in the 16 KiB pieces of http, needs half as much time again.
    So pieces are handed out without regard to the size asked for, small enough to stay in the processor's cache between
    reading, hashing and sending.
    """

    PIECE_BYTES = 1 << 18

    def __init__(self, size: int, take: Callable[[int, int], memoryview]) -> None:
        """`size` bytes; `take(start, count)` gives the next of them, which need to stay only until it is called again."""
        self._size = size
        self._take = take
        self._at = 0
        self.failure: Exception | None = None
        """What `take` raised, which a client may hand on as an error of the connection."""

    def __len__(self) -> int:
        return self._size

    def tell(self) -> int:
        """Where the next piece begins."""
        return self._at

    def seek(self, offset: int, whence: int = 0) -> int:
        """Go to `offset` from the start (0), from here (1) or from the end (2)."""
        self._at = offset + (0, self._at, self._size)[whence]
        return self._at

    def read(self, wanted: int = -1) -> memoryview:
        """The next piece; empty at the end."""
        piece = self._take(self._at, min(self.PIECE_BYTES, self._size - self._at))
        self._at += len(piece)
        return piece


def split(size: int, part_bytes: int) -> list[Part]:
    """Start and length of every part of `size` bytes."""
    return [(start, min(part_bytes, size - start)) for start in range(0, size, part_bytes)]


class Transfer:
    """One object on its way: `work` runs for each part on some thread, `finish` in order on the caller's.

    `work` may use the buffer, and `finish` takes what it returned, while the buffer is still the part's. If that lies
    elsewhere (`kept` is false), the buffer is free again after `work`, and a part that is slow does not hold up the others.
    """

    def __init__(
        self,
        parts: Sequence[Part],
        work: Callable[[int, Part, mmap], Any],
        finish: Callable[[Part, Any], Any],
        buffers: Buffers = BUFFERS_OF_PROCESS,
        *,
        kept: bool = True,
    ) -> None:
        self._parts, self._work, self._finish, self._buffers, self._kept = parts, work, finish, buffers, kept
        self._begin = threading.Lock()
        self._changed = threading.Condition()
        self._next = 0
        self._error: BaseException | None = None
        self._stopped = False
        self._ready: dict[int, tuple[mmap | None, Any]] = {}

    def run(self) -> list[Any]:
        """What `finish` returned for each part, in order. The first failure ends the whole, once no thread is at work."""
        threads = [
            threading.Thread(target=self._serve, name="part", daemon=True)
            for _ in range(min(PARTS_AT_ONCE, len(self._parts)))
        ]
        results = []
        try:
            for thread in threads:
                thread.start()
            for index, part in enumerate(self._parts):
                buffer, result = self._wait_for(index)
                try:
                    results.append(self._finish(part, result))
                finally:
                    del result
                    self._give(buffer)
        finally:
            self._stopped = True
            for thread in threads:
                if thread.ident is not None:
                    thread.join()
            for buffer, _ in self._ready.values():
                self._give(buffer)
        return results

    def _give(self, buffer: mmap | None) -> None:
        if buffer is not None:
            self._buffers.give(buffer)

    def _wait_for(self, index: int) -> tuple[mmap | None, Any]:
        with self._changed:
            while index not in self._ready:
                if self._error is not None:
                    raise self._error
                self._changed.wait()
            return self._ready.pop(index)

    def _ended(self) -> bool:
        return self._stopped or self._error is not None or self._next >= len(self._parts)

    def _serve(self) -> None:
        while True:
            with self._begin:
                if self._ended():
                    return
                buffer = self._buffers.take()
                if self._ended():
                    self._buffers.give(buffer)
                    return
                index, self._next = self._next, self._next + 1
            try:
                result = self._work(index, self._parts[index], buffer)
            except BaseException as error:  # noqa: BLE001 - raised again by the thread that waits
                self._buffers.give(buffer)
                with self._changed:
                    self._error = self._error or error
                    self._changed.notify()
                return
            if not self._kept:
                self._buffers.give(buffer)
            with self._changed:
                self._ready[index] = (buffer if self._kept else None, result)
                self._changed.notify()
