"""What a draft learns from its target's distributions, without either's (N, V) logits ever being whole.

    kl_t = sum_v p_t[v] (log p_t[v] - log q_t[v])      p = softmax(teacher_hidden W_t^T)      q = softmax(hidden W^T)
    dhidden_t = g_t (q_t - p_t) W

hidden, teacher_hidden  float32 | float16 | bfloat16 (N, H), (N, H_t)     weight, teacher_weight  the same dtypes (V, H), (V, H_t)
kl                      float32 (N,), float64 of float64                  rows at once: posttrain.kernels.linear_logprobs' choice

Both heads are frozen, so the forward pass saves the direction (q - p) W (N, H) and backward is one scale a row. The gradient is
that of the cross-entropy with soft targets (EAGLE's), from which kl differs by the target's entropy: kl is 0 for a perfect draft.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from posttrain.kernels.linear_logprobs import chunk_rows


class _SoftTargets(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor) -> Tensor:
        rows = len(hidden)
        # as in linear_logprobs: every number of rows that oneDNN has multiplied costs it memory for good
        fill = (0, 0, 0, -rows % 32)
        hidden, teacher_hidden = F.pad(hidden, fill), F.pad(teacher_hidden, fill)
        wide = torch.promote_types(hidden.dtype, torch.float32)
        kl = hidden.new_empty(len(hidden), dtype=wide)
        direction = torch.empty_like(hidden)
        step = chunk_rows(len(weight))
        for start in range(0, len(hidden), step):
            part = slice(start, start + step)
            log_p = (teacher_hidden[part] @ teacher_weight.t()).to(wide).log_softmax(-1)
            log_q = (hidden[part] @ weight.t()).to(wide).log_softmax(-1)
            p = log_p.exp()
            # a probability of 0 adds nothing, whatever its logarithm (-inf times 0 would be NaN)
            kl[part] = (p * (log_p - log_q).masked_fill_(p == 0, 0.0)).sum(-1)
            direction[part] = log_q.exp_().sub_(p).to(weight.dtype) @ weight
        ctx.save_for_backward(direction[:rows])
        return kl[:rows]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor):
        (direction,) = ctx.saved_tensors
        return direction * gradient[:, None].to(direction.dtype), None, None, None


def linear_kl(hidden: Tensor, weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor) -> Tensor:
    """KL (N,) of each row's draft distribution from the target's; differentiable in hidden alone.

    ValueError where the shapes do not fit or a weight or the teacher would need a gradient.
    """
    rows, V = len(hidden), len(weight)
    if (
        hidden.dim() != 2
        or teacher_hidden.dim() != 2
        or teacher_hidden.shape != (rows, teacher_weight.shape[1])
        or weight.shape != (V, hidden.shape[1])
        or len(teacher_weight) != V
    ):
        shapes = ", ".join(str(tuple(t.shape)) for t in (hidden, weight, teacher_hidden, teacher_weight))
        raise ValueError(f"hidden, weight and the teacher's two are {shapes}; expected (N, H), (V, H), (N, H'), (V, H')")
    if any(t.requires_grad for t in (weight, teacher_hidden, teacher_weight)) and torch.is_grad_enabled():
        raise ValueError("linear_kl gives no gradient to the heads and the teacher; detach them")
    return _SoftTargets.apply(hidden, weight, teacher_hidden, teacher_weight)
