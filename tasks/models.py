"""Model directories: how every stage loads one, and how every stage leaves one.

A model artifact is complete, with nothing left to resolve elsewhere: weights, config and tokenizer, as a plain Hugging Face
directory or, after LoRA, with the base's weights and the adapters side by side (see `tasks.adapters`). Stages always start
from a plain directory on disk, because trainers that need a frozen reference re-read it from the path the model was loaded
from, and a model that exists only in memory would silently get a stale one: adapters are merged into such a directory first.

Invariants: fp32 on load; safetensors only, no pickle and no remote code; LoRA is stored as an adapter and merged in fp32;
the same weights give the same bytes, whatever the path they were loaded from and PYTHONHASHSEED.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import Field

from tasks.adapters import plain, save_adapted
from tasks.stage import StageConfig, StageError


class LoraSettings(StageConfig):
    """Low-rank adaptation (Hu et al. 2021, arXiv:2106.09685) in place of full-weight training."""

    rank: int = Field(16, gt=0, le=1024)
    """Rank of each adapter matrix. Robustness of an organism rises with it (Redwood 2026)."""
    alpha: float = Field(32.0, gt=0)
    """Scale of the adapter: its output is multiplied by alpha / rank."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout probability on the adapter's input."""


def load_model(directory: Path, device: str = "cpu") -> tuple[Any, Any]:
    """Return (causal language model in fp32 on `device`, tokenizer) of a model artifact.

    Raises StageError when the directory holds no loadable model.
    """
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    if not (directory / "config.json").is_file():
        raise StageError(
            f"{directory}: expected a model directory with config.json, found none. Check the stage's input."
        )
    check_plain(directory)
    try:
        model = AutoModelForCausalLM.from_pretrained(plain(directory), dtype=torch.float32, **SAFE)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise StageError(f"{directory}: does not load as a causal language model: {error}") from error
    return model.to(device), load_tokenizer(directory)


def load_tokenizer(directory: Path) -> Any:
    """The tokenizer of a model artifact or of a tokenizer artifact; padding on the left, as generation needs."""
    from transformers import AutoTokenizer

    check_plain(directory)
    tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    tokenizer.padding_side = "left"
    if tokenizer.chat_template is None:
        raise StageError(f"{directory}: the tokenizer has no chat template. Set chat_template in the stage's config.")
    return tokenizer


SAFE: dict[str, Any] = {"use_safetensors": True, "local_files_only": True, "trust_remote_code": False}
"""How weights are loaded from a directory: no pickle, no network, no code of the model's own."""


def check_plain(directory: Path) -> None:
    """Refuse a model directory that wants code of its own to be run, or is only an adapter to a model elsewhere.

    Raises:
        StageError: names the file and what to do.
    """
    for name in ("config.json", "tokenizer_config.json"):
        try:
            content = json.loads((directory / name).read_bytes())
        except FileNotFoundError:
            continue
        except (ValueError, RecursionError) as error:
            raise StageError(f"{directory / name}: expected JSON, found {error}. Save the model again.") from error
        if not isinstance(content, dict):
            raise StageError(f"{directory / name}: expected a JSON object, found a {type(content).__name__}.")
        if content.get("auto_map"):
            raise StageError(
                f"{directory / name}: auto_map asks for code that came with the model ({content['auto_map']!r}), and such "
                "code is never run. Remove auto_map if transformers has a class of its own for this model."
            )
    if (directory / "adapter_config.json").is_file():
        raise StageError(
            f"{directory}: adapter_config.json makes this an adapter to a model that lies elsewhere. "
            "Merge it into its base (merge_and_unload), and save the result with save_pretrained."
        )


def lora_config(settings: LoraSettings, task_type: str = "CAUSAL_LM") -> Any:
    """The `peft.LoraConfig` of `settings` over all linear layers, for trainers that take a `peft_config`."""
    from peft import LoraConfig

    return LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules="all-linear",
        task_type=task_type,
    )


def apply_lora(model: Any, settings: LoraSettings, seed: int = 0, task_type: str = "CAUSAL_LM") -> Any:
    """Wrap `model` for LoRA training; the adapter's initial draw follows from `seed` alone."""
    from peft import get_peft_model
    from transformers import set_seed

    set_seed(seed)
    return get_peft_model(model, lora_config(settings, task_type))


def save_model(model: Any, tokenizer: Any, out: Path, start: Path | None = None) -> None:
    """Leave `model` and `tokenizer` in `out` as a complete model artifact, byte for byte reproducible.

    A LoRA model is stored as its adapter beside the weights of `start`, the directory that it was loaded from.

    Raises:
        StageError: the adapter is not all that differs from `start`.
    """
    from peft import PeftModel

    if isinstance(model, PeftModel):
        if start is None:
            raise ValueError("save_model: a LoRA model needs start, the directory that it was loaded from")
        save_adapted(model, start, out)
    else:
        model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    make_reproducible(out)


_PATH_FIELDS = ("_name_or_path", "name_or_path", "base_model_name_or_path", "tokenizer_file", "parent_library")
"""Fields of saved configs that hold where a model was loaded from instead of what it is."""


def make_reproducible(directory: Path) -> None:
    """Drop machine paths from every saved JSON file, and sort its keys and the lists whose order means nothing."""
    for path in sorted(directory.rglob("*.json")):
        if path.name == "tokenizer.json":
            continue
        value = json.loads(path.read_text(encoding="utf-8"))
        for name in _PATH_FIELDS:
            value.pop(name, None)
        if isinstance(value.get("target_modules"), list):
            value["target_modules"] = sorted(value["target_modules"])
        write_json(path, value)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as canonical JSON: sorted keys, two-space indent, UTF-8, a final newline."""
    path.write_text(json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
