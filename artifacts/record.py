"""The action record: what a stage ran on, what came out, and what it cost. One small JSON object per executed stage.

`payload` is the complete identity of the stage run; its digest is the record's key, so a record can never be served for
another key. `output` is the digest of the output tree. Everything else is recorded for people and is not identity.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

from artifacts.digest import canonical_json, digest_bytes, is_digest, seal, unseal
from artifacts.errors import Damaged, NewerFormat

ALGORITHM = 2
"""Number of the key algorithm; part of every key."""
SCHEMA = 1
"""Number of the form in which records are stored."""
MAX_RECORD_BYTES = 4 << 20
WITHDRAWN = b"withdrawn "
"""What stands in the place of a record that was withdrawn begins so; the key of the note with the reason follows."""
STAGE = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")


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
    equivalent: dict[str, Any] | None = None
    """Where a person has declared this run equivalent to another: `key` of that one's record, `because`, `by`, `at`."""

    def encode(self) -> bytes:
        """JSON bytes of the record."""
        return seal({"schema": SCHEMA, **{name: value for name, value in asdict(self).items() if value is not None}})

    @staticmethod
    def decode(data: bytes, stage: str, key: str) -> Record:
        """Parse and check the record stored for (`stage`, `key`).

        Raises:
            Damaged: the bytes are not a record, or are the record of something else.
            NewerFormat: they are intact, and of a schema that this version does not know.
        """
        where = f"action record v1/act/{stage}/{key}.json"
        this = (stage, key)
        if len(data) > MAX_RECORD_BYTES:
            raise Damaged(f"{where}: {len(data)} bytes, expected at most {MAX_RECORD_BYTES}", record=this)
        try:
            fields = unseal(data)
            if (schema := fields["schema"]) != SCHEMA:
                if type(schema) is int and schema > SCHEMA and data == seal(fields):
                    raise NewerFormat(
                        f"{where} was written by a newer version of this program (schema {schema}; this one knows "
                        f"{SCHEMA}); update this one, or name another store with --store"
                    )
                raise ValueError("unknown schema")
            del fields["schema"]
            record = Record(**fields)
            record._check()
            own_key = payload_key(record.payload)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            reason = str(error)[:300]
            raise Damaged(f"{where}: not a record ({type(error).__name__}: {reason})", record=this) from error
        if record.key != key or own_key != key or record.stage != stage or record.payload.get("stage") != stage:
            found = f"{record.stage[:64]!r}/{own_key[:12]}"
            raise Damaged(f"{where}: holds the record of {found}, expected {stage}/{key[:12]}", record=this)
        return record

    def _check(self) -> None:
        """Raise ValueError where a field is not what its annotation says: what is shown to people must be showable."""
        for name, (kinds, accepts) in _FIELDS.items():
            value = getattr(self, name)
            if type(value) not in kinds or not accepts(value):
                raise ValueError(f"{name} is {str(value)[:80]!r}")


def is_withdrawn(data: bytes) -> bool:
    """True when this stands in the place of a record that was withdrawn, which counts as none."""
    return data.startswith(WITHDRAWN)


def is_stage(text: object) -> bool:
    """True when `text` is a well-formed name of a stage: it is part of the paths of the stage's records."""
    return isinstance(text, str) and STAGE.fullmatch(text) is not None


def _is_text(value: str) -> bool:
    return len(value) <= 1024 and value.isprintable()


def _are_texts(values: Iterable[object]) -> bool:
    return all(isinstance(value, str) and _is_text(value) for value in values)


def _is_payload(payload: dict[str, Any]) -> bool:
    """True when the payload can be compared with another one, field by field; see `flows.plan.compare`."""
    config, inputs = payload.get("config"), payload.get("inputs")
    return (
        type(payload.get("algorithm")) is int
        and isinstance(payload.get("code"), str)
        and isinstance(config, dict)
        and isinstance(inputs, dict)
        and _are_texts([*config, *inputs, *inputs.values()])
    )


def _is_environment(value: dict[str, Any]) -> bool:
    versions = value.get("versions", {})
    texts = [text for name, text in value.items() if name != "versions" and isinstance(text, str)]
    return isinstance(versions, dict) and _are_texts([*value, *versions, *versions.values(), *texts])


def _is_equivalence(value: dict[str, Any]) -> bool:
    return is_digest(value.get("key")) and _are_texts([value.get("because"), value.get("by")])


_FIELDS: dict[str, tuple[tuple[type, ...], Callable[[Any], bool]]] = {
    "stage": ((str,), is_stage),
    "key": ((str,), is_digest),
    "payload": ((dict,), lambda payload: _is_payload(payload)),
    "output": ((str,), is_digest),
    "size": ((int,), lambda size: 0 <= size < 2**53),
    "commit": ((str,), _is_text),
    "node": ((str,), _is_text),
    "fence": ((int,), lambda fence: 0 <= fence < 2**53),
    "symbols": ((dict,), lambda symbols: _are_texts([*symbols, *symbols.values()])),
    "environment": ((dict,), _is_environment),
    "seconds": ((int, float), lambda seconds: 0 <= seconds < 1e10),
    "finished": ((int, float), lambda finished: 0 <= finished < 1e11),
    "equivalent": ((dict, type(None)), lambda value: value is None or _is_equivalence(value)),
}


def payload_key(payload: dict[str, Any]) -> str:
    """The key of a stage run: BLAKE3 of the canonical JSON of {algorithm, stage, code, config, inputs}."""
    return digest_bytes(canonical_json(payload))
