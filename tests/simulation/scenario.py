"""One schedule: which processes there are, what goes wrong, and how it has to end. Everything follows from the seed.

Workers run a small graph of stages on one to three machines and are started again when they end before their time, until
the accidents are used up. Then a fresh worker on a machine of its own has to finish every key within a bounded time,
whatever the others left behind and whatever rots meanwhile, and processes that were stopped all
along wake up and find that they are no longer needed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

from artifacts.digest import digest_bytes
from artifacts.store import Store
from tasks.worker import Stop
from tests.simulation.collections import LONGEST_WAIT, Collections
from tests.simulation.damage import Damage
from tests.simulation.ledger import TIME_TO_LIVE, Ledger, open_ledger
from tests.simulation.machine import CLOCK, simulated_machine
from tests.simulation.runs import Run
from tests.simulation.scheduler import Process, Turns, World, enter
from tests.simulation.server import Server, SimulatedBackend
from tests.simulation.stages import CountingConfig

ACCIDENTS = ("kill", "stop", "long stop", "clock jumps", "clock set", "asked to stop")
ANY_FAULTS = ("slow", "throttle", "403", "500", "time-out", "outage")
WRITE_FAULTS = ("lost reply", "duplicate", "late")
FAULTS = (*ANY_FAULTS, *WRITE_FAULTS, "409", "412")
RARE = 3
"""How many times more likely a fault is at a request of a kind that there are few of."""
CONDITIONAL = ("create", "swap")
WRITES = ("put", "delete", *CONDITIONAL)
SKEW = 600.0
"""Most seconds by which a machine's wall clock is wrong."""


@dataclass(frozen=True, slots=True)
class Node:
    """One stage of the graph."""

    name: str
    config: CountingConfig
    above: tuple[str, ...]
    deaf: bool


@dataclass(slots=True)
class Plan:
    """What a seed makes of a schedule."""

    nodes: list[Node]
    machines: int
    workers: int
    restarts: int
    collectors: int
    """Collections beside the workers, in a store with a past; 0 for an empty store."""
    rots: int
    """Objects that rot, at random times, also while the fresh worker is at it: no more than a run heals of one output."""
    repairs: int
    """Repairs beside the workers."""
    forgets: int
    """Records that a person forgets beside the workers."""
    brisk: bool
    """True when bodies are short and everybody begins at once, so that writers and collections meet often."""
    switch: float
    rates: dict[str, float]
    """Chance of each accident at a point, and of each fault at a request; absent ones never happen."""
    budget: int
    """Accidents and faults together."""


@dataclass(slots=True)
class Result:
    """How a schedule ended."""

    seed: int
    violations: list[str]
    counts: Counter[str]
    trace: list[str] = field(default_factory=list)


def plan(seed: int) -> Plan:
    """The plan of a seed. One schedule in six is calm; the others have some kinds of accident often and the rest never."""
    rng = Random(f"plan {seed}")
    nodes: list[Node] = []
    brisk = rng.random() < 0.3
    for index in range(rng.choice((1, 1, 2, 3))):
        config = CountingConfig(
            seed=index,
            steps=1 if brisk else rng.randint(1, 7),
            interval=rng.randint(1, 4),
            seconds=0.05 if brisk else rng.choice((0.5, 4.0, 12.0)),
            exact=rng.random() < 0.6,
        )
        above = tuple(node.name for node in nodes if rng.random() < 0.5)
        nodes.append(Node(f"n{index}", config, above, rng.random() < 0.15))
    calm = rng.random() < 1 / 6
    kinds = [kind for kind in (*ACCIDENTS, *FAULTS) if rng.random() < 0.4]
    people = not calm and rng.random() < 0.25
    return Plan(
        nodes=nodes,
        machines=rng.randint(1, 3),
        workers=rng.randint(1, 4),
        restarts=rng.randint(0, 4),
        collectors=rng.choice((0, 0, 0, 1, 2)),
        rots=rng.randint(0, 3) if people else 0,
        repairs=rng.randint(0, 2) if people else 0,
        forgets=rng.randint(0, 2) if people else 0,
        brisk=brisk,
        switch=rng.choice((0.05, 0.3, 0.9)),
        rates={} if calm else {kind: rng.choice((0.003, 0.01, 0.04)) for kind in kinds},
        budget=rng.randint(1, 12),
    )


class Schedule:
    """A world made from a plan, run to its end."""

    def __init__(self, seed: int, plan: Plan, folder: Path, *, trace: bool = False) -> None:
        self.plan = plan
        self.world = World(seed, Turns(self.plan.switch, self._accident), trace=trace)
        self.ledger = open_ledger(Ledger(self.world))
        self.server = Server(self.world, self.ledger, self.ledger.objects)
        self.store = Store(SimulatedBackend(self.world, self.server, self._fault), clock=CLOCK, at_once=1)
        self.folder = folder
        self.rng = Random(f"accidents {seed}")
        self.left = 0
        """Accidents and faults that may still happen."""
        self.restarts = self.plan.restarts
        self.finished: list[Process] = []
        self.named: set[tuple[str, str]] = set()
        """(stage, key) of the records that finished runs name."""
        self.stops: dict[Process, Stop] = {}
        self.skews = [0.0, *(self.rng.uniform(-SKEW, SKEW) for _ in range(self.plan.machines))]

    def run(self) -> None:
        """Everything until nobody is left, and the properties of the end."""
        collections = Collections(self)
        if self.plan.collectors:
            collections.make_past()
        self.left = self.plan.budget
        for _ in range(self.plan.workers):
            self._start_worker(self.delay(20.0) if self.rng.random() < 0.5 else 0.0)
        collections.start()
        damage = Damage(self)
        damage.start()
        self.world.run(until=self._all_idle, before=self.world.now + 4000.0)
        self.left, self.server.down_until = 0, 0.0
        self._finish_with_a_fresh_worker()
        self.world.run()
        if self.plan.rots:
            damage.finish()
            self._finish_with_a_fresh_worker()
        self.ledger.check_end()
        for crash in self.world.crashes:
            self.ledger.violated(f"crash: {crash}")
        self._check_calm()
        if self.plan.collectors:
            collections.finish()

    def _all_idle(self) -> bool:
        return not any(p.alive and p.stopped_until <= self.world.now for p in self.world.processes)

    def _finish_with_a_fresh_worker(self) -> None:
        waits = (
            LONGEST_WAIT * (1 + self.plan.rots + self.plan.repairs) if self.plan.collectors or self.plan.rots else 0.0
        )
        each = [node.config.steps * node.config.seconds + 2 * TIME_TO_LIVE + 30 + 2 * waits for node in self.plan.nodes]
        begun, bound = self.world.now, sum(each)
        last = self._start_worker(0.0, machine="fresh")
        self.world.run(until=lambda: not last.alive, before=begun + bound)
        if last not in self.finished:
            self.ledger.violated(f"no person: a fresh worker did not finish within {bound:.0f} s of the last accident")

    def _check_calm(self) -> None:
        if self.plan.rates:
            return
        for key, bodies in self.ledger.bodies.items():
            if len(bodies) != 1:
                self.ledger.violated(f"once: nothing went wrong, and {len(bodies)} bodies ran for {key[:8]}")

    def delay(self, longest: float) -> float:
        """When a process begins."""
        return self.rng.uniform(0.0, 0.5 if self.plan.brisk else longest)

    # Processes

    def start(self, name: str, machine: str, life: Callable[[], None], delay: float, skew: float = 0.0) -> Process:
        """A process that can be asked to stop."""
        made = self.world.process(name, machine, life, delay=delay, skew=skew)
        self.stops[made] = Stop()
        return made

    def _start_worker(self, delay: float, machine: str = "") -> Process:
        number = self.rng.randrange(self.plan.machines) + 1

        def life() -> None:
            if Run(self, self.plan.nodes, remember=True).run():
                self.finished.append(made)
                self.world.counts["workers that finished"] += 1

        name, skew = f"w{len(self.world.processes)}", 0.0 if machine else self.skews[number]
        made = self.start(name, machine or f"m{number}", life, delay, skew)
        made.on_end = lambda: self._ended(made)
        return made

    def _ended(self, process: Process) -> None:
        if process not in self.finished and self.restarts > 0 and self.left > 0:
            self.restarts -= 1
            self._start_worker(self.rng.uniform(0.0, 90.0))

    # Accidents

    def _accident(self, process: Process, label: str) -> None:
        kind = self._draw(ACCIDENTS)
        if kind is None:
            return
        self.world.counts[kind] += 1
        self.world.note(f"** {kind} at {label[:60]}")
        if kind == "kill":
            self.world.end(process)
        elif kind == "stop":
            process.stopped_until = self.world.now + self.rng.uniform(1.0, 3 * TIME_TO_LIVE)
        elif kind == "long stop":
            process.stopped_until = self.world.now + self.rng.uniform(100.0, 1500.0)
        elif kind == "clock jumps":
            self.world.now += self.rng.uniform(1.0, 2 * TIME_TO_LIVE)
            self.world.resumed = self.world.now
        elif kind == "clock set":
            self._set_clock(process.machine, self.rng.uniform(-SKEW, SKEW))
        else:
            self.stops[process].request("SIGTERM")

    def _set_clock(self, machine: str, skew: float) -> None:
        for process in self.world.processes:
            if process.machine == machine:
                process.skew = skew

    def _fault(self, verb: str, key: str) -> str | None:
        possible = FAULTS
        if verb not in WRITES:
            possible = ANY_FAULTS
        elif verb not in CONDITIONAL:
            possible = ANY_FAULTS + WRITE_FAULTS
        kind = self._draw(possible)
        if kind is not None:
            self.world.counts[kind] += 1
        return kind

    def _draw(self, kinds: tuple[str, ...]) -> str | None:
        if self.left <= 0 or not self.plan.rates:
            return None
        roll = self.rng.random()
        for kind in kinds:
            rate = self.plan.rates.get(kind, 0.0) * (1 if kind in ANY_FAULTS or kind in ACCIDENTS else RARE)
            if roll < rate:
                self.left -= 1
                return kind
            roll -= rate
        return None


def run_schedule(seed: int, *, trace: bool = False, change: Callable[[Plan], Plan] = lambda plan: plan) -> Result:
    """Run the schedule of `seed` to its end, with its plan changed by `change`."""
    with simulated_machine(seed) as folder:
        schedule = Schedule(seed, change(plan(seed)), folder, trace=trace)
        enter(schedule.world)
        try:
            schedule.run()
        except Exception as error:  # noqa: BLE001 - an error in a schedule is a finding with a seed
            schedule.ledger.violated(f"crash: {type(error).__name__}: {error}")
            if trace:
                raise
        finally:
            schedule.world.close()
        world = schedule.world
        world.counts["bodies"] += sum(len(bodies) for bodies in schedule.ledger.bodies.values())
        world.counts["steps"] += schedule.ledger.steps
        return Result(seed, schedule.ledger.violations, world.counts, world.trace or [])


def fingerprint(result: Result) -> str:
    """Digest of everything that happened in a traced schedule."""
    return digest_bytes("\n".join(result.trace).encode())
