"""How far a large transfer to or from the store is, as events that a person may be shown."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from artifacts.upload import Moved

WORTH_SHOWING = 64 << 20
"""Bytes from which a transfer is reported at all: what is smaller is over before anybody reads of it."""
EVERY_SECONDS = 0.5


def reporting(
    tell: Callable[[dict[str, Any]], None], what: str, monotonic: Callable[[], float] = time.monotonic
) -> Moved:
    """A listener for one transfer that passes on a `transfer` event now and then, and one when it is complete.

    `what` says what is done with the bytes: "reading inputs", "storing".
    """
    last = -EVERY_SECONDS

    def listener(done: int, total: int) -> None:
        nonlocal last
        now = monotonic()
        if total >= WORTH_SHOWING and (done >= total or now - last >= EVERY_SECONDS):
            last = now
            tell({"event": "transfer", "what": what, "done": done, "total": total})

    return listener
