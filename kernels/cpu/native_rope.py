"""Rotary position embedding in C (kernels/cpu/rope.h)."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from . import native, pytorch_rope

_P, _I, _L = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
native._library.rope.argtypes = [_P, _P, _P, _I, *[_L] * 11, _I, _P, _L]


def rope(x: Tensor, cos: Tensor, sin: Tensor, transposed: bool) -> Tensor:
    """As `pytorch_rope.rope`, which also does float64."""
    if x.dtype not in native._DTYPES or not x.numel():
        return pytorch_rope.rope(x, cos, sin, transposed)
    y = torch.empty(x.shape, dtype=x.dtype)
    x, cos, sin = (t if t.stride(3) == 1 else t.contiguous() for t in (x, cos, sin))
    many = cos.shape[0] > 1  # else one table for all rows: a step of 0
    native._library.rope(
        x.data_ptr(), cos.data_ptr(), sin.data_ptr(), native._DTYPES[x.dtype], *x.shape, *x.stride()[:3], cos.stride(0) * many,
        cos.stride(1), sin.stride(0) * many, sin.stride(1), transposed, y.data_ptr(), native._threads(x.numel()),
    )  # fmt: skip
    return y
