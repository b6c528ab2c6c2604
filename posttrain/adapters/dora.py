"""DoRA: a linear layer's weight as magnitudes times directions, the directions moved by a low-rank update.

    W' = (m / ||W + s B A||) (W + s B A)        row by row, so that        y = (m / norm) (W x + s B A x) + bias

Liu et al., "DoRA: Weight-Decomposed Low-Rank Adaptation" (arXiv:2402.09353), equation 5; the norm counts as a constant in
the gradient (their section 4.3).

    W     (N, K)   frozen, dense or a QuantizedWeight          A (r, K), B (N, r), s: as in LoRA
    m     (N,)     trained; starts as the rows' norms, so that the layer starts as it was
    norm  (N,)     of W + s B A, of which no N x K matrix is made:

    ||W + s B A||^2 = ||W||^2 + 2 s <W, B A> + s^2 ||B A||^2
    <W, B A>_n = sum_r B_nr (W A^T)_nr          ||B A||^2_n = B_n (A A^T) B_n^T

||W||^2 is taken once, W A^T (N, r) at each step: 2 N K r flops and one pass over the weight, packed as it is.
Dropout is the authors' (and PEFT's): it acts on what the update adds to the layer, y = W x + (g - 1) W x' + g s B A x' + bias
with g = m / norm and x' = drop(x), which takes a second product with W.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from posttrain.kernels import DoubleQuantized, QuantizedWeight, double_dequantize, lora_linear, quantized_linear

_CHUNK = 1 << 20  # weights widened at a time


def linear(x: Tensor, weight: Tensor | QuantizedWeight, bias: Tensor | None = None) -> Tensor:
    """x W^T + bias, W dense or in 4 bits."""
    return F.linear(x, weight, bias) if isinstance(weight, Tensor) else quantized_linear(x, weight, bias)


def row_squares(weight: Tensor | QuantizedWeight) -> Tensor:
    """||W||^2 row by row: float64 (N,). At most a few rows of the weight are widened at a time."""
    N, K = weight.shape
    if isinstance(weight, Tensor):
        step = max(1, _CHUNK // max(K, 1))
        chunks = (weight.detach()[i : i + step] for i in range(0, N, step))
    else:
        chunks = _dequantized_chunks(weight)
    squares = [torch.linalg.vector_norm(chunk.double(), dim=1).square() for chunk in chunks]
    return torch.cat(squares) if squares else torch.zeros(N, dtype=torch.float64)


def _dequantized_chunks(weight: QuantizedWeight):
    """The weight in float32, as many rows at a time as hold whole blocks."""
    N, K = weight.shape
    whole = weight.block_size // math.gcd(weight.block_size, max(K, 1))  # rows that end where a block ends
    step = whole * max(1, _CHUNK // max(K * whole, 1))
    absmax = double_dequantize(weight.absmax) if isinstance(weight.absmax, DoubleQuantized) else weight.absmax
    for i in range(0, N, step):
        rows = min(step, N - i)
        first, last = i * K, (i + rows) * K
        packed = weight.packed[first // 2 : -(-last // 2)]
        blocks = absmax[first // weight.block_size : -(-last // weight.block_size)]
        part = QuantizedWeight(packed, blocks, (rows, K), weight.dtype, weight.block_size, weight.quant_type)
        yield part.dequantize(torch.float32)


@torch.no_grad()
def weight_norm(
    weight: Tensor | QuantizedWeight, squares: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float, dtype: torch.dtype
) -> Tensor:
    """||W + s B A|| row by row, (N,) in float32 (float64 for that): `squares` is row_squares(weight).

    dtype: of the product W A^T, the layer's input's; a dense weight has it. The rest is summed in float64: three terms
    of N numbers, which cancel where the update takes most of a row away.
    """
    A, B = lora_A.to(dtype), lora_B.double()
    products = linear(A, weight).t().double()  # W A^T (N, r)
    A = A.to(torch.promote_types(dtype, torch.float32))
    gram = (A @ A.t()).double()
    total = squares + 2 * scaling * (B * products).sum(1) + scaling**2 * ((B @ gram) * B).sum(1)
    return total.clamp_(min=0).sqrt_().to(torch.promote_types(dtype, torch.float32))


class _Rescale(torch.autograd.Function):
    """y = factor z, as z + (factor - 1) z with one rounding: a factor near 1 keeps its digits where z has eight bits.

    dz = factor dy      dfactor = sum over the rows of dy z
    """

    @staticmethod
    def forward(ctx, z, factor):
        change = (factor - 1).to(z.dtype)
        ctx.save_for_backward(z, change)
        ctx.dtype = factor.dtype
        return torch.addcmul(z, z, change)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        z, change = ctx.saved_tensors
        dz = torch.addcmul(dy, dy, change) if ctx.needs_input_grad[0] else None
        dfactor = None
        if ctx.needs_input_grad[1]:
            dfactor = (dy * z).reshape(-1, z.shape[-1]).sum(0, dtype=ctx.dtype)
        return dz, dfactor


def rescaling(magnitude: Tensor, norm: Tensor) -> Tensor:
    """m / norm, and 0 where the norm is."""
    nonzero = norm > 0
    return torch.where(nonzero, magnitude / norm.where(nonzero, 1), 0)


def dora_linear(
    x: Tensor, weight: Tensor | QuantizedWeight, lora_A: Tensor, lora_B: Tensor, scaling: float, factor: Tensor,
    bias: Tensor | None = None, *, dropout: float = 0.0,
) -> Tensor:  # fmt: skip
    """factor (x W^T + scaling x A^T B^T) + bias: (..., N) in x's dtype. Differentiable in x, lora_A, lora_B, factor and bias.

    factor (N,): `rescaling` of the magnitudes and of `weight_norm` of the same weight and factors; a row of norm 0 gives `bias`
    alone. Dropout as in the module's docstring, its mask drawn from torch's generator.
    """
    dropped = F.dropout(x, dropout) if dropout else x
    y = lora_linear(dropped, weight, lora_A, lora_B, scaling)
    if torch.is_grad_enabled():
        y = _Rescale.apply(y, factor)
    else:
        y = torch.addcmul(y, y, (factor - 1).to(y.dtype))
    if dropout:
        y = y + linear(x - dropped, weight)
    return y if bias is None else y + bias
