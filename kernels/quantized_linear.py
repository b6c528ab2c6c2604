"""y = x W^T + bias with W in 4 bits, and dX = dY W.

Oracle: reference/quantized_linear.py.
"""
from __future__ import annotations

import torch
from torch import Tensor

from . import cpu
from ._library import LIBRARY, define
from .quantized_weight import QuantizedWeight

_WEIGHT = "Tensor packed, Tensor absmax, Tensor? nested_absmax, Tensor? nested_offset, int nested_block_size"


def _linear_cpu(x, packed, absmax, nested, offset, nested_block_size, bias, N, K, block_size, quant_type):
    y = cpu.linear_4bit(
        x.reshape(-1, K), packed, absmax, nested, offset, nested_block_size, bias, N, K, block_size, quant_type
    )
    return y.view(*x.shape[:-1], N)


def _linear_dx_cpu(dy, packed, absmax, nested, offset, nested_block_size, N, K, block_size, quant_type):
    dx = cpu.linear_4bit_dx(
        dy.reshape(-1, N), packed, absmax, nested, offset, nested_block_size, N, K, block_size, quant_type
    )
    return dx.view(*dy.shape[:-1], K)


define(
    f"quantized_linear(Tensor x, {_WEIGHT}, Tensor? bias, SymInt N, SymInt K, int block_size, str quant_type) -> Tensor",
    lambda x, *rest: x.new_empty(*x.shape[:-1], rest[6]),
    CPU=_linear_cpu,
)
define(
    f"quantized_linear_dx(Tensor dy, {_WEIGHT}, SymInt N, SymInt K, int block_size, str quant_type) -> Tensor",
    lambda dy, *rest: dy.new_empty(*dy.shape[:-1], rest[6]),
    CPU=_linear_dx_cpu,
)


def _setup_context(ctx, inputs, output):
    _, packed, absmax, nested, offset, nested_block_size, bias, N, K, block_size, quant_type = inputs
    ctx.save_for_backward(packed, absmax, nested, offset)
    ctx.rest = nested_block_size, N, K, block_size, quant_type
    ctx.has_bias = bias is not None


def _backward(ctx, dy):
    # dX = dY W                dbias = sum over rows of dY
    packed, absmax, nested, offset = ctx.saved_tensors
    dx = torch.ops.posttrain.quantized_linear_dx(dy, packed, absmax, nested, offset, *ctx.rest) if ctx.needs_input_grad[0] else None
    dbias = dy.flatten(0, -2).sum(0) if ctx.has_bias and ctx.needs_input_grad[6] else None
    return dx, None, None, None, None, None, dbias, None, None, None, None


torch.library.register_autograd("posttrain::quantized_linear", _backward, setup_context=_setup_context, lib=LIBRARY)


def quantized_linear(x: Tensor, w: QuantizedWeight, bias: Tensor | None = None) -> Tensor:
    """x (..., K) times W (N, K) transposed, plus bias (N,): (..., N) in x's dtype. Differentiable in x and bias."""
    N, K = w.shape
    if x.shape[-1] != K:
        raise ValueError(f"x has {x.shape[-1]} features and the weight {N} x {K} takes {K}")
    return torch.ops.posttrain.quantized_linear(x, *w.tensors(), bias, N, K, w.block_size, w.quant_type)
