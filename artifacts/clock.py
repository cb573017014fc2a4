"""Time and threads, as everything that waits, expires or runs beside something else takes them.

One small seam, so that the same code runs under the machine's clock and under a simulated one, where a seeded scheduler
decides who runs next and how time passes. Nothing else in the store or in a worker may ask `time` or start a thread.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Protocol


class Task(Protocol):
    """Something that runs beside its starter."""

    def join(self) -> None:
        """Wait until it has ended."""


class Timer(Protocol):
    """Something that will run later."""

    def cancel(self) -> None:
        """See that it does not run, unless it has begun to."""


class Clock:
    """The machine's own clock and threads."""

    def monotonic(self) -> float:
        """Seconds that only ever grow; comparable within this process only."""
        return time.monotonic()

    def time(self) -> float:
        """Unix seconds, as wrong as this machine's wall clock is. For people, never for decisions."""
        return time.time()

    def sleep(self, seconds: float) -> None:
        """Let `seconds` pass."""
        time.sleep(seconds)

    def wait(self, event: threading.Event, seconds: float) -> bool:
        """Wait until `event` is set, at most `seconds`; say whether it is."""
        return event.wait(seconds)

    def start(self, action: Callable[[], None], name: str) -> Task:
        """Run `action` in a thread that does not keep the process alive."""
        thread = threading.Thread(target=action, name=name, daemon=True)
        thread.start()
        return thread

    def later(self, seconds: float, action: Callable[[], None]) -> Timer:
        """Run `action` in `seconds`, unless it is cancelled first."""
        timer = threading.Timer(seconds, action)
        timer.daemon = True
        timer.start()
        return timer


SYSTEM = Clock()
"""The clock of every real process."""
