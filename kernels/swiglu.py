"""SwiGLU's elementwise part and its gradients, each in one pass (Shazeer, 2020, arXiv:2002.05202, eq. 6).

    y = silu(g) u,  silu(g) = g s,  s = sigmoid(g)
    du = dy g s        dg = dy u s (1 + g (1 - s))

gate, up, dy      float32 | float16 | bfloat16 (..., D)    may be strided, as halves of one fused projection are
y, dgate, dup     the same                                 contiguous

In float32, rounded once; 1 - s is sigmoid(-g), without the cancellation. Nothing is saved but gate and up.
Least bytes of n elements in bfloat16: 4 n read and 2 n written forward, 6 n and 4 n backward. Oracle: reference/swiglu.py.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from . import cpu
from ._library import define, differentiable
from ._rows import rows_of
from ._triton import tl, triton
from ._variant import Variant
from .cpu import pytorch_swiglu
from .nf4 import DTYPES

_BLOCK = 1024
_WARPS = 4


@triton.jit
def _place(D, BLOCK: tl.constexpr):
    """(row, columns, mask) of this program's BLOCK elements of a row."""
    tiles = tl.cdiv(D, BLOCK)
    row = tl.program_id(0) // tiles
    offs = (tl.program_id(0) % tiles) * BLOCK + tl.arange(0, BLOCK)
    return row.to(tl.int64), offs, offs < D


@triton.jit
def _exp(x):
    return tl.exp2(x * 1.4426950408889634)


@triton.jit
def _swiglu_fwd_kernel(gate_ptr, up_ptr, y_ptr, gate_stride, up_stride, D, BLOCK: tl.constexpr):
    # One program owns BLOCK elements of a row.
    row, offs, mask = _place(D, BLOCK)
    gate = tl.load(gate_ptr + row * gate_stride + offs, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * up_stride + offs, mask=mask, other=0.0).to(tl.float32)
    # an exponential that overflows gives 0, as it should
    tl.store(y_ptr + row * D + offs, (gate / (1.0 + _exp(-gate)) * up).to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _swiglu_bwd_kernel(
    gate_ptr, up_ptr, dy_ptr, dgate_ptr, dup_ptr, gate_stride, up_stride, dy_stride, D, BLOCK: tl.constexpr
):  # fmt: skip
    # One program owns BLOCK elements of a row.
    row, offs, mask = _place(D, BLOCK)
    gate = tl.load(gate_ptr + row * gate_stride + offs, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * up_stride + offs, mask=mask, other=0.0).to(tl.float32)
    dy = tl.load(dy_ptr + row * dy_stride + offs, mask=mask, other=0.0).to(tl.float32)
    below = 1.0 + _exp(-gate)
    s, rest = 1.0 / below, 1.0 / (1.0 + _exp(gate))
    tl.store(dup_ptr + row * D + offs, (dy * (gate / below)).to(dup_ptr.dtype.element_ty), mask=mask)
    tl.store(dgate_ptr + row * D + offs, (dy * up * (s * (1.0 + gate * rest))).to(dgate_ptr.dtype.element_ty), mask=mask)


def swiglu_triton(gate: Tensor, up: Tensor) -> Tensor:
    """Launch the forward kernel, one program for 1024 elements of a row."""
    if gate.dtype not in DTYPES or not gate.numel():
        return pytorch_swiglu.swiglu(gate, up)
    y, g, u = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device), rows_of(gate), rows_of(up)
    N, D = g.shape
    _swiglu_fwd_kernel[(N * triton.cdiv(D, _BLOCK),)](
        g, u, y, g.stride(0), u.stride(0), D, BLOCK=_BLOCK, num_warps=_WARPS
    )  # fmt: skip
    return y


def swiglu_backward_triton(dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Launch the backward kernel: (dgate, dup)."""
    if gate.dtype not in DTYPES or not gate.numel():
        return pytorch_swiglu.swiglu_backward(dy, gate, up)
    dgate, dup = (torch.empty(gate.shape, dtype=gate.dtype, device=gate.device) for _ in range(2))
    g, u, d = rows_of(gate), rows_of(up), rows_of(dy)
    N, D = g.shape
    _swiglu_bwd_kernel[(N * triton.cdiv(D, _BLOCK),)](
        g, u, d, dgate, dup, g.stride(0), u.stride(0), d.stride(0), D, BLOCK=_BLOCK, num_warps=_WARPS
    )  # fmt: skip
    return dgate, dup


define(
    "swiglu(Tensor gate, Tensor up) -> Tensor",
    lambda gate, up: gate.new_empty(gate.shape),
    CPU=lambda gate, up: cpu.swiglu(gate, up),
    CUDA=swiglu_triton,
)
define(
    "swiglu_backward(Tensor dy, Tensor gate, Tensor up) -> (Tensor, Tensor)",
    lambda dy, gate, up: (gate.new_empty(gate.shape), gate.new_empty(gate.shape)),
    CPU=lambda dy, gate, up: cpu.swiglu_backward(dy, gate, up),
    CUDA=swiglu_backward_triton,
)


def _backward(ctx, dy):
    # du = dy g s        dg = dy u s (1 + g (1 - s))
    dgate, dup = _call_backward(dy, *ctx.saved_tensors)
    need_gate, need_up = ctx.needs
    return dgate if need_gate else None, dup if need_up else None


def _no_second_derivative(ctx, *_):
    raise RuntimeError("swiglu has no second derivative; take it of the plain expression silu(gate) * up")


_call = differentiable("swiglu", _backward, lambda ctx, inputs, output: ctx.save_for_backward(*inputs))
_call_backward = differentiable("swiglu_backward", _no_second_derivative)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up of two (..., D) of one dtype. Differentiable once in both.

    Raises ValueError for shapes or devices that differ, TypeError for dtypes that do.
    """
    if gate.shape != up.shape or gate.dim() == 0:
        raise ValueError(f"gate {tuple(gate.shape)}, up {tuple(up.shape)}; expected the same shape (..., D)")
    if gate.dtype != up.dtype:
        raise TypeError(f"gate is {gate.dtype} and up {up.dtype}; cast one to the other's")
    if gate.device != up.device:
        raise ValueError(f"gate is on {gate.device} and up on {up.device}; move one to the other")
    return _call(gate, up)


def aot_variants() -> Iterator[Variant]:
    """Every dtype, forward and backward."""
    names = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
    for dtype in DTYPES:
        of, strides = f"*{names[dtype]}", {"gate_stride": "i32:16", "up_stride": "i32:16", "D": "i32:16"}
        both = {"gate_ptr": of, "up_ptr": of} | strides
        for name, kernel, rest in (
            ("swiglu", _swiglu_fwd_kernel, {"y_ptr": of}),
            ("swiglu_backward", _swiglu_bwd_kernel, {"dy_ptr": of, "dgate_ptr": of, "dup_ptr": of, "dy_stride": "i32:16"}),
        ):
            integers = tuple(k for k, kind in (both | rest).items() if kind == "i32:16")
            yield Variant(
                f"{name}_{names[dtype]}",
                kernel,
                both | rest,
                {"BLOCK": _BLOCK},
                _WARPS,
                unaligned=("gate_ptr", "up_ptr", *integers),
            )
