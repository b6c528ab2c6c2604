"""Blockwise 4-bit quantization: NF4 and FP4 (QLoRA, Dettmers et al. 2023, arXiv:2305.14314, section 3).

    absmax_b = max_{i in block b} |x_i|                 code_i = argmin_j |x_i / absmax_b - value_j|
    x~_i = value[code_i] * absmax_b

x          float32 | float16 | bfloat16, any shape  values; blocks run over the flattened tensor
packed     uint8 (ceil(n / 2),)                     two codes a byte, the first element in the high nibble
absmax     float32 (ceil(n / block_size),)          or uint8 codes of it (double quantization)

Defined on purpose: a block of zeros keeps absmax 0 and comes back +0; a NaN makes its block's absmax NaN and the whole
block comes back NaN; an infinity makes absmax infinite, comes back itself, and the block's finite values come back NaN;
blocks whose absmax is below 1e-38 are scaled as if it were 1e-38, as bitsandbytes does.

Oracle: reference/nf4.py.
"""
from __future__ import annotations

import math

import torch
from torch import Tensor

from . import cpu
from ._library import define

BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def _quantize_fake(x, block_size, quant_type):
    n = x.numel()
    return x.new_empty((n + 1) // 2, dtype=torch.uint8), x.new_empty(-(-n // block_size), dtype=torch.float32)


def _dequantize_fake(
    packed, absmax, nested_absmax, nested_offset, nested_block_size, shape, dtype, block_size, quant_type
):
    return packed.new_empty(shape, dtype=dtype)


define(
    "quantize_4bit(Tensor x, int block_size, str quant_type) -> (Tensor, Tensor)",
    _quantize_fake,
    CPU=cpu.quantize_4bit,
)
define(
    "dequantize_4bit(Tensor packed, Tensor absmax, Tensor? nested_absmax, Tensor? nested_offset, int nested_block_size, "
    "SymInt[] shape, ScalarType dtype, int block_size, str quant_type) -> Tensor",
    _dequantize_fake,
    CPU=cpu.dequantize_4bit,
)


def _check_block_size(block_size: int) -> None:
    if block_size not in BLOCK_SIZES:
        raise ValueError(f"block_size is {block_size!r}; it must be a power of two from 32 to 4096 (64 is the usual one)")


def _quantize(x: Tensor, block_size: int, quant_type: str) -> tuple[Tensor, Tensor]:
    _check_block_size(block_size)
    if x.dtype not in DTYPES:
        raise TypeError(f"x is {x.dtype}; expected float32, float16 or bfloat16: convert it first")
    return torch.ops.posttrain.quantize_4bit(x, block_size, quant_type)


def _dequantize(packed: Tensor, absmax: Tensor, shape, dtype, block_size: int, quant_type: str) -> Tensor:
    _check_block_size(block_size)
    n = math.prod(shape)
    if dtype not in DTYPES:
        raise TypeError(f"dtype is {dtype}; expected float32, float16 or bfloat16")
    if packed.dtype != torch.uint8 or absmax.dtype != torch.float32:
        raise TypeError(f"packed is {packed.dtype} and absmax {absmax.dtype}; expected uint8 and float32")
    if packed.numel() != (n + 1) // 2 or absmax.numel() != -(-n // block_size):
        raise ValueError(
            f"shape {tuple(shape)} at block_size {block_size} needs {(n + 1) // 2} packed bytes and "
            f"{-(-n // block_size)} absmax; given {packed.numel()} and {absmax.numel()}"
        )
    return torch.ops.posttrain.dequantize_4bit(
        packed.reshape(-1), absmax.reshape(-1), None, None, 256, shape, dtype, block_size, quant_type
    )


def quantize_nf4(x: Tensor, block_size: int = 64) -> tuple[Tensor, Tensor]:
    """Quantize to NF4. Returns (packed uint8 (ceil(n/2),), absmax float32 (ceil(n/block_size),))."""
    return _quantize(x, block_size, "nf4")


def quantize_fp4(x: Tensor, block_size: int = 64) -> tuple[Tensor, Tensor]:
    """Quantize to FP4. Returns (packed uint8 (ceil(n/2),), absmax float32 (ceil(n/block_size),))."""
    return _quantize(x, block_size, "fp4")


def dequantize_nf4(packed: Tensor, absmax: Tensor, shape, dtype: torch.dtype, block_size: int = 64) -> Tensor:
    """The inverse of `quantize_nf4`: value[code] * absmax, rounded once to `dtype`, in `shape`."""
    return _dequantize(packed, absmax, shape, dtype, block_size, "nf4")


def dequantize_fp4(packed: Tensor, absmax: Tensor, shape, dtype: torch.dtype, block_size: int = 64) -> Tensor:
    """The inverse of `quantize_fp4`: value[code] * absmax, rounded once to `dtype`, in `shape`."""
    return _dequantize(packed, absmax, shape, dtype, block_size, "fp4")
