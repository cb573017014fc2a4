"""Simulated processes, one running at a time: who goes on next, and when somebody is stopped or dies, follows from a seed.

Every thread of a simulated process is a greenlet. It gives up control only at a *point*: a store call, a sleep, a wait, a
step of a body. Time is virtual: it moves a little at every point, and jumps when everybody waits. A killed process is
never resumed, so that none of its `finally` blocks runs before the schedule is over; after that they have no effect.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any

from greenlet import getcurrent, greenlet

from artifacts.clock import Clock

EPOCH = 1_790_000_000.0
"""Unix time at which every schedule begins."""


class Ended(BaseException):
    """Unwinds a thread of a process that no longer exists."""


LONGEST = 200_000
"""Turns after which a schedule is taken for one that never ends; they have some hundreds."""


class Deadlock(Exception):
    """Everybody waits for something that will never happen, or somebody goes round in circles."""


@dataclass(eq=False, slots=True)
class Process:
    """One operating-system process on one machine."""

    name: str
    machine: str
    pid: int
    skew: float = 0.0
    """Seconds by which the machine's wall clock is ahead."""
    alive: bool = True
    ended_at: float | None = None
    stopped_until: float = 0.0
    """Virtual time until which the process is stopped, as by SIGSTOP."""
    on_end: Callable[[], None] = lambda: None
    """Called once, outside of any process, when this one ended or was killed."""
    immortal: bool = False
    """True for what is no process of ours: the network, which delivers late requests of the dead."""

    @property
    def identity(self) -> dict[str, object]:
        """What identifies it to the others on its machine."""
        return {"machine": self.machine, "pid": self.pid, "started": self.pid}


@dataclass(eq=False, slots=True)
class Thread:
    """A thread of a simulated process."""

    process: Process
    name: str
    run: greenlet
    wake: float | None
    """Virtual time at which it goes on; None while it waits for `condition` only."""
    condition: Callable[[], bool] | None = None
    done: bool = False

    def ready(self, now: float) -> bool:
        """True when it may go on."""
        if self.process.stopped_until > now:
            return False
        return (self.wake is not None and self.wake <= now) or (self.condition is not None and self.condition())

    def join(self) -> None:
        """Wait, inside the simulation, until it has ended."""
        world().wait(lambda: self.done, None)

    def cancel(self) -> None:
        """See that it does not begin, if it has not."""
        if not self.run:
            self.done = True


@dataclass(slots=True)
class Turns:
    """How the scheduler picks: the chance of a change at a point, and of an accident there."""

    switch: float = 0.3
    accidents: Callable[[Process, str], None] = lambda process, label: None
    """Called at every point of a process; may kill or stop it, or move the clock."""


class World:
    """Processes, their threads, and virtual time."""

    def __init__(self, seed: int, turns: Turns, *, trace: bool = False) -> None:
        self.seed = seed
        self.rng = Random(seed)
        self.turns = turns
        self.now = 0.0
        self.resumed = float("-inf")
        """Last time at which the clock jumped for everybody."""
        self.counts: Counter[str] = Counter()
        self.processes: list[Process] = []
        self.threads: list[Thread] = []
        self.trace: list[str] | None = [] if trace else None
        self.crashes: list[str] = []
        self._buried: list[Thread] = []
        self._closed = False
        self._turns = 0
        self._hub = getcurrent()
        self._current: Thread | None = None
        self._network = Process("network", "network", 0, immortal=True)

    # From outside: starting processes and letting time pass

    def process(
        self, name: str, machine: str, life: Callable[[], None], *, delay: float = 0.0, skew: float = 0.0
    ) -> Process:
        """A new process on `machine`, which begins `life` after `delay` seconds."""
        made = Process(name, machine, 100 + len(self.processes), skew)
        self.processes.append(made)

        def whole_life() -> None:
            life()
            self.end(made)

        self._thread(made, whole_life, "main", self.now + delay)
        return made

    def later(self, seconds: float, effect: Callable[[], None]) -> None:
        """Have `effect` happen in `seconds`, whoever is dead or stopped by then."""
        self._thread(self._network, effect, "late request", self.now + seconds)

    def run(self, until: Callable[[], bool] = lambda: False, before: float = float("inf")) -> None:
        """Let processes take turns until `until()`, the virtual time `before`, or nobody is left."""
        while not until() and self.now < before:
            living = [thread for thread in self.threads if not thread.done and thread.process.alive]
            self.threads = living
            ready = [thread for thread in living if thread.ready(self.now)]
            if not ready:
                wakes = [max(t.wake, t.process.stopped_until) for t in living if t.wake is not None]
                wakes += [t.process.stopped_until for t in living if t.process.stopped_until > self.now]
                if not wakes:
                    if living:
                        raise Deadlock(f"waiting for ever: {[f'{t.process.name} {t.name}' for t in living]}")
                    return
                self.now = max(self.now, min(min(wakes), before))
                continue
            self._turns += 1
            if self._turns > LONGEST:
                raise Deadlock(f"{LONGEST} turns, and no end; at work: {[f'{t.process.name} {t.name}' for t in ready]}")
            self._switch(ready[self.rng.randrange(len(ready))])

    def close(self) -> None:
        """Unwind what is left of every process, without any effect."""
        self._closed = True
        for thread in [*self._buried, *self.threads]:
            if thread.run:
                thread.run.throw(Ended)
        self._buried.clear()
        self.threads.clear()

    # From inside a process

    @property
    def current(self) -> Process:
        """The process whose code is running."""
        return self._network if self._current is None else self._current.process

    @property
    def inside(self) -> bool:
        """True while the code of a process is running."""
        return self._current is not None

    def note(self, text: str) -> None:
        """Add a line to the trace."""
        if self.trace is not None:
            name = f"{self.current.name}/{self._current.name}" if self._current is not None else "-"
            self.trace.append(f"{self.now:10.3f} {name:28s} {text}")

    def point(self, label: str) -> None:
        """A moment at which others may go on, and accidents happen."""
        self._unwind()
        process = self.current
        self.now += 0.002
        if process.immortal:
            return
        self.turns.accidents(process, label)
        if process.stopped_until > self.now or self.rng.random() < self.turns.switch:
            self.wait(None, 0.0)

    def wait(self, condition: Callable[[], bool] | None, seconds: float | None) -> None:
        """Let others go on until `condition()` holds or `seconds` have passed."""
        self._unwind()
        thread = self._current
        assert thread is not None
        thread.condition = condition
        thread.wake = None if seconds is None else self.now + seconds
        self._hub.switch()

    def start(self, action: Callable[[], Any], name: str, delay: float = 0.0) -> Thread:
        """A further thread of the running process."""
        self._unwind()
        return self._thread(self.current, action, name, self.now + delay)

    def end(self, process: Process) -> None:
        """The process ends here and now; what it was doing stays half done. Does not return to a process that ends itself."""
        if process.alive:
            self.note(f"-- {process.name} ends")
            process.alive, process.ended_at = False, self.now
            self._buried += [thread for thread in self.threads if thread.process is process and not thread.done]
            process.on_end()
        if self._current is not None and self._current.process is process:
            self._hub.switch()

    def _unwind(self) -> None:
        """Nothing has an effect any more once a schedule is over."""
        if self._closed or not self.current.alive:
            raise Ended

    def _thread(self, process: Process, action: Callable[[], Any], name: str, wake: float) -> Thread:
        def body() -> None:
            try:
                action()
            except Ended:
                pass
            except BaseException as error:  # noqa: BLE001 - no thread of ours may end by an error
                self.crashes.append(f"{process.name}/{name}: {type(error).__name__}: {error}")
            finally:
                thread.done = True

        thread = Thread(process, name, greenlet(body, self._hub), wake)
        self.threads.append(thread)
        return thread

    def _switch(self, thread: Thread) -> None:
        thread.condition = thread.wake = None
        self._current = thread
        try:
            thread.run.switch()
        finally:
            self._current = None


_WORLD: list[World] = []


def world() -> World:
    """The simulation that is running."""
    return _WORLD[-1]


def enter(new: World) -> None:
    """Make `new` the simulation that is running."""
    _WORLD[:] = [new]


class SimulatedClock(Clock):
    """Virtual time and simulated threads of whichever process is running."""

    def monotonic(self) -> float:
        return world().now + 1000.0 * world().current.pid

    def time(self) -> float:
        return EPOCH + world().now + world().current.skew

    def sleep(self, seconds: float) -> None:
        world().wait(None, seconds)
        world().point("wake up")

    def wait(self, event: threading.Event, seconds: float) -> bool:
        if not event.is_set():
            world().wait(event.is_set, max(0.0, seconds))
        return event.is_set()

    def start(self, action: Callable[[], None], name: str) -> Thread:
        return world().start(action, name)

    def later(self, seconds: float, action: Callable[[], None]) -> Thread:
        return world().start(action, "timer", seconds)
