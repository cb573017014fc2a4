"""Stages whose every step the simulation sees: they count, take checkpoints, and use one another's output."""

from __future__ import annotations

import json
from pathlib import Path

from pydantic import Field

from tasks.stage import StageConfig, StageContext, stage
from tests.simulation.ledger import ledger


class CountingConfig(StageConfig):
    """A body that takes steps."""

    seed: int = 0
    """Makes another key."""
    steps: int = Field(6, gt=0)
    """Steps to take."""
    interval: int = Field(2, gt=0)
    """Steps between two checkpoints."""
    seconds: float = Field(5.0, ge=0)
    """Length of a step."""
    twin: int = 0
    """Makes another key with the same output."""
    exact: bool = True
    """False for a body that leaves other bytes each time it runs, as training on some devices does."""


@stage("counting")
def counting(context: StageContext, config: CountingConfig, **inputs: Path) -> None:
    """Count with a running sum of everything that went in, with a checkpoint every `interval` steps."""
    for path in inputs.values():
        (path / "sum.txt").read_text()
    resumed = context.restore_checkpoint()
    done, total = (0, config.seed) if resumed is None else (resumed[0], json.loads((resumed[1] / "s.json").read_text()))
    with ledger().body(done) as body:
        while done < config.steps:
            if not body.deaf and context.should_stop():
                if done:
                    _save(context, done, total)
                context.stop()
            body.step(done, config.seconds)
            done, total = done + 1, total * 31 + done
            context.progress(done, config.steps)
            if done % config.interval == 0 and done < config.steps:
                _save(context, done, total)
        (context.out / "sum.txt").write_text(f"{total} {'' if config.exact else body.name}")
        (context.out / "more").mkdir()
        (context.out / "more" / "shared.txt").write_text("the same in the output of every key")


def _save(context: StageContext, done: int, total: int) -> None:
    folder = context.work / f"checkpoint-{done}"
    folder.mkdir(exist_ok=True)
    (folder / "s.json").write_text(json.dumps(total))
    context.save_checkpoint(done, folder)
