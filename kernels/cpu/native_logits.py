"""Rows of logits in C (kernels/cpu/logit_rows.h)."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from . import native, pytorch_logits

_P, _I, _L = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
native._library.logit_rows.argtypes = [_P, _I, _L, _L, _L, _P, _L, _I, _P, _P, _L]


def logit_rows(logits: Tensor, labels: Tensor, ignore_index: int, gradient: bool, entropy: bool) -> tuple[Tensor, Tensor]:
    """As `pytorch_logits.logit_rows`, which also does float64 and strided rows."""
    if logits.dtype not in native._DTYPES or (logits.numel() and logits.stride(1) != 1):
        return pytorch_logits.logit_rows(logits, labels, ignore_index, gradient, entropy)
    (N, V), labels = logits.shape, labels.contiguous()
    logprobs, entropies = torch.empty(N, dtype=torch.float32), torch.zeros(N, dtype=torch.float32)
    native._library.logit_rows(
        logits.data_ptr(), native._DTYPES[logits.dtype], N, V, logits.stride(0), labels.data_ptr(), ignore_index, gradient,
        logprobs.data_ptr(), entropies.data_ptr() if entropy else None, native._threads(4 * N * V),
    )  # fmt: skip
    return logprobs, entropies
