"""Cross-entropy of a linear head without its logits ever existing whole.

    z = h W^T           loss = sum over rows t of  logsumexp(z_t) - z_t[y_t]

    hidden  (N, D)      fp64/fp32/fp16/bf16
    weight  (V, D)      of hidden's dtype
    labels  (N,) int64
    loss    ()          fp32 (fp64 for fp64), the sum over the rows

The gradient is known as soon as the logits are:  dz_t = softmax(z_t) - onehot(y_t),  dh = dz W,  dW = dz^T h.
So the forward pass computes it chunk by chunk and keeps dh (N, D) alone; the backward pass multiplies it by the loss's
gradient. Log-softmax is taken in fp32; dz is rounded to hidden's dtype as the difference (near a certain label,
softmax rounded first would lose it). Memory: chunk x V logits in hidden's dtype and fp32, where the plain expression
holds N x V three times or more.
Floor: 4 N V D flops for a frozen head, 6 N V D for a trained one; W is read twice a chunk.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK = 256


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, labels, chunk):
        wide = torch.promote_types(hidden.dtype, torch.float32)
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        total = torch.zeros((), dtype=wide, device=hidden.device)
        dhidden = torch.empty_like(hidden) if need_hidden else None
        dweight = torch.zeros(weight.shape, dtype=wide, device=weight.device) if need_weight else None
        # Allocated once: on a CPU, touching fresh memory for the logits of each chunk costs as much as computing them.
        rows_at_once = min(chunk, len(hidden))
        narrow = hidden.new_empty(rows_at_once, len(weight))
        logits = torch.empty_like(narrow, dtype=wide)
        for start in range(0, len(hidden), chunk):
            rows, target = hidden[start : start + chunk], labels[start : start + chunk, None]
            dz, z = narrow[: len(rows)], logits[: len(rows)]
            torch.mm(rows, weight.t(), out=dz)
            z.copy_(dz)
            torch.log_softmax(z, 1, out=z)
            total -= z.gather(1, target).sum()
            if dhidden is None and dweight is None:
                continue
            dz.copy_(z.exp_().scatter_add_(1, target, z.new_full(target.shape, -1.0)))
            if dhidden is not None:
                torch.mm(dz, weight, out=dhidden[start : start + chunk])
            if dweight is not None:
                dweight += dz.t() @ rows
        ctx.save_for_backward(dhidden, dweight)
        ctx.weight_dtype = weight.dtype
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, dloss):
        dhidden, dweight = ctx.saved_tensors
        if dhidden is not None:
            dhidden = dhidden * dloss.to(dhidden.dtype)
        if dweight is not None:
            dweight = (dweight * dloss).to(ctx.weight_dtype)
        return dhidden, dweight, None, None


def linear_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor, chunk: int = CHUNK) -> Tensor:
    """Sum over rows of the cross-entropy of softmax(hidden weight^T) with `labels`. Differentiable in hidden and
    weight.

    hidden (N, D), weight (V, D), labels int64 (N,) in [0, V): leave rows without a label out. ValueError where shapes
    disagree.
    """
    if hidden.dim() != 2 or weight.dim() != 2 or labels.shape != hidden.shape[:1] or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"hidden {tuple(hidden.shape)}, weight {tuple(weight.shape)}, labels {tuple(labels.shape)}; "
            "expected (N, D), (V, D) and (N,)"
        )
    return _LinearCrossEntropy.apply(hidden, weight, labels, chunk)
