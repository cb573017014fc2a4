"""A small graph of toy stages, and how tests plan and run it. As a script it runs the graph once, to be killed."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from artifacts.store import Store
from flows.execute import StudyRun, run_in_order
from flows.graph import Graph, Node
from flows.plan import Planner, Resolution
from flows.workers import Hardware, WorkerPool
from tasks.identity import CodeReader
from tests import toy_stages as toys

PACKAGES = ("tasks", "artifacts", "tests")


def toy_graph(*, text: str = "a", seed: int = 0, steps: int = 5, seconds: float = 0.01) -> Graph:
    """a -> constant -> join <- b, slow: an edit of `a` stops at `constant`, whose output stays the same."""
    graph = Graph()
    graph.add(Node(name="a", stage=toys.source, config=toys.TextConfig(text=text)))
    graph.add(Node(name="b", stage=toys.source, config=toys.TextConfig(text="b")))
    graph.add(Node(name="slow", stage=toys.steps, config=toys.StepsConfig(steps=steps, seconds=seconds, seed=seed)))
    graph.add(Node(name="constant", stage=toys.constant, config=toys.TextConfig(text="c"), inputs={"above": "a"}))
    inputs = {"x": "constant", "y": "b", "z": "slow"}
    graph.add(Node(name="join", stage=toys.join, config=toys.TextConfig(text="j"), inputs=inputs))
    return graph


def planner(graph: Graph, store: Store) -> Planner:
    """A planner that reads the toy stages' source."""
    return Planner(graph, store, CodeReader(packages=PACKAGES))


def plan(graph: Graph, store: Store) -> dict[str, Resolution]:
    """The resolved graph."""
    return planner(graph, store).plan()


def run(
    graph: Graph,
    store: Store,
    scratch: Path,
    *,
    engine: Callable[[StudyRun], None] = run_in_order,
    watch: Callable[[str, dict[str, Any]], None] = lambda node, message: None,
    checkpoint_seconds: float = 0.0,
) -> StudyRun:
    """Run the graph with two workers and return the finished run."""
    pool = WorkerPool(Hardware("cpu", (), 2))
    study = StudyRun(
        graph=graph,
        store=store,
        pool=pool,
        scratch=scratch,
        watch=watch,
        checkpoint_seconds=checkpoint_seconds,
        _planner=planner(graph, store),
    )
    try:
        engine(study)
    finally:
        pool.close()
    return study


def digests(study: StudyRun) -> dict[str, str]:
    """Node -> digest of its output."""
    return {name: outcome.output for name, outcome in study.outcomes.items()}


def main() -> None:
    """`python -m tests.toy_study STORE SCRATCH STEPS SECONDS`: run, printing every event as a line."""
    url, scratch, steps, seconds = sys.argv[1:5]
    graph = toy_graph(steps=int(steps), seconds=float(seconds))

    def show(node: str, message: dict[str, Any]) -> None:
        print(json.dumps({"node": node, **message}), flush=True)

    study = run(graph, Store.open(url), Path(scratch), watch=show)
    print(json.dumps({"digests": digests(study), "failures": study.failures}), flush=True)


if __name__ == "__main__":
    main()
