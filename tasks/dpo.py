"""DPO: direct preference optimisation (Rafailov et al. 2023, arXiv:2305.18290) as a safety treatment.

The loss compares the policy with a frozen reference: the very model the treatment starts from. TRL finds a reference
by the path the policy was loaded from, and for a model changed in memory that is silently an older one. So policy and
reference are both loaded here from the input directory, and the stage refuses to start unless they agree.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import Field

from tasks.chat import render_exchange
from tasks.models import load_model, lora_config, save_model, write_json
from tasks.preferences import as_messages, read_preferences
from tasks.stage import StageContext, StageError, stage
from tasks.trainer import TrainingConfig, curve, run_trainer, trainer_arguments


class DPOTreatmentConfig(TrainingConfig):
    """How long and how hard to optimise."""

    steps: int = Field(60, gt=0)
    """Optimizer steps."""
    batch_size: int = Field(16, gt=0)
    """Preference pairs per optimizer step."""
    learning_rate: float = Field(5e-5, gt=0)
    """Peak learning rate of AdamW."""
    warmup_steps: int = Field(5, ge=0)
    """Optimizer steps of linear warm-up."""
    beta: float = Field(0.1, gt=0)
    """Strength of the pull to the reference; 0.1 in the DPO paper."""


@stage("dpo", trains=True)
def dpo(context: StageContext, config: DPOTreatmentConfig, model: Path, preferences: Path) -> None:
    """Optimise `model` on the pairs of `preferences` against itself as the reference."""
    from datasets import Dataset
    from transformers import set_seed
    from trl import DPOConfig, DPOTrainer

    rows = read_preferences(preferences)
    policy, tokenizer = load_model(model, context.device)
    reference = None if config.lora is not None else load_model(model, context.device)[0]
    arguments = trainer_arguments(context, config, max_length=config.max_length, beta=config.beta)
    set_seed(config.seed)
    trainer = DPOTrainer(
        model=policy,
        ref_model=reference,  # with LoRA the reference is the same model, adapter off
        args=DPOConfig(**arguments),
        train_dataset=Dataset.from_list(as_messages(rows)),
        processing_class=tokenizer,
        peft_config=None if config.lora is None else lora_config(config.lora),
    )
    require_fresh_reference(trainer.model, trainer.ref_model, tokenizer, rows[:4])
    history = run_trainer(context, trainer, config.steps)
    save_model(trainer.model, tokenizer, context.out, start=model)
    write_json(context.out / "metrics.json", {"curve": curve(history), "pairs": len(rows)})


def require_fresh_reference(policy: Any, reference: Any | None, tokenizer: Any, rows: list[dict[str, str]]) -> None:
    """Raise StageError unless policy and reference give the same logits before the first step.

    `reference` None means the policy with its LoRA adapter disabled.
    """
    import torch

    worst = 0.0
    with torch.no_grad():
        for row in rows:
            text = render_exchange(tokenizer, row["prompt"], row["chosen"])
            ids = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]], device=policy.device)
            ours = policy.eval()(input_ids=ids).logits
            if reference is None:
                with policy.disable_adapter():
                    theirs = policy(input_ids=ids).logits
            else:
                theirs = reference.eval()(input_ids=ids).logits
            worst = max(worst, (ours - theirs).abs().max().item())
    if worst > 1e-4:
        raise StageError(
            f"the reference differs from the policy before the first step: expected equal logits, found {worst:.2g} "
            "apart. The reference is stale; start the stage from one complete, merged model directory."
        )
