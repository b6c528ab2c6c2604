"""What temperature, top-k and top-p leave of rows of logits: a threshold and a log-normaliser, two numbers a row.

    p[v] = exp(z[v] / T - log Z) where z[v] >= tau, else 0          log Z = log sum over kept v of exp(z[v] / T)
    tau = the larger of the k-th largest logit and of the least logit that has less than top_p of what top-k kept above it

logits      float32 | float16 | bfloat16 (N, V)     rows contiguous; float64 on a CPU. NaN counts as -inf, +inf as 3e38
threshold   float32 (N,)                            tau, a logit of the row or -inf; float64 for float64
log_total   float32 (N,)                            log Z; -inf where no logit is finite

The one definition of sampling's filters: `posttrain.model.sampling` masks by this threshold, and spec_verify.py by the same. A
threshold keeps or drops equal tokens together, so neither a sort nor its stability is in the definition.
Least bytes: a row read once, 2 N V in bfloat16. Oracle: reference/logit_filter.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._library import define
from .cpu import pytorch_logit_filter
from .nf4 import DTYPES


def check_sampling(temperature: float, top_k: int, top_p: float) -> None:
    """ValueError unless temperature >= 0 and finite, top_k >= 0 (0: off) and 0 < top_p <= 1 (1: off)."""
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"temperature is {temperature}; expected 0 (greedy) or a positive number")
    if top_k < 0 or int(top_k) != top_k:
        raise ValueError(f"top_k is {top_k}; expected 0 (off) or a positive integer")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p is {top_p}; expected a number in (0, 1], 1 being off")


def _fake(logits, temperature, top_k, top_p, parameters):
    wide = torch.promote_types(logits.dtype, torch.float32)
    return logits.new_empty(len(logits), dtype=wide), logits.new_empty(len(logits), dtype=wide)


define(
    "logit_filter(Tensor logits, float temperature, int top_k, float top_p, Tensor? parameters) -> (Tensor, Tensor)",
    _fake,
    CPU=pytorch_logit_filter.logit_filter,
)


def logit_filter(logits: Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0) -> tuple[Tensor, Tensor]:
    """(threshold (...), log_total (...)) of logits (..., V): token v has probability exp(logit / temperature - log_total) where
    its logit is at least the threshold, else 0. temperature > 0; top_k 0 and top_p 1 are off.

    Raises ValueError for settings out of range and for rows of no logits, TypeError for dtypes.
    """
    check_sampling(temperature, top_k, top_p)
    if temperature == 0:
        raise ValueError("temperature is 0: the argmax needs no threshold")
    if logits.dim() == 0 or logits.shape[-1] == 0:
        raise ValueError(f"logits are {tuple(logits.shape)}; expected (..., V) with V > 0")
    if logits.dtype not in DTYPES and not (logits.dtype == torch.float64 and logits.device.type == "cpu"):
        raise TypeError(f"logits are {logits.dtype}; expected float32, float16 or bfloat16 (float64 on a CPU)")
    rows = logits.detach().reshape(-1, logits.shape[-1])
    found = torch.ops.posttrain.logit_filter(rows, float(temperature), int(top_k), float(top_p), None)
    threshold, log_total = (t.view(logits.shape[:-1]) for t in found)
    return threshold, log_total
