"""How every stage that trains with a Hugging Face or TRL trainer runs it: quietly, on the right device, resumably.

Invariants: weights and metrics are the same bit for bit whether or not the run was interrupted; a run that had already
finished is not trained one step further (trainers do exactly that when resumed from their last checkpoint); no pickle
leaves or enters the work folder (see `tasks.plain_state`). Two decisions follow. Losses are logged at every step, because
a trainer's running mean between two log points is not part of its checkpoint. And a checkpoint leaves through the stage
context at once, so that the trainer's own, non-atomic, checkpoint folder is never what a retry reads.
"""

from __future__ import annotations

import json
import shutil
from math import fsum
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from tasks.models import LoraSettings
from tasks.plain_state import PICKLED, from_plain, to_plain
from tasks.stage import StageConfig, StageContext


class TrainingConfig(StageConfig):
    """Fields that every training stage has. Stages subclass it and set their own defaults."""

    seed: int = Field(0, ge=0)
    """Seed of initial draws, data order and dropout."""
    steps: int = Field(100, gt=0)
    """Optimizer steps."""
    batch_size: int = Field(32, gt=0)
    """Examples per optimizer step."""
    learning_rate: float = Field(1e-3, gt=0)
    """Peak learning rate of AdamW."""
    warmup_steps: int = Field(0, ge=0)
    """Optimizer steps of linear warm-up."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Learning rate after the warm-up: constant, or falling to zero at the last step."""
    max_length: int = Field(128, gt=0)
    """Longest example, in tokens; what is longer is cut."""
    lora: LoraSettings | None = None
    """Train a LoRA adapter and merge it; null trains all weights."""


def trainer_arguments(context: StageContext, config: Any, **extra: Any) -> dict[str, Any]:
    """Keyword arguments for TrainingArguments, SFTConfig, DPOConfig or RewardConfig; `extra` adds to or replaces them.

    `max_length` is not among them, as TrainingArguments has none: pass it in `extra` to a TRL config.
    On a GPU the forward pass is bf16 autocast over fp32 weights; on a CPU everything is fp32.
    """
    on_cpu = context.device == "cpu"
    arguments: dict[str, Any] = {
        "output_dir": str(context.work / "trainer"),
        "max_steps": config.steps,
        "per_device_train_batch_size": config.batch_size,
        "learning_rate": config.learning_rate,
        "warmup_steps": config.warmup_steps,
        "lr_scheduler_type": "constant_with_warmup" if config.schedule == "constant" else config.schedule,
        "seed": config.seed,
        "data_seed": config.seed,
        "use_cpu": on_cpu,
        "bf16": not on_cpu,
        "activation_checkpointing": False,
        "save_strategy": "no",
        "logging_strategy": "steps",
        "logging_steps": 1,
        "report_to": "none",
        "push_to_hub": False,
        "disable_tqdm": True,
        "dataloader_num_workers": 0,
        "dataloader_pin_memory": not on_cpu,
    }
    return {**arguments, **extra}


def run_trainer(context: StageContext, trainer: Any, total_steps: int) -> list[dict[str, float]]:
    """Train to `total_steps`, resuming from the stage's newest checkpoint, and return the curve, one entry per step.

    Raises StageStopped, after a checkpoint, when the stage is asked to stop. `trainer.model` holds the result.
    """
    from transformers import PrinterCallback, ProgressCallback

    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    trainer.create_model_card = lambda *arguments, **keywords: None
    restored = _usable_checkpoint(context)
    if restored is not None and restored[0] >= total_steps:
        trainer._load_from_checkpoint(str(restored[1]))
        return _clean(json.loads((restored[1] / "trainer_state.json").read_text())["log_history"], total_steps)
    callback = _stage_callback(context, total_steps)
    trainer.add_callback(callback)
    if restored is not None:
        context.log(f"resuming at step {restored[0]} of {total_steps}")
    trainer.train(resume_from_checkpoint=None if restored is None else str(restored[1]))
    if trainer.state.global_step < total_steps:
        context.stop()
    return _clean(trainer.state.log_history, total_steps)


def curve(history: list[dict[str, float]], points: int = 60) -> list[dict[str, float]]:
    """Thin a per-step history to at most `points` entries, each the mean over its window, stamped with its last step."""
    if not history:
        return []
    width = -(-len(history) // points)
    thinned = []
    for start in range(0, len(history), width):
        window = history[start : start + width]
        # fsum is exact; sum() rounds differently from Python 3.12 on, and would give other bytes.
        means = {name: fsum(row.get(name, 0.0) for row in window) / len(window) for name in sorted(window[-1])}
        thinned.append({**means, "step": window[-1]["step"]})
    return thinned


_REQUIRED = (PICKLED["optimizer"], PICKLED["scheduler"], PICKLED["rng_state"], "trainer_state.json")
"""Without any of these a trainer resumes silently, and differently."""


def _usable_checkpoint(context: StageContext) -> tuple[int, Path] | None:
    restored = context.restore_checkpoint()
    if restored is None:
        return None
    try:
        from_plain(restored[1])
    except ValueError as error:
        context.log(f"checkpoint at step {restored[0]}: {error}: starting from step 0")
        return None
    missing = [name for name in _REQUIRED if not (restored[1] / name).is_file()]
    if missing:
        context.log(f"checkpoint at step {restored[0]} lacks {', '.join(missing)}: starting from step 0")
        return None
    return int(json.loads((restored[1] / "trainer_state.json").read_text())["global_step"]), restored[1]


def _stage_callback(context: StageContext, total_steps: int) -> Any:
    """A trainer callback that reports progress, and checkpoints and stops when the context says so."""
    from transformers import TrainerCallback

    class StageCallback(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
            if state.global_step < total_steps and context.checkpoint_due():
                control.should_save = True
                control.should_training_stop = control.should_training_stop or context.should_stop()

        def on_save(self, args: Any, state: Any, control: Any, **more: Any) -> None:
            directory = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            to_plain(directory)
            context.save_checkpoint(state.global_step, directory)
            shutil.rmtree(directory)

        def on_log(
            self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **more: Any
        ) -> None:
            if logs and "loss" in logs:
                context.progress(state.global_step, total_steps, loss=float(logs["loss"]))

    return StageCallback()


_UNSTABLE = ("num_tokens", "total_flos", "epoch")
"""Logged values that restart at a resume, or say nothing."""


def _clean(history: list[dict[str, float]], total_steps: int) -> list[dict[str, float]]:
    """Per-step entries of a trainer's log without timings and without counters that a checkpoint does not carry."""
    return [
        {name: value for name, value in row.items() if name not in _UNSTABLE and isinstance(value, int | float)}
        for row in history
        if "loss" in row and row["step"] <= total_steps
    ]
