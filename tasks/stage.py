"""How a stage is declared, and what its body may touch.

A stage is a pure function of (config, input artifacts). Its body receives a `StageContext`, its validated config, and
one directory per input artifact, and fills `context.out`; the tree of files it leaves there is its output artifact.
Invariants that the rest of the system relies on:

* the body reads nothing but its config and its input directories, and writes nothing but `out` and `work`;
* everything random follows from seeds in the config, so that two runs leave the same bytes;
* a body that trains calls `checkpoint_due` / `save_checkpoint` between steps and starts from `restore_checkpoint`, and
  the result does not depend on when, or whether, a checkpoint was taken.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from pydantic import BaseModel, ConfigDict


class StageConfig(BaseModel):
    """Base of every stage's config: frozen, unknown keys refused, every field part of the stage's identity."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)


class StageError(Exception):
    """A stage cannot run as configured. The message says what, where, expected and found, and what to do next."""


class StageStopped(Exception):
    """The body stopped early on request (signal, lost lease, deadline) after saving what it could."""


class Checkpoints(Protocol):
    """Where mid-stage checkpoints live. The worker backs it with the store; tests back it with a folder."""

    def save(self, step: int, directory: Path) -> None:
        """Persist a copy of `directory` as the newest checkpoint, taken after `step` steps."""

    def restore(self, into: Path) -> int | None:
        """Copy the newest intact checkpoint into the empty directory `into`; return its step, or None if none."""


@dataclass(slots=True)
class StageContext:
    """Everything a stage body may touch besides its config and inputs."""

    out: Path
    """Empty directory; what the body leaves here is the output artifact."""
    work: Path
    """Scratch directory, deleted afterwards."""
    checkpoints: Checkpoints
    on_progress: Callable[[int, int, dict[str, float]], None] = lambda done, total, metrics: None
    on_log: Callable[[str], None] = lambda message: None
    stop_requested: Callable[[], str | None] = lambda: None
    """Returns why the body must stop, or None."""
    device: str = "cpu"
    """Torch device string. Recorded with the result, never part of the key."""
    checkpoint_seconds: float = 15.0
    """Least time between two mid-stage checkpoints. Not part of the key: results do not depend on it."""
    _last_checkpoint: float = field(default_factory=time.monotonic)

    def progress(self, done: int, total: int, **metrics: float) -> None:
        """Report that `done` of `total` units of work are finished, with any numbers worth showing beside it."""
        self.on_progress(done, total, metrics)

    def log(self, message: str) -> None:
        """Send one line to whoever watches the run."""
        self.on_log(message)

    def checkpoint_due(self) -> bool:
        """True when enough time has passed since the last checkpoint, or when a stop was requested."""
        return self.should_stop() or time.monotonic() - self._last_checkpoint >= self.checkpoint_seconds

    def save_checkpoint(self, step: int, directory: Path) -> None:
        """Persist `directory` as the state after `step` steps."""
        self.checkpoints.save(step, directory)
        self._last_checkpoint = time.monotonic()

    def restore_checkpoint(self) -> tuple[int, Path] | None:
        """Return (step, directory) of the newest intact checkpoint of this very stage, or None to start afresh."""
        directory = self.work / "restored"
        directory.mkdir(parents=True, exist_ok=True)
        step = self.checkpoints.restore(directory)
        return None if step is None else (step, directory)

    def should_stop(self) -> bool:
        """True once the run was asked to end: save a checkpoint, then call `stop`."""
        return self.stop_requested() is not None

    def stop(self) -> None:
        """End the body early. Call it after the checkpoint is saved."""
        raise StageStopped(self.stop_requested() or "stopped")


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """A declared stage: its name, body, config class and the names of its inputs."""

    name: str
    body: Callable[..., None]
    config: type[StageConfig]
    inputs: tuple[str, ...]
    """Required inputs, from the body's parameters."""
    optional: tuple[str, ...] = ()
    """Inputs that may be absent: parameters with the default None."""
    variadic: bool = False
    """True when the body takes `**inputs`: any number of further named inputs."""
    trains: bool = False
    """True when the body needs the training stack (torch and friends), so its worker is forked from a preloaded one."""


def stage(name: str, *, trains: bool = False) -> Callable[[Callable[..., None]], Stage]:
    """Declare `body(context, config, input_one, input_two, ..., **more)` as the stage `name`.

    The config class is the annotation of the body's second parameter; the remaining parameters name the inputs. Each
    is given the directory (`pathlib.Path`) where that input artifact lies, read-only.
    """

    def declare(body: Callable[..., None]) -> Stage:
        parameters = list(inspect.signature(body, eval_str=True).parameters.values())
        config = parameters[1].annotation
        if not (isinstance(config, type) and issubclass(config, StageConfig)):
            raise TypeError(
                f"stage {name}: the second parameter must be annotated with a StageConfig, found {config!r}"
            )
        named = [p for p in parameters[2:] if p.kind is not p.VAR_KEYWORD]
        return Stage(
            name=name,
            body=body,
            config=config,
            inputs=tuple(p.name for p in named if p.default is p.empty),
            optional=tuple(p.name for p in named if p.default is not p.empty),
            variadic=any(p.kind is p.VAR_KEYWORD for p in parameters),
            trains=trains,
        )

    return declare
