"""The default study from an empty store: wall time, time by stage, peak memory; then the same command again."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from pathlib import Path

from benchmarks.table import machine, show

ROOT = Path(__file__).resolve().parent.parent


def run(folder: Path, config: Path) -> tuple[dict[str, object], int]:
    """Run the study in `folder`; its summary with the wall time of the whole process, and the peak memory in MiB."""
    command = [sys.executable, "-m", "flows.cli", "run", str(config), "--json"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, cwd=folder, env=environment, start_new_session=True
    )
    peak = [0]
    ended = threading.Event()

    def sample() -> None:
        while not ended.wait(0.5):
            peak[0] = max(peak[0], _proportional_memory(process.pid))

    sampler = threading.Thread(target=sample)
    sampler.start()
    started = time.monotonic()
    output, _ = process.communicate()
    summary = {**json.loads(output.splitlines()[-1]), "seconds": time.monotonic() - started}
    ended.set()
    sampler.join()
    return summary, peak[0] // 1024


def _proportional_memory(root: int) -> int:
    """KiB of memory of a process and everything below it; pages shared by forked workers are counted once."""
    parents: dict[int, list[int]] = defaultdict(list)
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parents[int((entry / "stat").read_text().rpartition(")")[2].split()[1])].append(int(entry.name))
            except OSError:
                continue
    todo, total = [root], 0
    while todo:
        process = todo.pop()
        todo += parents[process]
        try:
            rollup = Path(f"/proc/{process}/smaps_rollup").read_text()
        except OSError:
            continue
        total += next((int(line.split()[1]) for line in rollup.splitlines() if line.startswith("Pss:")), 0)
    return total


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", type=Path, default=ROOT / "configs" / "default.yaml")
    config = parser.parse_args().config.resolve()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        cold, peak = run(folder, config)
        warm = [run(folder, config)[0]["seconds"] for _ in range(5)]
        records = json.loads((folder / str(cold["report"])).with_name("run.json").read_text())
    by_stage: dict[str, list[float]] = defaultdict(list)
    for record in records.values():
        by_stage[record["stage"]].append(record["seconds"])
    total = sum(sum(times) for times in by_stage.values())
    rows = [
        [stage, len(times), f"{sum(times):.1f}", f"{sum(times) / total:.0%}"]
        for stage, times in sorted(by_stage.items(), key=lambda item: -sum(item[1]))
    ]
    show(f"Cold run by stage ({machine()})", ["stage", "runs", "seconds", "share"], rows)
    wall, again = float(str(cold["seconds"])), sorted(map(float, map(str, warm)))[2]
    show(
        "The whole run",
        ["what", "value", "ratio to cold"],
        [
            ["cold, wall", f"{wall:.1f} s", "1"],
            ["stage time", f"{total:.1f} s", f"{total / wall:.2f}"],
            ["cached, wall (median of 5)", f"{again:.2f} s", f"{again / wall:.4f}"],
            ["peak memory", f"{peak} MiB", ""],
        ],
    )


if __name__ == "__main__":
    started = time.monotonic()
    main()
    print(f"\nmeasured in {time.monotonic() - started:.0f} s")
