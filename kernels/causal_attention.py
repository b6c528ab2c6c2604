"""Causal attention on a CPU whose engine has one of its own (bfloat16 on a machine with AMX).

    p = softmax(scale q k^T), causal        y = p v                     (Vaswani et al., arXiv:1706.03762, eq. 1)
    dv = p^T dy    dp = dy v^T    ds = p (dp - sum of p dp)    dq = scale ds k    dk = scale ds^T q

    q        bf16 (B, heads, T, head_dim)      head_dim <= 256, scale = 1 / sqrt(head_dim)
    k, v     bf16 (B, kv heads, T, head_dim)   heads is a multiple of kv heads
    y        as q                              a position's heads lie side by side, as linear layers want them
    softmax  fp32 (2, B, heads, T)             p = exp(scale q k^T - softmax[0]) softmax[1], all that is kept of it

Flops: 2 B heads T^2 head_dim forward, 5 B heads T^2 head_dim backward. Bytes: each operand once. There is no kernel for a GPU:
posttrain/model/attention.py asks torch there. Oracle: reference/causal_attention.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import cpu
from ._library import define, differentiable


def _like(x: Tensor) -> Tensor:
    B, heads, T, D = x.shape
    return x.new_empty(B, T, heads, D).transpose(1, 2)


def _forward_cpu(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    assert cpu.attention_engine is not None, "causal_attention_takes says where this runs"
    return cpu.attention_engine.forward(q, k, v)


def _backward_cpu(q: Tensor, k: Tensor, v: Tensor, y: Tensor, softmax: Tensor, dy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    assert cpu.attention_engine is not None
    return cpu.attention_engine.backward(q, k, v, y, softmax, dy)


define(
    "causal_attention(Tensor q, Tensor k, Tensor v) -> (Tensor, Tensor)",
    lambda q, k, v: (_like(q), q.new_empty(2, *q.shape[:3], dtype=torch.float32)),
    CPU=_forward_cpu,
)
define(
    "causal_attention_backward(Tensor q, Tensor k, Tensor v, Tensor y, Tensor softmax, Tensor dy) -> (Tensor, Tensor, Tensor)",
    lambda q, k, v, *rest: (_like(q), _like(k), _like(v)),
    CPU=_backward_cpu,
)


def _setup_context(ctx, inputs, output):
    y, softmax = output
    ctx.save_for_backward(*inputs, y, softmax)
    ctx.mark_non_differentiable(softmax)


def _backward(ctx, dy, _):
    # the equations above, p from q k^T and softmax
    return _call_backward(*ctx.saved_tensors, dy)


def _no_double_backward(ctx, *gradients):
    raise RuntimeError("the gradients of causal_attention cannot be differentiated again: call backward without create_graph=True")


_call = differentiable("causal_attention", _backward, _setup_context)
_call_backward = differentiable("causal_attention_backward", _no_double_backward)


def causal_attention_takes(q: Tensor, k: Tensor, v: Tensor, trained: bool) -> bool:
    """Whether `causal_attention` computes this here, and faster than torch; with its backward pass (`trained`) or without."""
    engine = cpu.attention_engine
    return engine is not None and engine.faster_than_vendor(q.shape[2], trained) and engine.takes(q, k, v)


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(head_dim)) v, causal, where `causal_attention_takes` it. Differentiable in q, k and v, once."""
    return _call(q, k, v)[0]
