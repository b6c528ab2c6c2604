"""Rows of logits in PyTorch (kernels/logit_rows.py), a few at a time: the widened copies stay in the cache."""

from __future__ import annotations

import torch
from torch import Tensor

_ROWS = 8


def logit_rows(logits: Tensor, labels: Tensor, ignore_index: int, gradient: bool, entropy: bool) -> tuple[Tensor, Tensor]:
    """logits (N, V), overwritten where `gradient` -> (logprobs (N,), entropy (N,)), float32 (float64 for that)."""
    wide = torch.promote_types(logits.dtype, torch.float32)
    logprobs, entropies = (logits.new_zeros(len(logits), dtype=wide) for _ in range(2))
    learned = labels != ignore_index
    for start in range(0, len(logits), _ROWS):
        part = slice(start, start + _ROWS)
        keep = learned[part, None]
        label = labels[part, None].where(keep, 0)
        log_p = torch.log_softmax(logits[part].to(wide), 1)
        p = log_p.exp()
        logprobs[part] = log_p.gather(1, label).where(keep, 0)[:, 0]
        if entropy:
            entropies[part] = -(p * log_p.where(p > 0, 0)).sum(1).where(keep[:, 0], 0)
        if gradient:
            logits[part] = p.neg_().scatter_add_(1, label, p.new_ones(label.shape)).where(keep, 0)
    return logprobs, entropies


def fused_logprobs(
    hidden: Tensor, base: tuple, V: int, bias: Tensor | None, labels: Tensor, ignore_index: int, direction: bool, entropy: bool
) -> tuple[Tensor, Tensor, Tensor] | None:
    """None: as native_logprobs.py says where chunks of logits are the way."""
    return None
