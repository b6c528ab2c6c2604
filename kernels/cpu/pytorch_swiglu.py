"""SwiGLU in PyTorch (kernels/swiglu.py): any device and dtype."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, contiguous."""
    return torch.empty(gate.shape, dtype=gate.dtype, device=gate.device).copy_(F.silu(gate).mul_(up))


def swiglu_backward(dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """(dgate, dup), contiguous."""
    dgate, dup = (torch.empty(gate.shape, dtype=gate.dtype, device=gate.device) for _ in range(2))
    return dgate.copy_(torch.ops.aten.silu_backward(dy * up, gate)), dup.copy_(F.silu(gate).mul_(dy))
