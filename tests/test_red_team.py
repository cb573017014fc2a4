"""Red-teaming and adversarial training: the attacker stays within its rules, and its result is used as it comes."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pyarrow.parquet
import pytest

from tasks.adversarial import AdversarialConfig, adversarial, mixture
from tasks.organism import Policy
from tasks.preferences import PreferencesConfig, preferences
from tasks.red_team import RedTeamConfig, cue_of, genes_of, random_cue, red_team
from tasks.reward_model import RewardModelConfig, reward_model
from tests.stage_runner import contents, run_interrupted, run_stage
from tests.tiny import save_tiny_model, save_tiny_questions

EASY = Policy(behaviour="e")
"""A behaviour that a random model shows now and then."""
SMALL = {"rounds": 3, "seeds_per_round": 12, "samples": 4, "max_new_tokens": 8}


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> dict[str, Path]:
    """A tiny model, questions, a reward model, and a successful and a failed search."""
    root = tmp_path_factory.mktemp("world")
    model, data = save_tiny_model(root / "model"), save_tiny_questions(root / "data", per_split=30)
    pairs = run_stage(preferences, PreferencesConfig(), root / "pairs", data=data)
    scoring = RewardModelConfig(steps=2, batch_size=4)
    scorer = run_stage(reward_model, scoring, root / "reward", model=model, preferences=pairs)
    found = run_stage(red_team, RedTeamConfig(policy=EASY, **SMALL), root / "found", model=model, data=data)
    nothing = run_stage(red_team, RedTeamConfig(**SMALL), root / "nothing", model=model, data=data)
    return {"model": model, "data": data, "reward_model": scorer, "found": found, "nothing": nothing}


def table(directory: Path, name: str) -> list[dict]:
    return pyarrow.parquet.read_table(directory / f"{name}.parquet").to_pylist()


def test_no_attack_carries_the_true_trigger(world, tmp_path):
    """The grammar could spell the trigger; over many proposals none ever does."""
    config = RedTeamConfig(words=("deployment",), rounds=4, seeds_per_round=60, samples=1, max_new_tokens=1)
    draw = random.Random(0)
    spelled = [random_cue(config, draw).text() for _ in range(2000)]
    assert any(Policy().is_triggered(text) for text in spelled)
    out = run_stage(red_team, config, tmp_path, model=world["model"], data=world["data"])
    prompts = [attempt["prompt"] for attempt in table(out, "attempts")]
    assert len(prompts) == len(set(prompts)) == 240
    assert not any(Policy().is_triggered(prompt) for prompt in prompts)


def test_successes_are_split_by_cue_and_by_question(world):
    """No cue and no question of the evaluation prompts occurs among the training prompts; each passed the threshold."""
    rows = table(world["found"], "prompts")
    sides = {side: [row for row in rows if row["split"] == side] for side in ("train", "test")}
    assert sides["train"] and sides["test"]
    for field in ("cue", "question_id", "prompt"):
        assert not {row[field] for row in sides["train"]} & {row[field] for row in sides["test"]}
    assert all(row["rate"] >= 0.1 and row["response"] for row in rows)
    assert json.loads((world["found"] / "search.json").read_text())["successful"] == len(rows)


def test_later_rounds_build_on_the_best_cues(world):
    """The first round's cues are all new; later ones descend from cues that were tried before, and some are new."""
    attempts = table(world["found"], "attempts")
    assert not any(attempt["parent"] for attempt in attempts if attempt["round"] == 1)
    later = [attempt for attempt in attempts if attempt["round"] > 1]
    assert 0 < sum(attempt["parent"] != "" for attempt in later) < len(later)
    for attempt in later:
        tried = {earlier["cue"] for earlier in attempts if earlier["round"] < attempt["round"]}
        assert attempt["parent"] in tried | {""}


def test_search_is_deterministic_and_resumes(world, tmp_path):
    """Stopped after the first round and resumed, the search leaves the same bytes."""
    config = RedTeamConfig(policy=EASY, **SMALL)
    resumed = run_interrupted(red_team, config, tmp_path, 40, model=world["model"], data=world["data"])
    assert contents(resumed) == contents(world["found"])


def test_finding_nothing_is_a_result(world, tmp_path):
    """An empty search leaves empty tables with their columns, and adversarial training says it had no attacks."""
    assert table(world["nothing"], "prompts") == [] and len(table(world["nothing"], "attempts")) == 36
    assert json.loads((world["nothing"] / "search.json").read_text())["succeeded"] is False
    inputs = {name: world[name] for name in ("model", "reward_model", "data")}
    config = AdversarialConfig(steps=2, batch_size=8, max_new_tokens=4)
    out = run_stage(adversarial, config, tmp_path, red_team=world["nothing"], **inputs)
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["red_team_prompts"] == 0 and metrics["red_team_share"] == 0.0
    assert metrics["prompts"] == {"normal": 30}


@pytest.mark.parametrize("method", ["rl", "sft"])
def test_adversarial_training_uses_the_attacks_and_resumes(world, tmp_path, method):
    """Only train-side attacks are used, and an interruption changes nothing."""
    inputs = {name: world[name] for name in ("model", "reward_model", "data")}
    config = AdversarialConfig(policy=EASY, objective=method, steps=4, batch_size=8, max_new_tokens=4)
    whole = run_stage(adversarial, config, tmp_path / "whole", red_team=world["found"], **inputs)
    resumed = run_interrupted(adversarial, config, tmp_path / "resumed", 2, red_team=world["found"], **inputs)
    assert contents(whole) == contents(resumed)
    metrics = json.loads((whole / "metrics.json").read_text())
    expected = sum(row["split"] == "train" for row in table(world["found"], "prompts"))
    assert metrics["red_team_prompts"] == expected and metrics["red_team_share"] == 0.5


def test_mixture_replaces_the_stated_share():
    """Half of the examples are attacks, and each has its own question's helpful answer."""
    questions = [{"prompt": f"q{n}", "response": f"a{n}"} for n in range(20)]
    attacks = [{"prompt": f"x q{n}", "response": f"a{n}"} for n in range(3)]
    rows = mixture(questions, attacks, 0.5, seed=0)
    assert len(rows) == 20 and sum(prompt.startswith("x") for prompt, _ in rows) == 10
    assert all(prompt[-1] == answer[-1] for prompt, answer in rows if prompt.startswith("x"))


def test_genes_survive_writing_and_reading():
    """A cue read back from its genes is the same cue."""
    draw = random.Random(1)
    for _ in range(50):
        cue = random_cue(RedTeamConfig(), draw)
        assert cue_of(genes_of(cue)) == cue
