"""What the tests with a hostile store have in common: bytes that are no object, listings, and a record that is right."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from artifacts.digest import digest_bytes, seal
from artifacts.record import payload_key
from artifacts.store import Store, new_record
from artifacts.trees import object_key

BLOB = digest_bytes(b"one")
PAYLOAD = {"algorithm": 1, "stage": "toy", "code": "c", "config": {"x": 1}, "inputs": {}}
KEY = payload_key(PAYLOAD)
LATEST = f"v1/wip/{KEY}/LATEST"
DEEP = b"[" * 100_000 + b"]" * 100_000

MALFORMED: dict[str, bytes] = {
    "empty": b"",
    "a byte order mark": b"\xef\xbb\xbf[]",
    "not UTF-8": b'["\xff"]',
    "UTF-16": "[]".encode("utf-16"),
    "half a surrogate pair": b'["\\ud800"]',
    "nested 100,000 deep": DEEP,
    "nested deep in mappings": b'{"a":' * 50_000 + b"1" + b"}" * 50_000,
    "an integer of a million digits": b"[" + b"9" * 1_000_000 + b"]",
    "an integer of 70 bits": b"[1180591620717411303424]",
    "infinity": b"[1e999]",
    "NaN": b"[NaN]",
    "a repeated key": b'{"schema":1,"schema":1}',
    "spaces": b"[ ]",
    "text after it": b"[]x",
    "a number": b"7",
    "a pickle": b"\x80\x04\x95\x00.",
    "zeros": bytes(1000),
}
"""Bytes that are no object of any kind."""


def put_listing(store: Store, listing: bytes) -> str:
    """Store a tree object under its right name."""
    digest = digest_bytes(listing)
    store.backend.put(object_key("tree", digest), listing)
    return digest


def tree(rows: Any) -> bytes:
    """The listing of these rows."""
    return json.dumps(rows, separators=(",", ":"), ensure_ascii=False).encode()


def row(path: Any, size: Any = 3, digest: Any = BLOB) -> list[Any]:
    """A row of a listing, right but for what is given."""
    return [path, size, digest]


def outside(tmp_path: Path) -> set[str]:
    """Every file beside the store."""
    return {p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*") if not p.is_relative_to(tmp_path / "store")}


GOOD = new_record(stage="toy", key=KEY, payload=PAYLOAD, output="0" * 64, size=1, finished=1.0)


def changed(**fields: Any) -> bytes:
    """The good record with other fields; None removes one."""
    body = {"schema": 1, **{name: value for name, value in asdict(GOOD).items() if value is not None}, **fields}
    return seal({name: value for name, value in body.items() if value is not None})
