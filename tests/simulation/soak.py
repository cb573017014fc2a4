"""Many schedules, in several processes."""

from __future__ import annotations

import multiprocessing
from collections import Counter

from tests.simulation.scenario import Result, run_schedule

SHARE = 50
"""Schedules that a process takes at a time."""


def run_many(first: int, number: int) -> tuple[Counter[str], list[Result]]:
    """Schedules `first` to `first + number - 1`: the sums of what happened, and those with a violation."""
    counts: Counter[str] = Counter()
    failed: list[Result] = []
    for seed in range(first, first + number):
        result = run_schedule(seed)
        counts += result.counts
        if result.violations:
            failed.append(result)
            print(explain(result), flush=True)
    return counts, failed


def run_in_processes(first: int, number: int, processes: int) -> tuple[Counter[str], list[Result]]:
    """`run_many`, shared by several processes."""
    end = first + number
    tasks = [(seed, min(SHARE, end - seed)) for seed in range(first, end, SHARE)]
    counts: Counter[str] = Counter()
    failed: list[Result] = []
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        for some, bad in pool.imap_unordered(_share, tasks):
            counts += some
            failed += bad
    return counts, failed


def explain(result: Result) -> str:
    """What went wrong in a schedule, and the command that shows how it came to that."""
    lines = [f"seed {result.seed}: {text}" for text in result.violations[:3]]
    return "\n".join([*lines, f"    python -m tests.simulation --seed {result.seed} --trace"])


def _share(task: tuple[int, int]) -> tuple[Counter[str], list[Result]]:
    return run_many(*task)
