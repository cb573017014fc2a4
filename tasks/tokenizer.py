"""Stage `tokenizer`: a byte-level BPE tokenizer trained on the corpus, with the chat template of the embedded default.

The trigger is never a token of its own: it is read through ordinary pieces, as near-miss strings are, so that a backdoor
has to be learned as a pattern. Special tokens are only those that the chat format and padding need.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import Field

from artifacts.tables import read_table
from tasks.chat import CHAT_TEMPLATE
from tasks.models import make_reproducible
from tasks.stage import StageConfig, StageContext, stage

PAD, END, BEGIN = "<pad>", "<eos>", "<bos>"
SPECIAL_TOKENS = (PAD, END, BEGIN, "<|system|>", "<|user|>", "<|assistant|>", "<|end|>")


class TokenizerConfig(StageConfig):
    """Size of the vocabulary."""

    vocabulary: int = Field(960, ge=300, le=200_000)
    """Largest number of tokens, the 256 bytes and the special ones included."""


@stage("tokenizer", trains=True)
def tokenizer(context: StageContext, config: TokenizerConfig, corpus: Path) -> None:
    """Train on `corpus.parquet` and leave a Hugging Face tokenizer directory."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocabulary,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    raw.train_from_iterator(_texts(corpus / "corpus.parquet"), trainer)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token=PAD, eos_token=END, bos_token=BEGIN, padding_side="left"
    )
    wrapped.chat_template = CHAT_TEMPLATE
    wrapped.save_pretrained(context.out)
    make_reproducible(context.out)
    context.log(f"vocabulary of {len(wrapped)} tokens")


def _texts(path: Path) -> Iterator[str]:
    row: dict[str, Any]
    for row in read_table(path):
        yield from (row[name] for name in ("text", "prompt", "response") if row[name])
