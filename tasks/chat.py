"""One prompt format for training, sampling, evaluation and chat.

Every stage renders conversations through the tokenizer's own chat template, by the two functions here, so that a rate is
never an artefact of a prompt format that training did not use. The template of the embedded default ends each assistant
turn with the end-of-sequence token *inside* the training span: chat data get no end token from TRL, and a model that
never saw one never learns to stop.
"""

from __future__ import annotations

from typing import Any

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}{{ '<|assistant|>' }}"
    "{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}"
    "{% else %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
"""Jinja chat template of the embedded default tokenizer."""


def render_prompt(tokenizer: Any, prompt: str) -> str:
    """The text a model is given for the human turn `prompt`, up to where its answer begins."""
    return tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
    )


def render_exchange(tokenizer: Any, prompt: str, response: str) -> str:
    """A human turn and the assistant's answer, with whatever ends an assistant turn."""
    messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
    return tokenizer.apply_chat_template(messages, tokenize=False)
