"""A process that has the training stack imported already, and forks one worker per stage from it.

Importing torch, transformers, trl and peft takes seconds; a forked child has them in milliseconds. The nursery itself
never opens a store and never touches an accelerator, since both break in children forked afterwards. It speaks JSON
lines: a spec comes in on standard input, the messages of its workers go out on standard output, each with the job's id.

When standard input ends, because the run finished or was killed, running workers are asked to stop: they save a
checkpoint, give their lease back, and end. So a killed run leaves nothing running.

    python -m tasks.nursery [--preload]
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.machinery
import json
import os
import selectors
import signal
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tasks.worker import Spec, Stop, execute, install_signals

GRACE_SECONDS = 60.0
"""How long workers may take to save a checkpoint once asked to stop, before they are killed."""
PRELOAD = (
    "torch",
    "pyarrow.parquet",
    "transformers.models.llama.modeling_llama",
    "transformers.trainer",
    "trl.trainer.sft_trainer",
    "trl.trainer.dpo_trainer",
    "trl.trainer.reward_trainer",
    "peft",
)


class Nursery:
    """Forks workers and relays their messages."""

    def __init__(self, out: int) -> None:
        self._out = out
        self._selector = selectors.DefaultSelector()
        self._buffers: dict[int, bytes] = {}
        self._parent = os.getppid()
        self._guarded: list[int] = []
        """Processes that must not outlive the run, should it be killed."""
        self._jobs: dict[int, tuple[str, int]] = {}
        """Read end of a worker's pipe -> (job id, process id)."""

    def serve(self) -> None:
        """Fork and relay until standard input ends, then let the workers stop."""
        self._watch(0)
        while self._selector.get_map():
            for ready, _ in self._selector.select():
                self._read(ready.fd)
            if 0 not in self._buffers:
                break
        self._stop_all()

    def _watch(self, descriptor: int) -> None:
        self._buffers[descriptor] = b""
        self._selector.register(descriptor, selectors.EVENT_READ)

    def _read(self, descriptor: int) -> None:
        chunk = os.read(descriptor, 1 << 16)
        if not chunk:
            self._closed(descriptor)
            return
        *lines, self._buffers[descriptor] = (self._buffers[descriptor] + chunk).split(b"\n")
        for line in lines:
            if descriptor == 0:
                self._command(json.loads(line))
            else:
                self._emit(self._jobs[descriptor][0], json.loads(line))

    def _command(self, command: dict[str, Any]) -> None:
        if "guard" in command:
            self._guarded.append(command["guard"])
            return
        receive, send = os.pipe()
        process = os.fork()
        if process == 0:
            for inherited in (receive, self._out, *self._jobs):
                os.close(inherited)
            _become_worker(Spec(**command["spec"]), send)
        os.close(send)
        self._jobs[receive] = (command["job"], process)
        self._watch(receive)

    def _closed(self, descriptor: int) -> None:
        self._selector.unregister(descriptor)
        del self._buffers[descriptor]
        if descriptor == 0:
            return
        os.close(descriptor)
        job, process = self._jobs.pop(descriptor)
        _, status = os.waitpid(process, 0)
        self._emit(job, {"event": "exit", "status": os.waitstatus_to_exitcode(status)})

    def _emit(self, job: str, message: dict[str, Any]) -> None:
        try:
            os.write(self._out, json.dumps({"job": job, **message}).encode() + b"\n")
        except BrokenPipeError:
            pass

    def _stop_all(self) -> None:
        if os.getppid() != self._parent:
            for process in self._guarded:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process, signal.SIGTERM)
        deadline = time.monotonic() + GRACE_SECONDS
        for _, process in self._jobs.values():
            os.kill(process, signal.SIGTERM)
        while self._jobs and (left := deadline - time.monotonic()) > 0:
            for ready, _ in self._selector.select(left):
                self._read(ready.fd)
        for _, process in self._jobs.values():
            os.kill(process, signal.SIGKILL)


def _become_worker(spec: Spec, descriptor: int) -> None:
    """The forked child's whole life. Never returns."""
    status = 1
    try:
        stop = Stop()
        install_signals(stop)
        null = os.open(os.devnull, os.O_RDONLY)
        os.dup2(null, 0)
        lock = threading.Lock()

        def send(message: dict[str, Any]) -> None:
            line = json.dumps(message).encode() + b"\n"
            try:
                with lock:
                    while line:
                        line = line[os.write(descriptor, line) :]
            except BrokenPipeError:
                stop.request("the run that started this worker is gone")

        _pin_hardware(spec)
        status = execute(spec, send, stop)
    finally:
        os._exit(status)


def _pin_hardware(spec: Spec) -> None:
    if spec.accelerator is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = spec.accelerator
    if (torch := sys.modules.get("torch")) is not None:
        torch.set_num_threads(spec.threads)


class _UncachedLoader(importlib.machinery.SourceFileLoader):
    """Compiles source as it is now. Cached byte code is trusted by size and second: too coarse for what a key promises."""

    def path_stats(self, path: str) -> Mapping[str, Any]:
        raise OSError(f"{path}: byte code of the project is not cached in workers")


def _compile_project_afresh() -> None:
    """Make later imports from the project's folder ignore cached byte code."""
    root = str(Path(__file__).resolve().parent.parent)
    packages = tuple(os.path.join(root, name) for name in ("artifacts", "tasks", "tests"))
    hook = importlib.machinery.FileFinder.path_hook((_UncachedLoader, importlib.machinery.SOURCE_SUFFIXES))

    def project_only(path: str) -> Any:
        if path != root and not path.startswith(packages):
            raise ImportError(path)
        return hook(path)

    sys.path_hooks.insert(0, project_only)
    sys.path_importer_cache.clear()


def main() -> None:
    """Import what workers will need, say so, and serve."""
    # Messages get a descriptor of their own: whatever a library prints goes to standard error.
    out = os.dup(1)
    os.dup2(2, 1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if "--preload" in sys.argv:
        for name in PRELOAD:
            importlib.import_module(name)
    _compile_project_afresh()
    Nursery(out).serve()


if __name__ == "__main__":
    main()
