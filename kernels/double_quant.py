"""Double quantization: absmax itself in 8 bits (QLoRA, Dettmers et al. 2023, arXiv:2305.14314, section 3, eq. 6).

    offset = mean(absmax)                         nested_b = max_{i in block b} |absmax_i - offset|
    code_i = argmin_j |(absmax_i - offset) / nested_b - map_j|, raised until absmax~_i is not negative
    absmax~_i = map[code_i] * nested_b + offset

absmax     float32 (n,)                             finite and not negative, as quantize_nf4 returns it
codes      uint8 (n,)                               ranks in the dynamic 8-bit map (256 ascending values)
nested     float32 (ceil(n / block_size),)          `DoubleQuantized.absmax`
offset     float32 ()                               torch.mean(absmax): summed in PyTorch's order, fixed per device

Rounding, all in float32: the centred absmax is multiplied by 1 / max(nested, 1e-38); ties take the lower code; a
reconstruction is rounded after the product and after the sum. Where absmax is heavy-tailed the nearest code can bring
a small absmax back negative, which would flip the signs of a whole block of weights: such a code is raised to the
smallest one that does not. The format is bitsandbytes', which loads the result.

Least bytes: 8 n to find the mean and quantize, n + 4 n / block_size written; dequantize reads those and writes 4 n.
Oracle: reference/double_quant.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from . import codebooks, cpu
from ._library import define
from ._lookup import decode_absmax
from ._triton import tl, triton
from ._variant import Variant

_DEQUANTIZE_TILE = 1024


class DoubleQuantized(NamedTuple):
    """codes uint8 (n,), absmax float32 (ceil(n/block_size),) of the centred values, offset float32 (), block_size."""

    codes: Tensor
    absmax: Tensor
    offset: Tensor
    block_size: int = 256


@triton.jit
def _double_quantize_kernel(
    absmax_ptr, dynamic_map_ptr, upper_ptr, offset_ptr, codes_ptr, nested_ptr, n, block_size, TILE: tl.constexpr
):
    # One program owns one nested block; TILE is the next power of two. upper_ptr: the 255 thresholds and infinity.
    first = tl.program_id(0).to(tl.int64) * block_size
    column = tl.arange(0, TILE)
    mask = (column < block_size) & (first + column < n)
    offset = tl.load(offset_ptr)
    centred = tl.where(mask, tl.load(absmax_ptr + first + column, mask=mask, other=0.0) - offset, 0.0)
    nested = tl.max(tl.abs(centred), axis=0)
    tl.store(nested_ptr + tl.program_id(0), nested)
    scaled = centred * tl.div_rn(1.0, tl.maximum(nested, tl.cast(1e-38, tl.float32)))

    # code = number of thresholds strictly below scaled, found from its highest bit down
    code = tl.zeros((TILE,), tl.int32)
    for bit in tl.static_range(7, -1, -1):
        code += tl.where(scaled > tl.load(upper_ptr + code + (1 << bit) - 1), 1 << bit, 0)

    # reconstructions ascend with the code, so the smallest that is not negative is the number of negative ones
    reconstruction = tl.load(dynamic_map_ptr + tl.arange(0, 256)) * nested + offset
    smallest = tl.sum((reconstruction < 0.0).to(tl.int32), axis=0)
    tl.store(codes_ptr + first + column, tl.maximum(code, smallest).to(tl.uint8), mask=mask)


@triton.jit
def _double_dequantize_kernel(
    codes_ptr, dynamic_map_ptr, nested_ptr, offset_ptr, out_ptr, n, NESTED_BLOCK: tl.constexpr, TILE: tl.constexpr
):
    # One program owns TILE absmax.
    offs = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    absmax = decode_absmax(codes_ptr, offs, offs < n, dynamic_map_ptr, nested_ptr, offset_ptr, NESTED_BLOCK)
    tl.store(out_ptr + offs, absmax, mask=offs < n)


def double_quantize_triton(absmax: Tensor, block_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Launch the kernel, one program a nested block, after PyTorch's own mean (deterministic: no atomics)."""
    absmax = absmax.contiguous()
    codes, nested, _ = _quantize_fake(absmax, block_size)
    n = absmax.numel()
    if n == 0:
        return codes, nested, absmax.new_zeros(())
    offset = absmax.mean()
    _double_quantize_kernel[(nested.numel(),)](
        absmax, codebooks.on("DYNAMIC_MAP", absmax.device), codebooks.on("DYNAMIC_UPPER", absmax.device), offset,
        codes, nested, n, block_size, TILE=triton.next_power_of_2(block_size), num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
    return codes, nested, offset


def double_dequantize_triton(codes: Tensor, absmax: Tensor, offset: Tensor, block_size: int) -> Tensor:
    """Launch the kernel that brings absmax back on its own (dequantize_4bit decodes it in passing)."""
    codes, absmax = codes.contiguous(), absmax.contiguous()
    out = torch.empty_like(codes, dtype=torch.float32)
    n = codes.numel()
    if n:
        _double_dequantize_kernel[(triton.cdiv(n, _DEQUANTIZE_TILE),)](
            codes, codebooks.on("DYNAMIC_MAP", codes.device), absmax, offset, out, n, NESTED_BLOCK=block_size,
            TILE=_DEQUANTIZE_TILE, num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
    return out


def _quantize_fake(absmax, block_size):
    n = absmax.numel()
    return absmax.new_empty(n, dtype=torch.uint8), absmax.new_empty(-(-n // block_size)), absmax.new_empty(())


define(
    "double_quantize(Tensor absmax, int block_size) -> (Tensor, Tensor, Tensor)",
    _quantize_fake,
    CPU=cpu.double_quantize,
    CUDA=double_quantize_triton,
)
define(
    "double_dequantize(Tensor codes, Tensor absmax, Tensor offset, int block_size) -> Tensor",
    lambda codes, absmax, offset, block_size: torch.empty_like(codes, dtype=torch.float32),
    CPU=cpu.double_dequantize,
    CUDA=double_dequantize_triton,
)


def double_quantize(absmax: Tensor, block_size: int = 256) -> DoubleQuantized:
    """Quantize absmax to 8 bits around its mean, in blocks of `block_size` (256 is what bitsandbytes reads).

    absmax: float32 of any shape, taken flat. No reconstruction is negative, however heavy the tail. Raises TypeError
    for another dtype, ValueError for NaN, infinite or negative values, a sum that overflows, or a block_size below 1.
    """
    if absmax.dtype != torch.float32:
        raise TypeError(f"absmax is {absmax.dtype}; expected float32, as quantize_nf4 returns it")
    if block_size < 1:
        raise ValueError(f"block_size is {block_size!r}; expected a positive number (256 is what bitsandbytes reads)")
    absmax = absmax.detach().reshape(-1)
    if not torch.compiler.is_compiling() and absmax.numel():
        smallest, total = absmax.amin().item(), absmax.sum().item()
        if not (smallest >= 0 and total < torch.inf):  # NaN fails both
            raise ValueError(
                f"absmax ranges from {smallest} to {absmax.amax().item()} and sums to {total} in float32; 8 bits around "
                "their mean carry finite values from 0 up. Use double_quant=False, or mend the weight"
            )
    codes, nested, offset = torch.ops.posttrain.double_quantize(absmax, block_size)
    return DoubleQuantized(codes, nested, offset, block_size)


def double_dequantize(dq: DoubleQuantized) -> Tensor:
    """absmax float32 (n,) from its codes: map[code] * nested absmax + offset, rounded twice.

    Raises TypeError for another dtype than `double_quantize` gives, ValueError where the lengths do not fit.
    """
    n = dq.codes.numel()
    if dq.codes.dtype != torch.uint8 or dq.absmax.dtype != torch.float32 or dq.offset.dtype != torch.float32:
        raise TypeError(
            f"codes are {dq.codes.dtype}, absmax {dq.absmax.dtype}, offset {dq.offset.dtype}; expected uint8, float32, float32"
        )
    if dq.absmax.numel() != -(-n // dq.block_size) or dq.offset.numel() != 1:
        raise ValueError(
            f"{n} codes in blocks of {dq.block_size} need {-(-n // dq.block_size)} absmax and one offset; "
            f"given {dq.absmax.numel()} and {dq.offset.numel()}"
        )
    return torch.ops.posttrain.double_dequantize(dq.codes, dq.absmax, dq.offset, dq.block_size)


def aot_variants() -> Iterator[Variant]:
    """The configurations that the launchers choose at the block size that is ever stored, 256."""
    tables = dict.fromkeys(("dynamic_map_ptr", "upper_ptr", "offset_ptr", "nested_ptr"), "*fp32")
    yield Variant(
        "double_quantize",
        _double_quantize_kernel,
        {"absmax_ptr": "*fp32", **tables, "codes_ptr": "*u8", "n": "i32:16", "block_size": "i32:16"},
        {"TILE": 256},
        options={"enable_fp_fusion": False},
        unaligned=("absmax_ptr", "n"),
    )
    yield Variant(
        "double_dequantize",
        _double_dequantize_kernel,
        {"codes_ptr": "*u8", **tables, "out_ptr": "*fp32", "n": "i32:16"},
        {"NESTED_BLOCK": 256, "TILE": _DEQUANTIZE_TILE},
        options={"enable_fp_fusion": False},
        unaligned=("codes_ptr", "nested_ptr", "n"),
    )
