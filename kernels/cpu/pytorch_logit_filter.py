"""Thresholds and normalisers of rows of logits in PyTorch (kernels/logit_filter.py); no row is sorted whole."""

from __future__ import annotations

import torch
from torch import Tensor

LARGEST = 3.0e38
_FIRST = 64  # tokens looked at for a nucleus, eight times more each time they do not suffice


def cleaned(logits: Tensor) -> Tensor:
    """In float32 at least; NaN and -inf as -inf, +inf as the largest."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return wide.nan_to_num(-torch.inf, LARGEST, -torch.inf)


def logit_filter(logits: Tensor, temperature: float, top_k: int, top_p: float, parameters: Tensor | None) -> tuple[Tensor, Tensor]:
    """(threshold (N,), log Z (N,)) of logits (N, V), each row under its own (temperature, top_k, top_p) in parameters (N, 3)."""
    if parameters is not None:
        rows = [filter_rows(cleaned(row[None]), t, int(k), p) for row, (t, k, p) in zip(logits, parameters.tolist(), strict=True)]
        thresholds, log_totals = zip(*rows, strict=True) if rows else ((cleaned(logits[:, :0]).sum(1),),) * 2
        return torch.cat(thresholds), torch.cat(log_totals)
    return filter_rows(cleaned(logits), temperature, top_k, top_p)


def filter_rows(z: Tensor, temperature: float, top_k: int, top_p: float) -> tuple[Tensor, Tensor]:
    """Of cleaned rows (N, V) under one setting, temperature > 0."""
    V = z.shape[1]
    top = z.amax(1, keepdim=True)
    safe = top.where(top > -torch.inf, 0)
    weights = ((z - safe) / temperature).exp_()
    threshold = torch.full_like(top, -torch.inf)
    if 0 < top_k < V:
        threshold = z.topk(top_k, sorted=True).values[:, -1:]
        weights.masked_fill_(z < threshold, 0)
    total = weights.sum(1, keepdim=True)
    if top_p < 1:
        nucleus = _nucleus(z, safe, temperature, threshold, top_p * total)
        threshold = torch.maximum(threshold, nucleus)
        total = weights.masked_fill_(z < threshold, 0).sum(1, keepdim=True)
    return threshold[:, 0], (safe / temperature + total.log())[:, 0]


def _nucleus(z: Tensor, top: Tensor, temperature: float, threshold: Tensor, limit: Tensor) -> Tensor:
    """(N, 1): the least logit that has less than `limit` of the kept mass above it."""
    V, n = z.shape[1], _FIRST
    while True:
        largest = z.topk(min(n, V), sorted=True).values
        mass = ((largest - top) / temperature).exp_().masked_fill_(largest < threshold, 0).cumsum(1)
        if n >= V or bool((mass[:, -1:] >= limit).all()):
            at = (mass < limit).sum(1, keepdim=True).clamp(max=largest.shape[1] - 1)
            return largest.gather(1, at)
        n *= 8
