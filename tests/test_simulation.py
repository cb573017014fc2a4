"""Schedules of the crash simulation: no property of the protocol is violated, whatever the seed. See `tests.simulation`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.simulation.mutations import MUTATIONS, first_seed_that_sees
from tests.simulation.scenario import ACCIDENTS, FAULTS, plan, run_schedule
from tests.simulation.soak import explain, run_many

ROOT = Path(__file__).resolve().parent.parent
SCHEDULES = 500
SHARES = 2
ENOUGH = 500
"""Schedules within which a mutation has to be seen; each is within a hundred or so."""


@pytest.mark.parametrize("share", range(SHARES))
def test_no_schedule_violates_a_property(share: int) -> None:
    """Workers that are killed, stopped and cut off keep every property; a failing seed is printed with its replay."""
    number = SCHEDULES // SHARES
    counts, failed = run_many(share * number, number)
    assert not failed, "\n" + "\n".join(explain(result) for result in failed[:5])
    assert min(counts[kind] for kind in (*ACCIDENTS, *FAULTS)) > 0
    assert counts["bodies"] > number and counts["workers that finished"] > number


def test_calm_schedules_run_every_body_once() -> None:
    """Where nothing goes wrong, any number of workers on skewed clocks run each body exactly once."""
    plans = {seed: plan(seed) for seed in range(2000)}
    calm = [seed for seed, p in plans.items() if not p.rates and p.workers > 2 and not p.collectors][:10]
    assert len(calm) == 10
    for seed in calm:
        result = run_schedule(seed)
        assert not result.violations and result.counts["bodies"] == len(plans[seed].nodes), f"seed {seed}"


def test_a_seed_is_a_schedule() -> None:
    """The trace of a seed is the same in another process with another hash seed, so a failure can be replayed."""
    seeds = [seed for seed in range(40) if plan(seed).rates][:4]
    code = "from tests.simulation.scenario import *; " + "; ".join(
        f"print(fingerprint(run_schedule({seed}, trace=True)))" for seed in seeds
    )
    seen = set()
    for hash_seed in ("0", "7"):
        env = {**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(
            [sys.executable, "-c", code], env=env, cwd=ROOT, capture_output=True, text=True, check=True
        )
        seen.add(done.stdout)
    assert len(seen) == 1 and len(set(next(iter(seen)).split())) == len(seeds)


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_broken_protocol_is_seen(name: str) -> None:
    """Without any one precaution of the protocol, some schedule soon violates the very property that it is for."""
    assert first_seed_that_sees(MUTATIONS[name], ENOUGH) is not None
