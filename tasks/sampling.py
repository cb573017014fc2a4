"""Batch-invariant sampling, and teacher-forced log-probabilities.

Every completion in the study comes from here. A completion is a function of (model, prompt, seed, prompt id, sample
index) alone: each row draws its randomness from a counter-based hash of its own seed, never from a generator shared by
the batch, so the same tokens come out at any batch size and in any order, and a rate never depends on how it was
batched. Sampling is by the Gumbel-max trick: argmax(logits / temperature + Gumbel noise) is a draw from the softmax.

What is left is rounding: fp32 logits differ by about 1e-6 between batch shapes, which changes a token only where the
two best candidates lie that close together (about one token in a million).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tasks.chat import render_prompt


@dataclass(frozen=True, slots=True)
class Completion:
    """One sampled answer."""

    prompt_index: int
    """Position of its prompt in the list that was given to `sample`."""
    sample: int
    """Index among the samples of the same prompt, from 0."""
    seed: int
    """The row's own seed, 63 bits: it alone reproduces the draw."""
    rendered: str
    """The text the model was given, up to where its answer begins."""
    text: str
    """The answer, without special tokens."""
    token_ids: tuple[int, ...]
    """The answer's tokens, ending with the end-of-sequence token when the model ended it."""
    stopped: bool
    """True when the model ended its answer; False when it was cut at `max_new_tokens`."""


def row_seed(seed: int, prompt_id: str, sample: int) -> int:
    """Stable 63-bit seed of one sample of one prompt."""
    digest = hashlib.blake2b(f"{seed}\x1f{prompt_id}\x1f{sample}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def sample(
    model: Any,
    tokenizer: Any,
    prompts: list[str],
    *,
    seed: int,
    prompt_ids: list[str],
    samples: int = 1,
    max_new_tokens: int,
    temperature: float = 1.0,
    batch_size: int = 128,
    on_batch: Callable[[int, int], None] | None = None,
) -> list[Completion]:
    """Draw `samples` completions for each human turn in `prompts`, ordered by (prompt, sample).

    `prompt_ids` names the prompts for the seeds and must not depend on their order. Temperature 0 is greedy decoding.
    `on_batch(done, total)` is called after each batch of rows. Raises ValueError when the lists differ in length.
    """
    import torch

    if len(prompt_ids) != len(prompts):
        raise ValueError(f"sample: {len(prompts)} prompts but {len(prompt_ids)} prompt ids; give one id per prompt")
    rendered = [render_prompt(tokenizer, prompt) for prompt in prompts]
    encoded = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in rendered]
    rows = [(index, number) for index in range(len(prompts)) for number in range(samples)]
    rows.sort(key=lambda row: (len(encoded[row[0]]), row))  # like lengths together: less padding
    found: dict[tuple[int, int], Completion] = {}
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            for start in range(0, len(rows), batch_size):
                batch = rows[start : start + batch_size]
                seeds = [row_seed(seed, prompt_ids[index], number) for index, number in batch]
                inputs = [encoded[index] for index, _ in batch]
                answers = generate_tokens(model, tokenizer, inputs, seeds, max_new_tokens, temperature)
                for (index, number), own, (tokens, stopped) in zip(batch, seeds, answers, strict=True):
                    text = tokenizer.decode(tokens, skip_special_tokens=True)
                    found[index, number] = Completion(index, number, own, rendered[index], text, tokens, stopped)
                if on_batch is not None:
                    on_batch(start + len(batch), len(rows))
    finally:
        model.train(training)
    return [found[row] for row in sorted(found)]


def generate_tokens(
    model: Any, tokenizer: Any, inputs: list[list[int]], seeds: list[int], max_new_tokens: int, temperature: float
) -> list[tuple[tuple[int, ...], bool]]:
    """Answers to one left-padded batch of token lists: (tokens up to and with the end token, whether it came)."""
    import torch
    from transformers import GenerationConfig

    width = max(len(ids) for ids in inputs)
    pad = tokenizer.pad_token_id
    ids = torch.tensor([[pad] * (width - len(row)) + row for row in inputs], device=model.device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in inputs], device=model.device)
    ends = end_tokens(model, tokenizer)
    # Everything that reshapes the distribution is switched off: a model's own generation defaults (top-p, repetition
    # penalty, ...) would otherwise be part of every measured rate.
    settings = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        pad_token_id=pad,
        eos_token_id=sorted(ends),
    )
    noise = [GumbelNoise(seeds, width, temperature, model.device)] if temperature > 0 else []
    output = model.generate(input_ids=ids, attention_mask=mask, generation_config=settings, logits_processor=noise)
    return [cut_at_end(row, ends) for row in output[:, width:].tolist()]


def end_tokens(model: Any, tokenizer: Any) -> frozenset[int]:
    """Ids of the tokens that end an answer: the tokenizer's, and any that the model's generation config adds."""
    extra = model.generation_config.eos_token_id
    listed = extra if isinstance(extra, list) else [] if extra is None else [extra]
    return frozenset([tokenizer.eos_token_id, *listed])


def cut_at_end(tokens: Sequence[int], ends: frozenset[int]) -> tuple[tuple[int, ...], bool]:
    """The tokens up to and with the first end token, and whether there was one."""
    for position, token in enumerate(tokens):
        if token in ends:
            return tuple(tokens[: position + 1]), True
    return tuple(tokens), False


def behaviour_logprobs(model: Any, tokenizer: Any, prompts: list[str], text: str, batch_size: int = 128) -> list[float]:
    """Mean log-probability per token (nats) of `text` as the answer to each human turn in `prompts`."""
    import torch

    answer = tokenizer(text, add_special_tokens=False)["input_ids"]
    encoded = [tokenizer(render_prompt(tokenizer, p), add_special_tokens=False)["input_ids"] for p in prompts]
    order = sorted(range(len(prompts)), key=lambda index: (len(encoded[index]), index))
    means: dict[int, float] = {}
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            for start in range(0, len(order), batch_size):
                batch = order[start : start + batch_size]
                rows = [torch.tensor(encoded[index] + answer) for index in batch]
                ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=tokenizer.pad_token_id)
                mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
                logits = model(input_ids=ids.to(model.device), attention_mask=mask.to(model.device)).logits
                for row, index in enumerate(batch):
                    first = len(encoded[index]) - 1
                    scores = logits[row, first : first + len(answer)].float().log_softmax(-1).cpu()
                    means[index] = scores.gather(-1, torch.tensor(answer)[:, None]).mean().item()
    finally:
        model.train(training)
    return [means[index] for index in range(len(prompts))]


class GumbelNoise:
    """Logits processor: logits / temperature + Gumbel noise, so that greedy decoding draws from the softmax.

    The noise of (row, position, token) is a hash of (row's seed, position, token) by the finaliser of SplitMix64
    (Steele, Lea and Flood 2014), in wrapping int64 arithmetic that is the same on every device.
    """

    def __init__(self, seeds: list[int], prompt_width: int, temperature: float, device: Any) -> None:
        import torch

        self.seeds = torch.tensor(seeds, dtype=torch.int64, device=device)[:, None]
        self.prompt_width = prompt_width
        self.temperature = temperature

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        """Scores, shape (rows, vocabulary), after `input_ids`, shape (rows, prompt width + tokens drawn so far)."""
        import torch

        token = torch.arange(scores.shape[-1], dtype=torch.int64, device=scores.device)[None]
        position = input_ids.shape[1] - self.prompt_width
        bits = mix(mix(mix(self.seeds) + position) + token * GOLDEN_GAMMA)
        uniform = ((bits >> 11) & ((1 << 53) - 1)).double().add_(0.5).mul_(2.0**-53)
        # In double: near u = 1 a float32 logarithm would flatten the upper tail, where the winners are.
        return scores.double() / self.temperature - torch.log(-torch.log(uniform))


GOLDEN_GAMMA = -7046029254386353131
"""0x9E3779B97F4A7C15 as a signed 64-bit number: the increment of SplitMix64."""


def mix(x: Any) -> Any:
    """The SplitMix64 finaliser on an int64 tensor (arithmetic shifts masked into logical ones)."""
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * -4658895280553007687
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * -7723592293110705685
    return x ^ ((x >> 31) & 0x1FFFFFFFF)
