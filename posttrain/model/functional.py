"""RMSNorm and SwiGLU as the decoder calls them: the fused operations, and PyTorch's own for a row or two, as in decoding."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from posttrain import kernels

# Up to so many elements without a gradient, on a CPU, PyTorch's two or three small kernels cost less than one operation of ours:
# about 15 us of dispatch and call, in which PyTorch's SiLU does as many elements.
FEW = 1 << 14


def decoding(tensor: Tensor, *others: Tensor) -> bool:
    """Whether these are on a CPU and no gradient is to flow through them."""
    if tensor.device.type != "cpu":
        return False
    return not torch.is_grad_enabled() or not any(t.requires_grad for t in (tensor, *others))


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm of x (..., D) with weight (D,), in x's dtype. Differentiable in x and weight."""
    if x.numel() == x.shape[-1] and decoding(x, weight):
        # One row: its norm is a Python float, and two small kernels do.
        norm = torch.linalg.vector_norm(x, dtype=torch.promote_types(x.dtype, torch.float32)).item()
        return (x * (1.0 / math.sqrt(norm * norm / x.shape[-1] + eps))).mul_(weight)
    return kernels.rms_norm(x, weight, eps)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, elementwise. Differentiable in both."""
    if gate.numel() <= FEW and decoding(gate, up):
        return F.silu(gate).mul_(up)
    return kernels.swiglu(gate, up)
