"""lora_linear on a GPU: which kernels run, in what order, over which buffers. One layer is a group of one.

    forward    s = x' A^T for the whole group, one reading of x; then for each layer one of
               - the 4-bit decode kernel or GEMM with scaling s B^T among its sums (few rows: no dequantized W, no pass over y)
               - y = scaling s B^T + bias, then the vendor's GEMM adds x W^T to it, W dense or dequantized
    backward   s again; V and dB in one pass over dY; dX = drop'(V A) of the whole group, to which the vendor's GEMM adds each
               layer's dY W; dA = V^T x' of the whole group, one reading of x

Which way forward is `quantized_linear_plan.plan`'s choice, given the rank. A dense W takes the vendor's GEMM at any number of
rows: for few it moves 2 N K bytes, the small kernels beside it 2 r (N + K) + 4 M N: 1 % at r = 16, M = 1 and 4096 x 4096.
Nothing is kept between the two, and no buffer outlives a call.
Oracle: reference/lora_linear.py.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _low_rank, quantized_linear_decode, quantized_linear_gemm
from ._low_rank import LowRank
from ._split_k import add_parts_triton
from ._triton import current_arch
from ._variant import Variant
from .lora_linear_down import lora_linear_down_triton
from .lora_linear_grad import lora_linear_grad_triton, one_pass
from .lora_linear_plan import down_parts, grad_parts
from .lora_linear_up import lora_linear_up_triton
from .quantized_linear import _LAUNCHERS, _dequantized
from .quantized_linear_plan import current_target, plan


class Layer(NamedTuple):
    """base: (weight, absmax, nested_absmax, nested_offset, nested_block_size, N, K, block_size, quant_type)."""

    base: tuple[Any, ...]
    lora_A: Tensor
    lora_B: Tensor
    scaling: float

    def weight(self, dtype: torch.dtype) -> Tensor:
        """W (N, K): itself, or dequantized."""
        return self.base[0] if self.base[-1] == "none" else _dequantized(dtype, *self.base)


def _rows(z: Tensor) -> Tensor:
    return z if z.stride(1) == 1 or z.shape[1] == 1 else z.contiguous()


def _stack(tensors: Sequence[Tensor], dim: int) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors), dim)


def _down(x: Tensor, a: Tensor, scaling: float = 1.0, dropout: float = 0.0, seed: int = 0) -> Tensor:
    """scaling drop(x) a^T, (M, R) or its parts."""
    parts = down_parts(x.shape[0], a.shape[0], x.shape[1], x.element_size(), dropout > 0, current_target())
    return lora_linear_down_triton(x, a, scaling, dropout, seed, parts)


def _whole(s: Tensor, dtype: torch.dtype) -> Tensor:
    if s.dim() == 2:
        return s
    whole = s.new_empty(s.shape[1:], dtype=dtype)
    add_parts_triton(s, None, whole)
    return whole


def _grad(z: Tensor, s: Tensor, b: Tensor | None, scaling: float, dropout: float, seed: int, transposed: bool, dtype: torch.dtype):
    parts = grad_parts(
        *z.shape, s.shape[1], z.element_size(), dropout > 0, b is not None, *current_arch(), current_target()
    )  # fmt: skip
    return lora_linear_grad_triton(z, s, b, scaling, dropout, seed, parts, transposed, dtype)


def forward(x: Tensor, layers: Sequence[Layer], biases: Sequence[Tensor | None], dropout: float, seed: int) -> list[Tensor]:
    """y (M, N) of each layer for x (M, K)."""
    M = x.shape[0]
    if x.numel() == 0:  # nothing to sum
        ys = [x.new_zeros(M, layer.lora_B.shape[0]) for layer in layers]
        return [y if bias is None else y + bias for y, bias in zip(ys, biases, strict=True)]
    x = _rows(x)
    s = _down(x, _stack([layer.lora_A for layer in layers], 0), 1.0, dropout, seed)
    whole, ys, begin = None, [], 0
    for layer, bias in zip(layers, biases, strict=True):
        weight, absmax, *nested, N, K, block_size, quant_type = layer.base
        columns = slice(begin, begin + layer.lora_B.shape[1])
        begin = columns.stop
        if N == 0:
            ys.append(x.new_empty(M, 0))
            continue
        chosen = None if quant_type == "none" else plan(M, N, K, x.dtype, current_target(), layer.lora_B.shape[1])
        if chosen is None or chosen.kernel == "dequantize" or weight.data_ptr() % 16:  # packed is read in pieces of 16 bytes
            whole = _whole(s, x.dtype) if whole is None else whole
            y = lora_linear_up_triton(whole[:, columns], layer.lora_B, layer.scaling, bias)
            y.addmm_(x, layer.weight(x.dtype).t())
        else:
            term = LowRank(s[..., columns], layer.lora_B.contiguous(), layer.scaling)
            base = (weight, absmax, *nested, bias, N, K, block_size, quant_type, chosen.split_k, term)
            y = _LAUNCHERS[chosen.kernel](x, *base)
        ys.append(y)
    return ys


def backward(
    dys: Sequence[Tensor], x: Tensor, layers: Sequence[Layer], dropout: float, seed: int, need_x: bool, need_A: bool, need_B: bool
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """(dX (M, K), [dA (r, K)], [dB (N, r)]) for dY (M, N) of each layer; empty (0,) where not needed."""
    As, Bs = [layer.lora_A for layer in layers], [layer.lora_B for layer in layers]
    dAs, dBs, dx = [A.new_empty(0) for A in As], [B.new_empty(0) for B in Bs], x.new_empty(0)
    if x.numel() == 0 or sum(dy.shape[1] for dy in dys) == 0:
        zeros = [[t.new_zeros(t.shape) for t in tensors] for tensors in ([x], As, Bs)]
        return zeros[0][0] if need_x else dx, zeros[1] if need_A else dAs, zeros[2] if need_B else dBs
    x, dys, A = _rows(x), [_rows(dy) for dy in dys], _stack(As, 0)
    if need_B:
        each = _whole(_down(x, A, 1.0, dropout, seed), x.dtype).split([B.shape[1] for B in Bs], 1)
    Vs = []
    for i, (dy, B) in enumerate(zip(dys, Bs, strict=True)):
        scaling, V = layers[i].scaling, None
        if B.shape[0] == 0:
            Vs.append(x.new_zeros(x.shape[0], B.shape[1]))
            dBs[i] = B.new_zeros(B.shape if need_B else 0)
            continue
        if need_B:
            b = B.contiguous() if (need_x or need_A) and one_pass(B.shape[1], x.dtype) else None
            dBs[i], V = _grad(dy, each[i], b, scaling, 0.0, 0, False, B.dtype)
        if need_x or need_A:
            Vs.append(_whole(_down(dy, B.t(), scaling), x.dtype) if V is None else V)
    if need_x:
        dx = lora_linear_up_triton(_stack(Vs, 1), A.t(), 1.0, None, dropout, seed)
        for layer, dy in zip(layers, dys, strict=True):  # an empty one adds nothing
            dx.addmm_(dy, layer.weight(x.dtype))
    if need_A:
        dA, _ = _grad(x, _stack(Vs, 1), None, 1.0, dropout, seed, True, A.dtype)
        rows = dA.split([a.shape[0] for a in As])
        dAs = [dA] if len(As) == 1 else [part.to(a.dtype, copy=True) for part, a in zip(rows, As, strict=True)]
    return dx, dAs, dBs


def aot_variants() -> Iterator[Variant]:
    """The 4-bit kernels as they are launched with a term: of a rank in one dot and in several, s whole and in parts, B in fp32 and
    in x's dtype, on every tile. The other settings, which the term does not touch, are those of one launch."""
    without = set(_low_rank.NONE)
    for variant in itertools.chain(quantized_linear_decode.aot_variants(), quantized_linear_gemm.aot_variants()):
        x, whole = variant.signature["x_ptr"], variant.signature["y_ptr"] == variant.signature["x_ptr"]
        if variant.constexprs["NESTED_BLOCK"] == 0 or not variant.constexprs.get("EVEN_K", True) or not whole:
            continue
        if variant.constexprs["HAS_BIAS"] or x == "*fp16":
            continue
        for rank, parts, B in ((16, 8, "*fp32"), (64, 1, x)):
            signature = {name: kind for name, kind in variant.signature.items() if name not in without}
            signature |= {"s_ptr": "*fp32" if parts > 1 else x, "lora_B_ptr": B, "scaling": "fp32"}
            signature |= dict.fromkeys(("stride_sp", "stride_sm"), "i32:16" if rank % 16 == 0 else "i32")
            constexprs = {name: value for name, value in variant.constexprs.items() if name not in without}
            constexprs |= {"RANK": rank, "S_PARTS": parts}
            name = variant.name.replace("quantized_linear", "lora_linear") + f"_r{rank}_{parts}"
            signature |= dict.fromkeys(("RANK", "S_PARTS"), "constexpr")
            unaligned = variant.unaligned if variant.unaligned_options not in ({}, variant.options) else ()
            yield replace(variant, name=name, signature=signature, constexprs=constexprs, unaligned=unaligned)
