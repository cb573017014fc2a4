"""The probe finds the stores on which running stages would not be safe, and says what is missing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from artifacts import probe
from artifacts.backend import open_backend
from artifacts.errors import Conflict, StoreError, StoreUnavailable
from artifacts.memory import MemoryBackend
from artifacts.store import Store
from tests.conftest import use
from tests.counting import CountingBackend
from tests.servers import Server


def lacking(backend: Any, races: int = probe.ROUNDS) -> set[str]:
    return {guarantee.name for guarantee in probe.examine(backend, races) if not guarantee.holds}


def test_good_stores(store: Store) -> None:
    """On a folder, in memory and on a server with atomic conditions every guarantee holds, and nothing is left behind."""
    found = probe.examine(store.backend)
    assert {g.name for g in found} == set(probe.WITHOUT) and all(g.holds and g.seen for g in found)
    store.probe()
    assert not list(store.backend.list("v1/"))


def test_rclone_is_refused(rclone: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that ignores conditions is refused, with what is missing, what still works and what to use instead."""
    store = Store.open(use(rclone, monkeypatch))
    assert lacking(store.backend) == {probe.CREATE_ONLY, probe.SWAP}
    with pytest.raises(
        StoreError, match="create-only does not hold.*compare-and-swap does not hold.*still work.*--store"
    ):
        store.probe()


def test_swift_is_refused(swift: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server whose create-only is not atomic passes every single try, and is found out by racing."""
    store = Store.open(use(swift, monkeypatch))
    assert lacking(store.backend, races=0) == {probe.SWAP}
    assert lacking(store.backend) == {probe.SWAP, probe.ONE_CREATOR}
    with pytest.raises(StoreError, match="raced for one key.*does not implement|does not implement.*raced for one key"):
        store.probe()


@pytest.mark.parametrize("bad", ["rclone", "swift"])
def test_blobs_are_safe_everywhere(
    bad: str, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the refusal says still works does: a tree goes into a refused store and comes back verified."""
    store = Store.open(use(request.getfixturevalue(bad), monkeypatch))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "a").write_text("one")
    tree = store.put_tree(tmp_path / "out")
    store.materialise(tree.digest, tmp_path / "back")
    assert (tmp_path / "back" / "a").read_text() == "one"


class Lying(MemoryBackend):
    """A memory backend with one broken promise."""

    def __init__(self, broken: str) -> None:
        super().__init__(broken)
        self.broken = broken

    def put(self, key: str, data: bytes, *, if_absent: bool = False, if_match: str | None = None) -> str:
        if if_absent and (self.broken == probe.CREATE_ONLY or self.broken == "empty" and not data):
            if_absent = False
        if self.broken == probe.SWAP:
            if_match = None
        if self.broken == "never swaps" and if_match is not None:
            raise Conflict(key)
        return super().put(key, data, if_absent=if_absent, if_match=if_match)

    def get(self, key: str, **named: Any) -> Any:
        found = super().get(key, **named)
        return type(found)(b"stale", found.etag) if self.broken == probe.READS else found

    def list(self, prefix: str) -> Any:
        return iter(()) if self.broken == probe.LISTS else super().list(prefix)


@pytest.mark.parametrize(
    ("broken", "missing"),
    [
        (probe.CREATE_ONLY, probe.CREATE_ONLY),
        ("empty", probe.CREATE_ONLY),
        (probe.SWAP, probe.SWAP),
        ("never swaps", probe.SWAP),
        (probe.READS, probe.READS),
        (probe.LISTS, probe.LISTS),
    ],
)
def test_each_broken_promise_is_named(broken: str, missing: str) -> None:
    """Whatever a store fails at is named, and stages are refused on it."""
    backend = Lying(broken)
    assert missing in lacking(backend, races=0)
    with pytest.raises(StoreError, match=missing):
        probe.check(backend)


class LosesReplies(MemoryBackend):
    """Every conditional write is done, and answered as the retry of it would be: refused."""

    def put(self, key: str, data: bytes, **condition: Any) -> str:
        etag = super().put(key, data, **condition)
        if condition and data != b"start":
            raise Conflict(key)
        return etag


def test_lost_replies_are_no_broken_promise() -> None:
    """A store whose replies get lost, so that a writer's own write refuses its retry, keeps its promises all the same."""
    assert lacking(LosesReplies("lost")) == set()


def test_a_good_server_is_remembered(s3_url: str, tmp_path: Path) -> None:
    """A server found good is not raced again at once, but still tried; one found bad is tried in full every time."""
    counting: Callable[[], CountingBackend] = lambda: CountingBackend(open_backend(s3_url))  # noqa: E731
    first, second, elsewhere = counting(), counting(), counting()
    probe.check(first, tmp_path)
    probe.check(second, tmp_path)
    probe.check(elsewhere, tmp_path / "other")
    assert first.calls["put"] > probe.ROUNDS * probe.RACERS * 2 < elsewhere.calls["put"]
    assert 4 <= second.calls["put"] <= 8


def test_an_unreachable_store_is_no_bad_store(monkeypatch: pytest.MonkeyPatch, s3_server: Server) -> None:
    """Where nothing can be found out the error is about reaching the store, not about its promises."""
    use(s3_server, monkeypatch)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(StoreUnavailable, match="403"):
        Store.open("s3://some-bucket/x").probe()
