"""The audit trail: who changed by hand what a store holds, when, and why. And pins, the roots that people set.

`v1/audit/<time>-<uuid>.json`, one object an action, never changed or removed. Time is this machine's, for people; the order
of entries follows from it.
"""

from __future__ import annotations

import getpass
import platform
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from artifacts.backend import Backend, read_many
from artifacts.digest import seal, unseal

TRAIL = "v1/audit/"
PINS = "v1/pin/"
FORM = 2
"""Number of the form of entries; 1 where there is none. Collections of the time of form 1 removed the word `withdrawn`.

It is not their `schema`: of a record in the place of which one lies, that would say that a newer version wrote it.
"""


@dataclass(frozen=True, slots=True)
class Action:
    """One entry."""

    action: str
    """`pin`, `unpin`, `forget`, `restore`, `accept`, `repair` or `gc`."""
    because: str
    by: str
    """user@host."""
    at: float
    """Unix seconds."""
    details: dict[str, Any] = field(default_factory=dict)
    """What it was done to; `records` are the object keys of records that were withdrawn."""
    form: int = FORM

    def describe(self) -> dict[str, Any]:
        """Plain data for `--json`."""
        return {"action": self.action, "because": self.because, "by": self.by, "at": self.at, **self.details}


def note(backend: Backend, action: str, because: str = "", **details: Any) -> Action:
    """Add an entry to the trail."""
    entry = Action(action, because, me(), round(time.time(), 3), details)
    name = f"{TRAIL}{int(entry.at * 1000):015d}-{uuid.uuid4().hex}.json"
    backend.put(name, seal({"schema": 1, "form": FORM, **entry.describe()}))
    return entry


def read_trail(backend: Backend) -> Iterator[Action]:
    """All readable entries, oldest first."""
    for _, stored in read_many(backend, sorted(entry.key for entry in backend.list(TRAIL))):
        try:
            body = unseal(stored.data) if stored is not None else {}
            action, because, by, at = (body.pop(name) for name in ("action", "because", "by", "at"))
            if not (type(at) in (int, float) and 0 <= at < 1e11):
                continue  # no calendar knows such a day
            if not all(isinstance(text, str) for text in (action, because, by)):
                continue
        except (ValueError, KeyError):
            continue
        body.pop("schema", None)
        form = body.pop("form", 1)
        if isinstance(body.get("records", []), list):
            yield Action(action, because, by, float(at), body, 1 if form == 1 else FORM)


def me() -> str:
    """user@host, for people: in letters that a reader of a record or a pin accepts, whatever the system says."""
    try:
        user = getpass.getuser()
    except (OSError, KeyError):
        user = "?"
    name = f"{user}@{platform.node()}"
    return name if name.isprintable() else ascii(name)[1:-1]
