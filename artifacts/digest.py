"""Digests and the canonical JSON that keys are computed over.

All digests are BLAKE3, 256 bits, lower-case hexadecimal. Canonical JSON has sorted keys, no spaces, UTF-8, and only the
types that have one stable form on every Python version and host; anything else is refused with the name of the field.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from blake3 import blake3

DIGEST = re.compile(r"[0-9a-f]{64}\Z")


def digest_bytes(data: bytes) -> str:
    """BLAKE3 of `data` as 64 hexadecimal digits."""
    return blake3(data).hexdigest()


def digest_file(path: Path) -> str:
    """BLAKE3 of a file's bytes, memory-mapped, so that memory use does not grow with its size."""
    if path.stat().st_size < 1 << 16:
        return digest_bytes(path.read_bytes())
    return blake3().update_mmap(path).hexdigest()


def is_digest(text: object) -> bool:
    """True when `text` is a well-formed digest."""
    return isinstance(text, str) and DIGEST.match(text) is not None


def canonical_json(value: Any) -> bytes:
    """Encode `value` in its one canonical form.

    Raises:
        TypeError: a value without one stable form (a set, an object, NaN, a key that is not a string); the message
            names the field.
    """
    _check(value, "value")
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def _check(value: Any, where: str) -> None:
    if value is None or isinstance(value, (str, bool, int)):
        return
    if isinstance(value, float):
        if not math.isfinite(value):
            raise TypeError(f"{where}: {value} has no canonical JSON form; use a finite number or null")
        return
    if isinstance(value, Mapping):
        for key, item in value.items():
            if not isinstance(key, str):
                raise TypeError(f"{where}: the key {key!r} is a {type(key).__name__}; keys must be strings")
            _check(item, f"{where}.{key}")
        return
    if isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            _check(item, f"{where}[{index}]")
        return
    raise TypeError(
        f"{where}: a {type(value).__name__} has no canonical JSON form; "
        "use null, true/false, a number, a string, a list or a mapping with string keys"
    )
