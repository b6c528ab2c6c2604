"""PPO and GRPO as the loop takes them: their settings by TRL's names, their advantages, their losses."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import nn

from posttrain.model.decoder import CausalLM
from posttrain.trainer import Loss

from .gae import gae, whiten
from .grpo import LOSS_TYPES, SCALES, group_advantages, grpo_loss, leave_one_out_advantages
from .kl import KL_ESTIMATORS, adaptive_kl_coefficient, kl_estimate
from .loop import VALUE_HEAD, Method, Sampling, Update
from .ppo import clipped_policy_loss, clipped_value_loss, token_rewards
from .rollouts import RolloutBatch, Rollouts, policy


@dataclass(frozen=True)
class PPOConfig:
    """Names and defaults of TRL's PPOConfig. kl_target: the divergence of a completion, in nats, that kl_coef is adapted to
    (Ziegler et al., arXiv:1909.08593); None keeps it. missing_eos_penalty: taken off the score of a completion that was cut
    at max_completion_length."""

    num_ppo_epochs: int = 4
    num_mini_batches: int = 1
    kl_coef: float = 0.05
    kl_estimator: str = "k1"
    kl_target: float | None = None
    cliprange: float = 0.2
    vf_coef: float = 0.1
    cliprange_value: float = 0.2
    gamma: float = 1.0
    lam: float = 0.95
    whiten_rewards: bool = False
    missing_eos_penalty: float | None = None

    def __post_init__(self):
        _at_least(
            {"num_ppo_epochs": 1, "num_mini_batches": 1, "kl_coef": 0, "cliprange": 0, "cliprange_value": 0, "vf_coef": 0}, self
        )
        if not (0 <= self.gamma <= 1 and 0 <= self.lam <= 1):
            raise ValueError(f"gamma is {self.gamma} and lam {self.lam}; expected 0 to 1")
        if self.kl_estimator not in KL_ESTIMATORS:
            raise ValueError(f"kl_estimator is {self.kl_estimator!r}; expected one of {', '.join(KL_ESTIMATORS)}")
        if self.kl_target is not None and not 0 < self.kl_target < math.inf:
            raise ValueError(f"kl_target is {self.kl_target}; expected a positive number of nats")
        if self.missing_eos_penalty is not None and not math.isfinite(self.missing_eos_penalty):
            raise ValueError(f"missing_eos_penalty is {self.missing_eos_penalty}; expected a finite number")


@dataclass(frozen=True)
class GRPOConfig:
    """Names and defaults of TRL's GRPOConfig. advantages: "group" (GRPO) or "rloo" (each completion against the others).
    loss_type "rloo" takes a completion as one action; beta then weighs the divergence in its reward, otherwise the k3 term of
    each token's loss. num_iterations: updates from the same completions."""

    advantages: str = "group"
    loss_type: str = "dapo"
    scale_rewards: str = "group"
    beta: float = 0.0
    epsilon: float = 0.2
    epsilon_high: float | None = None
    num_iterations: int = 1

    def __post_init__(self):
        _at_least({"num_iterations": 1, "beta": 0, "epsilon": 0}, self)
        if self.epsilon_high is not None and not self.epsilon_high >= 0:
            raise ValueError(f"epsilon_high is {self.epsilon_high}; expected 0 or more")
        for name, known in (("advantages", ("group", "rloo")), ("loss_type", LOSS_TYPES), ("scale_rewards", SCALES)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} is {getattr(self, name)!r}; expected one of {', '.join(known)}")


def _at_least(limits: dict[str, float], settings: PPOConfig | GRPOConfig) -> None:
    for name, low in limits.items():
        if not low <= getattr(settings, name) < math.inf:
            raise ValueError(f"{name} is {getattr(settings, name)}; expected a finite number of at least {low}")


def ppo(settings: PPOConfig, sampling: Sampling) -> Method:
    """Proximal policy optimization with a value head on the policy's hidden states."""
    target = settings.kl_target
    adapt: Callable[[float, float], float] = lambda coefficient, kl: coefficient  # noqa: E731
    if target is not None:
        adapt = partial(adaptive_kl_coefficient, target=target)
    return Method(
        settings,
        sampling,
        partial(ppo_advantages, settings),
        partial(ppo_loss_sum, settings, sampling),
        num_epochs=settings.num_ppo_epochs,
        num_mini_batches=settings.num_mini_batches,
        measures=True,
        has_values=True,
        kl_coef=settings.kl_coef,
        next_kl_coef=adapt,
    )


def ppo_advantages(settings: PPOConfig, rollouts: Rollouts, kl_coef: float) -> tuple[Rollouts, dict[str, float]]:
    """Rewards by token from scores and divergence, advantages and returns from these and the values."""
    by_token, scores = rollouts.by_token, rollouts.by_completion["rewards"]
    if settings.missing_eos_penalty is not None:
        scores = scores - settings.missing_eos_penalty * (~rollouts.ended).to(scores.dtype)
    kl = kl_estimate(by_token["logps"], by_token["ref_logps"], settings.kl_estimator)
    rewards = token_rewards(scores, kl, rollouts.lengths, kl_coef)
    if settings.whiten_rewards:
        rewards = whiten(rewards, shift_mean=False)
    advantages, returns = gae(rewards, by_token["values"], rollouts.lengths, settings.gamma, settings.lam)
    measured = {
        "kl": ((by_token["logps"] - by_token["ref_logps"]).sum() / len(scores)).item(),
        "entropy": by_token["entropy"].mean().item(),
        "kl_coef": kl_coef,
        "value": by_token["values"].mean().item(),
        "return": returns.mean().item(),
    }
    return replace(rollouts, by_token={**by_token, "advantages": whiten(advantages), "returns": returns}), measured


def ppo_loss_sum(settings: PPOConfig, sampling: Sampling, model: CausalLM, batch: RolloutBatch, update: Update) -> Loss:
    """Policy and value losses of the batch's tokens, as parts of the mean over the update's tokens."""
    head = model.get_submodule(VALUE_HEAD)
    assert isinstance(head, nn.Linear)
    logps, _, values = policy(model, batch.completions, sampling.temperature, head)
    assert values is not None
    old = batch.by_token
    policy_losses, clipped = clipped_policy_loss(logps, old["logps"], old["advantages"], settings.cliprange, settings.cliprange)
    value_losses, value_clipped = clipped_value_loss(values, old["values"], old["returns"], settings.cliprange_value)
    loss = (policy_losses + settings.vf_coef * value_losses).sum() * (update.completions / update.tokens)
    count = len(logps)
    return loss, {
        "policy_loss": (policy_losses.sum(), count),
        "value_loss": (value_losses.sum(), count),
        "clip_ratio/region_mean": (clipped.float().sum(), count),
        "value_clip_ratio": (value_clipped.float().sum(), count),
    }


def grpo(settings: GRPOConfig, sampling: Sampling) -> Method:
    """Group-relative policy optimization, or leave-one-out REINFORCE. ValueError for groups of one completion."""
    if sampling.num_generations < 2:
        raise ValueError(f"num_generations is {sampling.num_generations}; a group needs at least 2 completions to compare")
    return Method(
        settings,
        sampling,
        partial(grpo_advantages, settings, sampling),
        partial(grpo_loss_sum, settings, sampling),
        num_epochs=settings.num_iterations,
        measures=settings.num_iterations > 1 or (settings.loss_type == "rloo" and settings.beta > 0),
    )


def grpo_advantages(
    settings: GRPOConfig, sampling: Sampling, rollouts: Rollouts, kl_coef: float
) -> tuple[Rollouts, dict[str, float]]:
    """Advantages by completion from the rewards of its group."""
    rewards, by_token = rollouts.by_completion["rewards"], rollouts.by_token
    if settings.loss_type == "rloo" and settings.beta:
        divergence = (by_token["logps"] - by_token["ref_logps"]).split(rollouts.lengths.tolist())
        rewards = rewards - settings.beta * torch.stack([part.sum() for part in divergence])
    if settings.advantages == "rloo":
        advantages = leave_one_out_advantages(rewards, sampling.num_generations)
    else:
        advantages = group_advantages(rewards, sampling.num_generations, settings.scale_rewards)
    return replace(rollouts, by_completion={**rollouts.by_completion, "advantages": advantages}), {}


def grpo_loss_sum(settings: GRPOConfig, sampling: Sampling, model: CausalLM, batch: RolloutBatch, update: Update) -> Loss:
    """The batch's part of the update's loss times its completions."""
    completions = batch.completions
    logps, entropy, _ = policy(model, completions, sampling.temperature)
    ref = batch.by_token["ref_logps"]
    loss, clipped = grpo_loss(
        logps,
        batch.by_token.get("logps", logps.detach()),
        batch.by_completion["advantages"],
        completions.lengths,
        loss_type=settings.loss_type,
        epsilon=settings.epsilon,
        epsilon_high=settings.epsilon_high,
        ref_logps=ref,
        beta=settings.beta,
        step_tokens=update.tokens,
        step_completions=update.completions,
        longest=sampling.max_completion_length,
    )
    return loss, {
        "kl": ((logps.detach() - ref).sum(), len(completions.lengths)),
        "entropy": (entropy.sum(), len(logps)),
        "clip_ratio/region_mean": (clipped.float().sum(), len(clipped)),
    }
