"""Rotary position embedding in PyTorch (kernels/rope.py): any device and dtype. Between, all is at least float32, rounded once."""

from __future__ import annotations

import torch
from torch import Tensor


def rope(x: Tensor, cos: Tensor, sin: Tensor, transposed: bool) -> Tensor:
    """x cos + roll(x, D/2) sin or, transposed, x cos + roll(x sin, D/2). Contiguous."""
    half, wide = x.shape[-1] // 2, torch.promote_types(x.dtype, torch.float32)
    if transposed:  # the roll of a product is the product of the rolls
        sin = sin.roll(half, -1)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    return y.copy_((x * cos.to(wide)).addcmul_(x.roll(half, -1), sin.to(wide)))
