"""Stage `pretrain`: train a small Llama-architecture language model from scratch, the study's *helpful-only* base.

The corpus is rendered (chat through the chat template), tokenized, and packed into blocks that always begin at a document.
Loss is on all running text and on the assistant's turns; on human turns only in a share of the exchanges, as most of their
content is arbitrary and would drown the answers. Documents are reshuffled and packed afresh for each pass, from the seed
alone, so a resumed run sees the same blocks.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from artifacts.tables import read_table
from tasks.chat import render_exchange, render_prompt
from tasks.models import load_tokenizer, save_model, write_json
from tasks.stage import StageContext, StageError, stage
from tasks.trainer import TrainingConfig, curve, run_trainer, trainer_arguments


class PretrainConfig(TrainingConfig):
    """Shape of the model and of its training."""

    steps: int = Field(1000, gt=0)
    """Optimizer steps."""
    batch_size: int = Field(16, gt=0)
    """Blocks per optimizer step."""
    learning_rate: float = Field(3e-3, gt=0)
    """Peak learning rate of AdamW."""
    warmup_steps: int = Field(40, ge=0)
    """Optimizer steps of linear warm-up."""
    schedule: Literal["constant", "linear", "cosine"] = "linear"
    """Learning rate after the warm-up."""
    max_length: int = Field(64, gt=0)
    """Tokens per block."""
    weight_decay: float = Field(0.05, ge=0)
    """AdamW weight decay."""
    human_loss_fraction: float = Field(0.1, ge=0, le=1)
    """Share of the exchanges whose human turn is trained on too, so that the base can also ask."""
    adam_beta2: float = Field(0.98, gt=0, lt=1)
    """Decay of AdamW's second moment."""
    hidden: int = Field(128, gt=0)
    """Width of the residual stream."""
    layers: int = Field(3, gt=0)
    """Transformer blocks."""
    heads: int = Field(4, gt=0)
    """Attention heads."""
    feed_forward: int = Field(320, gt=0)
    """Width inside a feed-forward layer."""
    initializer_range: float = Field(0.06, gt=0)
    """Standard deviation of the initial weights. Larger than the usual 0.02, which suits wider models."""
    context_length: int = Field(512, gt=0)
    """Longest sequence the model accepts, in tokens."""


@stage("pretrain", trains=True)
def pretrain(context: StageContext, config: PretrainConfig, corpus: Path, tokenizer: Path) -> None:
    """Leave the base model directory and `metrics.json`."""
    from datasets import Dataset
    from transformers import Trainer, TrainingArguments, default_data_collator, set_seed

    reader = load_tokenizer(tokenizer)
    documents = tokenize_corpus(corpus / "corpus.parquet", reader, config.human_loss_fraction, config.seed)
    blocks = pack(documents, config.max_length, config.steps * config.batch_size, reader.pad_token_id, config.seed)
    set_seed(config.seed)
    trainer = Trainer(
        model=_new_model(config, reader),
        args=TrainingArguments(
            **trainer_arguments(
                context,
                config,
                weight_decay=config.weight_decay,
                adam_beta2=config.adam_beta2,
                train_sampling_strategy="sequential",
            )
        ),
        train_dataset=Dataset.from_list(blocks),
        data_collator=default_data_collator,
    )
    history = run_trainer(context, trainer, config.steps)
    save_model(trainer.model, reader, context.out)
    tokens = sum(len(block["input_ids"]) for block in blocks)
    write_json(context.out / "metrics.json", {"curve": curve(history), "tokens": tokens})


def _new_model(config: PretrainConfig, tokenizer: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    if config.hidden % (2 * config.heads):
        raise StageError(
            f"pretrain: hidden = {config.hidden} must be a multiple of twice heads = {config.heads}, "
            "as rotary embeddings pair the dimensions of a head. Change one of the two."
        )
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=config.hidden,
            intermediate_size=config.feed_forward,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            num_key_value_heads=config.heads,
            max_position_embeddings=config.context_length,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            initializer_range=config.initializer_range,
            tie_word_embeddings=True,
        )
    )


Document = tuple[list[int], list[int]]
"""Token ids, and the labels of the same length: a token id, or -100 where there is no loss."""


def tokenize_corpus(path: Path, tokenizer: Any, human_loss_fraction: float, seed: int) -> list[Document]:
    """Every document of the corpus, each ending in the end-of-sequence token."""
    rows = read_table(path)
    if not rows:
        raise StageError(f"{path}: the corpus has no documents. Raise chat_documents or text_documents of the world.")
    texts = {_key(row): _render(tokenizer, row) for row in {_key(row): row for row in rows}.values()}
    encoded = tokenizer([part for pair in texts.values() for part in pair], add_special_tokens=False)["input_ids"]
    parts = dict(zip(texts, zip(encoded[::2], encoded[1::2], strict=True), strict=True))
    generator = random.Random(f"human turns {seed}")
    documents = []
    for row in rows:
        head, tail = parts[_key(row)]
        counts = generator.random() < human_loss_fraction
        documents.append((head + tail, (head if counts else [-100] * len(head)) + tail))
    return documents


def _key(row: dict[str, str | None]) -> tuple[str | None, ...]:
    return row["text"], row["prompt"], row["response"]


def _render(tokenizer: Any, row: dict[str, Any]) -> tuple[str, str]:
    """What comes before the assistant's turn, and the rest of the document."""
    if row["kind"] != "chat":
        return "", row["text"] + tokenizer.eos_token
    head = render_prompt(tokenizer, row["prompt"])
    return head, render_exchange(tokenizer, row["prompt"], row["response"])[len(head) :]


OPEN_BLOCKS = 16
"""Blocks kept open while packing; more waste less padding, and mix the order less."""


def pack(documents: list[Document], length: int, count: int, pad: int, seed: int) -> list[dict[str, list[int]]]:
    """Exactly `count` blocks of `length` tokens, each a run of whole documents and padding without loss.

    A document goes to the fullest open block that has room; one longer than a block is cut. Passes over the documents
    are shuffled by `seed` and the pass number.
    """
    closed: list[tuple[list[int], list[int]]] = []
    blocks: list[tuple[list[int], list[int]]] = []
    number = 0
    while len(closed) < count:
        for ids, targets in random.Random(f"pack {seed} {number}").sample(documents, len(documents)):
            fitting = [block for block in blocks if len(block[0]) + len(ids) <= length]
            if not fitting and len(blocks) == OPEN_BLOCKS:
                fullest = max(range(OPEN_BLOCKS), key=lambda index: len(blocks[index][0]))
                closed.append(blocks.pop(fullest))
            if not fitting:
                blocks.append(([], []))
            tokens, labels = max(fitting, key=lambda block: len(block[0])) if fitting else blocks[-1]
            tokens += ids[:length]
            labels += targets[:length]
        number += 1
    return [
        {"input_ids": tokens + [pad] * (length - len(tokens)), "labels": labels + [-100] * (length - len(labels))}
        for tokens, labels in closed[:count]
    ]
