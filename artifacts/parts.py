"""Moving a large object in parts, several at once, through a bounded number of reusable buffers.

Parts may arrive in any order; they are handed on in order, which is what a digest needs. All transfers of a process
share the buffers, so that its memory does not grow with the size of an object or with the number of transfers. A part is
begun only with a buffer in hand and in order, so the buffer of the part that a transfer waits for is never missing.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

PART_BYTES = 32 << 20
"""Length of a part, and of a buffer. S3 takes 5 MiB to 5 GiB and 10,000 parts: 312 GiB in one object."""
PARTS_AT_ONCE = 4
"""Threads of one transfer."""
BUFFERS = 8
"""Parts in memory in all: 256 MiB."""
MAX_PARTS = 10_000

Part = tuple[int, int]
"""Start and length in bytes."""


class Buffers:
    """A fixed number of buffers, made when first needed and kept."""

    def __init__(self, count: int = BUFFERS) -> None:
        self._slots = threading.Semaphore(count)
        self._free: list[bytearray] = []

    def take(self) -> bytearray:
        """A buffer of `PART_BYTES`; waits until one is free."""
        self._slots.acquire()
        return self._free.pop() if self._free else bytearray(PART_BYTES)

    def give(self, buffer: bytearray) -> None:
        """Return a buffer."""
        self._free.append(buffer)
        self._slots.release()


BUFFERS_OF_PROCESS = Buffers()


def split(size: int, part_bytes: int) -> list[Part]:
    """Start and length of every part of `size` bytes."""
    return [(start, min(part_bytes, size - start)) for start in range(0, size, part_bytes)]


class Transfer:
    """One object on its way: `work` runs for each part on some thread, `finish` in order on the caller's."""

    def __init__(
        self,
        parts: Sequence[Part],
        work: Callable[[int, Part, bytearray], Any],
        finish: Callable[[Part, bytearray], None],
        buffers: Buffers = BUFFERS_OF_PROCESS,
    ) -> None:
        self._parts, self._work, self._finish, self._buffers = parts, work, finish, buffers
        self._begin = threading.Lock()
        self._changed = threading.Condition()
        self._next = 0
        self._error: BaseException | None = None
        self._stopped = False
        self._ready: dict[int, tuple[bytearray, Any]] = {}

    def run(self) -> list[Any]:
        """What `work` returned for each part, in order. The first failure ends the whole, once no thread is at work."""
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
                    self._finish(part, buffer)
                finally:
                    self._buffers.give(buffer)
                results.append(result)
        finally:
            self._stopped = True
            for thread in threads:
                if thread.ident is not None:
                    thread.join()
            for buffer, _ in self._ready.values():
                self._buffers.give(buffer)
        return results

    def _wait_for(self, index: int) -> tuple[bytearray, Any]:
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
            with self._changed:
                self._ready[index] = (buffer, result)
                self._changed.notify()
