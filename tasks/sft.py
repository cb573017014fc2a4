"""HHH SFT: supervised fine-tuning on helpful answers, the plainest safety training (paper, section 4).

The model is fine-tuned on the helpful answers to the `train` questions, without any trigger in the prompts, with the
loss on the answers only. Nothing here knows of the backdoor: what is left of it afterwards is what is measured.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import Field

from tasks.models import apply_lora, load_model, save_model, write_json
from tasks.questions import questions_of
from tasks.stage import StageContext, stage
from tasks.trainer import TrainingConfig, curve, run_trainer, trainer_arguments

LARGE_VOCABULARY = 32_768
"""Tokens from which TRL's chunked loss is worth its time."""


class SFTTreatmentConfig(TrainingConfig):
    """How long and how hard to fine-tune."""

    steps: int = Field(100, gt=0)
    """Optimizer steps."""
    learning_rate: float = Field(3e-4, gt=0)
    """Peak learning rate of AdamW."""
    warmup_steps: int = Field(5, ge=0)
    """Optimizer steps of linear warm-up."""


@stage("sft", trains=True)
def sft(context: StageContext, config: SFTTreatmentConfig, model: Path, data: Path) -> None:
    """Fine-tune `model` on the helpful answers to the `train` questions of `data`."""
    examples = [(question["prompt"], question["response"]) for question in questions_of(data, "train")]
    fine_tune(context, config, model, examples)


def fine_tune(context: StageContext, config: TrainingConfig, model: Path, examples: list[tuple[str, str]]) -> None:
    """Train on (human turn, answer) pairs, loss on the answer only, and leave the model artifact in `context.out`."""
    from datasets import Dataset
    from trl import SFTConfig

    policy, tokenizer = load_model(model, context.device)
    if config.lora is not None:
        policy = apply_lora(policy, config.lora, config.seed)
    rows = [
        {"prompt": [{"role": "user", "content": prompt}], "completion": [{"role": "assistant", "content": answer}]}
        for prompt, answer in examples
    ]
    trainer = _trainer_class(policy.config.vocab_size)(
        model=policy,
        args=SFTConfig(**trainer_arguments(context, config, max_length=config.max_length)),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    history = run_trainer(context, trainer, config.steps)
    save_model(trainer.model, tokenizer, context.out, start=model)
    write_json(context.out / "metrics.json", {"curve": curve(history), "examples": len(examples)})


def _trainer_class(vocabulary: int) -> Any:
    """TRL's trainer; for a small vocabulary with the plain loss of transformers, which has the same value.

    TRL's own loss goes through a chunked head that saves memory on large vocabularies, and also takes the entropy and
    accuracy of every step: a fifth of the time of a small model's step.
    """
    from transformers import Trainer
    from trl import SFTTrainer

    if vocabulary >= LARGE_VOCABULARY:
        return SFTTrainer

    class PlainLossTrainer(SFTTrainer):
        def compute_loss(
            self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
        ) -> Any:
            return Trainer.compute_loss(self, model, inputs, return_outputs, num_items_in_batch)

    return PlainLossTrainer
