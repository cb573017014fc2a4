"""Workers in processes of their own: started on a spec, listened to through a file, stopped, killed, and always cleared away."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from artifacts.audit import verify
from artifacts.lease import Lease
from artifacts.store import Store
from tasks.identity import CodeReader, stage_payload
from tasks.stage import Stage, StageConfig
from tasks.worker import Spec
from tests.command import environment
from tests.stage_runner import run_stage
from tests.toy_study import PACKAGES
from tests.watched_stage import WatchedConfig, watched

PATIENCE = 240.0
"""Seconds after which something that should have happened is taken to never happen."""


def spec_of(
    store: str,
    config: StageConfig,
    scratch: Path,
    stage: Stage = watched,
    inputs: dict[str, str] | None = None,
    **how: Any,
) -> Spec:
    """What a worker needs to run `stage`, the watched one unless told; checkpoints are made after every step."""
    code = CodeReader(packages=PACKAGES).stage(stage)
    return Spec(
        store=store,
        node="node",
        module=stage.body.__module__,
        attribute=stage.body.__name__,
        config=config.model_dump(mode="json"),
        inputs=inputs or {},
        payload=stage_payload(stage, config, inputs or {}, code),
        symbols=dict(code.symbols),
        scratch=str(scratch),
        **{"checkpoint_seconds": 0.0, **how},
    )


def undisturbed(config: WatchedConfig, folder: Path) -> str:
    """Digest of the output of a body that nothing happened to."""
    notes = folder / "calm-notes"
    notes.mkdir(parents=True, exist_ok=True)
    calm = config.model_copy(update={"notes": str(notes), "gate": -1, "seconds": 0.0})
    return Store.open("memory://calm").put_tree(run_stage(watched, calm, folder / "calm")).digest


def wait_until(condition: Callable[[], Any], what: str) -> Any:
    """Whatever `condition` returns that is true."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        if found := condition():
            return found
        time.sleep(0.005)
    raise AssertionError(f"it never came to this: {what}")


@dataclass(slots=True)
class Worker:
    """One running worker."""

    process: subprocess.Popen[bytes]
    out: Path

    @property
    def pid(self) -> int:
        """Its process id."""
        return self.process.pid

    def messages(self) -> list[dict[str, Any]]:
        """What it has said so far."""
        return [json.loads(line) for line in self.out.read_text().splitlines(keepends=True) if line.endswith("\n")]

    def logged(self) -> str:
        """What it has told people so far."""
        return "\n".join(str(m.get("message", "")) for m in self.messages())

    def ended(self) -> dict[str, Any]:
        """Its last message, once it has ended."""
        wait_until(lambda: self.process.poll() is not None, f"worker {self.pid} ends; it said {self.logged()}")
        said = self.messages()
        return said[-1] if said else {"event": "nothing"}

    def send(self, number: signal.Signals) -> None:
        """Send it a signal; SIGKILL also waits for its end."""
        self.process.send_signal(number)
        if number == signal.SIGKILL:
            self.process.wait()


class Workers:
    """Starts workers below a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.all: list[Worker] = []

    def start(self, spec: Spec, *command: str, **variables: str) -> Worker:
        """A worker for `spec`: `python -m tasks.worker`, or the module and arguments given."""
        name = uuid.uuid4().hex
        path, out = self.folder / f"{name}.json", self.folder / f"{name}.out"
        path.write_text(json.dumps(asdict(spec)))
        module, *more = command or ("tasks.worker",)
        with open(out, "wb") as file:
            process = subprocess.Popen(
                [sys.executable, "-m", module, str(path), *more], stdout=file, env=environment(**variables)
            )
        self.all.append(Worker(process, out))
        return self.all[-1]


@contextmanager
def workers(folder: Path) -> Iterator[Workers]:
    """Every worker that is started in the block is ended with it."""
    folder.mkdir(parents=True, exist_ok=True)
    started = Workers(folder)
    try:
        yield started
    finally:
        for worker in started.all:
            worker.process.kill()
            worker.process.wait()


@dataclass(frozen=True, slots=True)
class Notes:
    """What the bodies of one config have noted."""

    folder: Path

    def lines(self, word: str = "", pid: int | None = None) -> list[list[str]]:
        """The notes that begin with `word`, of one process or of all: word, process id, number of steps."""
        path = self.folder / "notes"
        found = [line.split() for line in path.read_text().splitlines()] if path.exists() else []
        return [line for line in found if word in ("", line[0]) and pid in (None, int(line[1]))]

    def steps(self, pid: int | None = None) -> list[int]:
        """The steps taken."""
        return [int(line[2]) for line in self.lines("step", pid)]

    def open_gate(self) -> None:
        """Let the bodies go on."""
        (self.folder / "open").touch()


def notes_in(folder: Path) -> Notes:
    """Notes in a fresh folder."""
    folder.mkdir(parents=True)
    return Notes(folder)


def checkpoint_step(store: Store, key: str) -> int:
    """The step of the newest checkpoint in the store; 0 when there is none."""
    from artifacts.errors import NotFound

    try:
        body = json.loads(store.backend.get(f"v1/wip/{key}/LATEST").data)
    except NotFound:
        return 0
    return max((int(pointer["step"]) for pointer in body["checkpoints"]), default=0)


def need_nobody(store: Store) -> int:
    """Assert that the store is intact and that each of its leases can be taken at once; the number of leases."""
    found = verify(store)
    assert found.ok, [finding.describe() for finding in found.findings]
    keys = [entry.key.rpartition("/")[2].removesuffix(".json") for entry in store.backend.list("v1/lease/")]
    assert [key for key in keys if not Lease(store.backend, key).try_acquire()] == []
    return len(keys)


def kill(*processes: int) -> None:
    """SIGKILL to each that still is there."""
    for process in processes:
        try:
            os.kill(process, signal.SIGKILL)
        except ProcessLookupError:
            continue
