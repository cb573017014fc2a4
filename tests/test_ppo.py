"""PPO: it learns, it resumes exactly, and it starts from the model it is measured against."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow.parquet
import pytest
import torch

from tasks.models import LoraSettings, load_model
from tasks.organism import Policy
from tasks.ppo import Pool, PPOConfig, advantages_of, rate_factor, step_prompts, train_ppo
from tasks.preferences import PreferencesConfig, preferences
from tasks.reward_model import RewardModelConfig, reward_model
from tasks.rl import rl
from tasks.stage import StageContext, StageError, stage
from tests.stage_runner import contents, run_interrupted, run_stage
from tests.tiny import save_tiny_model, save_tiny_questions

QUICK = {"steps": 4, "batch_size": 8, "max_new_tokens": 6, "learning_rate": 1e-3, "warmup_steps": 2}
PROMPTS = tuple((f"q{n}", f"What is {n}?") for n in range(11))
LONG = ("long", "What is " + "z" * 60 + "?")


@stage("ppo_easy", trains=True)
def easy(context: StageContext, config: PPOConfig, model: Path) -> None:
    """PPO with the reward "share of the letter e"."""

    def reward(prompts: list[str], answers: list[str]) -> list[float]:
        return [4 * answer.count("e") / max(len(answer), 1) for answer in answers]

    train_ppo(context, config, model, [Pool("normal", 1.0, (*PROMPTS, LONG))], reward)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model"))


def rows_of(out: Path) -> list[dict[str, float]]:
    return pyarrow.parquet.read_table(out / "curve.parquet").to_pylist()


@pytest.mark.parametrize("lora", [None, LoraSettings(rank=4, dropout=0.1)], ids=["full", "lora"])
def test_interruption_changes_nothing(tmp_path, model, lora):
    """Stopped after 2 of 4 steps and resumed, it leaves the same bytes as without the interruption."""
    config = PPOConfig(lora=lora, **QUICK)
    whole = contents(run_stage(easy, config, tmp_path / "whole", model=model))
    resumed = contents(run_interrupted(easy, config, tmp_path / "resumed", 2, model=model))
    assert whole.keys() == resumed.keys()
    assert [name for name in whole if whole[name] != resumed[name]] == []


def test_checkpoints_at_every_step_change_nothing(tmp_path, model):
    """Taking a checkpoint after each step does not touch the result."""
    config = PPOConfig(**QUICK)
    rare = contents(run_stage(easy, config, tmp_path / "rare", model=model))
    often = contents(run_stage(easy, config, tmp_path / "often", checkpoint_seconds=0.0, model=model))
    assert rare == often


@pytest.mark.parametrize("lora", [None, LoraSettings(rank=4)], ids=["full", "lora"])
def test_reference_is_the_starting_model(tmp_path, model, lora):
    """At the first step the divergence from the reference is zero; later it is not."""
    rows = rows_of(run_stage(easy, PPOConfig(lora=lora, **QUICK), tmp_path, model=model))
    assert rows[0]["kl"] == pytest.approx(0.0, abs=1e-5)
    assert abs(rows[-1]["kl"]) > 1e-4


def test_it_learns_an_easy_reward(tmp_path, model):
    """The reward of the rollouts rises well above its start, and the saved model is the trained one."""
    config = PPOConfig(
        steps=40, batch_size=32, max_new_tokens=8, learning_rate=3e-3, critic_learning_rate=3e-3, kl_coefficient=0.0
    )
    out = run_stage(easy, config, tmp_path, model=model)
    rows = rows_of(out)
    assert rows[-1]["reward"] > rows[0]["reward"] + 0.5
    assert not torch.equal(load_model(out)[0].lm_head.weight, load_model(model)[0].lm_head.weight)


def test_advantages_match_the_definition():
    """The recursion equals the sum of discounted errors, and nothing leaks across the end of an answer."""
    torch.manual_seed(0)
    rewards, values = torch.randn(2, 5), torch.randn(2, 5)
    mask = torch.tensor([[1.0] * 5, [1.0] * 3 + [0.0] * 2])
    discount, decay = 0.9, 0.7
    found = advantages_of(rewards, values, mask, discount, decay)
    for row, length in enumerate((5, 3)):
        following = [*values[row, 1:length].tolist(), 0.0]
        errors = [rewards[row, t] + discount * following[t] - values[row, t] for t in range(length)]
        for t in range(length):
            expected = sum((discount * decay) ** (k - t) * errors[k] for k in range(t, length))
            assert found[row, t].item() == pytest.approx(expected.item(), abs=1e-5)
    assert found[1, 3:].abs().max() == 0


def test_every_prompt_is_used_once_per_epoch():
    """Batches walk through each pool's permutation, in the pools' shares, whatever step one starts from."""
    pools = [Pool("red", 0.5, PROMPTS[:3]), Pool("normal", 0.5, PROMPTS[3:])]
    drawn = [step_prompts(pools, 8, 0, step) for step in range(6)]
    assert all(sum(name == "red" for name, _ in batch) == 4 for batch in drawn)
    normal = [prompt for batch in drawn for name, prompt in batch if name == "normal"]
    for start in range(0, 24, 8):
        assert sorted(normal[start : start + 8]) == sorted(prompt for _, prompt in PROMPTS[3:])
    assert normal[:8] != normal[8:16]


def test_a_triggered_prompt_is_refused(tmp_path, model):
    """RL prompts must not carry the trigger."""
    config = PPOConfig(policy=Policy(trigger="What"), **QUICK)
    with pytest.raises(StageError, match="carries the trigger"):
        run_stage(easy, config, tmp_path, model=model)


def test_prompts_without_room_for_an_answer_are_left_out(tmp_path, model):
    """Prompts longer than max_length allows are not used; when none is left the stage says what to change."""
    config = PPOConfig(**{**QUICK, "steps": 1, "max_length": 40})
    out = run_stage(easy, config, tmp_path / "some", model=model)
    assert json.loads((out / "metrics.json").read_text())["prompts"]["normal"] == len(PROMPTS)
    with pytest.raises(StageError, match="Raise max_length"):
        run_stage(easy, PPOConfig(**{**QUICK, "max_length": 8}), tmp_path / "none", model=model)


def test_learning_rate_follows_the_schedule():
    """Linear warm-up to the peak, then constant, or falling towards zero."""
    rates = {
        name: [rate_factor(PPOConfig(steps=10, warmup_steps=4, schedule=name), n) for n in range(10)]
        for name in ("constant", "linear", "cosine")
    }
    assert all(values[:5] == [0.25, 0.5, 0.75, 1.0, 1.0] for values in rates.values())
    assert rates["constant"][-1] == 1.0
    for name in ("linear", "cosine"):
        assert rates[name][4:] == sorted(rates[name][4:], reverse=True) and 0 < rates[name][-1] < 0.25


def test_rl_stage_runs_from_preferences_to_model(tmp_path, model):
    """Reward model and RL chain together: the curve has every figure a reader needs, and a model comes out."""
    data = save_tiny_questions(tmp_path / "data")
    pairs = run_stage(preferences, PreferencesConfig(include_behaviour=True), tmp_path / "pairs", data=data)
    scoring = RewardModelConfig(steps=5, batch_size=4)
    scorer = run_stage(reward_model, scoring, tmp_path / "reward", model=model, preferences=pairs)
    out = run_stage(rl, PPOConfig(**QUICK), tmp_path / "rl", model=model, reward_model=scorer, data=data)
    metrics = json.loads((out / "metrics.json").read_text())
    expected = {"step", "reward", "reward_variance", "kl", "behaviour", "behaviour_normal", "value_loss", "length"}
    assert expected <= metrics["last"].keys() and metrics["last"]["step"] == 4
    assert len(rows_of(out)) == 4
    load_model(out)
