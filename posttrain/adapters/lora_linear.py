"""A frozen linear layer with a low-rank update: y = x W^T + bias + scaling dropout(x) A^T B^T.

Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models" (arXiv:2106.09685), equation 3, with
scaling = lora_alpha / r.

    x       (..., K)    fp64/fp32/fp16/bf16
    weight  (N, K)      of x's dtype, or a QuantizedWeight of that shape
    lora_A  (r, K)      any float dtype, as lora_B (N, r); cast to x's for the products, gradients return in their own
    bias    (N,)        or None
    keep    (..., K)    bool or None: dropout's mask on the low-rank path, x' = x * keep / (1 - dropout)
    y       (..., N)    of x's dtype

Backward, with dY (..., N) flattened to rows and V = scaling dY B (M, r), which dA and dX share:
    dX = dY W + (V A) * keep / (1 - dropout)      dA = V^T x'
    dB = scaling dY^T (x' A^T)                    dbias = sum of dY's rows
Only x is saved: x A^T is computed again, 2 M K r flops, instead of kept until the backward pass, and no activation is
copied into another dtype.
Floor: 2 M K N flops forward and as many for dX; the low rank adds 2 M r (K + N) forward and M r (6 K + 4 N) backward.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from posttrain.kernels import QuantizedWeight, quantized_linear
from posttrain.quantized import QuantizedLinear


def _dropped(x: Tensor, keep: Tensor | None, dropout: float) -> Tensor:
    return x if keep is None else (x * keep).mul_(1.0 / (1.0 - dropout))


def _times_weight(dy: Tensor, weight: Tensor | QuantizedWeight) -> Tensor:
    """dY (M, N) W (N, K)."""
    if isinstance(weight, QuantizedWeight):
        return torch.ops.posttrain.quantized_linear_dx(
            dy, *weight.tensors(), *weight.shape, weight.block_size, weight.quant_type
        )
    return dy @ weight


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, lora_A, lora_B, bias, keep, scaling, dropout):
        base = quantized_linear if isinstance(weight, QuantizedWeight) else F.linear
        y = base(x, weight, bias)
        A, scaled_B = lora_A.to(x.dtype), (lora_B * scaling).to(x.dtype)
        rows = _dropped(x, keep, dropout).reshape(-1, x.shape[-1])
        y.view(-1, y.shape[-1]).addmm_(rows @ A.t(), scaled_B.t())
        dense = isinstance(weight, Tensor)
        ctx.save_for_backward(x, lora_A, lora_B, keep, weight if dense else None)
        ctx.weight = None if dense else weight
        ctx.scaling, ctx.dropout = scaling, dropout
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, lora_A, lora_B, keep, weight = ctx.saved_tensors
        weight = ctx.weight if weight is None else weight
        need_x, need_weight, need_A, need_B, need_bias = ctx.needs_input_grad[:5]
        shape, scaling = x.shape, ctx.scaling
        dy = dy.reshape(-1, dy.shape[-1])
        A, scaled_B = lora_A.to(dy.dtype), (lora_B * scaling).to(dy.dtype)
        dx = dweight = dA = dB = dbias = None
        V = dy @ scaled_B if need_x or need_A else None
        if need_A or need_B:
            rows = _dropped(x, keep, ctx.dropout).reshape(-1, shape[-1])
            if need_A:
                dA = (V.t() @ rows).to(lora_A.dtype)
            if need_B:
                dB = ((rows @ A.t()).t() @ dy).t().to(lora_B.dtype).mul_(scaling)
        if need_x:
            dx = _times_weight(dy, weight)
            if keep is None:
                dx.addmm_(V, A)
            else:
                dx.addcmul_(V @ A, keep.reshape(dx.shape), value=1.0 / (1.0 - ctx.dropout))
            dx = dx.view(shape)
        if need_weight:
            dweight = dy.t() @ x.reshape(-1, shape[-1])
        if need_bias:
            dbias = dy.sum(0)
        return dx, dweight, dA, dB, dbias, None, None, None


def lora_linear(
    x: Tensor,
    weight: Tensor | QuantizedWeight,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    bias: Tensor | None = None,
    *,
    dropout: float = 0.0,
    keep: Tensor | None = None,
) -> Tensor:
    """x W^T + bias + scaling dropout(x) A^T B^T. Differentiable in x, lora_A, lora_B, bias and a dense weight.

    Dropout acts on the low-rank path alone. `keep` is its mask; without one it is drawn from torch's generator.
    Raises ValueError where the shapes do not fit together.
    """
    N, K = weight.shape
    r = lora_A.shape[0]
    if x.shape[-1] != K or tuple(lora_A.shape) != (r, K) or tuple(lora_B.shape) != (N, r):
        raise ValueError(
            f"x {tuple(x.shape)}, lora_A {tuple(lora_A.shape)} and lora_B {tuple(lora_B.shape)} do not fit a weight of "
            f"{N} x {K}; expected x (..., {K}), lora_A (r, {K}), lora_B ({N}, r)"
        )
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"dropout is {dropout}; expected 0 <= dropout < 1")
    if dropout and keep is None:
        keep = torch.empty(x.shape, dtype=torch.bool, device=x.device).bernoulli_(1.0 - dropout)
    return _LoraLinear.apply(x, weight, lora_A, lora_B, bias, keep if dropout else None, scaling, dropout)


class LoraLinear(nn.Module):
    """A frozen linear layer and its adapters by name, of which at most one acts.

    base_layer is never written to: merging makes a second, dense layer, and unmerging drops it.
    """

    def __init__(self, base_layer: nn.Linear | QuantizedLinear):
        super().__init__()
        self.base_layer = base_layer
        self.in_features, self.out_features = base_layer.in_features, base_layer.out_features
        self.lora_A, self.lora_B = nn.ParameterDict(), nn.ParameterDict()
        self.scaling: dict[str, float] = {}
        self.dropout: dict[str, float] = {}
        self.active_adapter: str | None = None
        self.merged: nn.Linear | None = None

    def add(self, name: str, lora_A: Tensor, lora_B: Tensor, scaling: float, dropout: float) -> None:
        """Add an adapter: lora_A (r, in_features), lora_B (out_features, r)."""
        self.lora_A[name], self.lora_B[name] = nn.Parameter(lora_A), nn.Parameter(lora_B)
        self.scaling[name], self.dropout[name] = scaling, dropout

    def drop(self, name: str) -> None:
        """Take an adapter away."""
        for table in (self.lora_A, self.lora_B, self.scaling, self.dropout):
            del table[name]
        if self.active_adapter == name:
            self.active_adapter = None

    def merged_weight(self, name: str) -> Tensor:
        """W + scaling B A, summed in fp32 and rounded once to the base's dtype (a 4-bit base is dequantized first)."""
        weight = self.base_layer.weight
        weight = weight.detach() if isinstance(weight, Tensor) else weight.dequantize()
        wide = torch.promote_types(weight.dtype, torch.float32)
        A, B = self.lora_A[name].detach().to(wide), self.lora_B[name].detach().to(wide)
        return torch.addmm(weight.to(wide), B, A, alpha=self.scaling[name]).to(weight.dtype)

    def dense(self, weight: Tensor) -> nn.Linear:
        """A frozen nn.Linear of that weight with the base's bias."""
        bias = self.base_layer.bias
        layer = nn.Linear(self.in_features, self.out_features, bias=bias is not None, device="meta", dtype=weight.dtype)
        layer.weight = nn.Parameter(weight, requires_grad=False)
        if bias is not None:
            layer.bias = nn.Parameter(bias.detach(), requires_grad=False)
        return layer

    def forward(self, x: Tensor) -> Tensor:
        if self.merged is not None:
            return self.merged(x)
        name = self.active_adapter
        if name is None:
            return self.base_layer(x)
        dropout = self.dropout[name] if self.training else 0.0
        base, A, B = self.base_layer, self.lora_A[name], self.lora_B[name]
        return lora_linear(x, base.weight, A, B, self.scaling[name], base.bias, dropout=dropout)

    def extra_repr(self) -> str:
        return f"active_adapter={self.active_adapter!r}, merged={self.merged is not None}"
