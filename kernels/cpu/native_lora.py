"""lora_linear of the native CPU engine.

Many rows of bfloat16 on a machine with AMX are one call in C, amx_many.c, base product and low rank together; where the base is the
vendor's (native_many.takes_product) it adds the low rank. Few rows are one call too where W is packed: lookup_linear.c sums the low
rank with the base, or multi_lora.c adds it; their gradients are low_rank.c's. Else torch's thin products.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from . import native, native_linear, native_low_rank, native_many, pytorch_lora
from .native_low_rank import LowRank
from .native_many import Layer

_P, _L = ctypes.c_void_p, ctypes.c_int64
# Backward, up to so many rows the low rank's gradients are sums of vectors; beyond, AMX pays for packing A and B.
_FEW_ROWS = 16


_library = native._library
_library.lora_dropout.argtypes = [_P, ctypes.c_int, _L, ctypes.c_double, _L, _P, _L]
_library.lora_dropout.restype = None


def _dropped(x: Tensor, p: float, seed: int) -> Tensor:
    """As pytorch_lora's, with the same bits."""
    if p == 0.0 or x.dtype not in native._DTYPES:
        return pytorch_lora.dropout(x, p, seed)
    x = x.contiguous()
    out, n = torch.empty_like(x), x.numel()
    _library.lora_dropout(x.data_ptr(), native._DTYPES[x.dtype], n, p, seed, out.data_ptr(), native._threads(16 * n))
    return out


def _forward(x: Tensor, bases: list[tuple], As, Bs, scalings, biases, dropout: float, seed: int, Ns) -> list[Tensor]:
    x, K = x.contiguous(), x.shape[1]
    layers = [Layer(*layer) for layer in zip(bases, biases, As, Bs, scalings, strict=True)]
    with_base = native_many.takes_product(x, Ns, K, False)
    if with_base:
        ys = [x.new_empty(x.shape[0], N) for N in Ns]
    else:
        product = pytorch_lora.base_product
        ys = [product(native_linear, x, base, bias, N, K) for base, bias, N in zip(bases, biases, Ns, strict=True)]
    native_many.forward(x, _dropped(x, dropout, seed), layers, ys, with_base)
    return ys


def _few(x: Tensor) -> bool:
    return x.shape[0] <= _FEW_ROWS and x.dtype in native._DTYPES


def _rounded(gradients: Sequence[Tensor | None], factors: Sequence[Tensor]) -> list[Tensor]:
    """The gradients in their factors' dtypes; empty (0,) for None."""
    return [t.new_empty(0) if grad is None else grad.to(t.dtype) for t, grad in zip(factors, gradients, strict=True)]


def _backward(
    dys, x: Tensor, bases: list[tuple], As, Bs, scalings, dropout: float, seed: int, need_x: bool, need_A: bool, need_B: bool
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    x, dys = x.contiguous(), [dy.contiguous() for dy in dys]
    layers = [Layer(base, None, *rest) for base, *rest in zip(bases, As, Bs, scalings, strict=True)]
    with_base = native_many.takes_product(x, [dy.shape[1] for dy in dys], x.shape[1], True)
    dx = None
    if need_x:
        dx = torch.empty_like(x) if with_base else pytorch_lora.base_dx(native_linear, dys, bases, x.shape[1])
    dAs = [torch.empty(A.shape) if need_A else None for A in As]
    dBs = [torch.empty(B.shape) if need_B else None for B in Bs]
    V = x.new_empty(x.shape[0], sum(len(A) for A in As)) if need_x and dropout else None
    native_many.backward(dys, _dropped(x, dropout, seed), layers, dx, V, dAs, dBs, with_base)
    if dx is None:
        dx = x.new_empty(0)
    elif V is not None:
        dx += _dropped(V @ torch.cat([A.to(x.dtype) for A in As]), dropout, seed)
    return dx, _rounded(dAs, As), _rounded(dBs, Bs)


def _few_rows_backward(
    dys, x: Tensor, bases: list[tuple], As, Bs, scalings, dropout: float, seed: int, need_x: bool, need_A: bool, need_B: bool
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    x, dys = x.contiguous(), [dy.contiguous() for dy in dys]
    dropped = _dropped(x, dropout, seed)
    dx = pytorch_lora.base_dx(native_linear, dys, bases, x.shape[1]) if need_x else x.new_empty(0)
    through = torch.zeros_like(x) if dropout else dx
    dAs = [torch.empty(A.shape) if need_A else None for A in As]
    dBs = [torch.empty(B.shape) if need_B else None for B in Bs]
    for dy, A, B, scaling, dA, dB in zip(dys, As, Bs, scalings, dAs, dBs, strict=True):
        native_low_rank.backward(LowRank(dropped, A, B, scaling), dy, through if need_x else None, dA, dB)
    if need_x and dropout:
        dx += _dropped(through, dropout, seed)
    return dx, _rounded(dAs, As), _rounded(dBs, Bs)


def lora_linear(
    x, weight, absmax, nested_absmax, nested_offset, nested_block_size, lora_A, lora_B, scaling, bias, dropout, seed, N, K,
    block_size, quant_type,
) -> Tensor:  # fmt: skip
    """x (M, K), W (N, K) dense or packed ("none": dense), lora_A (r, K), lora_B (N, r), bias (N,) or None: (M, N)."""
    base = (weight, absmax, nested_absmax, nested_offset, nested_block_size, block_size, quant_type)
    if not native_many.takes(x):
        if x.shape[0] > native_low_rank.MAX_ROWS or x.dtype not in native._DTYPES:
            return pytorch_lora.lora_linear_on(native_linear, x, base, lora_A, lora_B, scaling, bias, dropout, seed, N, K)
        low = LowRank(_dropped(x, dropout, seed), lora_A, lora_B, scaling)
        if quant_type != "none":
            return native_linear.linear_4bit(x, *base[:5], bias, N, K, block_size, quant_type, low)
        y = native_linear.dense_linear(x, weight, bias)
        native_low_rank.add(y, low)
        return y
    return _forward(x, [base], [lora_A], [lora_B], [scaling], [bias], dropout, seed, [N])[0]


def lora_linear_backward(
    dy, x, weight, absmax, nested_absmax, nested_offset, nested_block_size, lora_A, lora_B, scaling, dropout, seed, N, K,
    block_size, quant_type, need_x, need_A, need_B,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(dX (M, K), dA (r, K), dB (N, r)) of dy (M, N); empty (0,) where not needed. dA, dB in their factors' dtypes."""
    base = (weight, absmax, nested_absmax, nested_offset, nested_block_size, block_size, quant_type)
    needs = (need_x, need_A, need_B)
    backward = _few_rows_backward if _few(x) else _backward if native_many.takes(x, backward=True) else None
    if backward is None:
        plain = pytorch_lora.lora_linear_backward_on
        return plain(native_linear, dy, x, base, lora_A, lora_B, scaling, dropout, seed, N, K, *needs)
    dx, (dA,), (dB,) = backward([dy], x, [base], [lora_A], [lora_B], [scaling], dropout, seed, *needs)
    return dx, dA, dB


def lora_linear_group(x, bases, lora_As, lora_Bs, scalings, biases, dropout, seed, Ns, K) -> list[Tensor]:
    """[lora_linear(x, ...)] of layers that share x and the dropout: lists of what each takes, `bases` of the weight's tensors,
    nested_block_size, block_size and quant_type."""
    if not native_many.takes(x) or len(bases) > native_many.MAX_LAYERS:
        layers = zip(bases, lora_As, lora_Bs, scalings, biases, Ns, strict=True)
        each = [(*b[:5], A, B, s, bias, dropout, seed, N, K, *b[5:]) for b, A, B, s, bias, N in layers]
        return [lora_linear(x, *layer) for layer in each]
    return _forward(x, bases, lora_As, lora_Bs, scalings, biases, dropout, seed, Ns)


def lora_linear_group_backward(
    dys, x, bases, lora_As, lora_Bs, scalings, dropout, seed, Ns, K, need_x, need_A, need_B
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """(dX (M, K), [dA], [dB]) of [dy (M, N)]; empty (0,) where not needed."""
    needs = (need_x, need_A, need_B)
    if _few(x):
        return _few_rows_backward(dys, x, bases, lora_As, lora_Bs, scalings, dropout, seed, *needs)
    if not native_many.takes(x, backward=True) or len(bases) > native_many.MAX_LAYERS:
        group = pytorch_lora.lora_linear_group_backward_on
        return group(native_linear, dys, x, bases, lora_As, lora_Bs, scalings, dropout, seed, Ns, K, *needs)
    return _backward(dys, x, bases, lora_As, lora_Bs, scalings, dropout, seed, *needs)
