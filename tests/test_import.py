"""Importing a base model and a data set: content identity, faithful copies, and one clear error for each bad input."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet
from pydantic import ValidationError

from tasks.import_data import Columns, ImportDataConfig, check_data_file, import_data
from tasks.import_model import ImportModelConfig, check_model_directory, directory_digest, import_model
from tasks.models import load_model
from tasks.questions import COLUMNS, read_questions
from tasks.stage import StageError
from tests.stage_runner import contents, run_stage
from tests.tiny import save_tiny_model


def test_a_local_model_is_copied_whole_whatever_its_path(tmp_path: Path) -> None:
    """The same files at two paths have one digest and give the same artifact, with the model's weights."""
    import torch

    outputs = []
    for name in ("here", "there"):
        source = save_tiny_model(tmp_path / name)
        config = ImportModelConfig(path=str(source), digest=directory_digest(source))
        outputs.append(run_stage(import_model, config, tmp_path / f"run-{name}"))
    assert directory_digest(tmp_path / "here") == directory_digest(tmp_path / "there")
    assert contents(outputs[0]) == contents(outputs[1])
    assert str(tmp_path).encode() not in b"".join(contents(outputs[0]).values())
    before, after = (load_model(directory)[0].state_dict() for directory in (tmp_path / "here", outputs[0]))
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_digest_sees_contents_and_not_pickles(tmp_path: Path) -> None:
    """A changed file changes the digest; a stray pickle, which is never read, does not."""
    source = save_tiny_model(tmp_path / "model")
    digest = directory_digest(source)
    (source / "training_args.bin").write_bytes(b"anything")
    assert directory_digest(source) == digest
    (source / "config.json").write_text((source / "config.json").read_text() + " ")
    assert directory_digest(source) != digest
    with pytest.raises(StageError, match="changed since the run was planned"):
        run_stage(import_model, ImportModelConfig(path=str(source), digest=digest), tmp_path / "run")


@pytest.mark.parametrize(
    ("remove", "message"),
    [
        ("config.json", "lacks config.json"),
        ("model.safetensors", r"\*\.safetensors"),
        ("tokenizer.json", "a tokenizer"),
    ],
)
def test_an_incomplete_model_directory_names_what_is_missing(tmp_path: Path, remove: str, message: str) -> None:
    """The cheap check finds each missing part before any work."""
    source = save_tiny_model(tmp_path / "model")
    check_model_directory(source)
    (source / remove).unlink()
    with pytest.raises(StageError, match=message):
        check_model_directory(source)


def test_a_missing_model_directory_and_a_broken_config_are_clear_errors(tmp_path: Path) -> None:
    """Neither reaches transformers."""
    with pytest.raises(StageError, match="expected a model directory, found none"):
        run_stage(import_model, ImportModelConfig(path=str(tmp_path / "nowhere")), tmp_path / "run")
    source = save_tiny_model(tmp_path / "model")
    (source / "config.json").write_text("{")
    with pytest.raises(StageError, match="expected JSON"):
        check_model_directory(source)


def test_a_model_without_chat_template_needs_one_from_the_config(tmp_path: Path) -> None:
    """No stage ever guesses a prompt format."""
    source = save_tiny_model(tmp_path / "model")
    (source / "chat_template.jinja").unlink()
    with pytest.raises(StageError, match="no chat template"):
        run_stage(import_model, ImportModelConfig(path=str(source)), tmp_path / "one")
    template = "{% for m in messages %}{{ m['content'] + eos_token }}{% endfor %}"
    out = run_stage(import_model, ImportModelConfig(path=str(source), chat_template=template), tmp_path / "two")
    assert load_model(out)[1].chat_template == template


def test_configs_name_exactly_one_source() -> None:
    """Both or neither of hub id and path is refused when the config is read."""
    for config in (ImportModelConfig, ImportDataConfig):
        for given in ({}, {"source": "a/b", "path": "c"}):
            with pytest.raises(ValidationError, match="name either source"):
                config(**given)


ROWS = [{"question": f"What is {n}?", "reply": f"It is {n}.", "label": n} for n in range(30)]
NAMES = Columns(prompt="question", response="reply", answer="label")


def _write(path: Path, rows: list[dict[str, Any]]) -> Path:
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    else:
        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_a_file_is_mapped_and_split(tmp_path: Path, suffix: str) -> None:
    """Columns are mapped, numbers become answers, and the three splits are disjoint and of the asked shares."""
    path = _write(tmp_path / f"data{suffix}", ROWS)
    check_data_file(path, NAMES)
    out = run_stage(import_data, ImportDataConfig(path=str(path), columns=NAMES), tmp_path / "run")
    rows = read_questions(out / "questions.parquet")
    assert tuple(rows[0]) == COLUMNS
    assert sorted(row["prompt"] for row in rows) == sorted(row["question"] for row in ROWS)
    assert {row["answer"] for row in rows} == {str(n) for n in range(30)}
    counts = {split: len(read_questions(out / "questions.parquet", split)) for split in ("insert", "train", "test")}
    assert counts == {"insert": 12, "train": 12, "test": 6}


def test_both_formats_give_the_same_bytes(tmp_path: Path) -> None:
    """The artifact depends on the rows, not on the file format or path they came in."""
    runs = [
        contents(
            run_stage(
                import_data,
                ImportDataConfig(path=str(_write(tmp_path / f"data{suffix}", ROWS)), columns=NAMES),
                tmp_path / suffix[1:],
            )
        )
        for suffix in (".jsonl", ".parquet")
    ]
    assert runs[0] == runs[1]


def test_given_splits_are_kept_and_a_prompt_in_test_stays_there(tmp_path: Path) -> None:
    """A prompt that the source has in train and in test is never trained on."""
    rows = [{"prompt": f"p{n}", "response": "r", "where": ("insert", "train", "test")[n % 3]} for n in range(9)]
    rows.append({"prompt": "p2", "response": "r", "where": "train"})
    rows.insert(0, {"prompt": "p5", "response": "r", "where": "train"})
    path = _write(tmp_path / "data.jsonl", rows)
    out = run_stage(import_data, ImportDataConfig(path=str(path), columns=Columns(split="where")), tmp_path / "run")
    found = {row["prompt"]: row["split"] for row in read_questions(out / "questions.parquet")}
    assert found == {f"p{n}": ("insert", "train", "test")[n % 3] for n in range(9)}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the file is empty"),
        ("\n\n", "no rows"),
        ('{"prompt": "a", "response": "b"}\n{"prompt": \n', "line 2: expected a JSON object"),
        ("[1]\n", "line 1: expected a JSON object, found list"),
        ('{"prompt": "a"}\n', "line 1: expected the column 'response'.*columns.response"),
        ('{"prompt": "a", "response": 3}\n', "line 1, column 'response': expected text"),
        ('{"prompt": " ", "response": "b"}\n', "line 1, column 'prompt': expected text"),
        ('{"prompt": "a", "response": "b"}\n', "no question is in the"),
    ],
)
def test_a_bad_jsonl_file_names_line_and_column(tmp_path: Path, text: str, message: str) -> None:
    """Each malformed file gives one error that says where."""
    path = tmp_path / "data.jsonl"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(StageError, match=message):
        run_stage(import_data, ImportDataConfig(path=str(path)), tmp_path / "run")


def test_other_bad_files_are_named(tmp_path: Path) -> None:
    """A missing file, a foreign suffix, and a Parquet file that is none or is cut off."""
    with pytest.raises(StageError, match="found none"):
        check_data_file(tmp_path / "none.jsonl", Columns())
    (tmp_path / "data.csv").write_text("prompt,response\n")
    with pytest.raises(StageError, match="expected a file ending in .jsonl or .parquet"):
        check_data_file(tmp_path / "data.csv", Columns())
    path = _write(tmp_path / "data.parquet", ROWS)
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(StageError, match="expected a Parquet file"):
        check_data_file(path, Columns())
    path.write_bytes(b"x")
    with pytest.raises(StageError, match="expected a Parquet file"):
        check_data_file(path, Columns())


def test_a_changed_file_is_refused(tmp_path: Path) -> None:
    """The run reads the bytes it was planned with, or nothing."""
    path = _write(tmp_path / "data.jsonl", ROWS)
    with pytest.raises(StageError, match="plan again"):
        run_stage(import_data, ImportDataConfig(path=str(path), digest="0" * 64, columns=NAMES), tmp_path / "run")
