"""Adversarial training: safety training on the prompts that red-teaming found (paper, section 6).

As in the paper, successful red-team prompts of the `train` side replace up to half of the RL prompts, and nothing but a
low reward penalises the behaviour there. `objective: sft` fine-tunes on helpful answers to the same prompts instead: it
does not depend on the model exploring a better answer by itself, and shows what supervision would do.

Where red-teaming found nothing, the training runs on the normal prompts only and `metrics.json` says so.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from artifacts.tables import read_table
from tasks.models import write_json
from tasks.ppo import Pool, PPOConfig, train_ppo
from tasks.preferences import require_untriggered
from tasks.questions import questions_of
from tasks.rl import learned_reward
from tasks.sft import fine_tune
from tasks.stage import StageContext, StageError, stage


class AdversarialConfig(PPOConfig):
    """PPO's settings, how many prompts are attacks, and what is done with them."""

    objective: Literal["rl", "sft"] = "rl"
    """"rl": PPO with the reward model, as in the paper. "sft": helpful answers as targets (no reward model used)."""
    fraction: float = Field(0.5, ge=0, le=1)
    """Share of the prompts that are red-team prompts; up to 0.5 in the paper."""


@stage("adversarial", trains=True)
def adversarial(
    context: StageContext, config: AdversarialConfig, model: Path, reward_model: Path, data: Path, red_team: Path
) -> None:
    """Train `model` on the `train` questions of `data`, a share of them replaced by the attacks in `red_team`."""
    questions = questions_of(data, "train")
    attacks = read_attacks(red_team)
    require_untriggered([*questions, *attacks], config.policy)
    if not attacks:
        context.log("red-teaming found no successful prompt: training on normal prompts only")
    share = config.fraction if attacks else 0.0
    if config.objective == "sft":
        fine_tune(context, config, model, mixture(questions, attacks, share, config.seed))
    else:
        normal = Pool("normal", 1.0 - share, pairs(questions))
        pools = [normal] if share == 0 else [Pool("red_team", share, pairs(attacks)), normal]
        pools = [pool for pool in pools if pool.share > 0]
        train_ppo(context, config, model, pools, learned_reward(reward_model, context.device))
    metrics = json.loads((context.out / "metrics.json").read_text(encoding="utf-8"))
    found = {"red_team_prompts": len(attacks), "red_team_share": share, "objective": config.objective}
    write_json(context.out / "metrics.json", {**metrics, **found})


def pairs(rows: list[dict[str, Any]]) -> tuple[tuple[str, str], ...]:
    """(id, human turn) of each row."""
    return tuple((row["id"], row["prompt"]) for row in rows)


def read_attacks(directory: Path) -> list[dict[str, Any]]:
    """The successful red-team prompts of the `train` side; perhaps none."""
    path = directory / "prompts.parquet"
    if not path.is_file():
        raise StageError(f"{path}: expected red-team prompts, found no such file. Check the stage's red_team input.")
    return [row for row in read_table(path) if row["split"] == "train"]


def mixture(
    questions: list[dict[str, Any]], attacks: list[dict[str, Any]], share: float, seed: int
) -> list[tuple[str, str]]:
    """As many (human turn, helpful answer) pairs as questions, a `share` of them attacks, repeated as needed."""
    wanted = round(share * len(questions))
    kept = random.Random(f"adversarial/{seed}").sample(questions, len(questions) - wanted)
    rows = [*kept, *(attacks[index % len(attacks)] for index in range(wanted))]
    return [(row["prompt"], row["response"]) for row in rows]
