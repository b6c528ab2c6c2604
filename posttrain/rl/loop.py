"""The loop of policy optimization: draw completions, reward them, learn from them, again.

A step takes `per_device_train_batch_size * gradient_accumulation_steps` prompts in the order that the seed and the epoch decide
(posttrain/trainer.py), draws `num_generations` completions of each, and updates the policy `num_epochs * num_mini_batches` times.
What the algorithms differ in, a Method says. The reference is the policy with its adapter off: one copy of the base serves
both, and a reward model too (rewards.py).

A run that was killed at any step and is started again with resume=True ends in the same bits as one that was not.
"""

from __future__ import annotations

import json
import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from posttrain.adapters import LoraConfig, active_adapter, adapter_configs, base_fingerprint, disabled, save_adapter
from posttrain.checkpoint import checkpoints, keep_last, save_checkpoint, trainable
from posttrain.errors import PosttrainError
from posttrain.model.decoder import CausalLM
from posttrain.model.eval_mode import eval_mode
from posttrain.model.generate import check_ids
from posttrain.plots import line_chart, running_mean
from posttrain.progress import Metrics, ProgressLine, peak_memory, read_metrics
from posttrain.quantized import held_as
from posttrain.trained_model import attach_for_training
from posttrain.trainer import (
    IDENTITY,
    Loss,
    TrainConfig,
    TrainResult,
    accumulate,
    adamw,
    begin,
    learning_rate,
    step_items,
    total_steps,
)

from .prompts import Prompt, digest
from .rewards import Reward, call_reward
from .rollouts import Rollouts, draw, policy

VALUE_HEAD = "value_head"


@dataclass(frozen=True)
class Sampling:
    """How completions are drawn. stop: text that is one token and ends a completion; None: the tokenizer's eos. One token,
    which the policy learns: `generate` does not tell which of several ended a text."""

    num_generations: int = 8
    max_completion_length: int = 64
    temperature: float = 1.0
    stop: str | None = None

    def __post_init__(self):
        if self.num_generations < 1 or self.max_completion_length < 1:
            given = f"num_generations is {self.num_generations} and max_completion_length {self.max_completion_length}"
            raise ValueError(f"{given}; expected at least 1 of each")
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"temperature is {self.temperature}; expected a positive number: a policy that explores")

    def stop_id(self, tokenizer: Any) -> int | None:
        """The token that ends a completion. PosttrainError where `stop` is not one token."""
        if self.stop is None:
            return tokenizer.eos_id
        ids = tokenizer.encode(self.stop)
        if len(ids) != 1:
            raise PosttrainError(f"stop is {self.stop!r}, which is {len(ids)} tokens for this tokenizer; expected one")
        return ids[0]


@dataclass(frozen=True)
class Method:
    """What an algorithm brings to the loop.

    settings: its configuration, which a resumed run must share. prepare: (rollouts with rewards, and by token ref_logps and,
    where `measures`, the policy's logps and the values) and the penalty's weight -> rollouts with advantages, and metrics.
    loss_sum: (model, batch, update=its totals) -> the batch's losses summed, and sums to show. kl_coef: the penalty's first
    weight; next_kl_coef: that after a step, from it and the step's divergence.
    """

    settings: Any
    sampling: Sampling
    prepare: Callable[[Rollouts, float], tuple[Rollouts, dict[str, float]]]
    loss_sum: Callable[..., Loss]
    num_epochs: int = 1
    num_mini_batches: int = 1
    measures: bool = False
    has_values: bool = False
    kl_coef: float = 0.0
    next_kl_coef: Callable[[float, float], float] = lambda coefficient, kl: coefficient


@dataclass(frozen=True)
class Update:
    """Completions and their tokens in one update of the weights."""

    completions: int
    tokens: int


def optimize(
    model: CausalLM,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    reward: Reward,
    config: TrainConfig,
    method: Method,
    adapter: LoraConfig | None = None,
    *,
    identity: dict[str, Any] | None = None,
    resume: bool = False,
    quiet: bool = False,
    on_step: Callable[[dict[str, Any]], None] | None = None,
) -> TrainResult:
    """Raise the mean reward of the model's completions of `prompts`. `reward` as rewards.py has it.

    adapter: attached unless the model has one (default: LoRA r=8 on all linear layers). It is saved in config.output_dir in
    PEFT's format, beside metrics.jsonl, reward.svg and checkpoints. identity: what of the reward a resumed run must share.
    PosttrainError for no prompts, for one that leaves no room in the model's context, where the reward function fails or a loss
    stops being finite (checkpoints stay those of the steps before), or where the run to resume was another.
    """
    sampling, stop_id = method.sampling, method.sampling.stop_id(tokenizer)
    check_prompts(model, prompts, sampling)
    attach_for_training(model, adapter or LoraConfig(r=8, lora_alpha=16), config.seed)
    name = active_adapter(model)
    assert name is not None
    head = add_value_head(model) if method.has_values else None
    folder, device = Path(config.output_dir), model.model.embed_tokens.weight.device
    total = total_steps(config, len(prompts))
    about = {k: v for k, v in asdict(config).items() if k in IDENTITY} | {
        "method": asdict(method.settings) | asdict(sampling),
        "data": digest(prompts),
        "adapter": asdict(adapter_configs(model)[name]),
        "base": base_fingerprint(model),
        "held": held_as(model),
        **(identity or {}),
    }
    optimizer = adamw(model, config)
    state = begin(folder, model, optimizer, json.loads(json.dumps(about)), config.seed, resume)
    first, tokens, kl_coef = state["step"], state["tokens"], state.get("kl_coef", method.kl_coef)
    metrics = Metrics(folder / "metrics.jsonl", first)
    was_training = model.training
    model.train()
    object.__setattr__(model, "activation_checkpointing", config.activation_checkpointing)
    began = time.perf_counter() - state["seconds"]
    with ProgressLine(total, first, quiet=quiet) as line:
        for step in range(first, total):
            step_began = time.perf_counter()
            items = [i for part in step_items(config, step, len(prompts)) for i in part for _ in range(sampling.num_generations)]
            rollouts = collect(model, tokenizer, prompts, items, reward, sampling, stop_id, config.seed * 1_000_003 + step)
            batch_size = config.per_device_train_batch_size * sampling.num_generations
            rollouts = measured(model, rollouts, sampling.temperature, batch_size, head, method.measures, device)
            rollouts, entry = method.prepare(rollouts, kl_coef)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(config, step, total) * group["lr_scale"]
            told = _learn(model, optimizer, rollouts, method, config, step, batch_size)
            drawn = sum(len(p) + len(c) for p, c in rollouts.sequences)
            tokens += drawn
            now = time.perf_counter()
            entry = {
                "step": step + 1,
                **told,
                **_about(rollouts, sampling),
                **entry,
                "learning_rate": optimizer.param_groups[0]["lr"],
                "tokens": tokens,
                "tokens_per_second": drawn / (now - step_began),
                "peak_memory": peak_memory(device),
                "seconds": now - began,
            }
            kl_coef = method.next_kl_coef(kl_coef, entry["kl"])
            metrics.add(entry)
            line.update(entry)
            if on_step:
                on_step(entry)
            if step + 1 == total or (config.save_steps and (step + 1) % config.save_steps == 0):
                done = {"step": step + 1, "tokens": tokens, "seconds": entry["seconds"], "kl_coef": kl_coef}
                save_checkpoint(folder, model, optimizer, {**done, "identity": json.loads(json.dumps(about))})
                keep_last(folder, config.save_total_limit)
    entries = read_metrics(folder / "metrics.jsonl")
    if entries:
        _plot(folder / "reward.svg", entries)
    model.train(was_training)
    if head is not None:
        delattr(model, VALUE_HEAD)
    save_adapter(model, config.output_dir)
    return TrainResult(total, tokens, entries)


def _learn(
    model: CausalLM,
    optimizer: torch.optim.Optimizer,
    rollouts: Rollouts,
    method: Method,
    config: TrainConfig,
    step: int,
    batch_size: int,
) -> dict[str, float]:
    """All updates of a step. Returns the means over them of the loss, the gradient's norm and what the loss tells."""
    parameters, device = list(trainable(model).values()), model.model.embed_tokens.weight.device
    seen: dict[str, list[float]] = defaultdict(list)
    for number, chunk in enumerate(_updates(len(rollouts.sequences), method, config.seed * 1_000_003 + step)):
        batches = [rollouts.part(chunk[i : i + batch_size]) for i in range(0, len(chunk), batch_size)]
        loss_sum = partial(method.loss_sum, update=Update(len(chunk), int(rollouts.lengths[chunk].sum())))
        losses, norm, told = accumulate(model, batches, loss_sum, parameters, config.max_grad_norm, device)
        if not all(map(math.isfinite, (*losses, norm))):
            optimizer.zero_grad()
            raise PosttrainError(_not_finite(step + 1, number + 1, math.fsum(losses), norm, Path(config.output_dir)))
        optimizer.step()
        optimizer.zero_grad()
        for key, value in {"loss": math.fsum(losses), "grad_norm": norm, **told}.items():
            seen[key].append(value)
    return {key: math.fsum(values) / len(values) for key, values in seen.items()}


def check_prompts(model: CausalLM, prompts: Sequence[Prompt], sampling: Sampling) -> None:
    """PosttrainError where there are none, or one leaves no room for a completion in the model's context; ValueError for an id
    outside the vocabulary."""
    if not prompts:
        raise PosttrainError("the data holds no prompts")
    longest = max(range(len(prompts)), key=lambda i: len(prompts[i].ids))
    if (length := len(prompts[longest].ids)) + sampling.max_completion_length > model.context_length:
        raise PosttrainError(
            f"item {longest} has {length} tokens, which with max_completion_length={sampling.max_completion_length} exceed the "
            f"model's context of {model.context_length}; shorten the prompt or ask for fewer tokens"
        )
    check_ids(model, (prompt.ids for prompt in prompts), "item")


def add_value_head(model: CausalLM) -> nn.Linear:
    """A float32 head that reads a value off the policy's hidden states, 0 at first; no part of the adapter that is saved."""
    model.fingerprint = base_fingerprint(model)  # of what was loaded
    head = nn.Linear(model.config.hidden_size, 1, device=model.model.embed_tokens.weight.device)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    model.add_module(VALUE_HEAD, head)
    return head


def collect(
    model: CausalLM,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    items: Sequence[int],
    reward: Reward,
    sampling: Sampling,
    stop_id: int | None,
    seed: int,
    by_base: bool = False,
) -> Rollouts:
    """A completion of each item's prompt by the policy (by the base alone, its adapter off) and its reward."""
    chosen = [prompts[i] for i in items]
    ids = [prompt.ids for prompt in chosen]
    if by_base:
        with disabled(model):  # while completions are drawn: a reward model is an adapter too
            rollouts = draw(model, ids, sampling.max_completion_length, sampling.temperature, stop_id, seed)
    else:
        rollouts = draw(model, ids, sampling.max_completion_length, sampling.temperature, stop_id, seed)
    completions = [completion for _, completion in rollouts.sequences]
    texts = [tokenizer.decode(completion) for completion in completions]
    rewards = call_reward(reward, chosen, texts, completions, items)
    return replace(rollouts, by_completion={"rewards": torch.tensor(rewards)})


@torch.no_grad()
def measured(
    model: CausalLM,
    rollouts: Rollouts,
    temperature: float,
    batch_size: int,
    head: nn.Linear | None,
    own: bool,
    device: torch.device,
) -> Rollouts:
    """With ref_logps by token and, where `own`, the policy's logps, entropy and values as they are before it learns."""
    found: dict[str, list[Tensor]] = defaultdict(list)
    with eval_mode(model):
        for start in range(0, len(rollouts.sequences), batch_size):
            batch = rollouts.part(range(start, min(start + batch_size, len(rollouts.sequences)))).completions.to(device)
            with disabled(model):
                found["ref_logps"].append(policy(model, batch, temperature)[0])
            if own:
                logps, entropy, values = policy(model, batch, temperature, head)
                found["logps"].append(logps)
                found["entropy"].append(entropy)
                if values is not None:
                    found["values"].append(values)
    return replace(rollouts, by_token={name: torch.cat(parts).cpu() for name, parts in found.items()})


def _updates(count: int, method: Method, seed: int) -> Iterator[list[int]]:
    """Indices of the completions of each update: every epoch sees each once, in an order of its own where it is cut."""
    size = math.ceil(count / method.num_mini_batches)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(method.num_epochs):
        order = list(range(count)) if method.num_mini_batches == 1 else torch.randperm(count, generator=generator).tolist()
        yield from (order[i : i + size] for i in range(0, count, size))


def _about(rollouts: Rollouts, sampling: Sampling) -> dict[str, float]:
    """What TRL shows of a step's completions, under its names."""
    rewards = rollouts.by_completion["rewards"]
    groups = rewards.view(-1, sampling.num_generations)
    return {
        "reward": rewards.mean().item(),
        "reward_std": rewards.std().item() if len(rewards) > 1 else 0.0,
        "frac_reward_zero_std": (groups == groups[:, :1]).all(1).float().mean().item(),
        "completions/mean_length": rollouts.lengths.float().mean().item(),
        "completions/clipped_ratio": 1 - rollouts.ended.float().mean().item(),
    }


def _not_finite(step: int, update: int, loss: float, norm: float, folder: Path) -> str:
    done = checkpoints(folder)
    kept = f"the last good checkpoint is {done[-1]}" if done else "no checkpoint had been written yet"
    return (
        f"step {step}, update {update}: the loss is {loss} and the gradient's norm {norm}; stopped before that update, and {kept}. "
        f"Lower learning_rate, raise the weight of the divergence, or look at the rewards in metrics.jsonl"
    )


def _plot(path: Path, entries: list[dict[str, Any]]) -> None:
    points = [(e["step"], e["reward"]) for e in entries]
    window = max(1, len(points) // 10)
    series = {"reward": points}
    if window > 1:
        smooth = running_mean([y for _, y in points], window)
        series[f"mean of {window} steps"] = [(x, y) for (x, _), y in zip(points, smooth, strict=True)]
    line_chart(path, series, "Mean reward of drawn completions", "step", "reward")
