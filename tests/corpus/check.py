"""Makes each mutation of the package, plans it against a store that holds the unchanged stage, and runs both.

What the planner says is the verdict under test; what the stage writes is the proof of the label: a mutation that must hit
writes the same bytes, and one that must miss writes others (or fails), unless it is labelled as a miss out of caution.
As a script it prints the code digest of every mutation, for comparing interpreters.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import io
import json
import math
import os
import random
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from artifacts.memory import MemoryBackend
from artifacts.record import Record
from artifacts.store import Store, new_record
from flows.graph import Graph, Node
from flows.plan import Difference, Planner, Resolution
from tasks.identity import CodeReader, SourceError
from tasks.stage import StageContext
from tests.corpus.mutations import MUTATIONS, Mutation
from tests.corpus.producer import FileConfig, file

HERE = Path(__file__).parent


@contextlib.contextmanager
def unpatched() -> Iterator[None]:
    """Undo what mutations do to the standard library."""
    kept = random.random, math.floor
    try:
        yield
    finally:
        random.random, math.floor = kept


class Corpus:
    """The package in a folder of its own, changed by one mutation at a time."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.root = folder / "package"
        shutil.copytree(HERE / "package", self.root, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copytree(HERE / "inputs", folder / "inputs")
        self.baselines: dict[tuple[Any, ...], tuple[Store, str]] = {}
        self.runs = 0

    def verdict(self, mutation: Mutation) -> tuple[str, list[Difference], bool]:
        """(`hit`, `run` or `refused`; what `why` names; whether the stage writes the same as before)."""
        with self.changed(mutation.given), unpatched():
            if mutation.given not in self.baselines:
                self.baselines[mutation.given] = self._recorded()
            store, before = self.baselines[mutation.given]
            with self.changed(mutation.edits), self.surroundings(mutation), unpatched():
                self.forget()
                try:
                    found = self.plan(store, mutation)
                    verdict, differences = found.status, found.differences
                except SourceError:
                    verdict, differences = "refused", []
                return verdict, differences, self.output(mutation) == before

    def _recorded(self) -> tuple[Store, str]:
        nothing = Mutation("nothing")
        with unpatched():
            return self._recorded_afresh(nothing)

    def _recorded_afresh(self, nothing: Mutation) -> tuple[Store, str]:
        self.forget()
        store = Store(MemoryBackend())
        found = self.plan(store, nothing)
        store.commit(self._record(found, "0" * 64))
        assert self.plan(store, nothing).status == "hit"
        return store, self.output(nothing)

    @contextlib.contextmanager
    def changed(self, edits: tuple[tuple[str, str, str], ...]) -> Iterator[None]:
        """The package with (file, old, new) replaced; every `old` must occur."""
        before: dict[Path, bytes | None] = {}
        try:
            for name, old, new in edits:
                path = self.root / "study" / name
                before.setdefault(path, path.read_bytes() if path.exists() else None)
                text = path.read_text() if path.exists() else ""
                assert old in text, f"{name} does not hold {old!r}"
                path.write_text(text.replace(old, new, 1) if old else text + new)
            yield
        finally:
            for path, data in before.items():
                path.write_bytes(data) if data is not None else path.unlink()

    @contextlib.contextmanager
    def surroundings(self, mutation: Mutation) -> Iterator[None]:
        """Environment variables, working directory and files' times, as the mutation wants them."""
        before, directory = dict(os.environ), Path.cwd()
        os.environ.update(mutation.environ)
        if mutation.elsewhere:
            os.chdir(self.folder)
            for path in [*self.root.rglob("*.py"), *(self.folder / "inputs").rglob("*.*")]:
                os.utime(path, (1e9, 1e9))
        try:
            yield
        finally:
            os.chdir(directory)
            os.environ.clear()
            os.environ.update(before)

    def stage(self) -> Any:
        """The declared stage, imported afresh after `forget`."""
        sys.path.insert(0, str(self.root))
        importlib.invalidate_caches()
        try:
            body = importlib.import_module("study.body")
        finally:
            sys.path.remove(str(self.root))
        return body.score

    @staticmethod
    def forget() -> None:
        """Let the package be imported afresh."""
        for name in [name for name in sys.modules if name.partition(".")[0] == "study"]:
            del sys.modules[name]

    def plan(self, store: Store, mutation: Mutation) -> Resolution:
        """Resolve the stage, with records of its inputs in the store."""
        graph = Graph()
        contents = {"data": "1", "tokenizer": "2"} | mutation.inputs
        wanted = {name: content for name, content in contents.items() if content}
        for name in wanted:
            graph.add(
                Node(
                    name=name,
                    stage=file,
                    config=FileConfig(revision=mutation.revision * 100 + int(wanted[name]) * 10 + len(name) % 2),
                )
            )
        score = self.stage()
        config = score.config(**mutation.config)
        graph.add(Node(name="score", stage=score, config=config, inputs={name: name for name in wanted}))
        planner = Planner(graph, store, CodeReader(self.root, ("study",)))
        planner._code["file"] = FILE
        for name, found in planner.plan().items():
            if name != "score":
                store.commit(self._record(found, wanted[name] * 64))
        return planner.plan()["score"]

    def _record(self, found: Resolution, output: str) -> Record:
        assert found.key is not None
        return new_record(
            stage=found.node.stage.name,
            key=found.key,
            payload=found.payload,
            output=output,
            size=1,
            symbols=found.symbols,
        )

    def output(self, mutation: Mutation) -> str:
        """What the stage writes, or how it fails."""
        self.runs += 1
        out = self.folder / f"out-{self.runs}"
        out.mkdir()
        logged = io.StringIO()
        context = StageContext(out=out, work=out / "work", checkpoints=None)  # type: ignore[arg-type]
        try:
            with contextlib.redirect_stdout(logged):
                score = self.stage()
                data, vocabulary = self.folder / "inputs" / "data", self.folder / "inputs" / "tokenizer"
                inputs = {"data": data, "tokenizer": vocabulary if mutation.inputs.get("tokenizer", "2") else None}
                score.body(dataclasses.replace(context, **mutation.context), score.config(**mutation.config), **inputs)
            return (out / "out.json").read_text()
        except Exception as error:  # noqa: BLE001 - whatever goes wrong is an output that differs
            return f"{type(error).__name__}: {error}"
        finally:
            shutil.rmtree(out)


FILE = CodeReader(packages=("tests",)).stage(file)


def digests(folder: Path, stride: int = 1) -> dict[str, str]:
    """The code digest of each mutation, or of one in `stride`."""
    corpus = Corpus(folder)
    found = {}
    for mutation in MUTATIONS[::stride]:
        with corpus.changed(mutation.given), corpus.changed(mutation.edits):
            try:
                identity = CodeReader(corpus.root, ("study",)).reach([("study.body", "score")], [CONFIG])
                found[mutation.name] = identity.digest
            except SourceError:
                found[mutation.name] = "refused"
    return found


CONFIG = ("study.config", "ScoreConfig")

if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as temporary:
        print(json.dumps(digests(Path(temporary), int(sys.argv[1]))))
