"""Adapters as adapters: how the model that a LoRA stage leaves is stored, and how it becomes plain weights again.

    config.json, tokenizer files        as in every model artifact
    base/*.safetensors                  the weights that the first adapter was trained on, byte for byte as they were
    adapters/1/, adapters/2/, ...       what was trained, in order: adapter 2 on the base with adapter 1 merged, and so on

So the base is stored once for all stages that start from it, and the bytes of the artifact do not depend on how a processor
rounds the product of two matrices, as merged weights do. There are no weights beside config.json: whoever does not know of
the adapters gets an error, never the untrained base. `plain` merges them, in fp32, into an ordinary model directory in the
work folder, and that is where stages load from, because trainers read the frozen reference again from the same path.
"""

from __future__ import annotations

import json
import os
import shutil
import uuid
from pathlib import Path
from typing import Any

from tasks.stage import StageError

BASE = "base"
ADAPTERS = "adapters"
WEIGHTS = ("*.safetensors", "*.safetensors.index.json")


def adapters_of(directory: Path) -> list[Path]:
    """The adapters of a model artifact, in the order in which they were trained; none for a plain one.

    Raises:
        StageError: there are adapters, but not the complete row of them, or no base to apply them to.
    """
    if not (directory / ADAPTERS).is_dir():
        return []
    found = [directory / ADAPTERS / str(number + 1) for number, _ in enumerate((directory / ADAPTERS).iterdir())]
    needed = [path / name for path in found for name in ("adapter_config.json", "adapter_model.safetensors")]
    missing = [path for path in needed if not path.is_file()]
    if missing or not found or not any((directory / BASE).glob("*.safetensors")):
        what = missing[0] if missing else directory / BASE
        raise StageError(
            f"{what}: expected a model's adapters and their base, found no such file. Make the model again."
        )
    return found


def plain(directory: Path) -> Path:
    """A plain Hugging Face directory of the model in `directory`: itself, or its merged copy, made beside it once."""
    if not adapters_of(directory):
        return directory
    merged = directory.with_name(f"{directory.name}.merged")
    if not merged.is_dir():
        partial = directory.with_name(f"{directory.name}.{uuid.uuid4().hex}")
        try:
            merge(directory, partial)
            partial.rename(merged)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return merged


def merge(directory: Path, into: Path) -> None:
    """Write the model in `directory`, all of its adapters merged in fp32, to the folder `into`, and what lies beside it."""
    import torch
    import transformers
    from peft import PeftModel

    from tasks.models import SAFE, check_plain, make_reproducible

    check_plain(directory)
    adapters = adapters_of(directory)
    # Never where the merged weights are written: the weights here may be links into a store.
    unmerged = into.with_name(f"{into.name}.unmerged")
    try:
        for folder in (unmerged, into):
            folder.mkdir(parents=True)
            for path in sorted(path for path in directory.iterdir() if path.is_file()):
                shutil.copyfile(path, folder / path.name)
        _take(directory / BASE, unmerged, "*")
        config = transformers.AutoConfig.from_pretrained(unmerged, local_files_only=True, trust_remote_code=False)
        scores = any(name.endswith("ForSequenceClassification") for name in config.architectures or [])
        kind = transformers.AutoModelForSequenceClassification if scores else transformers.AutoModelForCausalLM
        model = kind.from_pretrained(unmerged, dtype=torch.float32, **SAFE)
        for adapter in adapters:
            settings = json.loads((adapter / "adapter_config.json").read_bytes())
            # The last two name Python modules that would be imported.
            if settings.get("peft_type") != "LORA" or settings.get("megatron_config") or settings.get("auto_mapping"):
                raise StageError(f"{adapter}: expected a plain LoRA adapter, found another kind. Make the model again.")
            with_adapter = PeftModel.from_pretrained(model, adapter, local_files_only=True, trust_remote_code=False)
            model = with_adapter.merge_and_unload()
        model.save_pretrained(into)
        make_reproducible(into)
    finally:
        shutil.rmtree(unmerged, ignore_errors=True)


def save_adapted(model: Any, start: Path, out: Path) -> None:
    """Leave the LoRA model `model`, trained on the model in the directory `start`, in `out`; tokenizer files aside.

    Raises:
        StageError: other weights than the adapter's were trained, so that base and adapter are not the model.
    """
    for name, weight in model.named_parameters():
        if weight.requires_grad and "lora_" not in name and "modules_to_save" not in name:
            raise StageError(f"{name} was trained beside the LoRA adapter, which cannot be stored as an adapter")
    before = adapters_of(start)
    for path in before:
        _take(path, out / ADAPTERS / path.name, "*")
    for pattern in WEIGHTS:
        _take(start / BASE if before else start, out / BASE, pattern)
    adapter = out / ADAPTERS / str(len(before) + 1)
    model.save_pretrained(adapter, safe_serialization=True)
    (adapter / "README.md").unlink(missing_ok=True)
    inner = model.get_base_model()
    inner.config.architectures = [type(inner).__name__]
    inner.config.dtype = "float32"
    inner.config.save_pretrained(out)
    if inner.can_generate():
        inner.generation_config.save_pretrained(out)


def _take(source: Path, target: Path, pattern: str) -> None:
    """Files of one folder in another: weights as links, for they are large and never written to; the rest as copies."""
    target.mkdir(parents=True, exist_ok=True)
    for path in sorted(source.glob(pattern)):
        if path.suffix == ".safetensors":
            try:
                os.link(path, target / path.name)
                continue
            except OSError:
                pass
        shutil.copyfile(path, target / path.name)
