"""y = x W^T + bias with W in 4 bits, and its gradients (QLoRA, Dettmers et al. 2023, arXiv:2305.14314, eq. 5).

    y[m, n] = sum_k w[n, k] x[m, k] + bias[n]          w[n, k] = value[code[n, k]] * absmax[(n K + k) // block_size]
    dx[m, k] = sum_n dy[m, n] w[n, k]                  dbias[n] = sum_m dy[m, n]               (W itself takes no gradient)

x          float32 | float16 | bfloat16 (..., K)   any strides; M rows in all
packed     uint8 (ceil(N K / 2),)                  two codes a byte, the first element in the high nibble
absmax     float32 (ceil(N K / block_size),)       or uint8 codes of it (double quantization); blocks may straddle rows
bias       x's dtype (N,) or None
y          x's dtype (..., N)                      sums in float32

On a GPU `quantized_linear_plan.plan` chooses among three ways: the decode kernel (few rows), the tensor-core GEMM, and
dequantizing W once, then the vendor's GEMM. dX always takes the third: it is wanted in training, where rows are many. On a
CPU, `cpu.linear_4bit`. Least bytes are stated in the kernels' files.
Oracle: reference/quantized_linear.py.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from . import cpu
from ._library import define, differentiable
from ._rows import flattened, unflattened
from .nf4 import DTYPES, dequantize_4bit_triton
from .quantized_linear_decode import quantized_linear_decode_triton
from .quantized_linear_gemm import quantized_linear_gemm_triton
from .quantized_linear_plan import current_target, plan
from .quantized_weight import QuantizedWeight

_WEIGHT = "Tensor packed, Tensor absmax, Tensor? nested_absmax, Tensor? nested_offset, int nested_block_size"
_LAUNCHERS = {"decode": quantized_linear_decode_triton, "gemm": quantized_linear_gemm_triton}


def _dequantized(dtype, packed, absmax, nested, offset, nested_block_size, N, K, block_size, quant_type) -> Tensor:
    """W (N, K) in `dtype`. Of PyTorch's allocator, which gives one layer's memory to the next as soon as it is dropped, and knows
    of streams, threads and the pools of CUDA graphs; a buffer of our own would be written by two threads at once."""
    return dequantize_4bit_triton(packed, absmax, nested, offset, nested_block_size, (N, K), dtype, block_size, quant_type)


def _linear_cpu(x, packed, absmax, nested, offset, nested_block_size, bias, N, K, block_size, quant_type):
    rows = flattened(x)
    y = cpu.linear_4bit(rows, packed, absmax, nested, offset, nested_block_size, bias, N, K, block_size, quant_type)
    return unflattened(y, x)


def _linear_dx_cpu(dy, packed, absmax, nested, offset, nested_block_size, N, K, block_size, quant_type):
    rows = flattened(dy)
    dx = cpu.linear_4bit_dx(rows, packed, absmax, nested, offset, nested_block_size, N, K, block_size, quant_type)
    return dx.view(*dy.shape[:-1], K)


def _linear_cuda(x, packed, absmax, nested, offset, nested_block_size, bias, N, K, block_size, quant_type):
    rows = flattened(x)
    if rows.numel() == 0 or N == 0:  # nothing to sum
        y = x.new_zeros(rows.shape[0], N)
        return unflattened(y if bias is None else y + bias, x)
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    chosen = plan(rows.shape[0], N, K, x.dtype, current_target())
    if chosen.kernel == "dequantize" or packed.data_ptr() % 16:  # kernels read packed in pieces of 16 bytes
        weight = _dequantized(x.dtype, packed, absmax, nested, offset, nested_block_size, N, K, block_size, quant_type)
        y = F.linear(rows, weight, bias)
    else:
        y = _LAUNCHERS[chosen.kernel](
            rows, packed, absmax, nested, offset, nested_block_size, bias, N, K, block_size, quant_type, chosen.split_k
        )
    return unflattened(y, x)


def _linear_dx_cuda(dy, packed, absmax, nested, offset, nested_block_size, N, K, block_size, quant_type):
    rows = flattened(dy)
    if rows.numel() == 0 or K == 0:
        return dy.new_zeros(*dy.shape[:-1], K)
    weight = _dequantized(dy.dtype, packed, absmax, nested, offset, nested_block_size, N, K, block_size, quant_type)
    return (rows @ weight).view(*dy.shape[:-1], K)


define(
    f"quantized_linear(Tensor x, {_WEIGHT}, Tensor? bias, SymInt N, SymInt K, int block_size, str quant_type) -> Tensor",
    lambda x, *rest: x.new_empty(*x.shape[:-1], rest[6]),
    CPU=_linear_cpu,
    CUDA=_linear_cuda,
)
define(
    f"quantized_linear_dx(Tensor dy, {_WEIGHT}, SymInt N, SymInt K, int block_size, str quant_type) -> Tensor",
    lambda dy, *rest: dy.new_empty(*dy.shape[:-1], rest[6]),
    CPU=_linear_dx_cpu,
    CUDA=_linear_dx_cuda,
)


def _setup_context(ctx, inputs, output):
    _, packed, absmax, nested, offset, nested_block_size, bias, N, K, block_size, quant_type = inputs
    ctx.save_for_backward(packed, absmax, nested, offset)
    ctx.rest = nested_block_size, N, K, block_size, quant_type
    ctx.has_bias = bias is not None


def _backward(ctx, dy):
    # dx = dy W                dbias = sum over rows of dy
    packed, absmax, nested, offset = ctx.saved_tensors
    N = ctx.rest[1]
    dx = dbias = None
    if ctx.needs[0]:
        dx = _call_dx(dy, packed, absmax, nested, offset, *ctx.rest)
    if ctx.has_bias and ctx.needs[6]:
        dbias = dy.reshape(-1, N).sum(0)
    return dx, None, None, None, None, None, dbias, None, None, None, None


def _setup_context_dx(ctx, inputs, output):
    _, packed, absmax, nested, offset, *rest = inputs
    ctx.save_for_backward(packed, absmax, nested, offset)
    ctx.rest = rest


def _backward_dx(ctx, ddx):
    # dx = dy W is linear in dy: ddy = ddx W^T, so gradients of gradients are the forward again
    packed, absmax, nested, offset = ctx.saved_tensors
    nested_block_size, *rest = ctx.rest
    ddy = _call(ddx, packed, absmax, nested, offset, nested_block_size, None, *rest)
    return ddy, None, None, None, None, None, None, None, None, None


_call = differentiable("quantized_linear", _backward, _setup_context)
_call_dx = differentiable("quantized_linear_dx", _backward_dx, _setup_context_dx)


def quantized_linear(x: Tensor, w: QuantizedWeight, bias: Tensor | None = None) -> Tensor:
    """x (..., K) times W (N, K) transposed, plus bias (N,): (..., N) in x's dtype. Differentiable in x and bias.

    x: float32, float16 or bfloat16, any leading dimensions and strides; W is decoded to x's dtype whatever its own was (for a
    few rows it is not rounded at all).
    Raises TypeError for a weight that is no QuantizedWeight or for dtypes that do not fit, ValueError for shapes or devices
    that do not.
    """
    if not isinstance(w, QuantizedWeight):
        raise TypeError(f"w is a {type(w).__name__}; expected a QuantizedWeight: make one with quantize_weight(w)")
    if len(w.shape) != 2:
        raise ValueError(f"the weight has shape {tuple(w.shape)}; a linear layer's is (out, in)")
    N, K = w.shape
    if x.dim() == 0 or x.shape[-1] != K:
        raise ValueError(f"x has shape {tuple(x.shape)} and the weight {N} x {K} takes {K} features in the last dimension")
    if x.dtype not in DTYPES:
        raise TypeError(f"x is {x.dtype}; expected float32, float16 or bfloat16")
    if x.device != w.packed.device:
        raise ValueError(f"x is on {x.device} and the weight on {w.packed.device}; move one to the other")
    if bias is not None and (bias.shape != (N,) or bias.dtype != x.dtype or bias.device != x.device):
        raise ValueError(
            f"bias is {bias.dtype} {tuple(bias.shape)} on {bias.device}; expected {x.dtype} ({N},) on {x.device}, as x's"
        )
    return _call(x, *w.tensors(), bias, N, K, w.block_size, w.quant_type)
