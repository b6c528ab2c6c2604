"""RMSNorm and SwiGLU with a backward that saves inputs alone.

Autograd's own graph of these expressions keeps every intermediate (float32 copies included); over a decoder's layers
that is most of the activation memory after the matmuls' inputs.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


class _RMSNorm(torch.autograd.Function):
    """y = w x r, r = (mean(x^2) + eps)^-1/2 (Zhang and Sennrich, 2019, arXiv:1910.07467, eq. 4).

    With n = x r:   dw = sum over rows of dy n        dx = r (w dy - n mean(w dy n))
    Saves x, w and r (one float a row).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        y, r = _rms_norm(x, weight, eps)
        ctx.save_for_backward(x, weight, r)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor):
        x, weight, r = ctx.saved_tensors
        normalized = x * r
        dnormalized = dy.to(r.dtype)
        dweight = None
        if ctx.needs_input_grad[1]:
            dweight = (dnormalized * normalized).flatten(0, -2).sum(0).to(weight.dtype)
        if not ctx.needs_input_grad[0]:
            return None, dweight, None
        dnormalized = dnormalized * weight
        projection = (dnormalized * normalized).mean(-1, keepdim=True)
        dx = dnormalized.addcmul_(normalized, projection, value=-1).mul_(r).to(x.dtype)
        return dx, dweight, None


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(y in x's dtype, r in at least float32 (..., 1)). Everything between is at least float32, rounded once."""
    wide = torch.promote_types(x.dtype, torch.float32)
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide)
    r = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
    return (x * r).mul_(weight).to(x.dtype), r


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm of x (..., D) with weight (D,), in x's dtype. Differentiable in x and weight."""
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        return _RMSNorm.apply(x, weight, eps)
    if x.numel() == x.shape[-1] and x.device.type == "cpu":
        # One row, as in decoding: r is a Python float, and two small kernels do instead of seven.
        norm = torch.linalg.vector_norm(x, dtype=torch.promote_types(x.dtype, torch.float32)).item()
        return (x * (1.0 / math.sqrt(norm * norm / x.shape[-1] + eps))).mul_(weight)
    return _rms_norm(x, weight, eps)[0]


class _SwiGLU(torch.autograd.Function):
    """y = silu(g) u, silu(g) = g s, s = sigmoid(g) (Shazeer, 2020, arXiv:2002.05202, eq. 6).

    du = dy g s        dg = dy u s (1 + g (1 - s))
    Saves g and u.
    """

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, dy: Tensor):
        gate, up = ctx.saved_tensors
        dup = F.silu(gate).mul_(dy) if ctx.needs_input_grad[1] else None
        dgate = torch.ops.aten.silu_backward(dy * up, gate) if ctx.needs_input_grad[0] else None
        return dgate, dup


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, elementwise. Differentiable in both."""
    if torch.is_grad_enabled() and (gate.requires_grad or up.requires_grad):
        return _SwiGLU.apply(gate, up)
    return F.silu(gate).mul_(up)
