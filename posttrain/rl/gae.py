"""Generalised advantage estimation (Schulman et al., arXiv:1506.02438) and whitening. Oracle: reference/gae.py."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

EPSILON = 1e-8  # added to the variance


def gae(rewards: Tensor, values: Tensor, lengths: Tensor, gamma: float = 1.0, lam: float = 0.95) -> tuple[Tensor, Tensor]:
    """(advantages, returns), both (tokens,), of rewards and values (tokens,) of completions of `lengths` (N,) tokens.

    A_t = delta_t + gamma lam A_(t+1), delta_t = r_t + gamma V_(t+1) - V_t: eq. 16 as a recursion, from each last token.
    """
    sizes = lengths.tolist()
    r, v = (pad_sequence(x.split(sizes), batch_first=True) for x in (rewards, values))  # zeros after the ends stay zeros
    advantage, following = torch.zeros_like(r[:, 0]), torch.zeros_like(v[:, 0])
    columns = []
    for t in range(r.shape[1] - 1, -1, -1):
        delta = r[:, t] + gamma * following - v[:, t]
        advantage, following = delta + gamma * lam * advantage, v[:, t]
        columns.append(advantage)
    padded = torch.stack(columns[::-1], 1)
    advantages = padded[torch.arange(padded.shape[1], device=padded.device) < lengths[:, None]]
    return advantages, advantages + values


def whiten(values: Tensor, shift_mean: bool = True) -> Tensor:
    """values (tokens,) with deviation 1 and mean 0 (their own without shift_mean). One value alone has no deviation and
    becomes 0."""
    mean = values.mean()
    variance = values.var() if len(values) > 1 else torch.zeros_like(mean)
    whitened = (values - mean) * torch.rsqrt(variance + EPSILON)
    return whitened if shift_mean else whitened + mean
