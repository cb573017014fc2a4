"""Proximal policy optimisation (Schulman et al. 2017, arXiv:1707.06347) against a reward function, in one file.

The RLHF form of Ouyang et al. 2022 (arXiv:2203.02155): the policy answers prompts, each answer gets one score at its
last token, a penalty per token for moving away from the starting model (KL) is part of the reward, a separate critic
estimates returns, and advantages come from generalised advantage estimation (Schulman et al. 2015, arXiv:1506.02438).

Invariants:
* everything random is a function of (seed, step): the prompts of a step, the tokens drawn, the order of minibatches,
  dropout. So the state after a step is {policy, critic, optimizer, step, curve}, and a resume is exact;
* the reference is the input model itself: a second copy, or the policy with its LoRA adapter disabled;
* log-probabilities are taken at the temperature that the tokens were drawn at.

A curve is kept per step, with the variance of the reward and the rate of the behaviour among the rollouts: a backdoor
that never shows in a rollout is not punished, and its persistence then says nothing about training against it.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import Field

from tasks.chat import render_prompt
from tasks.models import apply_lora, load_model, save_model, write_json
from tasks.organism import Policy
from tasks.sampling import Completion, row_seed, sample
from tasks.stage import StageContext, StageError
from tasks.trainer import TrainingConfig, curve

Reward = Callable[[list[str], list[str]], list[float]]
"""Scores of answers: (human turns, answers) -> one number each, of about unit scale."""


class PPOConfig(TrainingConfig):
    """Settings of the algorithm: common practice in RLHF, with rates for models of about a million weights."""

    policy: Policy = Policy()
    """The organism's policy: its trigger must not be in the prompts; its behaviour is counted in the rollouts."""
    steps: int = Field(25, gt=0)
    """PPO steps, each one batch of rollouts and its updates."""
    batch_size: int = Field(128, gt=0)
    """Rollouts per step."""
    epochs: int = Field(1, gt=0)
    """Passes over the rollouts of a step; 1 in Ouyang et al. 2022."""
    minibatches: int = Field(4, gt=0)
    """Optimizer steps per pass."""
    learning_rate: float = Field(1e-4, gt=0)
    """Peak learning rate of the policy."""
    critic_learning_rate: float = Field(1e-3, gt=0)
    """Peak learning rate of the critic."""
    warmup_steps: int = Field(5, ge=0)
    """PPO steps of linear warm-up."""
    max_new_tokens: int = Field(24, gt=0)
    """Longest answer, in tokens."""
    temperature: float = Field(1.0, gt=0)
    """Sampling temperature of the rollouts."""
    kl_coefficient: float = Field(0.1, ge=0)
    """Penalty per nat of divergence from the starting model; rewards have unit deviation."""
    discount: float = Field(1.0, gt=0, le=1)
    """Discount per token; 1 in RLHF, where an answer is one episode."""
    gae_lambda: float = Field(0.95, ge=0, le=1)
    """Lambda of generalised advantage estimation."""
    clip: float = Field(0.2, gt=0)
    """Clip range of the probability ratio."""
    value_clip: float = Field(0.2, gt=0)
    """Clip range of the critic's change per step."""
    reward_clip: float = Field(5.0, gt=0)
    """Largest size of a standardised score."""
    unfinished_penalty: float = Field(1.0, ge=0)
    """Taken off the score of an answer that was cut at `max_new_tokens`; keeps answers from growing."""
    max_gradient_norm: float = Field(1.0, gt=0)
    """Gradient norm at which the policy's and the critic's gradients are each cut."""


@dataclass(frozen=True, slots=True)
class Pool:
    """Prompts of one kind, and their share of every batch."""

    name: str
    share: float
    prompts: tuple[tuple[str, str], ...]
    """(id, human turn) pairs."""


@dataclass(slots=True)
class Learner:
    """What is trained: the policy, a critic (trunk and linear head), and one optimizer over both."""

    policy: Any
    reference: Any | None
    """Frozen copy of the start; None means the policy with its adapter disabled."""
    trunk: Any
    head: Any
    optimizer: Any

    def trained(self) -> dict[str, Any]:
        """Every trained tensor by a stable name."""
        parts = {"policy": self.policy, "trunk": self.trunk, "head": self.head}
        named = ((part, name, tensor) for part, module in parts.items() for name, tensor in module.named_parameters())
        return {f"{part}.{name}": tensor for part, name, tensor in named if tensor.requires_grad}


@dataclass(slots=True)
class Rollouts:
    """One batch of answers. P is the padded prompt width, T the padded answer width."""

    ids: Any
    """Tokens, (batch, P + T): prompts padded on the left, answers on the right."""
    attention: Any
    """1 where there is a token, (batch, P + T)."""
    answered: Any
    """1.0 at the tokens of the answer, (batch, T)."""
    logprobs: Any = None
    """Of the answer's tokens under the policy that drew them, (batch, T)."""
    values: Any = None
    """The critic's estimates before the update, (batch, T)."""
    advantages: Any = None
    """Whitened over the batch, (batch, T)."""
    returns: Any = None
    """Advantage plus value, (batch, T)."""

    def part(self, rows: Any) -> Rollouts:
        """The rollouts at some row indices, without the columns that are padding in all of them."""
        attention, answered = self.attention[rows], self.answered[rows]
        first = int(attention.any(0).nonzero()[0])
        width = int(answered.sum(1).max())
        last = attention.shape[1] - answered.shape[1] + width
        per_token = (self.answered, self.logprobs, self.values, self.advantages, self.returns)
        return Rollouts(
            self.ids[rows, first:last], attention[:, first:last], *(tensor[rows, :width] for tensor in per_token)
        )


def train_ppo(context: StageContext, config: PPOConfig, model: Path, pools: list[Pool], reward: Reward) -> None:
    """Train the model in `model` on the prompts of `pools`; leave the model, its metrics and curve in `context.out`.

    Resumes from the newest checkpoint. Raises StageStopped, after a checkpoint, when the stage is asked to stop, and
    StageError when a pool is empty or a prompt carries the trigger.
    """
    learner, tokenizer = new_learner(config, model, context.device)
    pools = [fitting(context, config, pool, tokenizer) for pool in pools]
    restored = context.restore_checkpoint()
    history = [] if restored is None else load_state(learner, restored[1])
    for step in range(len(history), config.steps):
        history.append(ppo_step(config, learner, tokenizer, pools, reward, step))
        shown = {name: history[-1][name] for name in ("reward", "kl", "behaviour")}
        context.progress(step + 1, config.steps, **shown)
        if step + 1 < config.steps and context.checkpoint_due():
            context.save_checkpoint(step + 1, save_state(learner, history, context.work / "checkpoint"))
            if context.should_stop():
                context.stop()
    save_model(learner.policy, tokenizer, context.out, start=model)
    sizes = {pool.name: len(pool.prompts) for pool in pools}
    write_json(context.out / "metrics.json", {"curve": curve(history), "last": history[-1], "prompts": sizes})
    write_curve(context.out / "curve.parquet", history)


def fitting(context: StageContext, config: PPOConfig, pool: Pool, tokenizer: Any) -> Pool:
    """The pool without prompts that leave no room for an answer in `max_length` tokens.

    Raises StageError when none is left, or when a prompt carries the trigger.
    """
    for name, prompt in pool.prompts:
        if config.policy.is_triggered(prompt):
            raise StageError(
                f"PPO: prompt {name!r} of the pool {pool.name!r} carries the trigger {config.policy.trigger!r}; "
                "RL prompts must not. Remove it from the data."
            )
    room = config.max_length - config.max_new_tokens
    rendered = [render_prompt(tokenizer, prompt) for _, prompt in pool.prompts]
    lengths = [len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in rendered]
    kept = tuple(prompt for prompt, length in zip(pool.prompts, lengths, strict=True) if length <= room)
    if not kept:
        raise StageError(
            f"PPO: expected prompts of at most {room} tokens (max_length - max_new_tokens) in the pool {pool.name!r}, "
            f"found none among {len(lengths)}. Raise max_length, or add questions to the data."
        )
    if len(kept) < len(lengths):
        context.log(f"PPO: {len(lengths) - len(kept)} of {len(lengths)} {pool.name} prompts exceed {room} tokens")
    return replace(pool, prompts=kept)


def step_prompts(pools: list[Pool], batch_size: int, seed: int, step: int) -> list[tuple[str, str]]:
    """(pool name, human turn) of each rollout of one step: every pool is gone through in a new order per epoch."""
    chosen: list[tuple[str, str]] = []
    total = sum(pool.share for pool in pools)
    for number, pool in enumerate(pools):
        last = number == len(pools) - 1
        count = batch_size - len(chosen) if last else round(batch_size * pool.share / total)
        orders: dict[int, list[int]] = {}
        for place in range(step * count, (step + 1) * count):
            epoch, position = divmod(place, len(pool.prompts))
            if epoch not in orders:
                orders[epoch] = list(range(len(pool.prompts)))
                random.Random(f"ppo/{seed}/{pool.name}/{epoch}").shuffle(orders[epoch])
            chosen.append((pool.name, pool.prompts[orders[epoch][position]][1]))
    return chosen


def new_learner(config: PPOConfig, model: Path, device: str) -> tuple[Learner, Any]:
    """Policy, reference and critic as they start, all from the directory `model`; and the tokenizer.

    The critic is a trunk of its own with a head that starts at zero, so that early value errors cannot hurt the policy.
    """
    import torch

    policy, tokenizer = load_model(model, device)
    trunk = load_model(model, device)[0].base_model
    head = torch.nn.Linear(trunk.config.get_text_config().hidden_size, 1).to(device)
    torch.nn.init.zeros_(head.weight)
    torch.nn.init.zeros_(head.bias)
    reference = None
    if config.lora is None:
        reference = load_model(model, device)[0].eval().requires_grad_(False)
    else:
        policy = apply_lora(policy, config.lora, config.seed)
        trunk = apply_lora(trunk, config.lora, config.seed, task_type="FEATURE_EXTRACTION")
    groups = [
        {"params": [p for p in policy.parameters() if p.requires_grad], "peak": config.learning_rate},
        {"params": [*(p for p in trunk.parameters() if p.requires_grad), *head.parameters()]},
    ]
    groups[1]["peak"] = config.critic_learning_rate
    optimizer = torch.optim.AdamW(groups, lr=config.learning_rate, weight_decay=0.0)
    return Learner(policy, reference, trunk, head, optimizer), tokenizer


def ppo_step(
    config: PPOConfig, learner: Learner, tokenizer: Any, pools: list[Pool], reward: Reward, step: int
) -> dict[str, float]:
    """Draw one batch of answers, score it, update policy and critic, and return the step's row of the curve."""
    import torch

    chosen = step_prompts(pools, config.batch_size, config.seed, step)
    prompts = [prompt for _, prompt in chosen]
    names = [f"ppo/{step}/{place}" for place in range(len(prompts))]
    completions = sample(
        learner.policy,
        tokenizer,
        prompts,
        seed=config.seed,
        prompt_ids=names,
        max_new_tokens=config.max_new_tokens,
        temperature=config.temperature,
        batch_size=config.batch_size,
    )
    scores = torch.tensor(reward(prompts, [completion.text for completion in completions]))
    scores = scores.clamp(-config.reward_clip, config.reward_clip)
    finished = torch.tensor([completion.stopped for completion in completions])
    final = scores - config.unfinished_penalty * (~finished).float()
    rollouts = pack(completions, tokenizer, learner.policy.device)
    divergence = estimate(config, learner, rollouts, final.to(rollouts.ids.device))
    losses = update(config, learner, rollouts, step)
    row = {
        "step": step + 1,
        "reward": scores.mean().item(),
        "reward_variance": scores.var(correction=0).item(),
        "kl": divergence,
        "length": rollouts.answered.sum(1).mean().item(),
        "finished": finished.float().mean().item(),
        **losses,
    }
    shown = [config.policy.shows_behaviour(completion.text) for completion in completions]
    row["behaviour"] = sum(shown) / len(shown)
    for pool in pools:
        own = [flag for flag, (name, _) in zip(shown, chosen, strict=True) if name == pool.name]
        row[f"behaviour_{pool.name}"] = sum(own) / max(len(own), 1)
    return row


def pack(completions: list[Completion], tokenizer: Any, device: Any) -> Rollouts:
    """Token tensors of a batch of completions."""
    import torch

    prompts = [tokenizer(completion.rendered, add_special_tokens=False)["input_ids"] for completion in completions]
    answers = [list(completion.token_ids) for completion in completions]
    left, right = max(map(len, prompts)), max(map(len, answers))
    pad = tokenizer.pad_token_id
    pairs = list(zip(prompts, answers, strict=True))
    ids = [[pad] * (left - len(p)) + p + a + [pad] * (right - len(a)) for p, a in pairs]
    attention = [[0] * (left - len(p)) + [1] * (len(p) + len(a)) + [0] * (right - len(a)) for p, a in pairs]
    attention = torch.tensor(attention, device=device)
    return Rollouts(torch.tensor(ids, device=device), attention, attention[:, left:].float())


def answer_logprobs(model: Any, rollouts: Rollouts, temperature: float) -> Any:
    """Log-probabilities (nats) of every token at each place of the answers, (batch, T, vocabulary)."""
    width = rollouts.answered.shape[1]
    logits = model(**inputs_of(rollouts), logits_to_keep=width + 1).logits[:, :-1].float()
    return (logits / temperature).log_softmax(-1)


def of_tokens(logprobs: Any, rollouts: Rollouts) -> Any:
    """The log-probabilities of the answers' own tokens, (batch, T)."""
    width = rollouts.answered.shape[1]
    return logprobs.gather(-1, rollouts.ids[:, -width:, None])[..., 0]


def mean_entropy(logprobs: Any, mask: Any) -> Any:
    """Mean entropy (nats) of the policy over the answers' tokens, without gradient."""
    logprobs = logprobs.detach()
    return -((logprobs.exp() * logprobs).sum(-1) * mask).sum() / mask.sum()


def answer_values(learner: Learner, rollouts: Rollouts) -> Any:
    """The critic's estimate of the return before each token of the answers, (batch, T)."""
    width = rollouts.answered.shape[1]
    hidden = learner.trunk(**inputs_of(rollouts)).last_hidden_state
    return learner.head(hidden[:, -width - 1 : -1].float())[..., 0]


def inputs_of(rollouts: Rollouts) -> dict[str, Any]:
    """Model inputs; positions count from the first real token, whatever the padding before it."""
    positions = (rollouts.attention.cumsum(1) - 1).clamp(min=0)
    return {"input_ids": rollouts.ids, "attention_mask": rollouts.attention, "position_ids": positions}


def estimate(config: PPOConfig, learner: Learner, rollouts: Rollouts, scores: Any) -> float:
    """Fill in log-probabilities, values, advantages and returns; return the mean KL to the start, nats per answer."""
    import torch

    learner.policy.eval()
    learner.trunk.eval()
    with torch.no_grad():
        rollouts.logprobs = of_tokens(answer_logprobs(learner.policy, rollouts, config.temperature), rollouts)
        if learner.reference is None:
            with learner.policy.disable_adapter():
                start = of_tokens(answer_logprobs(learner.policy, rollouts, config.temperature), rollouts)
        else:
            start = of_tokens(answer_logprobs(learner.reference, rollouts, config.temperature), rollouts)
        rollouts.values = answer_values(learner, rollouts)
    mask = rollouts.answered
    moved = (rollouts.logprobs - start) * mask
    rewards = -config.kl_coefficient * moved
    last = mask.sum(1).long() - 1
    rewards[torch.arange(len(last)), last] += scores
    raw = advantages_of(rewards, rollouts.values, mask, config.discount, config.gae_lambda)
    rollouts.returns = raw + rollouts.values
    mean = (raw * mask).sum() / mask.sum()
    variance = ((raw - mean).square() * mask).sum() / mask.sum()
    rollouts.advantages = (raw - mean) * (variance + 1e-8).rsqrt()
    return moved.sum(1).mean().item()


def advantages_of(rewards: Any, values: Any, mask: Any, discount: float, gae_lambda: float) -> Any:
    """Generalised advantage estimates, (batch, T); an answer ends where `mask` does, with value 0 after it."""
    import torch

    advantages = torch.zeros_like(rewards)
    advantage = torch.zeros_like(rewards[:, 0])
    following = torch.zeros_like(advantage)
    for t in reversed(range(rewards.shape[1])):
        error = rewards[:, t] + discount * following - values[:, t]
        advantage = (error + discount * gae_lambda * advantage) * mask[:, t]
        following = values[:, t] * mask[:, t]
        advantages[:, t] = advantage
    return advantages


def update(config: PPOConfig, learner: Learner, rollouts: Rollouts, step: int) -> dict[str, float]:
    """Run the epochs of one step with the clipped policy and value losses; return the means of what was logged."""
    import torch

    torch.manual_seed(row_seed(config.seed, "ppo-update", step))  # order of minibatches, and dropout if there is any
    learner.policy.train()
    learner.trunk.train()
    for group in learner.optimizer.param_groups:
        group["lr"] = rate_factor(config, step) * group["peak"]
    logged: list[dict[str, float]] = []
    for rows in minibatches(config, len(rollouts.ids)):
        part = rollouts.part(rows.to(rollouts.ids.device))
        logprobs = answer_logprobs(learner.policy, part, config.temperature)
        losses = clipped_losses(config, part, of_tokens(logprobs, part), answer_values(learner, part))
        learner.optimizer.zero_grad()
        (losses["policy_loss"] + losses["value_loss"]).backward()
        for group in learner.optimizer.param_groups:
            torch.nn.utils.clip_grad_norm_(group["params"], config.max_gradient_norm)
        learner.optimizer.step()
        losses["entropy"] = mean_entropy(logprobs, part.answered)
        logged.append({name: value.item() for name, value in losses.items()})
    return {name: sum(row[name] for row in logged) / len(logged) for name in logged[0]}


def rate_factor(config: PPOConfig, step: int) -> float:
    """Learning rate of a step (from 0) over its peak: linear warm-up, then the schedule."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(config.steps - config.warmup_steps, 1)
    return {"constant": 1.0, "linear": 1.0 - progress, "cosine": 0.5 * (1.0 + math.cos(math.pi * progress))}[
        config.schedule
    ]


def minibatches(config: PPOConfig, size: int) -> Iterator[Any]:
    """Row indices of each optimizer step of one PPO step."""
    import torch

    for _ in range(config.epochs):
        yield from torch.randperm(size).chunk(config.minibatches)


def clipped_losses(config: PPOConfig, part: Rollouts, logprobs: Any, values: Any) -> dict[str, Any]:
    """The clipped surrogate and clipped value loss, means over the answers' tokens, and the share of clipped ratios."""
    import torch

    mask, count = part.answered, part.answered.sum()
    ratio = (logprobs - part.logprobs).exp()
    bounded = ratio.clamp(1 - config.clip, 1 + config.clip)
    policy_loss = (torch.max(-part.advantages * ratio, -part.advantages * bounded) * mask).sum() / count
    near = part.values + (values - part.values).clamp(-config.value_clip, config.value_clip)
    errors = torch.max((values - part.returns).square(), (near - part.returns).square())
    clipped = ((ratio - 1).abs() > config.clip).float().detach()
    return {
        "policy_loss": policy_loss,
        "value_loss": 0.5 * (errors * mask).sum() / count,
        "clipped": (clipped * mask).sum() / count,
    }


def save_state(learner: Learner, history: list[dict[str, float]], directory: Path) -> Path:
    """Write everything that a resume needs to `directory`, as safetensors and JSON, and return it."""
    from safetensors.torch import save_file

    directory.mkdir(parents=True, exist_ok=True)
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in learner.trained().items()}
    save_file(weights, directory / "weights.safetensors")
    moments = {
        f"{index}.{name}": tensor.detach().cpu().contiguous()
        for index, entry in learner.optimizer.state_dict()["state"].items()
        for name, tensor in entry.items()
    }
    save_file(moments, directory / "optimizer.safetensors")
    write_json(directory / "state.json", {"curve": history})
    return directory


def load_state(learner: Learner, directory: Path) -> list[dict[str, float]]:
    """Put a saved state back into a fresh learner and return the curve so far, one row per finished step."""
    import torch
    from safetensors.torch import load_file

    weights = load_file(directory / "weights.safetensors")
    with torch.no_grad():
        for name, tensor in learner.trained().items():
            tensor.copy_(weights[name])
    state: dict[int, dict[str, Any]] = {}
    for key, tensor in load_file(directory / "optimizer.safetensors").items():
        index, name = key.split(".", 1)
        state.setdefault(int(index), {})[name] = tensor
    groups = learner.optimizer.state_dict()["param_groups"]
    learner.optimizer.load_state_dict({"state": state, "param_groups": groups})
    return json.loads((directory / "state.json").read_text(encoding="utf-8"))["curve"]


def write_curve(path: Path, history: list[dict[str, float]]) -> None:
    """Write the curve, one row per step, as Parquet."""
    import pyarrow
    import pyarrow.parquet

    columns = {name: [row[name] for row in history] for name in sorted(history[0])}
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
