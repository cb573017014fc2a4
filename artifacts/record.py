"""The action record: what a stage ran on, what came out, and what it cost. One small JSON object per executed stage.

`payload` is the complete identity of the stage run; its digest is the record's key, so a record can never be served for
another key. `output` is the digest of the output tree. Everything else is recorded for people and is not identity.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any

from artifacts.digest import canonical_json, digest_bytes, is_digest
from artifacts.errors import Damaged

ALGORITHM = 1
"""Number of the key algorithm; part of every key."""
MAX_RECORD_BYTES = 4 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One action record."""

    stage: str
    key: str
    payload: dict[str, Any]
    output: str
    """Digest of the output tree."""
    size: int
    """Bytes of the output, all files together."""
    commit: str
    """Random id of the commit, so that a writer recognises its own record after a lost reply."""
    node: str = ""
    """What the study that ran it called it; recorded for people, not identity."""
    fence: int = 0
    symbols: dict[str, str] = field(default_factory=dict)
    """Digest of every first-party function, class and constant that the stage reaches, as `file::symbol`."""
    environment: dict[str, Any] = field(default_factory=dict)
    """Library versions, device, host, threads: recorded, not identity."""
    seconds: float = 0.0
    """Wall time of the body, summed over interrupted attempts where known."""
    finished: float = 0.0
    """When it was committed, Unix seconds."""

    def encode(self) -> bytes:
        """JSON bytes of the record."""
        return canonical_json({"schema": 1, **asdict(self)})

    @staticmethod
    def decode(data: bytes, stage: str, key: str) -> Record:
        """Parse and check the record stored for (`stage`, `key`).

        Raises:
            Damaged: the bytes are not a record, or are the record of something else.
        """
        where = f"action record v1/act/{stage}/{key}.json"
        this = (stage, key)
        if len(data) > MAX_RECORD_BYTES:
            raise Damaged(f"{where}: {len(data)} bytes, expected at most {MAX_RECORD_BYTES}", record=this)
        try:
            fields = json.loads(data)
            if fields.pop("schema") != 1:
                raise ValueError("unknown schema")
            record = Record(**fields)
            own_key = payload_key(record.payload)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise Damaged(f"{where}: not a record ({type(error).__name__}: {error})", record=this) from error
        if record.key != key or own_key != key or record.stage != stage or record.payload.get("stage") != stage:
            found = f"{record.stage}/{own_key[:12]}"
            raise Damaged(f"{where}: holds the record of {found}, expected {stage}/{key[:12]}", record=this)
        if not is_digest(record.output) or not isinstance(record.size, int):
            raise Damaged(f"{where}: output {record.output!r} is not a digest", record=this)
        return record


def payload_key(payload: dict[str, Any]) -> str:
    """The key of a stage run: BLAKE3 of the canonical JSON of {algorithm, stage, code, config, inputs}."""
    return digest_bytes(canonical_json(payload))
