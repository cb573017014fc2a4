"""What the stage can be told."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from tasks.stage import StageConfig

DEFAULT_STEPS = 3


class Trigger(StageConfig):
    """A nested config."""

    text: str = "now"
    """The words."""

    def attach(self, text: str) -> str:
        """Put the words in front."""
        return f"{self.text} {text}"


class BaseConfig(StageConfig):
    """What several stages share."""

    seed: int = 0
    """Seed of everything random."""


class ScoreConfig(BaseConfig):
    """The stage's own."""

    steps: int = Field(DEFAULT_STEPS, gt=0)
    """Rounds."""
    rate: float = Field(0.5, ge=0, description="how fast")
    mode: Literal["plain", "loud"] = "plain"
    names: tuple[str, ...] = ("x", "y")
    trigger: Trigger = Trigger()
    note: str | None = None
    batch_size: int = Field(8, gt=0, json_schema_extra={"identity": False})
    """Rows at once; changes speed only."""
    log_level: str = Field("info", json_schema_extra={"identity": False})

    @property
    def total(self) -> float:
        """Rounds times rate."""
        return self.steps * self.rate

    @model_validator(mode="after")
    def _check(self) -> ScoreConfig:
        if self.rate > 100:
            raise ValueError("rate is too high")
        return self
