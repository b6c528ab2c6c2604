"""A weight in 4 bits: what the kernels need to know about it, in one value."""
from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from . import nf4
from .double_quant import DoubleQuantized, double_quantize

QUANTIZE = {"nf4": nf4.quantize_nf4, "fp4": nf4.quantize_fp4}


@dataclass(frozen=True, eq=False)
class QuantizedWeight:
    """packed uint8 (ceil(n/2),); absmax float32 (ceil(n/block_size),) or its double quantization; shape and dtype of the
    original; quant_type "nf4" or "fp4"."""

    packed: Tensor
    absmax: Tensor | DoubleQuantized
    shape: tuple[int, ...]
    dtype: torch.dtype
    block_size: int = 64
    quant_type: str = "nf4"

    def tensors(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, int]:
        """(packed, absmax or its codes, nested_absmax, nested_offset, nested_block_size), as the ops take them."""
        if isinstance(self.absmax, DoubleQuantized):
            return (self.packed, *self.absmax)
        return self.packed, self.absmax, None, None, 256

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight in `dtype` (the original's unless given)."""
        return torch.ops.posttrain.dequantize_4bit(
            *self.tensors(), self.shape, dtype or self.dtype, self.block_size, self.quant_type
        )


def quantize_weight(w: Tensor, quant_type: str = "nf4", block_size: int = 64, double_quant: bool = True) -> QuantizedWeight:
    """Quantize a weight of any shape to 4 bits, its absmax to 8 when `double_quant`."""
    if quant_type not in QUANTIZE:
        raise ValueError(f"quant_type is {quant_type!r}; expected one of {', '.join(QUANTIZE)}")
    packed, absmax = QUANTIZE[quant_type](w, block_size)
    return QuantizedWeight(
        packed, double_quantize(absmax) if double_quant else absmax, tuple(w.shape), w.dtype, block_size, quant_type
    )
