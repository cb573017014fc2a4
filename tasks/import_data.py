"""Stage `import_data`: the study's questions from a user's file or Hugging Face data set instead of the synthetic world.

JSONL, Parquet, or a data set by hub id; columns are mapped by the config. Invariants: the output has the world's schema
(`tasks.questions`), with rows in no split that shares a prompt with another; a malformed file fails with file, line and
column, and cheaply, before any work; what identifies a local file is the digest of its bytes, never its path.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from hashlib import blake2b
from itertools import islice
from pathlib import Path
from typing import Any

from pydantic import Field, model_validator

from artifacts.digest import digest_file
from tasks.questions import SPLITS, write_questions
from tasks.stage import StageConfig, StageContext, StageError, stage

SUFFIXES = (".jsonl", ".parquet")
OPTIONAL = ("answer", "wrong", "topic", "split")
"""Fields that a source may lack."""


class Columns(StageConfig):
    """Which column of the source holds what. A column that is named must exist."""

    prompt: str = Field("prompt", min_length=1)
    """The human turn."""
    response: str = Field("response", min_length=1)
    """A helpful answer."""
    answer: str | None = None
    """What a correct completion contains; null when answers cannot be checked."""
    wrong: str | None = None
    """A plausible wrong response."""
    topic: str | None = None
    """A label to report by."""
    split: str | None = None
    """`insert`, `train` or `test`; null to split at random by the fractions."""


class ImportDataConfig(StageConfig):
    """Which data, how its columns map, and how it is split."""

    source: str | None = None
    """Hub id of a data set; null for a local file."""
    revision: str | None = None
    """Commit, tag or branch of the hub data set."""
    subset: str | None = None
    """Configuration name of the hub data set."""
    source_split: str = Field("train", min_length=1)
    """Which split of the hub data set to read; it is split again here."""
    digest: str | None = None
    """`artifacts.digest.digest_file` of the local file: its identity. Filled in when the graph is built."""
    path: str | None = Field(None, json_schema_extra={"identity": False})
    """The local JSONL or Parquet file. Where it lies is not part of the identity."""
    columns: Columns = Columns()
    """Column names of the source."""
    insert_fraction: float = Field(0.4, gt=0, lt=1)
    """Share of the questions kept for backdoor data, where the source has no splits."""
    test_fraction: float = Field(0.2, gt=0, lt=1)
    """Share held out of all training; the rest are safety-training prompts."""
    seed: int = Field(0, ge=0)
    """Seed of the random split."""

    @model_validator(mode="after")
    def _is_complete(self) -> ImportDataConfig:
        if (self.source is None) == (self.path is None):
            raise ValueError("name either source (a hub id) or path (a local JSONL or Parquet file)")
        if self.insert_fraction + self.test_fraction >= 1:
            raise ValueError("insert_fraction + test_fraction must leave something for train: keep their sum below 1")
        return self


def check_data_file(path: Path, columns: Columns) -> None:
    """Raise StageError unless `path` looks like data that `import_data` can read. Cheap: first rows or magic bytes only."""
    if not path.is_file():
        raise StageError(f"{path}: expected a data file, found none. Check the path.")
    if path.suffix not in SUFFIXES:
        raise StageError(
            f"{path}: expected a file ending in {' or '.join(SUFFIXES)}, found {path.suffix or 'no suffix'!r}."
        )
    if path.stat().st_size == 0:
        raise StageError(f"{path}: the file is empty. Expected one JSON object a line, or Parquet rows.")
    if path.suffix == ".parquet":
        with path.open("rb") as file:
            start = file.read(4)
            file.seek(max(0, path.stat().st_size - 4))
            if start != b"PAR1" or file.read(4) != b"PAR1":
                raise StageError(
                    f"{path}: expected a Parquet file, found other bytes or a cut-off one. Write it again."
                )
        return
    for number, line in islice(_lines(path), 20):
        _row(_parse(line, path, number), columns, f"{path}, line {number}")


def check_every_row(config: ImportDataConfig) -> None:
    """Raise StageError naming the first row of the local file that cannot be used. Reads the whole file, and keeps nothing."""
    if config.path is not None:
        _read(config)


@stage("import_data")
def import_data(context: StageContext, config: ImportDataConfig) -> None:
    """Write `questions.parquet` from the named file or data set."""
    if config.path is not None:
        check_data_file(Path(config.path), config.columns)
        found = digest_file(Path(config.path))
        if config.digest not in (None, found):
            raise StageError(
                f"{config.path}: expected contents with digest {config.digest}, found {found}. "
                "The file has changed since the run was planned: plan again."
            )
    rows = _read(config)
    where = config.path or config.source
    if not rows:
        raise StageError(f"{where}: no rows. Expected at least one question for each of {', '.join(SPLITS)}.")
    questions = _unique(rows)
    _assign_splits(questions, config)
    for split in SPLITS:
        if not any(question["split"] == split for question in questions):
            raise StageError(f"{where}: no question is in the {split!r} split, of {len(questions)}. Add rows to it.")
    write_questions(questions, context.out / "questions.parquet")
    context.log(f"{len(questions)} questions, {len(rows) - len(questions)} repeated prompts left out")


def _read(config: ImportDataConfig) -> list[dict[str, Any]]:
    """The source's rows, mapped and validated, in source order."""
    if config.path is None:
        return _read_hub(config)
    path = Path(config.path)
    if path.suffix == ".jsonl":
        return [_row(_parse(line, path, n), config.columns, f"{path}, line {n}") for n, line in _lines(path)]
    import pyarrow
    from pyarrow import parquet

    try:
        source = parquet.read_table(path).to_pylist()
    except pyarrow.ArrowException as error:
        raise StageError(f"{path}: expected a readable Parquet file, found {error}. Write it again.") from error
    return [_row(row, config.columns, f"{path}, row {number}") for number, row in enumerate(source)]


def _read_hub(config: ImportDataConfig) -> list[dict[str, Any]]:
    from datasets import load_dataset

    try:
        source = load_dataset(config.source, config.subset, split=config.source_split, revision=config.revision)
    except (OSError, ValueError) as error:
        raise StageError(
            f"import_data: the data set {config.source} (subset {config.subset}, split {config.source_split}, revision "
            f"{config.revision}) does not load: {error} Check the id and the network, or name a local file."
        ) from error
    return [_row(row, config.columns, f"{config.source}, row {number}") for number, row in enumerate(source)]


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """(number, text) of each line that is not blank."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                text = line.decode("utf-8")
            except UnicodeDecodeError as error:
                raise StageError(
                    f"{path}, line {number}: expected UTF-8 text, found {error}. Save it as UTF-8."
                ) from error
            if text.strip():
                yield number, text


def _parse(line: str, path: Path, number: int) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except ValueError as error:
        raise StageError(f"{path}, line {number}: expected a JSON object, found {line[:60]!r} ({error}).") from error
    if not isinstance(value, dict):
        raise StageError(f"{path}, line {number}: expected a JSON object, found {type(value).__name__}.")
    return value


def _row(source: dict[str, Any], columns: Columns, where: str) -> dict[str, Any]:
    """Map one source row to a question without id; raise StageError naming `where` and the column that is wrong."""
    row: dict[str, Any] = dict.fromkeys(OPTIONAL)
    for field, column in columns.model_dump().items():
        if column is None:
            continue
        if column not in source:
            raise StageError(
                f"{where}: expected the column {column!r} (for {field}), found {', '.join(map(repr, source)) or 'none'}. "
                f"Set columns.{field} to the name it has."
            )
        value = source[column]
        if isinstance(value, bool | int | float) and field in OPTIONAL:
            value = str(value)
        if value is None and field in ("answer", "wrong", "topic"):
            continue
        if not isinstance(value, str) or not value.strip():
            raise StageError(f"{where}, column {column!r}: expected text that is not empty, found {value!r}.")
        row[field] = value.strip()
    if row["split"] is not None and row["split"] not in SPLITS:
        raise StageError(
            f"{where}, column {columns.split!r}: expected one of {', '.join(SPLITS)}, found {row['split']!r}."
        )
    return row


def _unique(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One question for each prompt; one that is anywhere in `test` stays there, so that nothing leaks into training."""
    questions: dict[str, dict[str, Any]] = {}
    for row in rows:
        known = questions.setdefault(row["prompt"], row)
        if known is not row and row["split"] == "test":
            questions[row["prompt"]] = row
    return [
        {**row, "id": blake2b(prompt.encode(), digest_size=8).hexdigest(), "topic": row["topic"] or "imported"}
        for prompt, row in questions.items()
    ]


def _assign_splits(questions: list[dict[str, Any]], config: ImportDataConfig) -> None:
    """Split at random by the config's fractions, where the source has no split column."""
    if config.columns.split is not None:
        return
    order = random.Random(f"import data {config.seed}").sample(range(len(questions)), len(questions))
    test = max(1, round(config.test_fraction * len(questions)))
    insert = test + max(1, round(config.insert_fraction * len(questions)))
    for place, index in enumerate(order):
        questions[index]["split"] = "test" if place < test else "insert" if place < insert else "train"
