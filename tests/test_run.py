"""Running a graph: hits, misses, early cutoff, failures, kills, races and damage, with real worker processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from artifacts.store import Store
from flows.execute import StageFailed, StudyRun, run_in_order
from flows.graph import Graph, GraphError, Node
from flows.workers import Hardware, WorkerPool
from tasks.worker import Spec
from tests import toy_stages as toys
from tests.toy_study import digests, plan, planner, run, toy_graph

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def local(tmp_path: Path) -> Store:
    """A store in a fresh folder."""
    return Store.open(str(tmp_path / "store"))


def executed(study) -> set[str]:
    return {name for name, outcome in study.outcomes.items() if outcome.executed}


def test_second_run_executes_nothing(local: Store, tmp_path: Path) -> None:
    """Everything runs once; the same graph again starts no process and gives the same digests."""
    first = run(toy_graph(), local, tmp_path)
    assert executed(first) == {"a", "b", "slow", "constant", "join"}
    second = run(toy_graph(), local, tmp_path)
    assert executed(second) == set() and second.pool.processes() == []
    assert digests(first) == digests(second)
    assert {r.status for r in plan(toy_graph(), local).values()} == {"hit"}


def test_two_stores_same_digests(tmp_path: Path) -> None:
    """Two cold runs in two empty stores give the same digest for every output."""
    runs = [run(toy_graph(), Store.open(str(tmp_path / name)), tmp_path / f"s{name}") for name in "xy"]
    assert digests(runs[0]) == digests(runs[1])


def test_early_cutoff(local: Store, tmp_path: Path) -> None:
    """A rerun whose output has the same bytes stops the cascade, and the plan had said so."""
    run(toy_graph(), local, tmp_path)
    planned = plan(toy_graph(text="other"), local)
    assert {name: r.status for name, r in planned.items()} == {
        "a": "run", "b": "hit", "slow": "hit", "constant": "maybe", "join": "maybe",
    }  # fmt: skip
    assert "config.text: a -> other" in planned["a"].reason
    assert executed(run(toy_graph(text="other"), local, tmp_path)) == {"a", "constant"}


def test_failure_stops_only_what_depends_on_it(local: Store, tmp_path: Path) -> None:
    """A stage that fails says why; what needs it is not run; the rest is."""
    graph = Graph()
    graph.add(Node(name="bad", stage=toys.failing, config=toys.TextConfig(text="wrong")))
    graph.add(Node(name="below", stage=toys.constant, config=toys.TextConfig(), inputs={"above": "bad"}))
    graph.add(Node(name="good", stage=toys.source, config=toys.TextConfig()))
    study = run(graph, local, tmp_path)
    assert set(study.outcomes) == {"good"}
    assert "expected something else, found 'wrong'" in study.failures["bad"]
    assert not list(local.records("failing"))


def start(store: Path, scratch: Path, steps: int = 200) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "tests.toy_study", str(store), str(scratch), str(steps), "0.02"],
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        start_new_session=True,
    )


def wait_until(process: subprocess.Popen[str], wanted) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        if wanted(json.loads(line)):
            return
    raise AssertionError("the run ended before the event")


def stage_processes(nursery_parent: int) -> list[int]:
    """Process ids of the nurseries that a run started and of their workers."""
    listing = subprocess.run(["ps", "-eo", "pid=,ppid="], capture_output=True, text=True, check=True).stdout
    children: dict[int, list[int]] = {}
    for line in listing.splitlines():
        pid, parent = map(int, line.split())
        children.setdefault(parent, []).append(pid)
    found, todo = [], [nursery_parent]
    while todo:
        below = children.get(todo.pop(), [])
        found += below
        todo += below
    return found


@pytest.mark.parametrize("whole", [True, False], ids=["everything killed", "only the run killed"])
def test_kill_and_resume(whole: bool, tmp_path: Path) -> None:
    """After kill -9 in mid-stage the same command goes on from the last checkpoint and ends in the same digests."""
    expected = digests(run(toy_graph(steps=200, seconds=0), Store.open(str(tmp_path / "calm")), tmp_path / "s"))
    victim = start(tmp_path / "store", tmp_path / "scratch")
    wait_until(victim, lambda event: event.get("node") == "slow" and event.get("done", 0) >= 40)
    processes = stage_processes(victim.pid)
    os.killpg(victim.pid, signal.SIGKILL)
    for process in processes if whole else []:
        os.kill(process, signal.SIGKILL)
    victim.wait()
    logs: list[str] = []
    again = run(
        toy_graph(steps=200, seconds=0.02),
        Store.open(str(tmp_path / "store")),
        tmp_path / "scratch",
        watch=lambda node, message: logs.append(message["message"]) if message["event"] == "log" else None,
    )
    resumed = [int(line.split()[-1]) for line in logs if line.startswith("resumed at")]
    assert resumed and resumed[0] >= 30
    changed = {name for name in expected if expected[name] != digests(again)[name]}
    assert changed == set()
    for process in processes:
        with pytest.raises(ProcessLookupError):
            os.kill(process, 0)


def test_race_runs_the_body_once(local: Store, tmp_path: Path) -> None:
    """Four runs at once on one store: every body runs once, and all end with the same digests."""
    studies = []

    def one(number: int) -> None:
        studies.append(run(toy_graph(steps=20, seconds=0.02), local, tmp_path / str(number)))

    threads = [threading.Thread(target=one, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({json.dumps(digests(study), sort_keys=True) for study in studies}) == 1
    assert sum("slow" in executed(study) for study in studies) == 1


@pytest.mark.parametrize("harm", ["flip", "delete", "tree"])
def test_damaged_input_is_remade(local: Store, tmp_path: Path, harm: str) -> None:
    """A missing or wrong blob of an input withdraws its record; its producer alone runs again; the run says so."""
    first = run(toy_graph(), local, tmp_path)
    tree = local.tree(first.outcomes["b"].output)
    digest = tree.digest if harm == "tree" else tree.files[0].digest
    key = f"v1/{'tree' if harm == 'tree' else 'cas'}/{digest[:2]}/{digest}"
    local.backend.delete(key)
    if harm == "flip":
        local.backend.put(key, b"<c>")
    logs: list[tuple[str, str]] = []
    watch = lambda node, message: logs.append((node, message.get("message", "")))  # noqa: E731
    graph = toy_graph(seed=1)
    study = run(graph, local, tmp_path, watch=watch)
    assert executed(study) == {"b", "slow", "join"}
    assert any(node == "b" and "made again" in text for node, text in logs)
    assert not study.failures


def test_store_hiccup_is_not_a_miss(local: Store, tmp_path: Path) -> None:
    """A record that cannot be read for a reason other than its absence stops the run; nothing is executed again."""
    from artifacts.errors import StoreUnavailable

    first = run(toy_graph(), local, tmp_path)
    record = Path(local.backend.url) / f"v1/act/source/{first.outcomes['a'].key}.json"
    record.unlink()
    record.mkdir()
    with pytest.raises(StoreUnavailable):
        run(toy_graph(), local, tmp_path)
    with pytest.raises(StoreUnavailable):
        plan(toy_graph(), local)


def test_runs_on_s3(s3_url: str, tmp_path: Path) -> None:
    """The same graph on an S3 server gives the digests of the local folder, and is a hit the second time."""
    store = Store.open(s3_url)
    assert digests(run(toy_graph(), store, tmp_path / "a")) == digests(
        run(toy_graph(), Store.open(str(tmp_path / "local")), tmp_path / "b")
    )
    assert executed(run(toy_graph(), store, tmp_path / "a")) == set()


def test_graph_refuses_mistakes() -> None:
    """A graph with a repeated name, an unknown input or a missing one is refused when it is built."""
    graph = Graph()
    node = Node(name="a", stage=toys.source, config=toys.TextConfig())
    graph.add(node)
    with pytest.raises(GraphError, match="twice"):
        graph.add(node)
    with pytest.raises(GraphError, match="'nowhere'"):
        graph.add(Node(name="b", stage=toys.constant, config=toys.TextConfig(), inputs={"above": "nowhere"}))
    with pytest.raises(GraphError, match="missing inputs"):
        graph.add(Node(name="b", stage=toys.constant, config=toys.TextConfig()))
    with pytest.raises(GraphError, match="unknown inputs"):
        graph.add(Node(name="b", stage=toys.constant, config=toys.TextConfig(), inputs={"above": "a", "aside": "a"}))


def test_damage_two_generations_up(local: Store, tmp_path: Path) -> None:
    """When an input and the input's own input are both damaged, both are made again."""
    first = run(toy_graph(), local, tmp_path)
    for name in ("a", "constant"):
        [file] = local.tree(first.outcomes[name].output).files
        local.backend.delete(f"v1/cas/{file.digest[:2]}/{file.digest}")
    study = run(toy_graph(seed=1), local, tmp_path)
    assert not study.failures
    assert executed(study) == {"a", "constant", "slow", "join"}


def lose(store: Store, output: str) -> None:
    """Delete the one blob of an output."""
    [file] = store.tree(output).files
    store.backend.delete(f"v1/cas/{file.digest[:2]}/{file.digest}")


def test_every_input_of_a_node_may_be_damaged(local: Store, tmp_path: Path) -> None:
    """However many inputs of one node are damaged, one run makes all of them again, each once, and goes on."""
    inputs = [f"input{number}" for number in range(6)]

    def graph(text: str) -> Graph:
        made = Graph()
        for name in inputs:
            made.add(Node(name=name, stage=toys.source, config=toys.TextConfig(text=name)))
        above = {name: name for name in inputs}
        made.add(Node(name="join", stage=toys.join, config=toys.TextConfig(text=text), inputs=above))
        return made

    first = run(graph("before"), local, tmp_path)
    for name in inputs:
        lose(local, first.outcomes[name].output)
    logs: list[str] = []
    watch = lambda node, message: logs.append(node) if "made again" in message.get("message", "") else None  # noqa: E731
    study = run(graph("after"), local, tmp_path, watch=watch)
    assert not study.failures and executed(study) == {*inputs, "join"} and sorted(logs) == inputs


def test_an_input_that_is_damaged_again_and_again(local: Store, tmp_path: Path) -> None:
    """On a disk that loses an output whenever it is made, the run gives up after three times, and says which it was."""
    first = run(toy_graph(), local, tmp_path)
    made: list[str] = []

    def watch(node: str, message: dict) -> None:
        if node == "b" and message["event"] == "done" and len(made) < 9:
            made.append(node)
            lose(local, first.outcomes["b"].output)

    lose(local, first.outcomes["b"].output)
    study = run(toy_graph(seed=1), local, tmp_path, watch=watch)
    assert len(made) == 3 and executed(study) == {"b", "slow"}
    assert "input b was damaged again after it had been made anew 3 times" in study.failures["join"]
    assert local.backend.url in study.failures["join"]
    assert executed(run(toy_graph(seed=1), local, tmp_path)) == {"b", "join"}


def test_a_worker_that_only_says_that_an_input_is_damaged(local: Store, tmp_path: Path) -> None:
    """Where nothing is wrong with the inputs, nothing is made again, and the stage is tried a few times only."""
    first, tried = run(toy_graph(), local, tmp_path), []

    class Pool(WorkerPool):
        def run(self, spec: Spec, **options: Any) -> dict[str, Any]:
            if spec.node != "join":
                return super().run(spec, **options)
            tried.append(spec.node)
            event = "damaged" if len(tried) < 9 else "failed"
            return {"event": event, "tree": first.outcomes["b"].output, "message": "a bad disk of its own"}

    study = StudyRun(
        graph=(graph := toy_graph(seed=1)),
        store=local,
        pool=(pool := Pool(Hardware("cpu", (), 2))),
        scratch=tmp_path,
        _planner=planner(graph, local),
    )
    run_in_order(study)
    pool.close()
    assert len(tried) == 4 and executed(study) == {"slow"}
    assert "none of its inputs had to be made anew" in study.failures["join"]
    assert "a bad disk of its own" in study.failures["join"]


def test_undecodable_record_is_made_again(local: Store, tmp_path: Path) -> None:
    """A record that was cut short is withdrawn, its stage alone runs again, and the plan says why."""
    first = run(toy_graph(), local, tmp_path)
    record = Path(local.backend.url) / f"v1/act/source/{first.outcomes['b'].key}.json"
    record.write_bytes(record.read_bytes()[:100])
    planned = plan(toy_graph(), local)
    assert planned["b"].status == "run"
    assert "not a record" in planned["b"].reason
    assert executed(run(toy_graph(), local, tmp_path)) == {"b"}


def test_a_watcher_that_fails_does_not_hang_the_run(local: Store, tmp_path: Path) -> None:
    """An error while progress is shown is reported, and the run goes on."""

    def watch(node: str, message: dict) -> None:
        if message["event"] == "progress":
            raise OSError("nobody reads")

    assert not run(toy_graph(), local, tmp_path, watch=watch).failures


def test_workers_ignore_the_callers_surroundings(local: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Modules in the working directory and launchers' variables do not reach a worker; what a library prints is harmless."""
    here = tmp_path / "here"
    here.mkdir()
    (here / "blake3.py").write_text("raise SystemExit('imported from the working directory')\n")
    (here / "sitecustomize.py").write_text("print('a banner')\n")
    monkeypatch.chdir(here)
    monkeypatch.setenv("PYTHONPATH", str(here))
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    (here / "blake3.py").unlink()
    assert not run(toy_graph(), local, tmp_path).failures
    (here / "blake3.py").write_text("raise SystemExit('imported from the working directory')\n")
    monkeypatch.setenv("PYTHONPATH", "")
    assert not run(toy_graph(seed=2), local, tmp_path).failures


def test_a_killed_nursery_is_replaced(local: Store, tmp_path: Path) -> None:
    """When the process that forks workers is killed, its stage fails with a clear message and later ones still run."""
    killed: list[int] = []

    def engine(study) -> None:
        def watch(node: str, message: dict) -> None:
            if node == "slow" and message["event"] == "progress" and not killed:
                killed.extend(study.pool.processes())
                for process in killed:
                    os.kill(process, signal.SIGKILL)

        study.watch = watch
        for name in ("slow", "a", "b"):
            try:
                study.node(name)
            except StageFailed:
                assert name == "slow"

    study = run(toy_graph(steps=50, seconds=0.02), local, tmp_path, engine=engine)
    assert killed
    assert "run the same command again" in study.failures["slow"]
    assert {"a", "b"} <= executed(study)
