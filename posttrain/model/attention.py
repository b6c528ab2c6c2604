"""Attention whose backward pass on a CPU is matrix products.

    p = softmax(scale q k^T + mask)         y = p v            (Vaswani et al., arXiv:1706.03762, eq. 1)

    q     (B, heads, T, head_dim)           fp64/fp32/fp16/bf16
    k, v  (B, kv heads, S, head_dim)        heads is a multiple of kv heads: those that share one become its rows
    mask  (B or 1, 1, T, S)                 added to the scores, of q's dtype; None: causal, T = S
    y     (B, heads, T, head_dim)

Backward:  dv = p^T dy    dp = dy v^T    ds = p (dp - sum over S of p dp)    dq = scale ds k    dk = scale ds^T q
PyTorch's forward is kept: it never holds p whole. Its backward on a CPU, in half precision, multiplies small tiles
without the matrix unit: 32 to 46 ms for B=4, T=256, 9 heads of 64 on one core, where the five products above, p
computed again, take 9.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

# The backward pass holds this many scores at once; beyond it for a single group of heads, PyTorch's own takes over.
_SCORES = 2**25


def _forward(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    gqa = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=gqa)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        ctx.save_for_backward(q, k, v, mask)
        return _forward(q, k, v, mask)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor):
        q, k, v, mask = ctx.saved_tensors
        B, heads, T, D = q.shape
        kv_heads, S = k.shape[1:3]
        rows = heads // kv_heads * T
        if mask is None:
            mask = q.new_full((T, S), -torch.inf).triu_(1)[None, None]
        scale = D**-0.5
        dq, dk, dv = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (q, k, v))
        batches = max(1, _SCORES // (heads * T * S))
        for at in range(0, B, batches):
            part = slice(at, at + batches)
            some = mask[part] if mask.shape[0] == B else mask
            qs = (q[part] * scale).reshape(-1, rows, D)
            ks, vs = k[part].reshape(-1, S, D), v[part].reshape(-1, S, D)
            dys = dy[part].reshape(-1, rows, D)
            scores = torch.bmm(qs, ks.transpose(1, 2)).view(-1, heads, T, S).add_(some)
            p = scores.softmax(-1).view(-1, rows, S)
            dp = torch.bmm(dys, vs.transpose(1, 2))
            ds = torch.ops.aten._softmax_backward_data(dp, p, -1, dp.dtype)
            dv[part] = torch.bmm(p.transpose(1, 2), dys).view(-1, kv_heads, S, D)
            dk[part] = torch.bmm(ds.transpose(1, 2), qs).view(-1, kv_heads, S, D)
            dq[part] = torch.bmm(ds, ks).mul_(scale).view(-1, heads, T, D)
        return dq, dk, dv, None


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(head_dim) + mask) v, causal without a mask. Differentiable in q, k and v."""
    trained = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    if trained and q.device.type == "cpu" and q.shape[1] * q.shape[2] * k.shape[2] <= _SCORES:
        return _Attention.apply(q, k, v, mask)
    return _forward(q, k, v, mask)
