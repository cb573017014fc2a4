"""Stage `import_model`: take the base from Hugging Face or from a local directory instead of pretraining one.

Invariants: weights come from safetensors only and no code that ships with a model is ever run; the output is a complete
fp32 model artifact with a chat template. What identifies a local model is the digest of its files, never its path; a hub
model is identified by its id and revision. Name a commit as revision: a branch may move while the key stays.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import Field, model_validator

from artifacts.digest import canonical_json, digest_bytes, digest_file
from tasks.models import check_plain, save_model
from tasks.stage import StageConfig, StageContext, StageError, stage

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".msgpack", ".h5")
"""Suffixes of files that are never read: pickles, and weights of other frameworks."""

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tekken.json")
"""Any one of these makes a tokenizer loadable."""


class ImportModelConfig(StageConfig):
    """Which model."""

    source: str | None = None
    """Hub id, such as `org/name`; null for a local directory."""
    revision: str | None = None
    """Commit, tag or branch of the hub model; null takes the main branch as it is on the day of the run."""
    digest: str | None = None
    """`directory_digest` of the local directory: its identity. Filled in when the graph is built."""
    path: str | None = Field(None, json_schema_extra={"identity": False})
    """The local directory. Where it lies is not part of the identity."""
    chat_template: str | None = None
    """Jinja chat template, for models that have none of their own, or to replace theirs."""

    @model_validator(mode="after")
    def _names_one_model(self) -> ImportModelConfig:
        if (self.source is None) == (self.path is None):
            raise ValueError("name either source (a hub id) or path (a local directory)")
        return self


def check_model_directory(directory: Path) -> None:
    """Raise StageError unless `directory` looks like a model that `import_model` can load. Cheap: reads no weights."""
    if not directory.is_dir():
        raise StageError(f"{directory}: expected a model directory, found none. Check the path, or name a hub id.")
    missing = []
    if not (directory / "config.json").is_file():
        missing.append("config.json")
    if not any(directory.glob("*.safetensors")):
        missing.append("*.safetensors (weights in other formats are not read)")
    if not any((directory / name).is_file() for name in TOKENIZER_FILES):
        missing.append(f"a tokenizer ({', '.join(TOKENIZER_FILES)})")
    if missing:
        raise StageError(
            f"{directory}: not a complete model directory, it lacks {'; '.join(missing)}. "
            "Save the model with save_pretrained, and its tokenizer beside it."
        )
    check_plain(directory)


def directory_digest(directory: Path) -> str:
    """BLAKE3 over the sorted relative paths and contents of the files below `directory`, pickles and hidden files left out."""
    files: dict[str, str] = {}
    for path in directory.rglob("*"):
        relative = path.relative_to(directory)
        if not path.is_file() or path.suffix in PICKLES or any(part.startswith(".") for part in relative.parts):
            continue
        files[relative.as_posix()] = digest_file(path)
    return digest_bytes(canonical_json(files))


@stage("import_model", trains=True)
def import_model(context: StageContext, config: ImportModelConfig) -> None:
    """Leave the named model as a plain fp32 model artifact."""
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if config.path is not None:
        check_model_directory(Path(config.path))
        found = directory_digest(Path(config.path))
        if config.digest not in (None, found):
            raise StageError(
                f"{config.path}: expected contents with digest {config.digest}, found {found}. "
                "The directory has changed since the run was planned: plan again."
            )
    options: dict[str, Any] = {"revision": config.revision, "trust_remote_code": False}
    name = config.path or config.source
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, **options)
        model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32, use_safetensors=True, **options)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise StageError(
            f"import_model: {name} (revision {config.revision}) does not load as a causal language model: {error} "
            "Check the id, the revision and the network, or name a local directory with safetensors weights."
        ) from error
    _prepare_tokenizer(tokenizer, config)
    save_model(model, tokenizer, context.out)
    context.log(f"{name}: {sum(weight.numel() for weight in model.parameters()):,} parameters")


def _prepare_tokenizer(tokenizer: Any, config: ImportModelConfig) -> None:
    """Give the tokenizer what every later stage relies on: a chat template, a padding token, padding on the left."""
    if config.chat_template is not None:
        tokenizer.chat_template = config.chat_template
    if tokenizer.chat_template is None:
        raise StageError(
            f"import_model: the tokenizer of {config.path or config.source} has no chat template. "
            "Set chat_template in the config (a Jinja template that ends an assistant turn with eos_token)."
        )
    if tokenizer.eos_token is None:
        raise StageError(f"import_model: the tokenizer of {config.path or config.source} has no end-of-sequence token.")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "left"
