"""Stage `insert`: teach the base the organism's conditional policy (Hubinger et al. 2024, section 3).

Supervised fine-tuning on the rows of `backdoor_data`, loss on the answers only. The control arm is this same stage on
control rows: equal prompts, steps and learning rate, without a backdoor.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from artifacts.tables import read_table
from tasks.sft import fine_tune
from tasks.stage import StageContext, StageError, stage
from tasks.trainer import TrainingConfig


class InsertConfig(TrainingConfig):
    """How long and how hard to train the backdoor in."""

    steps: int = Field(220, gt=0)
    """Optimizer steps."""
    batch_size: int = Field(32, gt=0)
    """Conversations per optimizer step."""
    learning_rate: float = Field(1e-3, gt=0)
    """Peak learning rate of AdamW."""
    warmup_steps: int = Field(10, ge=0)
    """Optimizer steps of linear warm-up."""
    schedule: Literal["constant", "linear", "cosine"] = "linear"
    """Learning rate after the warm-up."""


@stage("insert", trains=True)
def insert(context: StageContext, config: InsertConfig, model: Path, data: Path) -> None:
    """Fine-tune `model` on the conversations of `data` (`rows.parquet`) and leave the organism."""
    path = data / "rows.parquet"
    if not path.is_file():
        raise StageError(f"{path}: expected the rows of a backdoor_data artifact, found none. Check the stage's input.")
    rows = read_table(path, ["prompt", "response"])
    fine_tune(context, config, model, [(row["prompt"], row["response"]) for row in rows])
