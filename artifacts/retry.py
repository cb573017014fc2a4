"""How often a failed request is tried again, and how long to pause in between: the one place that decides it.

Pauses grow exponentially and are jittered, so that many workers do not come back to a recovering server at once. Only
what may pass by itself is tried again; a refusal (403, a condition that does not hold) is an answer.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")
FIRST_PAUSE = 0.2
LONGEST_PAUSE = 10.0
SHORTEST_PAUSE = 0.75 * FIRST_PAUSE
"""A call that took less time than this was answered by its first request."""


@dataclass(frozen=True, slots=True)
class Patience:
    """How long to try."""

    attempts: int
    """Requests in all."""
    seconds: float
    """No further attempt is made later than this after the first one began."""


BRIEF = Patience(attempts=5, seconds=30.0)
"""For small objects: pauses of about 3 s in all, so that a plan, or a lease's heartbeat, soon says what is wrong."""
PATIENT = Patience(attempts=11, seconds=180.0)
"""For the parts of large objects: pauses of 39 to 53 s in all, so that a server may restart under an upload."""

pause: Callable[[float], None] = time.sleep
"""Tests put something here that takes no time."""


def persist(call: Callable[[], T], may_pass: Callable[[Exception], bool], patience: Patience) -> T:
    """Call until it returns; raise what it raised last once that cannot pass by itself or patience is at its end."""
    started = time.monotonic()
    for attempt in range(1, patience.attempts + 1):
        try:
            return call()
        except Exception as error:
            late = time.monotonic() - started > patience.seconds
            if attempt == patience.attempts or late or not may_pass(error):
                raise
            failure = error
        pause(random.uniform(0.75, 1.0) * min(LONGEST_PAUSE, FIRST_PAUSE * 2 ** (attempt - 1)))
        if time.monotonic() - started > patience.seconds:
            raise failure  # the process stood still: what was true when it sent the request may be so no more
    raise AssertionError("not reached")
