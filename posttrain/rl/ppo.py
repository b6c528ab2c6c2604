"""PPO on completions (Schulman et al., arXiv:1707.06347; Ziegler et al., arXiv:1909.08593). Oracle: reference/ppo.py."""

from __future__ import annotations

import torch
from torch import Tensor


def token_rewards(scores: Tensor, kl: Tensor, lengths: Tensor, kl_coef: float) -> Tensor:
    """Rewards (tokens,): each token pays kl_coef times its divergence (tokens,), the last of each completion of `lengths`
    (N,) tokens gets the completion's score (N,)."""
    rewards = -kl_coef * kl
    rewards[lengths.cumsum(0) - 1] += scores
    return rewards


def clipped_policy_loss(logps: Tensor, old_logps: Tensor, advantages: Tensor, low: float, high: float) -> tuple[Tensor, Tensor]:
    """-min(rho A, clip(rho, 1 - low, 1 + high) A) with rho = exp(logps - old_logps) (eq. 7), and where clipping took the
    gradient away; all (tokens,), or (N,) where a completion is one action."""
    ratio = torch.exp(logps - old_logps)
    gain, clipped_gain = ratio * advantages, ratio.clamp(1 - low, 1 + high) * advantages
    return -torch.minimum(gain, clipped_gain), clipped_gain < gain


def clipped_value_loss(values: Tensor, old_values: Tensor, returns: Tensor, cliprange: float) -> tuple[Tensor, Tensor]:
    """1/2 max((v - R)^2, (clip(v, v_old - range, v_old + range) - R)^2), and where clipping took the gradient away; all
    (tokens,)."""
    near = torch.maximum(torch.minimum(values, old_values + cliprange), old_values - cliprange)
    error, near_error = (values - returns).square(), (near - returns).square()
    return 0.5 * torch.maximum(error, near_error), near_error > error
