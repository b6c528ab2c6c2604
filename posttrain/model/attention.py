"""Attention whose backward pass on a CPU is matrix products.

    p = softmax(scale q k^T + mask)         y = p v            (Vaswani et al., arXiv:1706.03762, eq. 1)

    q     (B, heads, T, head_dim)           fp64/fp32/fp16/bf16
    k, v  (B, kv heads, S, head_dim)        heads is a multiple of kv heads: those that share one become its rows
    mask  (B or 1, 1, T, S)                 added to the scores, of q's dtype; None: causal, T = S. No query may see a key
                                            after its own, the last T of the S being the queries'
    y     (B, heads, T, head_dim)

Backward:  dv = p^T dy    dp = dy v^T    ds = p (dp - sum over S of p dp)    dq = scale ds k    dk = scale ds^T q
PyTorch's forward is kept: it never holds p whole. Its backward on a CPU, in half precision, multiplies small tiles
without the matrix unit: 32 to 46 ms for B=4, T=256, 9 heads of 64 on one core, where the five products above, p
computed again, take 9. They go over a quarter of the queries at a time, with the keys up to the last of them: three
eighths of the scores are never made and the others stay in the cache (two thirds of the time at T = 256, half at 1024).

Without a mask, where the CPU engine has an attention of its own (bfloat16 on a machine with AMX), that is both passes:
posttrain/kernels/causal_attention.py.
"""

from __future__ import annotations

from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from posttrain.kernels.causal_attention import causal_attention, causal_attention_takes

# The backward pass holds this many scores at once; beyond it for a single group of heads, PyTorch's own takes over.
_SCORES = 2**25
_BLOCKS = 4


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
        (B, heads, T, D), (kv_heads, S) = q.shape, k.shape[1:3]
        wide, scale = torch.promote_types(q.dtype, torch.float32), D**-0.5
        keys, values = k.reshape(B, kv_heads, S, D), v.reshape(B, kv_heads, S, D)
        dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        dk, dv = (torch.zeros(k.shape, dtype=wide, device=q.device) for _ in range(2))
        batches, queries = max(1, _SCORES // (heads * T * S)), max(1, -(-T // _BLOCKS))
        for at, first in product(range(0, B, batches), range(0, T, queries)):
            part, block = slice(at, at + batches), slice(first, min(first + queries, T))
            n, seen = block.stop - block.start, S - T + block.stop
            qs, dys = ((t[part, :, block]).reshape(-1, heads // kv_heads * n, D) for t in (q, dy))
            ks, vs = (t[part, :, :seen].flatten(0, 1) for t in (keys, values))
            qs = qs * scale
            scores = torch.bmm(qs, ks.transpose(1, 2)).view(-1, heads, n, seen)
            if mask is None:
                scores += q.new_full((n, seen), -torch.inf).triu_(seen - n + 1)
            else:
                scores += (mask[part] if mask.shape[0] == B else mask)[:, :, block, :seen]
            p = scores.softmax(-1).view(qs.shape[0], -1, seen)
            dp = torch.bmm(dys, vs.transpose(1, 2))
            ds = torch.ops.aten._softmax_backward_data(dp, p, -1, dp.dtype)
            dv[part, :, :seen] += torch.bmm(p.transpose(1, 2), dys).view(-1, kv_heads, seen, D)
            dk[part, :, :seen] += torch.bmm(ds.transpose(1, 2), qs).view(-1, kv_heads, seen, D)
            dq[part, :, block] = torch.bmm(ds, ks).mul_(scale).view(-1, heads, n, D)
        return dq, dk.to(k.dtype), dv.to(v.dtype), None


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(head_dim) + mask) v, causal without a mask. Differentiable in q, k and v."""
    trained = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    if mask is None and causal_attention_takes(q, k, v, trained):
        return causal_attention(q, k, v)
    if trained and q.device.type == "cpu" and q.shape[1] * q.shape[2] * k.shape[2] <= _SCORES:
        return _Attention.apply(q, k, v, mask)
    return _forward(q, k, v, mask)
