"""The low rank beside a product of few rows, by low_rank.c and multi_lora.c: scaling x A^T B^T and its gradients."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from . import native

_P, _I, _L = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
MAX_ROWS = 64  # FEW_ROWS in api.c
_library = native._library
_library.low_rank_add.argtypes = [_P, _P]
_library.few_rows_backward.argtypes = [_P] * 5


class LowRank(ctypes.Structure):
    """low_rank in low_rank.h, and the tensors that it points into for as long as it lives."""

    _fields_ = [
        *((name, _P) for name in ("x", "A", "B")),
        *((name, _I) for name in ("dtype", "factors")),
        *((name, _L) for name in ("M", "N", "K", "r", "threads")),
        ("scaling", ctypes.c_float),
        ("engine", _P),
    ]

    def __init__(self, x: Tensor, A: Tensor, B: Tensor, scaling: float):
        """x (M, K) after dropout; A (r, K) and B (N, r) are read as they are if both are float32, else in x's dtype."""
        if not (A.dtype == B.dtype == torch.float32):
            A, B = A.to(x.dtype), B.to(x.dtype)
        self.alive = x, A, B = x.contiguous(), A.contiguous(), B.contiguous()
        (M, K), (N, r) = x.shape, B.shape
        dtypes, threads = (native._DTYPES[x.dtype], native._DTYPES[A.dtype]), native._threads(M * r * (N + K))
        super().__init__(x.data_ptr(), A.data_ptr(), B.data_ptr(), *dtypes, M, N, K, r, threads, scaling, None)


def add(y: Tensor, low: LowRank) -> None:
    """y (M, N) += scaling x A^T B^T, for at most MAX_ROWS rows."""
    native._check(_library.low_rank_add(ctypes.byref(low), y.data_ptr()))


def backward(low: LowRank, dy: Tensor, dx: Tensor | None, dA: Tensor | None, dB: Tensor | None) -> None:
    """With V = scaling dY B: dx += V A, dA = V^T x, dB = scaling dY^T (x A^T), dA and dB float32, where they are not None. All are
    contiguous."""
    addresses = (native._address(t) for t in (dy, dx, dA, dB))
    native._check(_library.few_rows_backward(ctypes.byref(low), *addresses))
