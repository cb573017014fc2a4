"""Digests and the canonical JSON that keys are computed over, and that everything stored as JSON is written in.

All digests are BLAKE3, 256 bits, lower-case hexadecimal. Canonical JSON has sorted keys, no spaces, UTF-8, and only the
types that have one stable form on every Python version and host; anything else is refused with the name of the field.
A value has one form only, and `parse_canonical` takes no other: bytes of a store cannot mean different things to
different readers (repeated keys, NaN, numbers beyond every range), nor exhaust one by their nesting.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from blake3 import blake3

READ_BYTES = 4 << 20
DIGEST = re.compile(r"[0-9a-f]{64}\Z")
MAX_INTEGER = 2**64
"""Integers are below this in size, so that every language and database can hold them, if only as unsigned."""
MAX_DEPTH = 64
"""Levels of lists and mappings inside each other."""


def digest_bytes(data: bytes) -> str:
    """BLAKE3 of `data` as 64 hexadecimal digits."""
    return blake3(data).hexdigest()


def digest_file(path: Path) -> str:
    """BLAKE3 of a file's bytes."""
    hasher = blake3()
    update_from(hasher, path)
    return hasher.hexdigest()


def update_from(hasher: blake3, path: Path, offset: int = 0, size: int | None = None) -> None:
    """Add `size` bytes of a file from `offset` (default: all from there on), read piece by piece: memory does not grow.

    Raises:
        EOFError: the file is shorter.
    """
    left = path.stat().st_size - offset if size is None else size
    buffer = memoryview(bytearray(min(READ_BYTES, left)))
    with open(path, "rb", buffering=0) as file:
        file.seek(offset)
        while left > 0:
            count = file.readinto(buffer[:left])
            if not count:
                raise EOFError(f"{path} ended {left} bytes early")
            hasher.update(buffer[:count])
            left -= count


def is_digest(text: object) -> bool:
    """True when `text` is a well-formed digest."""
    return isinstance(text, str) and DIGEST.match(text) is not None


def canonical_json(value: Any) -> bytes:
    """Encode `value` in its one canonical form.

    Raises:
        TypeError: a value without one stable form (a set, an object, NaN, a key that is not a string, half a surrogate
            pair, an integer beyond 64 bits, more than 64 levels); the message names the field.
    """
    _check(value, "value", 0)
    try:
        return _encode(value)
    except UnicodeEncodeError as error:
        raise TypeError(f"the text {error.object[:80]!r} is not Unicode and has no canonical JSON form") from error


def parse_canonical(data: bytes) -> Any:
    """The value whose canonical form is `data`.

    Raises:
        ValueError: `data` is not JSON, or is not the canonical form of any value.
    """
    try:
        value = _DECODER.decode(data.decode())
        _limit_depth(value)
        canonical = _encode(value)
    except RecursionError as error:
        raise ValueError(f"more than {MAX_DEPTH} levels of nesting") from error
    except (json.JSONDecodeError, UnicodeError) as error:
        raise ValueError("is not the JSON that it should be") from error
    if canonical != data:
        raise ValueError("not canonical JSON: a key is repeated or out of order, or a number or text has another form")
    return value


def seal(body: Mapping[str, Any]) -> bytes:
    """The canonical form of `body` with its own digest in it, as `check`: for objects that their name does not verify."""
    check = digest_bytes(canonical_json(body))
    return canonical_json({**body, "check": check})


def unseal(data: bytes) -> dict[str, Any]:
    """The body that `seal` wrote. One without a `check` is taken as it is.

    Raises:
        ValueError: `data` is not the canonical form of an object, or its check does not match.
    """
    body = parse_canonical(data)
    if not isinstance(body, dict):
        raise ValueError("not an object")
    check = body.pop("check", None)
    if check is None:
        return body
    # The canonical form of the rest is these bytes without that field, and need not be made again.
    rest = data.replace(b'"check":' + _encode(check) + b",", b"", 1)
    if check not in (digest_bytes(rest), digest_bytes(_encode(body))):
        raise ValueError("its check does not match: some byte of it was changed")
    return body


def _encode(value: Any) -> bytes:
    return _ENCODER.encode(value).encode()


def _integer(text: str) -> int:
    if len(text) > 21 or not -MAX_INTEGER < int(text) < MAX_INTEGER:
        raise ValueError(f"the integer {text[:24]} has more than 64 bits")
    return int(text)


def _constant(text: str) -> float:
    raise ValueError(f"{text} is not JSON")


_ENCODER = json.JSONEncoder(sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
_DECODER = json.JSONDecoder(parse_int=_integer, parse_constant=_constant)


def _limit_depth(value: Any) -> None:
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        level = [
            item
            for parent in level
            if isinstance(parent, (dict, list))
            for item in (parent.values() if isinstance(parent, dict) else parent)
            if isinstance(item, (dict, list))
        ]
        if not level:
            return
    raise ValueError(f"more than {MAX_DEPTH} levels of nesting")


def _check(value: Any, where: str, depth: int) -> None:
    if value is None or isinstance(value, (str, bool)):
        return
    if isinstance(value, int):
        if not -MAX_INTEGER < value < MAX_INTEGER:
            raise TypeError(
                f"{where}: an integer of {value.bit_length()} bits has no canonical JSON form; use at most 64"
            )
        return
    if isinstance(value, float):
        if not math.isfinite(value):
            raise TypeError(f"{where}: {value} has no canonical JSON form; use a finite number or null")
        return
    if depth > MAX_DEPTH:
        raise TypeError(f"{where[:80]}: more than {MAX_DEPTH} levels of nesting have no canonical JSON form")
    if isinstance(value, Mapping):
        for key, item in value.items():
            if not isinstance(key, str):
                raise TypeError(f"{where}: the key {key!r} is a {type(key).__name__}; keys must be strings")
            _check(item, f"{where}.{key}", depth + 1)
        return
    if isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            _check(item, f"{where}[{index}]", depth + 1)
        return
    raise TypeError(
        f"{where}: a {type(value).__name__} has no canonical JSON form; "
        "use null, true/false, a number, a string, a list or a mapping with string keys"
    )
