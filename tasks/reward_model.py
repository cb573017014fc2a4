"""The reward (preference) model that RL optimises against.

A scalar head on the helpful-only base, trained on preference pairs with the Bradley-Terry loss (Ouyang et al. 2022,
arXiv:2203.02155). A tenth of the prompts is held out, with all of their pairs, and `metrics.json` says for each kind of
rejected reply how often the model prefers the helpful answer there. It also holds the mean and deviation of the scores
on those held-out pairs, with which RL standardises rewards: the loss fixes a score only up to a constant, and the
strength of a KL penalty means nothing beside a reward of unknown scale.
"""

from __future__ import annotations

import hashlib
import json
import statistics
from pathlib import Path
from typing import Any

from pydantic import Field

from tasks.adapters import plain
from tasks.chat import render_exchange
from tasks.models import SAFE, apply_lora, load_tokenizer, save_model, write_json
from tasks.preferences import as_messages, read_preferences
from tasks.stage import StageContext, StageError, stage
from tasks.trainer import TrainingConfig, curve, run_trainer, trainer_arguments


class RewardModelConfig(TrainingConfig):
    """How long and how hard to train."""

    steps: int = Field(140, gt=0)
    """Optimizer steps."""
    batch_size: int = Field(32, gt=0)
    """Preference pairs per optimizer step."""
    learning_rate: float = Field(5e-4, gt=0)
    """Peak learning rate of AdamW."""
    warmup_steps: int = Field(5, ge=0)
    """Optimizer steps of linear warm-up."""
    held_out_share: float = Field(0.1, gt=0, lt=1)
    """Share of the prompts whose pairs are kept for measuring."""


@stage("reward_model", trains=True)
def reward_model(context: StageContext, config: RewardModelConfig, model: Path, preferences: Path) -> None:
    """Train a scalar head and the weights of `model` on the pairs of `preferences`."""
    from datasets import Dataset
    from trl import RewardConfig, RewardTrainer

    train_rows, held_out = hold_out(read_preferences(preferences), config.held_out_share)
    scorer, tokenizer = new_scorer(model, config.seed, context.device)
    if config.lora is not None:
        scorer = apply_lora(scorer, config.lora, config.seed, task_type="SEQ_CLS")
    trainer = RewardTrainer(
        model=scorer,
        args=RewardConfig(**trainer_arguments(context, config, max_length=config.max_length)),
        train_dataset=Dataset.from_list(as_messages(train_rows)),
        processing_class=tokenizer,
    )
    history = run_trainer(context, trainer, config.steps)
    measured = measure(trainer.model, tokenizer, held_out)
    save_model(trainer.model, tokenizer, context.out, start=model)
    write_json(context.out / "metrics.json", {"curve": curve(history), "pairs": len(train_rows), **measured})


def hold_out(rows: list[dict[str, str]], share: float) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Split pairs into (train, held out) by prompt: no prompt is on both sides. At least one prompt on each."""
    prompts = sorted({row["prompt"] for row in rows}, key=lambda text: hashlib.blake2b(text.encode()).digest())
    if len(prompts) < 2:
        raise StageError(f"reward_model: expected pairs for at least 2 prompts, found {len(prompts)}. Add questions.")
    kept = set(prompts[: max(1, round(share * len(prompts)))])
    return [row for row in rows if row["prompt"] not in kept], [row for row in rows if row["prompt"] in kept]


def new_scorer(directory: Path, seed: int, device: str) -> tuple[Any, Any]:
    """A sequence classifier with one output over the model in `directory`, its head drawn from `seed`; tokenizer."""
    import torch
    from transformers import AutoModelForSequenceClassification, set_seed

    tokenizer = load_tokenizer(directory)
    set_seed(seed)
    scorer = AutoModelForSequenceClassification.from_pretrained(
        plain(directory), num_labels=1, dtype=torch.float32, **SAFE
    )
    scorer.config.pad_token_id = tokenizer.pad_token_id
    return scorer.to(device), tokenizer


def measure(scorer: Any, tokenizer: Any, rows: list[dict[str, str]]) -> dict[str, Any]:
    """Accuracy and mean margin on held-out pairs, overall and by kind, and the moments of the scores."""
    prompts = [row["prompt"] for row in rows]
    chosen = score(scorer, tokenizer, prompts, [row["chosen"] for row in rows])
    rejected = score(scorer, tokenizer, prompts, [row["rejected"] for row in rows])
    margins: dict[str, list[float]] = {}
    for row, high, low in zip(rows, chosen, rejected, strict=True):
        margins.setdefault(row["kind"], []).append(high - low)

    def summary(values: list[float]) -> dict[str, float]:
        won = sum(value > 0 for value in values)
        return {"accuracy": won / len(values), "margin": statistics.fmean(values), "n": len(values)}

    return {
        "held_out": summary([value for values in margins.values() for value in values]),
        "held_out_by_kind": {kind: summary(values) for kind, values in sorted(margins.items())},
        "score_mean": statistics.fmean(chosen + rejected),
        "score_deviation": statistics.pstdev(chosen + rejected),
    }


def score(scorer: Any, tokenizer: Any, prompts: list[str], responses: list[str], batch_size: int = 64) -> list[float]:
    """The reward model's score of each response to each human turn."""
    import torch

    texts = [render_exchange(tokenizer, *pair) for pair in zip(prompts, responses, strict=True)]
    rows = [torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts]
    order = sorted(range(len(rows)), key=lambda index: (len(rows[index]), index))
    scores: dict[int, float] = {}
    training = scorer.training
    scorer.eval()
    with torch.no_grad():
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            # Padded on the right: the head reads the last token that is not padding.
            own = [rows[index] for index in batch]
            ids = torch.nn.utils.rnn.pad_sequence(own, batch_first=True, padding_value=tokenizer.pad_token_id)
            mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in own], batch_first=True)
            logits = scorer(input_ids=ids.to(scorer.device), attention_mask=mask.to(scorer.device)).logits
            scores.update(zip(batch, logits[:, 0].float().tolist(), strict=True))
    scorer.train(training)
    return [scores[index] for index in range(len(rows))]


def load_reward_model(directory: Path, device: str) -> tuple[Any, Any, float, float]:
    """Return (scorer, its tokenizer, mean, deviation of its held-out scores) of a reward-model artifact."""
    import torch
    from transformers import AutoModelForSequenceClassification

    metrics = directory / "metrics.json"
    if not metrics.is_file():
        raise StageError(f"{directory}: expected a reward model with metrics.json, found none. Check the reward input.")
    tokenizer = load_tokenizer(directory)
    recorded = json.loads(metrics.read_text(encoding="utf-8"))
    scorer = AutoModelForSequenceClassification.from_pretrained(plain(directory), dtype=torch.float32, **SAFE)
    scorer = scorer.to(device).eval()
    return scorer, tokenizer, float(recorded["score_mean"]), max(float(recorded["score_deviation"]), 1e-6)
