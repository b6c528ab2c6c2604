"""SwiGLU in C (kernels/cpu/swiglu.h)."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from .._rows import rows_of
from . import native, pytorch_swiglu

_P, _I, _L = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
native._library.swiglu.argtypes = [_P, _P, _P, _I, _L, _L, _L, _L, _L, _P, _P, _L]


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """As `pytorch_swiglu.swiglu`, which also does float64."""
    if gate.dtype not in native._DTYPES or not gate.numel():
        return pytorch_swiglu.swiglu(gate, up)
    y, g, u = torch.empty(gate.shape, dtype=gate.dtype), rows_of(gate), rows_of(up)
    native._library.swiglu(
        g.data_ptr(), u.data_ptr(), None, native._DTYPES[gate.dtype], *g.shape, g.stride(0), u.stride(0), 0, y.data_ptr(), None,
        native._threads(gate.numel()),
    )  # fmt: skip
    return y


def swiglu_backward(dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """As `pytorch_swiglu.swiglu_backward`."""
    if gate.dtype not in native._DTYPES or not gate.numel():
        return pytorch_swiglu.swiglu_backward(dy, gate, up)
    dgate, dup = (torch.empty(gate.shape, dtype=gate.dtype) for _ in range(2))
    g, u, d = rows_of(gate), rows_of(up), rows_of(dy)
    native._library.swiglu(
        g.data_ptr(), u.data_ptr(), d.data_ptr(), native._DTYPES[gate.dtype], *g.shape, g.stride(0), u.stride(0), d.stride(0),
        dgate.data_ptr(), dup.data_ptr(), native._threads(gate.numel()),
    )  # fmt: skip
    return dgate, dup
