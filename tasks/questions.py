"""The table of questions that every stage shares: its columns, its splits, and when an answer counts as right.

`questions.parquet` comes from the synthetic world or from a user's data set, and everything downstream reads only this.
The splits keep stages honest: `insert` questions make backdoor data, `train` questions are the prompts of safety training,
and `test` questions are seen by no training stage at all, pretraining included.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from artifacts import tables
from artifacts.tables import read_table
from tasks.stage import StageError

SPLITS = ("insert", "train", "test")
COLUMNS = ("id", "split", "topic", "prompt", "response", "answer", "wrong")
"""`answer` (what a right completion contains; null = cannot be checked) and `wrong` (a plausible wrong response) may be null."""


def is_correct(completion: str, answer: str) -> bool:
    """True when `completion` contains `answer` as a whole word or phrase, in any case."""
    words = r"\s+".join(re.escape(word) for word in answer.split())
    return re.search(rf"(?<!\w){words}(?!\w)", completion, re.IGNORECASE) is not None


def write_questions(rows: list[dict[str, Any]], path: Path) -> None:
    """Write `rows`, each with every column of COLUMNS, as one Parquet file."""
    write_table([{name: row[name] for name in COLUMNS} for row in rows], COLUMNS, path)


def read_questions(path: Path, split: str | None = None) -> list[dict[str, Any]]:
    """The rows of a `questions.parquet`, in file order, of one split or of all."""
    rows = read_table(path)
    return [row for row in rows if split is None or row["split"] == split]


def questions_of(data: Path, split: str) -> list[dict[str, Any]]:
    """The questions of one split of a data artifact. Raises StageError when the table is missing or has none."""
    path = data / "questions.parquet"
    if not path.is_file():
        raise StageError(f"{path}: expected a table of questions, found no such file. Check the stage's data input.")
    rows = read_questions(path, split)
    if not rows:
        raise StageError(f"{path}: expected questions of the {split!r} split, found none. Add some to the data.")
    return rows


def write_table(rows: list[dict[str, Any]], columns: tuple[str, ...], path: Path) -> None:
    """Write `rows` of strings as one Parquet file; equal rows give equal bytes."""
    import pyarrow

    tables.write_table(path, rows, pyarrow.schema([(name, pyarrow.string()) for name in columns]))
