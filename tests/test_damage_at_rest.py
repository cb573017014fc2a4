"""Damage done to a store behind its back, on a disk and on a real server: refused, named by `verify`, undone by least work."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from artifacts.errors import Damaged
from artifacts.store import Store
from flows.execute import StudyRun, run_in_order
from flows.graph import Graph
from flows.workers import Hardware, WorkerPool
from tests.servers import Server
from tests.test_upkeep import plain
from tests.toy_study import digests, planner, toy_graph

CASES = [(kind, how) for how in ("delete", "truncate", "flip", "swap") for kind in ("record", "blob", "tree")]
"""A deleted record first: once a record was withdrawn, the note about that explains why there is none."""

FEW = [("blob", "delete"), ("record", "swap"), ("tree", "truncate"), ("blob", "flip")]


class RawFolder:
    """The files of a local store."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def read(self, key: str) -> bytes:
        return (self.root / key).read_bytes()

    def replace(self, key: str, data: bytes | None) -> None:
        (self.root / key).unlink()
        if data is not None:
            (self.root / key).write_bytes(data)


class RawBucket:
    """The objects of a store on a server, by requests of boto3."""

    def __init__(self, client: Any, url: str) -> None:
        self.client = client
        self.bucket, _, self.prefix = url.removeprefix("s3://").partition("/")

    def read(self, key: str) -> bytes:
        data: bytes = self.client.get_object(Bucket=self.bucket, Key=f"{self.prefix}/{key}")["Body"].read()
        return data

    def replace(self, key: str, data: bytes | None) -> None:
        if data is None:
            self.client.delete_object(Bucket=self.bucket, Key=f"{self.prefix}/{key}")
        else:
            self.client.put_object(Bucket=self.bucket, Key=f"{self.prefix}/{key}", Body=data)


@pytest.fixture
def raw(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, RawFolder | RawBucket]:
    """The URL of a fresh store, and a way to its bytes that does not pass through the project's code."""
    if request.getfixturevalue("backend") == "local":
        return str(tmp_path / "store"), RawFolder(tmp_path / "store")
    server: Server = request.getfixturevalue("s3_server")
    url = request.getfixturevalue("s3_url")
    return url, RawBucket(server.client(), url)


@pytest.fixture
def run(raw: tuple[str, RawFolder | RawBucket], tmp_path: Path) -> Iterator[Callable[[Graph], StudyRun]]:
    """Runs a graph on the store, always with the same worker processes."""
    pool, store = WorkerPool(Hardware("cpu", (), 2)), Store.open(raw[0])

    def run_graph(graph: Graph) -> StudyRun:
        study = StudyRun(
            graph=graph, store=store, pool=pool, scratch=tmp_path / "scratch", _planner=planner(graph, store)
        )
        run_in_order(study)
        assert not study.failures
        return study

    yield run_graph
    pool.close()


def harmed(data: bytes, other: bytes, how: str) -> bytes | None:
    """What is left of an object."""
    middle = len(data) // 2
    return {
        "truncate": data[:middle],
        "flip": data[:middle] + bytes([data[middle] ^ 4]) + data[middle + 1 :],
        "swap": other,
        "delete": None,
    }[how]


def keys_of(store: Store, study: StudyRun, node: str) -> dict[str, str]:
    """The objects of one node's output: blob, tree and record."""
    outcome = study.outcomes[node]
    [file] = store.tree(outcome.output).files
    return {
        "blob": f"v1/cas/{file.digest[:2]}/{file.digest}",
        "tree": f"v1/tree/{outcome.output[:2]}/{outcome.output}",
        "record": f"v1/act/{outcome.stage}/{outcome.key}.json",
    }


def is_refused(store: Store, study: StudyRun, node: str, kind: str, how: str, into: Path) -> bool:
    """Whether what was harmed is refused by whoever reads it; a deleted record reads as none."""
    outcome = study.outcomes[node]
    try:
        if kind == "record":
            return store.lookup(outcome.stage, outcome.key) is None and how == "delete"
        store.materialise(outcome.output, into)
    except Damaged:
        return not into.exists() or not list(into.iterdir())
    return False


@pytest.mark.parametrize(
    ("backend", "way", "cases"),
    [
        pytest.param("local", "repair", CASES, id="local-repair"),
        pytest.param("local", "run", CASES, id="local-run"),
        pytest.param("s3", "repair", CASES, id="s3-repair", marks=pytest.mark.slow),
        pytest.param("s3", "run", FEW, id="s3-run", marks=pytest.mark.slow),
    ],
)
def test_damage_at_rest(
    backend: str,
    way: str,
    cases: list[tuple[str, str]],
    raw: tuple[str, RawFolder | RawBucket],
    run: Callable[[Graph], StudyRun],
    tmp_path: Path,
) -> None:
    """Blobs, trees and records, cut short, flipped, exchanged and deleted, one after the other: each read is refused and each
    object named. `repair` without a copy withdraws that stage alone; a run makes again what it needs of it, and nothing else."""
    url, bytes_of = raw
    store = Store.open(url)
    first = run(toy_graph())
    nodes = {n: {"stage": o.stage, "key": o.key, "output": o.output} for n, o in first.outcomes.items()}
    store.put_run({"experiment": "toy", "config": {}, "nodes": nodes, "complete": True})
    keys, others = keys_of(store, first, "b"), keys_of(store, first, "a")
    sound = {kind: bytes_of.read(key) for kind, key in keys.items()}
    for seed, (kind, how) in enumerate(cases, start=1):
        bytes_of.replace(keys[kind], harmed(bytes_of.read(keys[kind]), bytes_of.read(others[kind]), how))
        assert is_refused(store, first, "b", kind, how, tmp_path / f"into-{seed}"), (kind, how)
        found = plain("verify", "--store", url, cwd=tmp_path, status=1)["damage"]
        assert {finding["key"] for finding in found} == {keys[kind]}, (kind, how, found)
        if way == "repair":
            done = plain("repair", "--store", url, cwd=tmp_path)
            lost = [record["node"] for record in done["withdrawn"]], done["unreadable"]
            assert lost == (([], [keys[kind]]) if kind == "record" else (["b"], [])), (kind, how, done)
        # A hit does not read its output, so a new stage that needs it goes with the run.
        graph = toy_graph() if way == "repair" or kind == "record" else toy_graph(seed=seed)
        study = run(graph)
        expected = {"b"} if way == "repair" or kind == "record" else {"b", "slow", "join"}
        assert {name for name, outcome in study.outcomes.items() if outcome.executed} == expected, (kind, how)
        assert digests(study)["b"] == digests(first)["b"]
        assert plain("verify", "--store", url, cwd=tmp_path)["ok"], (kind, how)
        assert {k: bytes_of.read(keys[k]) for k in ("blob", "tree")} == {k: sound[k] for k in ("blob", "tree")}
