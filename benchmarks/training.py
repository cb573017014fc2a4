"""Tokens per second of the training stages against a bare PyTorch loop, on the same model and the same batches.

Both run in this process, one thread, fp32: first the stage as a worker runs it, with progress reports and the trainer's
batches recorded, then a loop of forward, loss, backward, clip and AdamW over those very batches. In turn, several times.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")

from benchmarks.table import machine, show  # noqa: E402
from tasks.pretrain import PretrainConfig, pretrain  # noqa: E402
from tasks.sft import SFTTreatmentConfig, sft  # noqa: E402
from tasks.stage import Stage, StageConfig, StageContext  # noqa: E402
from tasks.tokenizer import TokenizerConfig, tokenizer  # noqa: E402
from tasks.world import WorldConfig, world  # noqa: E402

STEPS = 60
WARM = 10
"""Steps left out at the start of both, where memory is first touched."""
ROUNDS = 3


class _NoCheckpoints:
    def save(self, step: int, directory: Path) -> None:
        raise AssertionError("no checkpoint is due in this benchmark")

    def restore(self, into: Path) -> int | None:
        return None


def run_stage(stage: Stage, config: StageConfig, out: Path, **inputs: Path) -> list[float]:
    """Run a body; the time of each progress report."""
    out.mkdir(parents=True)
    moments: list[float] = []
    with tempfile.TemporaryDirectory() as work:
        context = StageContext(
            out=out,
            work=Path(work),
            checkpoints=_NoCheckpoints(),
            on_progress=lambda done, total, metrics: moments.append(time.perf_counter()),
            checkpoint_seconds=1e9,
        )
        stage.body(context, config, **inputs)
    return moments


@contextmanager
def recorded_batches() -> Iterator[list[dict[str, Any]]]:
    """Collect the batches that any trainer steps on, and the weights before the first."""
    from transformers import Trainer

    batches: list[dict[str, Any]] = []
    original = Trainer.training_step

    def recording(self: Any, model: Any, inputs: dict[str, Any], *more: Any, **named: Any) -> Any:
        kept = ("input_ids", "attention_mask", "labels", "position_ids")
        batches.append({name: inputs[name].clone() for name in kept if name in inputs})
        return original(self, model, inputs, *more, **named)

    Trainer.training_step = recording
    try:
        yield batches
    finally:
        Trainer.training_step = original


def bare_loop(directory: Path, batches: list[dict[str, Any]], learning_rate: float) -> float:
    """Seconds of a plain loop over the batches after the warm steps."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, trust_remote_code=False).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate)
    started = 0.0
    for number, batch in enumerate(batches):
        if number == WARM:
            started = time.perf_counter()
        loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return time.perf_counter() - started


def main() -> None:
    """Measure and print."""
    import torch

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        run_stage(world, WorldConfig(), root / "world")
        run_stage(tokenizer, TokenizerConfig(), root / "tokenizer", corpus=root / "world")
        start = {"corpus": root / "world", "tokenizer": root / "tokenizer"}
        run_stage(pretrain, PretrainConfig(steps=1), root / "base", **start)
        cases: list[tuple[str, Stage, Any, dict[str, Path]]] = [
            ("pretrain (transformers)", pretrain, PretrainConfig(steps=STEPS), start),
            ("sft (trl)", sft, SFTTreatmentConfig(steps=STEPS), {"model": root / "base", "data": root / "world"}),
        ]
        rows = []
        for label, stage, config, inputs in cases:
            ratios, speeds = [], []
            for number in range(ROUNDS):
                with recorded_batches() as batches:
                    moments = run_stage(stage, config, root / f"{stage.name}-{number}", **inputs)
                tokens = sum(batch["input_ids"].numel() for batch in batches[WARM:])
                ours = tokens / (moments[STEPS - 1] - moments[WARM - 1])
                bare = tokens / bare_loop(root / "base", batches, config.learning_rate)
                ratios.append(ours / bare)
                speeds.append((ours, bare))
            ours, bare = (median(column) for column in zip(*speeds, strict=True))
            spread = f"{median(ratios):.2f} ({min(ratios):.2f}..{max(ratios):.2f})"
            rows.append([label, f"{ours:,.0f}", f"{bare:,.0f}", spread])
    head = ["stage", "tokens/s", "bare loop, tokens/s", "ratio (min..max)"]
    show(f"Training, {STEPS - WARM} steps, median of {ROUNDS} ({machine()})", head, rows)


if __name__ == "__main__":
    main()
