"""Small stages for tests of the machinery: they count, concatenate, fail, wait and checkpoint in known ways."""

from __future__ import annotations

import json
import time
from pathlib import Path

from pydantic import Field

from tasks.stage import StageConfig, StageContext, StageError, stage


class TextConfig(StageConfig):
    """What to write."""

    text: str = "text"
    """Content of the output."""


class StepsConfig(StageConfig):
    """A body that takes steps."""

    steps: int = Field(20, gt=0)
    """Steps to take."""
    seconds: float = Field(0.05, ge=0)
    """Length of a step."""
    seed: int = 0
    """Changes the output."""


def decorated(text: str) -> str:
    """A helper that `source` reaches."""
    return f"<{text}>"


@stage("source")
def source(context: StageContext, config: TextConfig) -> None:
    """Write the configured text."""
    (context.out / "text.txt").write_text(decorated(config.text))


@stage("join")
def join(context: StageContext, config: TextConfig, **inputs: Path) -> None:
    """Concatenate all inputs."""
    parts = [f"{name}={(path / 'text.txt').read_text()}" for name, path in sorted(inputs.items())]
    (context.out / "text.txt").write_text(config.text + ",".join(parts))


@stage("constant")
def constant(context: StageContext, config: TextConfig, above: Path) -> None:
    """An output that does not depend on its input, for early cutoff."""
    (context.out / "text.txt").write_text(config.text)


@stage("failing")
def failing(context: StageContext, config: TextConfig) -> None:
    """A body that refuses its config."""
    raise StageError(f"text: expected something else, found {config.text!r}")


@stage("steps")
def steps(context: StageContext, config: StepsConfig) -> None:
    """Count to `steps` with a running hash, with a checkpoint whenever one is due; resumable to the same output."""
    done, state = 0, config.seed
    if (restored := context.restore_checkpoint()) is not None:
        done, state = restored[0], json.loads((restored[1] / "state.json").read_text())
        context.log(f"resumed at {done}")
    while done < config.steps:
        time.sleep(config.seconds)
        done, state = done + 1, (state * 6364136223846793005 + 1442695040888963407) % 2**64
        context.progress(done, config.steps, state=float(state % 7))
        if done < config.steps and context.checkpoint_due():
            folder = context.work / f"checkpoint-{done}"
            folder.mkdir()
            (folder / "state.json").write_text(json.dumps(state))
            context.save_checkpoint(done, folder)
            if context.should_stop():
                context.stop()
    (context.out / "text.txt").write_text(str(state))


@stage("writing")
def writing(context: StageContext, config: TextConfig, above: Path) -> None:
    """A body that writes into its input, where it is allowed to or not, as soon as it is told that it may."""
    context.progress(0, 1)
    path = above / "text.txt"
    if config.text:
        path.chmod(0o644)
        with open(path, "r+") as file:
            file.write(config.text)
    (context.out / "text.txt").write_text(path.read_text())
