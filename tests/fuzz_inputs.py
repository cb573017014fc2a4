"""Inputs for fuzzing: valid objects that were changed a little, as JSON or as bytes."""

from __future__ import annotations

import copy
import json
from typing import Any

from hypothesis import strategies as st

from artifacts.digest import canonical_json, seal
from tests.fuzz_parsers import DIGEST, KEY

ODD = st.sampled_from([
    None, True, -1, 0, 2**53, 2**64 - 1, 10**18, -0.0, 1e308, 5e-324, "", "..", "../x", "/", "a/b", "\x00", "\x1b[2J", "\u202e",
    "e\u0301", "x" * 300, "9" * 5000, "nan", "inf", DIGEST, KEY, [], {}, [[]], {"": ""}, [[1.0, 2]], {"pid": 2**63},
])  # fmt: skip


@st.composite
def changed(draw: st.DrawFn, data: bytes) -> bytes:
    """A valid object with some values replaced, removed, repeated or moved; or its bytes cut, flipped, filled or doubled."""
    try:
        value = json.loads(data)
    except ValueError:
        value = None
    if value is None or draw(st.booleans()):
        return draw(damaged(data))
    value = copy.deepcopy(value)
    for _ in range(draw(st.integers(1, 3))):
        value = draw(edited(value))
    sealed = isinstance(value, dict) and value.pop("check", None) is not None and draw(st.booleans())
    try:
        return seal(value) if sealed else canonical_json(value)
    except TypeError:
        return json.dumps(value).encode()


@st.composite
def edited(draw: st.DrawFn, value: Any) -> Any:
    """A JSON value with one edit somewhere in it."""
    if not isinstance(value, dict | list) or not value or draw(st.integers(0, 5)) == 0:
        return draw(ODD)
    place = draw(st.sampled_from(sorted(value) if isinstance(value, dict) else range(len(value))))
    kind = draw(st.sampled_from(["inside", "inside", "inside", "remove", "add", "swap"]))
    made = copy.copy(value)
    if kind == "inside":
        made[place] = draw(edited(value[place]))
    elif kind == "remove":
        del made[place]
    elif kind == "add":
        made.update({draw(st.text(max_size=5)): draw(ODD)}) if isinstance(made, dict) else made.append(
            copy.copy(made[place])
        )
    else:
        other = draw(st.sampled_from(sorted(value) if isinstance(value, dict) else range(len(value))))
        made[place], made[other] = made[other], made[place]
    return made


@st.composite
def damaged(draw: st.DrawFn, data: bytes) -> bytes:
    """Bytes with a run of them cut out, replaced, put in or doubled."""
    start = draw(st.integers(0, len(data)))
    end = draw(st.integers(start, min(len(data), start + draw(st.sampled_from([1, 8, len(data)])))))
    middle = draw(st.one_of(st.just(b""), st.binary(max_size=9), st.just(data[start:end] * 2), st.sampled_from([
        b"[" * 2000, b'{"a":' * 2000, b"9" * 5000, b"1e999", b"NaN", b"\xff", b"\x00" * 9, b"\xff" * 8, b"2001-99-99",
        b"!!python/", b"&a [*a]", b"? ", b"<<: 1", b": :", b"0x", b"1_000", b"=", b"\xef\xbb\xbf", b"\\ud800",
    ])))  # fmt: skip
    return data[:start] + middle + data[end:]
