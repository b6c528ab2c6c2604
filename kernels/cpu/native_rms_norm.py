"""RMSNorm in C (kernels/cpu/rms_norm.h)."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from .._rows import rows_of
from . import native, pytorch_rms_norm

_P, _I, _L, _F = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_float
native._library.rms_norm.argtypes = [_P, _I, _L, _L, _L, _P, _I, _F, _P, _P, _L]
native._library.rms_norm_backward.argtypes = [_P, _I, _L, _L, _L, _P, _L, _P, _I, _P, _P, _P, _L, _L]
_ROWS = 32  # that share a sum of dweight: short chains of additions, and the same ones however many threads


def _takes(x: Tensor, weight: Tensor) -> bool:
    return x.dtype in native._DTYPES and weight.dtype in native._DTYPES and x.numel() > 0


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """As `pytorch_rms_norm.rms_norm`, which also does float64."""
    if not _takes(x, weight):
        return pytorch_rms_norm.rms_norm(x, weight, eps)
    rows, weight = rows_of(x), weight.contiguous()
    N, D = rows.shape
    y, rstd = torch.empty(x.shape, dtype=x.dtype), torch.empty(N, dtype=torch.float32)
    native._check(
        native._library.rms_norm(
            rows.data_ptr(), native._DTYPES[x.dtype], N, D, rows.stride(0), weight.data_ptr(), native._DTYPES[weight.dtype], eps,
            y.data_ptr(), rstd.data_ptr(), native._threads(N * D),
        )
    )  # fmt: skip
    return y, rstd


def rms_norm_backward(dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, need_weight: bool) -> tuple[Tensor, Tensor]:
    """As `pytorch_rms_norm.rms_norm_backward`."""
    if not _takes(x, weight):
        return pytorch_rms_norm.rms_norm_backward(dy, x, weight, rstd, need_weight)
    rows, dy_rows, weight = rows_of(x), rows_of(dy), weight.contiguous()
    N, D = rows.shape
    dx = torch.empty(x.shape, dtype=x.dtype)
    parts = torch.empty(-(-N // _ROWS), D, dtype=torch.float32) if need_weight else None
    native._check(
        native._library.rms_norm_backward(
            rows.data_ptr(), native._DTYPES[x.dtype], N, D, rows.stride(0), dy_rows.data_ptr(), dy_rows.stride(0),
            weight.data_ptr(), native._DTYPES[weight.dtype], rstd.data_ptr(), dx.data_ptr(), native._address(parts), _ROWS,
            native._threads(N * D),
        )
    )  # fmt: skip
    return dx, weight.new_empty(0) if parts is None else parts.sum(0).to(weight.dtype)
