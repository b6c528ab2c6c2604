"""The CPU engine in plain PyTorch: what runs where no C compiler built the native one. Same bytes, slower.

The rules of rounding, ties and special values are stated in `kernels/nf4.py` and `kernels/double_quant.py`.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import codebooks

_ABSMAX_FLOOR, _RECIPROCAL_FLOOR = 1e-38, 1e-42


def _codes_nf4(scaled: Tensor) -> Tensor:
    codes = torch.bucketize(scaled, codebooks.NF4_THRESHOLDS, out_int32=True)
    return codes.masked_fill_(scaled.isnan(), 0)  # bucketize sorts NaN last


def _codes_fp4(scaled: Tensor) -> Tensor:
    ranks = torch.bucketize(scaled.abs(), codebooks.FP4_THRESHOLDS)
    codes = codebooks.FP4_MAGNITUDE_CODES[ranks] + 8 * (scaled < 0)
    return codes.masked_fill_(scaled.isnan(), 0)


_CODES = {"nf4": _codes_nf4, "fp4": _codes_fp4}


def quantize_4bit(x: Tensor, block_size: int, quant_type: str) -> tuple[Tensor, Tensor]:
    flat = x.detach().reshape(-1).float()
    n = flat.numel()
    full = n - n % block_size
    blocks = flat[:full].view(-1, block_size)
    absmax = blocks.abs().amax(1) if full else flat.new_empty(0)
    reciprocal = absmax.clamp(min=_ABSMAX_FLOOR).reciprocal().clamp(min=_RECIPROCAL_FLOOR)
    scaled = (blocks * reciprocal[:, None]).clamp(-1, 1).flatten()
    if n > full:  # the last, partial block divides
        tail = flat[full:]
        tail_absmax = tail.abs().amax()
        # inf / inf is NaN: an infinity takes its sign's outermost code
        tail_scaled = torch.where(tail.isinf(), tail.sign(), tail / tail_absmax.clamp(min=_ABSMAX_FLOOR))
        tail_scaled = torch.where(tail_absmax.isnan(), tail_absmax, tail_scaled)
        absmax = torch.cat([absmax, tail_absmax[None]])
        scaled = torch.cat([scaled, tail_scaled.clamp(-1, 1)])
    codes = F.pad(_CODES[quant_type](scaled).to(torch.uint8), (0, n % 2), value=7 if quant_type == "nf4" else 0)
    return codes[::2] << 4 | codes[1::2], absmax


def dequantize_4bit(
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    nested_block_size: int,
    shape,
    dtype: torch.dtype,
    block_size: int,
    quant_type: str,
) -> Tensor:
    if nested_absmax is not None and nested_offset is not None:
        absmax = double_dequantize(absmax, nested_absmax, nested_offset, nested_block_size)
    n = math.prod(shape)
    codes = torch.stack([packed >> 4, packed & 15], 1).flatten()[:n]
    values = codebooks.CODEBOOKS[quant_type][codes.int()]
    values *= absmax.repeat_interleave(block_size)[:n]
    return values.to(dtype).view(tuple(shape))


def double_quantize(absmax: Tensor, block_size: int) -> tuple[Tensor, Tensor, Tensor]:
    n = absmax.numel()
    offset = absmax.mean() if n else absmax.new_zeros(())
    centred = F.pad(absmax - offset, (0, -n % block_size)).view(-1, block_size)
    nested = centred.abs().amax(1) if n else absmax.new_empty(0)
    scaled = (centred * nested.clamp(min=_ABSMAX_FLOOR).reciprocal()[:, None]).clamp(-1, 1)
    codes = torch.bucketize(scaled, codebooks.DYNAMIC_THRESHOLDS)
    # a reconstruction below zero would flip the signs of a whole block: take the smallest code that is not
    reconstructions = codebooks.DYNAMIC_MAP * nested[:, None] + offset
    smallest = 256 - (reconstructions >= 0).sum(1, keepdim=True)
    codes = torch.maximum(codes, smallest)
    return codes.flatten()[:n].to(torch.uint8), nested, offset


def double_dequantize(codes: Tensor, absmax: Tensor, offset: Tensor, block_size: int) -> Tensor:
    values = codebooks.DYNAMIC_MAP[codes.int()]
    return values.mul_(absmax.repeat_interleave(block_size)[: codes.numel()]).add_(offset)


def _tiles(N: int, K: int) -> list[tuple[int, int]]:
    """Row ranges whose dequantized tile stays within about 1 MiB, each starting on a whole byte of `packed`."""
    rows = max(2, (1 << 18) // max(K, 1) // 2 * 2)
    return [(start, min(start + rows, N)) for start in range(0, N, rows)]


def _tile(weight: tuple, start: int, stop: int, K: int, dtype: torch.dtype) -> Tensor:
    """Rows start..stop of the weight, dequantized; blocks may straddle rows, so whole blocks are cut out and trimmed."""
    packed, absmax, block_size, quant_type = weight
    first, last = start * K // block_size, -(-stop * K // block_size)
    n = min(last * block_size, packed.numel() * 2) - first * block_size
    part = packed[first * block_size // 2 : (first * block_size + n + 1) // 2]
    flat = dequantize_4bit(part, absmax[first:last], None, None, 0, (n,), dtype, block_size, quant_type)
    skip = start * K - first * block_size
    return flat[skip : skip + (stop - start) * K].view(stop - start, K)


def linear_4bit(x, packed, absmax, nested_absmax, nested_offset, nested_block_size, bias, N, K, block_size, quant_type) -> Tensor:
    """x (M, K) times the weight (N, K) transposed, plus bias (N,) or None, in x's dtype: (M, N)."""
    if nested_absmax is not None:
        absmax = double_dequantize(absmax, nested_absmax, nested_offset, nested_block_size)
    weight = (packed, absmax, block_size, quant_type)
    y = x.new_empty(x.shape[0], N)
    for start, stop in _tiles(N, K):
        y[:, start:stop] = F.linear(x, _tile(weight, start, stop, K, x.dtype), None if bias is None else bias[start:stop])
    return y


def linear_4bit_dx(dy, packed, absmax, nested_absmax, nested_offset, nested_block_size, N, K, block_size, quant_type) -> Tensor:
    """dy (M, N) times the weight (N, K), in dy's dtype: (M, K); summed over tiles in fp32."""
    if nested_absmax is not None:
        absmax = double_dequantize(absmax, nested_absmax, nested_offset, nested_block_size)
    weight = (packed, absmax, block_size, quant_type)
    dx = dy.new_zeros(dy.shape[0], K, dtype=torch.float32)
    for start, stop in _tiles(N, K):
        dx += dy[:, start:stop] @ _tile(weight, start, stop, K, dy.dtype)
    return dx.to(dy.dtype)


def dense_linear(x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
    """x (M, K) times a dense w (N, K) transposed, plus bias (N,) or None."""
    return F.linear(x, w, bias)
