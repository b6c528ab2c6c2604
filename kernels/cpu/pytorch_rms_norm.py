"""RMSNorm in PyTorch (kernels/rms_norm.py): any device and dtype. Between, all is at least float32, rounded once."""

from __future__ import annotations

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(y as x, rstd (N,) float32, for float64 that)."""
    wide = torch.promote_types(x.dtype, torch.float32)
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide)
    rstd = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    return y.copy_((x * rstd).mul_(weight)), rstd.reshape(-1)


def rms_norm_backward(dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, need_weight: bool) -> tuple[Tensor, Tensor]:
    """(dx as x, dweight as the weight; without `need_weight` of no elements)."""
    normalized = x * rstd.view(*x.shape[:-1], 1)
    dnormalized = dy.to(rstd.dtype)
    dweight = weight.new_empty(0)
    if need_weight:
        dweight = (dnormalized * normalized).reshape(rstd.numel(), x.shape[-1]).sum(0).to(weight.dtype)
    dnormalized = dnormalized * weight
    projection = (dnormalized * normalized).mean(-1, keepdim=True)
    wide = dnormalized.addcmul_(normalized, projection, value=-1).mul_(rstd.view(*x.shape[:-1], 1))
    return torch.empty(x.shape, dtype=x.dtype, device=x.device).copy_(wide), dweight
