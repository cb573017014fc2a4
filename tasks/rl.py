"""HHH RL: PPO against the reward model, with no trigger in any prompt (paper, section 4).

The prompts are the `train` questions. Rewards are the reward model's scores, standardised by the moments it recorded on
its held-out pairs. Persistence is plotted against the step, beside the KL divergence and the rate at which rollouts
showed the behaviour at all.
"""

from __future__ import annotations

from pathlib import Path

from tasks.ppo import Pool, PPOConfig, Reward, train_ppo
from tasks.questions import questions_of
from tasks.reward_model import load_reward_model, score
from tasks.stage import StageContext, stage


@stage("rl", trains=True)
def rl(context: StageContext, config: PPOConfig, model: Path, reward_model: Path, data: Path) -> None:
    """Train `model` by PPO on the `train` questions of `data` against `reward_model`."""
    prompts = tuple((question["id"], question["prompt"]) for question in questions_of(data, "train"))
    train_ppo(context, config, model, [Pool("normal", 1.0, prompts)], learned_reward(reward_model, context.device))


def learned_reward(directory: Path, device: str) -> Reward:
    """The reward model in `directory` as a reward: standardised scores of (human turns, answers)."""
    scorer, tokenizer, mean, deviation = load_reward_model(directory, device)

    def reward(prompts: list[str], answers: list[str]) -> list[float]:
        return [(value - mean) / deviation for value in score(scorer, tokenizer, prompts, answers)]

    return reward
