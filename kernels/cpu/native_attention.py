"""Causal attention of bfloat16 on a machine with AMX, by amx_attention.c."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from . import native

_P, _L = ctypes.c_void_p, ctypes.c_int64
_HEAD_DIM = 256  # beyond it a head's keys, values and sums leave the second-level cache
_POSITIONS = 32  # fewer leave most of a block of queries empty


class _Heads(ctypes.Structure):
    """head_rows in attention.h."""

    _fields_ = [("values", _P), ("batch", _L), ("head", _L), ("row", _L)]


class _Args(ctypes.Structure):
    """attention_args in attention.h."""

    _fields_ = [
        *((name, _Heads) for name in ("q", "k", "v", "y", "dy", "dq", "dk", "dv")),
        *((name, _P) for name in ("softmax", "workspace")),
        *((name, _L) for name in ("B", "heads", "kv_heads", "T", "D", "threads")),
        ("scale", ctypes.c_double),
    ]


_library = native._library
_library.attention_bytes.argtypes, _library.attention_bytes.restype = [ctypes.POINTER(_Args)], _L
for _name in ("attention_forward", "attention_backward"):
    getattr(_library, _name).argtypes = [ctypes.POINTER(_Args)]


def takes(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether the library attends with these: bfloat16 on the CPU, q (B, heads, T, D), k and v (B, kv heads, T, D), D <= 256."""
    if native.ISA != "amx" or any(t.device.type != "cpu" or t.dtype != torch.bfloat16 for t in (q, k, v)):
        return False
    (B, heads, T, D), kv_heads = q.shape, k.shape[1]
    shared = k.shape == v.shape == (B, kv_heads, T, D) and kv_heads > 0 and heads % kv_heads == 0
    return shared and q.numel() > 0 and D <= _HEAD_DIM


def faster_than_vendor(T: int, backward: bool) -> bool:
    """Whether T positions are attended to here, or by torch; with the backward pass or without.

    Measured on two cores, times over torch's forward: 32 to 512 positions 0.4 to 0.8 (64 of 32 heads of 128: up to 1.0), 1024 to
    8192 0.4 to 0.9; 16 positions 1.0 to 1.25. The backward pass takes 0.05 to 0.3 of the products with torch.bmm.
    """
    return backward or T >= _POSITIONS


def _rows(x: Tensor) -> Tensor:
    return x if x.stride(3) == 1 else x.contiguous()


def _empty(x: Tensor) -> Tensor:
    """As x (B, heads, T, D), laid out with a position's heads side by side, as linear layers want them."""
    B, heads, T, D = x.shape
    return torch.empty(B, T, heads, D, dtype=x.dtype).transpose(1, 2)


def _args(q: Tensor, k: Tensor, softmax: Tensor, **operands: Tensor) -> _Args:
    B, heads, T, D = q.shape
    strided = {name: _Heads(x.data_ptr(), *x.stride()[:3]) for name, x in {"q": q, "k": k, **operands}.items()}
    threads = native._threads(q.numel() * T)
    return _Args(
        **strided, softmax=softmax.data_ptr(), B=B, heads=heads, kv_heads=k.shape[1], T=T, D=D, threads=threads, scale=D**-0.5
    )


def forward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """y (B, heads, T, D) = softmax(q k^T / sqrt(D)) v, causal, and what `backward` needs of the softmax,
    float32 (2, B, heads, T): p = exp(q k^T / sqrt(D) - [0]) [1]."""
    q, k, v, y = _rows(q), _rows(k), _rows(v), _empty(q)
    softmax = torch.empty(2, *q.shape[:3], dtype=torch.float32)
    native._check(_library.attention_forward(_args(q, k, softmax, v=v, y=y)))
    return y, softmax


def backward(q: Tensor, k: Tensor, v: Tensor, y: Tensor, softmax: Tensor, dy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv from what `forward` took and returned, and y's gradient."""
    q, k, v, y, dy = (_rows(x) for x in (q, k, v, y, dy))
    dq, dk, dv = _empty(q), _empty(k), _empty(v)
    args = _args(q, k, softmax, v=v, y=y, dy=dy, dq=dq, dk=dk, dv=dv)
    workspace = native.kept_memory(_library.attention_bytes(args))  # not kept where it is large: it must live as long as the call
    args.workspace = workspace.data_ptr()
    native._check(_library.attention_backward(args))
    return dq, dk, dv
