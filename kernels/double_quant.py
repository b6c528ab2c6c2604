"""Double quantization: absmax itself in 8 bits (QLoRA, Dettmers et al. 2023, arXiv:2305.14314, section 3, eq. 5-6).

    offset = mean(absmax)     absmax~_i = dynamic_map[code_i] * nested_absmax[i // block_size] + offset

Oracle: reference/double_quant.py.
"""
from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import cpu
from ._library import define


class DoubleQuantized(NamedTuple):
    """codes uint8 (n,), absmax float32 (ceil(n/block_size),) of the centred values, offset float32 (), block_size."""

    codes: Tensor
    absmax: Tensor
    offset: Tensor
    block_size: int = 256


def _quantize_fake(absmax, block_size):
    n = absmax.numel()
    return absmax.new_empty(n, dtype=torch.uint8), absmax.new_empty(-(-n // block_size)), absmax.new_empty(())


define(
    "double_quantize(Tensor absmax, int block_size) -> (Tensor, Tensor, Tensor)", _quantize_fake, CPU=cpu.double_quantize
)
define(
    "double_dequantize(Tensor codes, Tensor absmax, Tensor offset, int block_size) -> Tensor",
    lambda codes, absmax, offset, block_size: torch.empty_like(codes, dtype=torch.float32),
    CPU=cpu.double_dequantize,
)


def double_quantize(absmax: Tensor, block_size: int = 256) -> DoubleQuantized:
    """Quantize absmax to 8 bits around its mean; no reconstruction is negative."""
    if absmax.dtype != torch.float32:
        raise TypeError(f"absmax is {absmax.dtype}; expected float32, as quantize_nf4 returns it")
    if not torch.isfinite(absmax).all():
        raise ValueError("absmax holds NaN or infinity, which 8 bits cannot carry; use double_quant=False, or mend the weight")
    return DoubleQuantized(*torch.ops.posttrain.double_quantize(absmax, block_size), block_size)


def double_dequantize(dq: DoubleQuantized) -> Tensor:
    """absmax float32 (n,)."""
    return torch.ops.posttrain.double_dequantize(dq.codes, dq.absmax, dq.offset, dq.block_size)
