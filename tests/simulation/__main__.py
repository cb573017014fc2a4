"""Run many schedules, or one with its trace."""

from __future__ import annotations

import argparse
import os
import sys
import time

from tests.simulation.scenario import run_schedule
from tests.simulation.soak import run_in_processes


def main() -> int:
    """The command line. Status 1 when a property was violated."""
    parser = argparse.ArgumentParser(prog="python -m tests.simulation", description=__doc__)
    parser.add_argument("--schedules", type=int, default=10_000, help="how many (10000)")
    parser.add_argument("--first", type=int, default=0, help="seed of the first one (0)")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1, help="at a time (one a core)")
    parser.add_argument("--seed", type=int, help="run this one schedule only")
    parser.add_argument("--trace", action="store_true", help="with --seed: print everything that happened")
    options = parser.parse_args()
    if options.seed is not None:
        return _one(options.seed, options.trace)
    started = time.monotonic()
    counts, failed = run_in_processes(options.first, options.schedules, options.processes)
    seconds = time.monotonic() - started
    print(f"{options.schedules} schedules from seed {options.first} in {seconds:.0f} s, {len(failed)} with a violation")
    for name, number in counts.most_common():
        print(f"{number:12d}  {name}")
    return 1 if failed else 0


def _one(seed: int, trace: bool) -> int:
    result = run_schedule(seed, trace=trace)
    print("\n".join(result.trace))
    print(dict(result.counts))
    print("\n".join(result.violations) or "no property was violated")
    return 1 if result.violations else 0


if __name__ == "__main__":
    sys.exit(main())
