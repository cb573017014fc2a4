"""One worker against edits, other workers, and what earlier ones left in the scratch folder. Bodies run in this process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from artifacts import scratch
from artifacts.checkpoints import StoredCheckpoints
from artifacts.clock import SYSTEM
from artifacts.digest import canonical_json, digest_file
from artifacts.errors import StoreError
from artifacts.lease import Lease, process_identity, this_process
from artifacts.record import payload_key
from artifacts.store import Store, new_record
from tasks import worker
from tasks.identity import CodeReader, stage_payload
from tasks.inputs import Inputs
from tasks.stage import StageError
from tasks.worker import Spec, Stop
from tests import toy_stages as toys
from tests.toy_study import PACKAGES

GONE = {**this_process(), "started": 1}
ELSEWHERE = {"machine": "another", "pid": 1, "started": 1}


def spec_of(stage: Any, config: Any, tmp_path: Path, **changes: Any) -> Spec:
    code = CodeReader(packages=PACKAGES).stage(stage)
    inputs = changes.pop("inputs", {})
    return Spec(
        store=str(tmp_path / "store"),
        node="node",
        module="tests.toy_stages",
        attribute=stage.body.__name__,
        config=config.model_dump(mode="json"),
        inputs=inputs,
        payload=stage_payload(stage, config, inputs, code),
        symbols=dict(code.symbols),
        scratch=str(tmp_path / "scratch"),
        **changes,
    )


def steps_of(tmp_path: Path, **changes: Any) -> Spec:
    config = toys.StepsConfig(steps=100, seconds=0.02)
    return spec_of(toys.steps, config, tmp_path, checkpoint_seconds=0.0, time_to_live=30.0, **changes)


def execute(spec: Spec, on_progress: Any = lambda done: None) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The last message and all messages of a worker in this process."""
    messages: list[dict[str, Any]] = []

    def send(message: dict[str, Any]) -> None:
        messages.append(message)
        if message["event"] == "progress":
            on_progress(message["done"])

    worker.execute(spec, send, Stop())
    return messages[-1], messages


def attempt(spec: Spec, name: str, holder: dict[str, object], text: str | None) -> scratch.Attempt:
    """An attempt that another process left; finished with `text` as its output if that is given."""
    made = scratch.new_attempt(Path(spec.scratch), spec.key, name)
    (made.folder / "holder.json").write_bytes(canonical_json(holder))
    if text is not None:
        (made.out / "text.txt").write_text(text)
        made.finish(2.0)
    return made


def test_source_edited_while_the_body_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An output that the edited source may have made is not published under the key of the old source."""
    spec = spec_of(toys.source, toys.TextConfig(), tmp_path)
    checked = []

    def require(self: Any) -> None:
        checked.append(1)
        if len(checked) > 1:
            raise StageError("the source changed")

    monkeypatch.setattr(worker._Attempt, "_require_planned_code", require)
    last, _ = execute(spec)
    assert last["event"] == "failed" and "the source changed" in last["message"]
    assert Store.open(spec.store).lookup("source", spec.key) is None
    assert scratch.finished_attempt(Path(spec.scratch), spec.key) is None


def test_finished_attempt_is_published_only_intact(tmp_path: Path) -> None:
    """An output of an earlier attempt is taken over by its digests: the same sizes with other bytes are not enough."""
    spec = spec_of(toys.source, toys.TextConfig(text="good"), tmp_path)
    attempt(spec, "1-deadbeef", GONE, "<good>").out.joinpath("text.txt").write_bytes(b"\0" * 6)
    last, _ = execute(spec)
    assert Store.open(spec.store).read(last["output"], "text.txt") == b"<good>"
    other = spec_of(toys.source, toys.TextConfig(text="kept"), tmp_path)
    attempt(other, "1-deadbeef", GONE, "kept as it was")
    last, _ = execute(other)
    assert Store.open(spec.store).read(last["output"], "text.txt") == b"kept as it was" and last["seconds"] == 2.0
    assert not list((tmp_path / "scratch").iterdir())


@pytest.mark.parametrize("trouble", ["link", "link to a folder", "name", "twins"])
def test_an_output_that_cannot_be_stored_is_not_finished(tmp_path: Path, trouble: str) -> None:
    """What no store takes fails the stage before it counts as finished, so the next run makes it anew; nor is it adopted."""
    spec = spec_of(toys.source, toys.TextConfig(), tmp_path)
    left = attempt(spec, "1-deadbeef", GONE, "kept")

    def spoil() -> None:
        if trouble.startswith("link"):
            (left.out / "latest").symlink_to("text.txt" if trouble == "link" else ".")
        for name in {"name": ["tab\tname"], "twins": ["Text.txt"]}.get(trouble, []):
            (left.out / name).write_text("x")

    spoil()
    with pytest.raises(StoreError, match="link or a special|not safe|upper and lower"):
        left.finish(1.0)
    rows = [
        [p.relative_to(left.out).as_posix(), p.stat().st_size, digest_file(p)]
        for p in sorted(left.out.rglob("*"))
        if p.is_file()
    ]
    (left.folder / scratch.FINISHED).write_bytes(canonical_json({"seconds": 1.0, "files": rows}))
    last, _ = execute(spec)
    assert last["event"] == "done" and last["executed"]
    assert Store.open(spec.store).read(last["output"], "text.txt") == b"<text>"
    assert not list((tmp_path / "scratch").iterdir())


def test_another_live_worker_keeps_its_scratch(tmp_path: Path) -> None:
    """A worker that finishes removes its own attempt and those of processes that are gone, and no other."""
    spec = spec_of(toys.source, toys.TextConfig(), tmp_path)
    alive = attempt(spec, "1-aaaaaaaa", ELSEWHERE, "another's")
    attempt(spec, "1-bbbbbbbb", GONE, None)
    last, _ = execute(spec)
    assert Store.open(spec.store).read(last["output"], "text.txt") == b"<text>"
    assert list(alive.folder.parent.iterdir()) == [alive.folder] and alive.is_finished()


def test_abandoned_attempts_are_swept(tmp_path: Path) -> None:
    """A worker's start removes what killed workers left at other stages, but not finished outputs or live attempts."""
    others = spec_of(toys.source, toys.TextConfig(text="other"), tmp_path)
    attempt(others, "1-aaaaaaaa", GONE, None)
    kept = {attempt(others, "2-b", GONE, "done").folder, attempt(others, "3-c", ELSEWHERE, None).folder}
    nameless = attempt(others, "4-d", GONE, None).folder
    (nameless / "holder.json").unlink()
    os.utime(nameless, (time.time() - 2 * 86400,) * 2)
    execute(spec_of(toys.source, toys.TextConfig(), tmp_path))
    assert set((tmp_path / "scratch" / others.key).iterdir()) == kept


@pytest.mark.parametrize("by", ["the body", "another", "another, leaving the size and the text"])
def test_inputs_that_are_written_make_no_result(tmp_path: Path, by: str) -> None:
    """An input in which the body or another process writes by way of its link to the store fails the stage.

    Nothing is committed, and what became wrong in the store is not there any more, so that the next run has it made again.
    """
    made = spec_of(toys.source, toys.TextConfig(text="A" * 100), tmp_path)
    above = execute(made)[0]["output"]
    store = Store.open(made.store)
    [blob] = (path for path in (tmp_path / "store/v1/cas").rglob("*") if path.is_file())
    config = toys.TextConfig(text="EVIL" if by == "the body" else "")
    spec = spec_of(toys.writing, config, tmp_path, inputs={"above": above})

    def write(done: int) -> None:
        if by != "the body":
            blob.chmod(0o644)
            with open(blob, "r+") as file:
                file.write("EVIL" if by == "another" else "<A")

    last, _ = execute(spec, write)
    assert last["event"] == "failed" and "read-only" in last["message"] and "text.txt" in last["message"]
    assert store.lookup("writing", spec.key) is None and not scratch.finished_attempt(Path(spec.scratch), spec.key)
    assert blob.exists() == (by == "another, leaving the size and the text")
    honest = spec_of(toys.writing, toys.TextConfig(text=""), tmp_path, inputs={"above": above})
    last, _ = execute(honest)
    assert last["event"] == ("done" if blob.exists() else "damaged")


def test_an_input_written_while_it_was_read_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A write that falls between the verification of an input and the note of its time is found by its digest."""
    above = execute(spec_of(toys.source, toys.TextConfig(text="A" * 100), tmp_path))[0]["output"]
    materialise = Store.materialise

    def then_write(self: Store, digest: str, into: Path, progress: Any = None) -> Any:
        tree = materialise(self, digest, into, progress)
        (into / "text.txt").chmod(0o644)
        with open(into / "text.txt", "r+") as file:
            file.write("EVIL")
        return tree

    monkeypatch.setattr(Store, "materialise", then_write)
    spec = spec_of(toys.writing, toys.TextConfig(text=""), tmp_path, inputs={"above": above})
    last, _ = execute(spec)
    assert last["event"] == "failed" and "while it was verified" in last["message"]
    assert Store.open(spec.store).lookup("writing", spec.key) is None


def test_checkpoints_are_made_of_intact_inputs(tmp_path: Path) -> None:
    """No checkpoint is saved once an input was written: a later attempt would go on from wrong bytes."""
    store, folder = Store.open(str(tmp_path / "store")), tmp_path / "state"
    folder.mkdir()
    (folder / "x").write_text("x")
    inputs = Inputs(store, tmp_path / "inputs")
    path = inputs.read(store.put_tree(folder).digest) / "x"
    stored = StoredCheckpoints(store.backend, "0" * 64, fence=1)
    timed = worker._TimedCheckpoints(stored, SYSTEM, inputs.require_unchanged)
    timed.save(1, folder)
    os.utime(path, ns=(1, 1))
    with pytest.raises(StageError, match="read-only"):
        timed.save(2, folder)
    (tmp_path / "into").mkdir()
    assert stored.restore(tmp_path / "into") == 1


def test_lost_lease_adopts_the_winner(tmp_path: Path) -> None:
    """A worker whose lease is taken over stops its body, and ends with the other worker's record and no leftovers."""
    spec = steps_of(tmp_path)
    store = Store.open(spec.store)
    won = store.put_tree(attempt(spec, "9-winner", ELSEWHERE, "winner").out)

    def take_over(done: int) -> None:
        if done == 5:
            path = f"v1/lease/{spec.key}.json"
            held = store.backend.get(path)
            body = {**json.loads(held.data), "owner": "winner", "fence": 2, "holder": ELSEWHERE}
            store.backend.put(path, canonical_json(body), if_match=held.etag)
            store.commit(
                new_record(stage="steps", key=spec.key, payload=spec.payload, output=won.digest, size=won.size)
            )

    last, messages = execute(spec, take_over)
    assert last["event"] == "done" and last["output"] == won.digest and not last["executed"]
    assert max(m["done"] for m in messages if m["event"] == "progress") < 100
    assert [p.name for p in (tmp_path / "scratch" / spec.key).iterdir()] == ["9-winner"]


def test_vanished_store_is_not_another_worker(tmp_path: Path) -> None:
    """A worker whose lease object is removed says that it is gone, and blames nobody."""
    spec = steps_of(tmp_path)
    store = Store.open(spec.store)
    last, _ = execute(spec, lambda done: store.backend.delete(f"v1/lease/{spec.key}.json"))
    assert last["event"] == "failed" and "is gone from the store" in last["message"]
    assert "another worker" not in last["message"]


def test_lost_lease_record_goes_on_from_its_checkpoints(tmp_path: Path) -> None:
    """A lease object that was removed between two runs starts above the fence of the checkpoints that are left."""
    spec = steps_of(tmp_path)
    store = Store.open(spec.store)
    folder = tmp_path / "state"
    folder.mkdir()
    (folder / "state.json").write_text("7")
    StoredCheckpoints(store.backend, spec.key, fence=5).save(98, folder)
    last, messages = execute(spec)
    assert last["event"] == "done" and min(m["done"] for m in messages if m["event"] == "progress") == 99
    assert Lease(store.backend, spec.key).try_acquire() and not list(store.backend.list("v1/wip/"))


def test_damaged_record_names_itself(tmp_path: Path) -> None:
    """A record that cannot be read is reported as the record it is, so that it can be withdrawn."""
    spec = spec_of(toys.source, toys.TextConfig(), tmp_path)
    store = Store.open(spec.store)
    assert spec.key == payload_key(spec.payload)
    store.backend.put(f"v1/act/source/{spec.key}.json", b"torn")
    last, _ = execute(spec)
    assert last["event"] == "damaged" and last["tree"] is None and last["record"] == ["source", spec.key]
    assert "not a record" in last["message"]


def test_a_finished_attempt_is_taken_over(tmp_path: Path) -> None:
    """Who takes over what a dead process finished owns it: others on the machine do not remove it under his hands."""
    attempt = scratch.new_attempt(tmp_path, "a" * 64, "1-x")
    (attempt.out / "weights").write_text("w")
    attempt.finish(3.0)
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    (attempt.folder / scratch.HOLDER).write_bytes(canonical_json(process_identity(child.pid)))
    assert scratch.finished_attempt(tmp_path, "a" * 64) is None
    child.communicate()
    assert attempt.is_abandoned() and not attempt.is_mine()
    assert scratch.finished_attempt(tmp_path, "a" * 64) == attempt
    assert attempt.is_mine() and not attempt.is_abandoned() and attempt.is_finished()
