"""What the code under test takes from its machine, all from the seed: names, clocks, processes, threads, temporary folders."""

from __future__ import annotations

import random
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from random import Random
from typing import Any
from unittest import mock

from artifacts import audit, condemned, intent, lease, retry, scratch, trail
from tests.simulation.scheduler import SimulatedClock, world

CLOCK = SimulatedClock()


class _OneThread:
    """A pool that does everything in the thread that asks for it."""

    def __init__(self, workers: int) -> None:
        pass

    def __enter__(self) -> _OneThread:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def map(self, action: Callable[[Any], Any], every: Iterable[Any]) -> Iterator[Any]:
        """What `action` returns for each."""
        return iter([action(one) for one in every])


@contextmanager
def simulated_machine(seed: int) -> Iterator[Path]:
    """Names, processes and the temporary folder of the code under test follow from the seed, and nothing else does."""
    names = Random(f"names {seed}")
    state = random.getstate()
    random.seed(seed)

    def this_process() -> dict[str, object]:
        return world().current.identity

    def is_gone(holder: dict[str, object]) -> bool:
        here = world().current
        same = [p for p in world().processes if p.identity == holder]
        return holder.get("machine") == here.machine and bool(same) and not same[0].alive

    folder = Path(tempfile.mkdtemp(prefix="simulation-", dir=_memory_folder()))
    fakes = {"this_process": this_process, "is_gone": is_gone}
    try:
        with mock.patch.object(uuid, "uuid4", lambda: uuid.UUID(int=names.getrandbits(128), version=4)):
            with mock.patch.multiple(lease, **fakes), mock.patch.multiple(scratch, **fakes):
                with (
                    mock.patch.object(intent, "is_gone", is_gone),
                    mock.patch.object(condemned, "this_process", this_process),
                    mock.patch.multiple(retry, pause=CLOCK.sleep, time=CLOCK),
                    mock.patch.object(trail, "time", CLOCK),
                    mock.patch.object(audit, "ThreadPoolExecutor", _OneThread),
                ):
                    yield folder
    finally:
        random.setstate(state)
        shutil.rmtree(folder, ignore_errors=True)


@cache
def _memory_folder() -> str | None:
    return "/dev/shm" if Path("/dev/shm").is_dir() else None
