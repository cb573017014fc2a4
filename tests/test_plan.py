"""Planning a large study: how many requests it makes, and that a hint is never believed."""

from __future__ import annotations

import pwd
import uuid
from pathlib import Path

import pytest

from artifacts.digest import digest_bytes
from artifacts.errors import StoreError
from artifacts.store import Store, new_record
from flows.graph import Graph, Node
from flows.hints import Hints, hints_for
from flows.plan import Planner
from tasks.identity import CodeReader, stage_key
from tests import toy_stages as toys
from tests.counting import CountingBackend
from tests.toy_study import PACKAGES

LEVELS, WIDTH = 20, 50


def layered(text: str = "") -> Graph:
    """LEVELS x WIDTH nodes, each made from two of the level above; `text` goes into the first node."""
    graph = Graph()
    for level in range(LEVELS):
        for column in range(WIDTH):
            given = text if level == column == 0 else ""
            config = toys.TextConfig(text=f"{level} {column} {given}")
            above = {} if level == 0 else {"x": f"{level - 1}/{column}", "y": f"{level - 1}/{(column + 1) % WIDTH}"}
            stage = toys.join if above else toys.source
            graph.add(Node(name=f"{level}/{column}", stage=stage, config=config, inputs=above))
    return graph


def recorded(graph: Graph, store: Store, *, fresh: bool = False) -> None:
    """Commit a record for every node, with an invented output that follows from its key (or a new one if `fresh`)."""
    planner, outputs = Planner(graph, store, CodeReader(packages=PACKAGES)), {}
    for node in graph:
        payload, symbols = planner.identity(node, {name: outputs[source] for name, source in node.inputs.items()})
        key = stage_key(payload)
        outputs[node.name] = digest_bytes((uuid.uuid4().hex if fresh else key).encode())
        store.commit(
            new_record(
                stage=node.stage.name, key=key, payload=payload, symbols=symbols, output=outputs[node.name], size=1
            )
        )


def counted_plan(graph: Graph, backend: CountingBackend, hints: Hints | None):
    """The plan, with the requests it made left in `backend`."""
    backend.reset()
    return Planner(graph, Store(backend), CodeReader(packages=PACKAGES), hints).plan()


def test_cached_plan_is_one_round_of_reads(tmp_path: Path) -> None:
    """1,000 recorded stages in 20 levels: one concurrent read of 1,000 records; no listing, no stat, no payload."""
    graph, backend = layered(), CountingBackend(Store.open(f"memory://{uuid.uuid4().hex}").backend)
    recorded(graph, Store(backend))
    hints = Hints(tmp_path / "hints.sqlite")
    plan = counted_plan(graph, backend, hints)
    assert backend.calls == {"get_many": LEVELS} and backend.keys == {"get_many": 1000}
    again = counted_plan(graph, backend, Hints(tmp_path / "hints.sqlite"))
    assert backend.calls == {"get_many": 1} and backend.keys == {"get_many": 1000}
    assert {r.status for r in again.values()} == {"hit"}
    assert {n: r.key for n, r in again.items()} == {n: r.key for n, r in plan.items()}


def test_hint_is_never_believed(tmp_path: Path) -> None:
    """Hints of another store, of records that are gone, and a broken hint file change no plan."""
    graph, hints = layered(), Hints(tmp_path / "hints.sqlite")
    first = CountingBackend(Store.open(f"memory://{uuid.uuid4().hex}").backend)
    recorded(graph, Store(first))
    counted_plan(graph, first, hints)
    second = CountingBackend(Store.open(f"memory://{uuid.uuid4().hex}").backend)
    assert {r.status for r in counted_plan(graph, second, hints).values()} == {"run"}
    recorded(graph, Store(second), fresh=True)
    honest = counted_plan(graph, second, None)
    hinted = counted_plan(graph, second, hints)
    assert {n: (r.status, r.key) for n, r in hinted.items()} == {n: (r.status, r.key) for n, r in honest.items()}
    (tmp_path / "hints.sqlite").write_bytes(b"not a database")
    broken = counted_plan(graph, second, hints)
    assert {r.status for r in broken.values()} == {"hit"}


def test_changed_node_reads_only_what_is_below_it_anew(tmp_path: Path) -> None:
    """After an edit of one node the rest is still read in the one round, and the edited node is a miss."""
    backend = CountingBackend(Store.open(f"memory://{uuid.uuid4().hex}").backend)
    hints = Hints(tmp_path / "hints.sqlite")
    recorded(layered(), Store(backend))
    counted_plan(layered(), backend, hints)
    backend.reset()
    plan = Planner(layered("edited"), Store(backend), CodeReader(packages=PACKAGES), hints).plan(explain=False)
    below = {name for name, r in plan.items() if r.status != "hit"}
    assert "0/0" in below and "0/1" not in below
    assert backend.calls["get_many"] == 2 and backend.keys["get_many"] == 1000 - len(below) + 1


def test_one_damaged_record_costs_no_more_reads(tmp_path: Path) -> None:
    """A record that does not decode is a miss that says why; the other 999 are read as before."""
    graph, backend = layered(), CountingBackend(Store.open(f"memory://{uuid.uuid4().hex}").backend)
    recorded(graph, Store(backend))
    hints = Hints(tmp_path / "hints.sqlite")
    last = f"{LEVELS - 1}/0"
    key = counted_plan(graph, backend, hints)[last].key
    backend.put(f"v1/act/join/{key}.json", b"torn")
    backend.reset()
    plan = Planner(graph, Store(backend), CodeReader(packages=PACKAGES), hints).plan(explain=False)
    assert plan[last].damage is not None and plan[last].status == "run"
    assert sum(r.status == "hit" for r in plan.values()) == 999
    assert backend.calls == {"get_many": 1}


def test_hints_are_for_remote_stores_only(tmp_path: Path, monkeypatch) -> None:
    """A local store needs none; two servers that hold a bucket of the same name share none."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert hints_for(str(tmp_path / "store")) is None
    paths = []
    for endpoint in ("http://127.0.0.1:1", "http://127.0.0.1:2"):
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        hints = hints_for("s3://bucket/x")
        assert hints is not None
        hints.remember({endpoint: "f" * 64})
        paths.append(hints.load(["http://127.0.0.1:1", "http://127.0.0.1:2"]))
    assert paths == [{"http://127.0.0.1:1": "f" * 64}, {"http://127.0.0.1:2": "f" * 64}]


def test_no_hints_where_they_cannot_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache folder that cannot even be looked for, or a user without a home directory, means no hints and no error."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / ("x" * 300)))
    hints = hints_for("s3://bucket/x")
    assert hints is not None
    hints.remember({"0" * 64: "1" * 64})
    assert hints.load(["0" * 64]) == {}

    def nobody(number: int) -> None:
        raise KeyError(number)

    monkeypatch.setattr(pwd, "getpwuid", nobody)
    for name in ("XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name)
    assert hints_for("s3://bucket/x") is None


def test_a_home_that_nobody_has_is_no_store() -> None:
    """A store below the home of an unknown user is refused in the store's own terms."""
    with pytest.raises(StoreError, match="~no-such-user"):
        Store.open("~no-such-user/store")
