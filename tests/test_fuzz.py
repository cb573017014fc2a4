"""Every parser of stored bytes, on arbitrary bytes and on valid objects that were changed: valid, or its declared error.

`FUZZ_EXAMPLES` is the number of inputs of each kind for each parser; the default suits every run of the tests, `make fuzz`
takes thousands. Which inputs are tried follows from the code and from `FUZZ_SEED`, so a failure comes back on the next run.
"""

from __future__ import annotations

import json
import os
from typing import Any

import pytest
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from artifacts import tensors
from artifacts.digest import canonical_json, parse_canonical, seal, unseal
from tests.fuzz_inputs import changed
from tests.fuzz_parsers import PARSERS
from tests.fuzz_store import OBJECTS, survey

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "40"))
SEED = os.environ.get("FUZZ_SEED")
_limited = settings(
    max_examples=EXAMPLES,
    derandomize=SEED is None,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)


def fuzzed(test: Any) -> Any:
    """The test with its number of examples, drawn from the seed."""
    return _limited(test if SEED is None else seed(int(SEED))(test))


def few(test: Any) -> Any:
    """The same with fewer examples, for what takes longer."""
    fewer = settings(_limited, max_examples=max(8, EXAMPLES // 2))
    return fewer(test if SEED is None else seed(int(SEED))(test))


def check(name: str, data: bytes) -> None:
    """The parser takes the bytes, or raises what it declares; anything else fails the test."""
    parse, declared, _ = PARSERS[name]
    try:
        parse(data)
    except declared:
        return


@pytest.fixture(autouse=True)
def _small_files_are_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a few bytes of weights are worth cutting."""
    monkeypatch.setattr(tensors, "SPLIT_FROM", 0)
    monkeypatch.setattr(tensors, "PART_FROM", 4)


@pytest.mark.parametrize("name", PARSERS)
def test_the_valid_object_is_valid(name: str) -> None:
    """What the changes start from is accepted, so that they are small steps from it."""
    parse, _, good = PARSERS[name]
    parse(good)


@pytest.mark.parametrize("name", PARSERS)
def test_arbitrary_bytes(name: str) -> None:
    """Bytes of any kind are refused as declared."""

    @fuzzed
    @given(st.binary(max_size=200))
    def run(data: bytes) -> None:
        check(name, data)

    run()


@pytest.mark.parametrize("name", PARSERS)
def test_changed_objects(name: str) -> None:
    """Nearly valid objects are taken for what they are, or refused as declared."""

    @fuzzed
    @given(changed(PARSERS[name][2]))
    def run(data: bytes) -> None:
        check(name, data)

    run()


@pytest.mark.parametrize("key", OBJECTS, ids=lambda key: key.split("/")[1])
def test_a_store_with_a_changed_object_can_be_repaired(key: str) -> None:
    """Whatever one object of a store holds, it can be listed, read and marked, and after a repair it is intact."""

    @few
    @given(st.one_of(changed(OBJECTS[key]), st.binary(max_size=200)))
    def run(data: bytes) -> None:
        survey(key, data)

    run()


def test_the_store_that_is_changed_is_intact() -> None:
    """What the changes start from has nothing to repair."""
    assert survey("v1/other", b"") == 0


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(1 - 2**64, 2**64 - 1) | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(codec="utf-8")),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(st.characters(codec="utf-8")), inner),
)  # fmt: skip


@fuzzed
@given(JSON)
def test_every_value_comes_back(value: Any) -> None:
    """What can be encoded is decoded to the same value, whose one form it is; numbers keep their kind."""
    data = canonical_json(value)
    assert repr(parse_canonical(data)) == repr(json.loads(data)) and canonical_json(parse_canonical(data)) == data


@fuzzed
@given(st.dictionaries(st.text(st.characters(codec="utf-8"), max_size=5), JSON), st.data())
def test_a_changed_byte_of_a_sealed_object_is_found(body: dict[str, Any], choice: st.DataObject) -> None:
    """No other byte anywhere in a sealed object leaves it valid with another meaning."""
    body.pop("check", None)
    data = bytearray(seal(body))
    place = choice.draw(st.integers(0, len(data) - 1))
    data[place] ^= 1 << choice.draw(st.integers(0, 7))
    try:
        found = unseal(bytes(data))
    except ValueError:
        return
    # Only a change of the field's name itself takes the seal away, and then the field is seen under its new name.
    assert len(found) == len(body) + 1
