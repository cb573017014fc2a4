"""A backend that counts what is asked of the one below it."""

from __future__ import annotations

from collections import Counter
from typing import Any

from artifacts.backend import Backend


class CountingBackend:
    """Passes every verb on, and keeps `calls` (verb -> times) and `keys` (verb -> keys named in all calls)."""

    def __init__(self, below: Backend) -> None:
        self._below = below
        self.url = below.url
        self.calls: Counter[str] = Counter()
        self.keys: Counter[str] = Counter()

    def reset(self) -> None:
        """Start counting anew."""
        self.calls.clear()
        self.keys.clear()

    def __getattr__(self, verb: str) -> Any:
        method = getattr(self._below, verb)

        def counted(what: Any = None, *arguments: Any, **named: Any) -> Any:
            if what is not None and not isinstance(what, str):
                what = list(what)
            self.calls[verb] += 1
            self.keys[verb] += len(what) if isinstance(what, list) else 1
            return method(*(() if what is None else (what,)), *arguments, **named)

        return counted
