"""Blockwise 4-bit quantization: NF4 and FP4 (QLoRA, Dettmers et al. 2023, arXiv:2305.14314, sections 2 and 3).

    absmax_b = max_{i in block b} |x_i|       code_i = argmin_j |x_i / absmax_b - value_j|      (eq. 1, values by eq. 4)
    x~_i = value[code_i] * absmax_b                                                             (eq. 2)

x          float32 | float16 | bfloat16, any shape  values; blocks run over the flattened tensor
packed     uint8 (ceil(n / 2),)                     two codes a byte, the first element in the high nibble
absmax     float32 (ceil(n / block_size),)          or uint8 codes of it (double quantization)

Rounding, all in float32: x is multiplied by 1 / absmax (rounded division); only a last block shorter than block_size is
divided by absmax instead. A code is the number of thresholds strictly below the scaled value: ties take the lower code.
Defined on purpose: a block of zeros keeps absmax 0 and comes back +0; a NaN makes its block's absmax NaN and the whole
block comes back NaN; an infinity makes absmax infinite, comes back itself, and the block's finite values come back NaN;
blocks whose absmax is below 1e-38 are scaled as if it were 1e-38, as bitsandbytes does.

Least bytes: quantize reads itemsize * n and writes n / 2 + 4 n / block_size; dequantize reads n / 2 + 4 n / block_size
(n / 2 + n / block_size + n / (64 block_size) with double quantization: 4.127 bits a weight at 64) and writes
itemsize * n.
Instructions: docs/math/nf4.md counts them; `make counters` measures them.
Oracle: reference/nf4.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from . import codebooks, cpu
from ._library import define
from ._lookup import decode_absmax, lookup_word, product_table
from ._rows import contiguous
from ._triton import backend, tl, triton
from ._variant import Variant

BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
QUANT_TYPES = ("nf4", "fp4")

# A polynomial that predicts a scaled value's code to within one, by least squares through (threshold_j, j + 1/2): at
# every threshold it is within 0.13 (NF4) or 0.19 (FP4) of j + 1/2, and anything under 1/2 would do. One exact comparison
# settles the code.
NF4_PREDICT = (7.1349467, 11.484821, 0.56152564, -4.5676875)
FP4_PREDICT = (0.45677888, 11.844481, -5.4927231)
_N0, _N1, _N2, _N3 = (tl.constexpr(c) for c in NF4_PREDICT)
_F0, _F1, _F2 = (tl.constexpr(c) for c in FP4_PREDICT)
_FP4_CODES_BY_RANK = tl.constexpr(0x32547610)  # nibble r: the bit pattern of the r-th smallest magnitude
_QUANTIZE_TILE = 2048  # elements a program owns, where a block is not larger
_GROUP = tl.constexpr(32)  # weights for which absmax is decoded once: the smallest block, 16 packed bytes
_GROUPS = 128  # groups a program owns


@triton.jit
def _code(scaled, upper_ptr, QUANT_TYPE: tl.constexpr):
    """int32 code of each scaled value: predict, then correct by one exact comparison. NaN gives any code."""
    scaled = tl.where(scaled > -1.0, scaled, -1.0)  # one max.f32, and -1 for NaN in older interpreters too
    scaled = tl.minimum(scaled, 1.0)
    if QUANT_TYPE == "nf4":
        predicted = tl.fma(tl.fma(tl.fma(scaled, _N3, _N2), scaled, _N1), scaled, _N0).to(tl.int32)
        return predicted + (scaled > tl.load(upper_ptr + predicted)).to(tl.int32)
    magnitude = tl.abs(scaled)
    predicted = tl.fma(tl.fma(magnitude, _F2, _F1), magnitude, _F0).to(tl.int32)
    rank = predicted + (magnitude > tl.load(upper_ptr + predicted)).to(tl.int32)
    return ((_FP4_CODES_BY_RANK >> (rank * 4)) & 7) + (scaled < 0).to(tl.int32) * 8


@triton.jit
def _quantize_4bit_kernel(
    x_ptr, upper_ptr, packed_ptr, absmax_ptr, n_blocks,
    BLOCK_SIZE: tl.constexpr, ROWS: tl.constexpr, QUANT_TYPE: tl.constexpr,
):  # fmt: skip
    # One program owns ROWS whole blocks: reads them once, writes their absmax and packed bytes.
    first = tl.program_id(0).to(tl.int64) * ROWS
    row = tl.arange(0, ROWS)
    mask = row < n_blocks - first
    offs = row[:, None] * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)[None, :]
    x = tl.load(x_ptr + first * BLOCK_SIZE + offs, mask=mask[:, None], other=0.0).to(tl.float32)
    # as integers, |x| orders like the floats, with NaN above infinity: the maximum propagates it
    absmax = tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=1).to(tl.float32, bitcast=True)
    tl.store(absmax_ptr + first + row, absmax, mask=mask)

    smallest_absmax = tl.cast(1e-38, tl.float32)  # a bare 1e-38 is subnormal and would be taken for float64
    smallest_reciprocal = tl.cast(1e-42, tl.float32)
    reciprocal = tl.div_rn(1.0, tl.where(absmax < smallest_absmax, smallest_absmax, absmax))
    reciprocal = tl.where(reciprocal < smallest_reciprocal, smallest_reciprocal, reciprocal)
    code = _code(x * reciprocal[:, None], upper_ptr, QUANT_TYPE)

    # eight codes to a word, so that stores are wide; a block with a NaN gets code 0 throughout
    nibble = tl.arange(0, 8)
    shift = nibble // 2 * 8 + (1 - nibble % 2) * 4
    word = tl.sum(tl.reshape(code, (ROWS, BLOCK_SIZE // 8, 8)) << shift[None, None, :], axis=2)
    word = tl.where((absmax == absmax)[:, None], word, 0)
    offs_word = row[:, None] * (BLOCK_SIZE // 8) + tl.arange(0, BLOCK_SIZE // 8)[None, :]
    word_ptr = packed_ptr.to(tl.pointer_type(tl.int32)) + first * (BLOCK_SIZE // 8)
    tl.store(word_ptr + offs_word, word, mask=mask[:, None])


@triton.jit(do_not_specialize=["length"])
def _quantize_4bit_short_kernel(x_ptr, upper_ptr, packed_ptr, absmax_ptr, length, TILE: tl.constexpr, QUANT_TYPE: tl.constexpr):
    # One program owns the last block when it is short: its `length` values are divided, and end on any nibble.
    offs = tl.arange(0, TILE)
    x = tl.load(x_ptr + offs, mask=offs < length, other=0.0).to(tl.float32)
    absmax = tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=0).to(tl.float32, bitcast=True)
    tl.store(absmax_ptr, absmax)
    smallest_absmax = tl.cast(1e-38, tl.float32)
    divisor = tl.where(absmax < smallest_absmax, smallest_absmax, absmax)
    scaled = tl.div_rn(x, tl.full((TILE,), 1.0, tl.float32) * divisor)
    scaled = tl.where(tl.abs(x) == float("inf"), x, scaled)  # inf / inf
    code = tl.where(absmax == absmax, _code(scaled, upper_ptr, QUANT_TYPE), 0)
    code = tl.where(offs < length, code, 7 if QUANT_TYPE == "nf4" else 0)  # an odd last nibble is the code of 0
    byte = tl.sum(tl.reshape(code, (TILE // 2, 2)) << (4 - 4 * tl.arange(0, 2))[None, :], axis=1)
    offs_byte = tl.arange(0, TILE // 2)
    tl.store(packed_ptr + offs_byte, byte.to(tl.uint8), mask=offs_byte < (length + 1) // 2)


@triton.jit(do_not_specialize=["block_shift"])
def _dequantize_4bit_words_kernel(
    packed_ptr, absmax_ptr, dynamic_map_ptr, nested_absmax_ptr, nested_offset_ptr, out_ptr, n_groups, block_shift,
    NESTED_BLOCK: tl.constexpr, GROUPS: tl.constexpr, QUANT_TYPE: tl.constexpr,
):  # fmt: skip
    # One program owns GROUPS groups of 32 weights; a thread loads a group's 16 bytes, and its block's absmax once.
    # n is a multiple of 32, packed is aligned to 16 bytes and out is 16 bits wide; block_shift = log2(block_size / 32).
    first = tl.program_id(0).to(tl.int64) * GROUPS
    left = n_groups - first
    left = tl.where(left > GROUPS, GROUPS, left).to(tl.int32)
    group = tl.arange(0, GROUPS)
    mask = group < left
    absmax = decode_absmax(
        absmax_ptr, (first + group) >> block_shift, mask,
        dynamic_map_ptr, nested_absmax_ptr, nested_offset_ptr, NESTED_BLOCK,
    )  # fmt: skip
    t = product_table(absmax[:, None], QUANT_TYPE, out_ptr.dtype.element_ty)
    offs = group[:, None] * 4 + tl.arange(0, 4)[None, :]
    word_ptr = packed_ptr.to(tl.pointer_type(tl.int32)) + first * 4
    word = tl.load(word_ptr + offs, mask=mask[:, None], other=0)
    # half a group at a time: eight results in registers leave room for full occupancy, and 32 bytes fill a sector
    halves = tl.split(tl.trans(tl.reshape(word, (GROUPS, 2, 2)), (0, 2, 1)))
    pair_ptr = out_ptr.to(tl.pointer_type(tl.int32)) + first * 16
    for half in tl.static_range(2):
        v0, v1, v2, v3 = lookup_word(halves[half], t[0], t[1], t[2], t[3], t[4], t[5], t[6], t[7])
        values = tl.reshape(tl.join(tl.join(v0, v2), tl.join(v1, v3)), (GROUPS, 8))
        offs_out = group[:, None] * 16 + half * 8 + tl.arange(0, 8)[None, :]
        tl.store(pair_ptr + offs_out, values, mask=mask[:, None])


@triton.jit(do_not_specialize=["block_shift"])
def _dequantize_4bit_kernel(
    packed_ptr, absmax_ptr, dynamic_map_ptr, nested_absmax_ptr, nested_offset_ptr, values_ptr, out_ptr,
    n, n_bytes, block_shift, NESTED_BLOCK: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    # One program owns GROUPS groups of 32 weights, any n and any dtype: values are gathered from the 16-entry table.
    first = tl.program_id(0).to(tl.int64) * GROUPS
    left = n - first * _GROUP
    left = tl.where(left > GROUPS * _GROUP, GROUPS * _GROUP, left).to(tl.int32)
    left_bytes = n_bytes - first * (_GROUP // 2)
    left_bytes = tl.where(left_bytes > GROUPS * _GROUP // 2, GROUPS * _GROUP // 2, left_bytes).to(tl.int32)
    group = tl.arange(0, GROUPS)
    absmax = decode_absmax(
        absmax_ptr, (first + group) >> block_shift, group * _GROUP < left,
        dynamic_map_ptr, nested_absmax_ptr, nested_offset_ptr, NESTED_BLOCK,
    )[:, None]  # fmt: skip
    offs = group[:, None] * (_GROUP // 2) + tl.arange(0, _GROUP // 2)[None, :]
    byte = tl.load(packed_ptr + first * (_GROUP // 2) + offs, mask=offs < left_bytes, other=0).to(tl.int32)
    high = (tl.load(values_ptr + (byte >> 4)) * absmax).to(out_ptr.dtype.element_ty)
    low = (tl.load(values_ptr + (byte & 15)) * absmax).to(out_ptr.dtype.element_ty)
    values = tl.reshape(tl.join(high, low), (GROUPS * _GROUP,))
    offs_out = tl.arange(0, GROUPS * _GROUP)
    tl.store(out_ptr + first * _GROUP + offs_out, values, mask=offs_out < left)


def quantize_4bit_triton(x: Tensor, block_size: int, quant_type: str) -> tuple[Tensor, Tensor]:
    """Launch the quantization kernels: one for the whole blocks, one for a short last block."""
    x = x.detach().contiguous().view(-1)
    packed, absmax = _quantize_fake(x, block_size, quant_type)
    upper = codebooks.on(f"{quant_type.upper()}_UPPER", x.device)
    blocks, rest = divmod(x.numel(), block_size)
    rows = max(_QUANTIZE_TILE // block_size, 1)
    if blocks:
        _quantize_4bit_kernel[(triton.cdiv(blocks, rows),)](
            x, upper, packed, absmax, blocks, block_size, rows, quant_type, num_warps=8, enable_fp_fusion=False
        )
    if rest:
        whole = blocks * block_size
        _quantize_4bit_short_kernel[(1,)](
            x[whole:], upper, packed[whole // 2 :], absmax[blocks:], rest, BLOCK_SIZES[-1], quant_type,
            num_warps=8, enable_fp_fusion=False,
        )  # fmt: skip
    return packed, absmax


def dequantize_4bit_triton(
    packed: Tensor, absmax: Tensor, nested_absmax: Tensor | None, nested_offset: Tensor | None, nested_block_size: int,
    shape, dtype: torch.dtype, block_size: int, quant_type: str,
) -> Tensor:  # fmt: skip
    """Launch a dequantization kernel: byte permutation on NVIDIA for 16-bit output in whole groups, else gathering."""
    packed, absmax, nested_absmax = packed.contiguous(), absmax.contiguous(), contiguous(nested_absmax)
    out = packed.new_empty(shape, dtype=dtype)
    n = out.numel()
    if n == 0:
        return out
    nested_block = 0 if nested_absmax is None else nested_block_size
    dynamic_map = codebooks.on("DYNAMIC_MAP", packed.device) if nested_block else None
    source = (packed, absmax, dynamic_map, nested_absmax, nested_offset)
    shift = (block_size // 32).bit_length() - 1
    grid = (triton.cdiv(n, _GROUPS * 32),)
    if backend() == "cuda" and dtype != torch.float32 and n % 32 == 0 and packed.data_ptr() % 16 == 0:
        _dequantize_4bit_words_kernel[grid](
            *source, out, n // 32, shift, nested_block, _GROUPS, quant_type, num_warps=4, enable_fp_fusion=False
        )
    else:
        _dequantize_4bit_kernel[grid](
            *source, codebooks.on(quant_type.upper(), packed.device), out, n, packed.numel(), shift,
            nested_block, _GROUPS, num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
    return out


def _quantize_fake(x, block_size, quant_type):
    n = x.numel()
    return x.new_empty((n + 1) // 2, dtype=torch.uint8), x.new_empty(-(-n // block_size), dtype=torch.float32)


def _dequantize_fake(packed, absmax, nested_absmax, nested_offset, nested_block_size, shape, dtype, block_size, quant_type):
    return packed.new_empty(shape, dtype=dtype)


define(
    "quantize_4bit(Tensor x, int block_size, str quant_type) -> (Tensor, Tensor)",
    _quantize_fake,
    CPU=cpu.quantize_4bit,
    CUDA=quantize_4bit_triton,
)
define(
    "dequantize_4bit(Tensor packed, Tensor absmax, Tensor? nested_absmax, Tensor? nested_offset, "
    "int nested_block_size, SymInt[] shape, ScalarType dtype, int block_size, str quant_type) -> Tensor",
    _dequantize_fake,
    CPU=cpu.dequantize_4bit,
    CUDA=dequantize_4bit_triton,
)


def _check_block_size(block_size: int) -> None:
    if block_size not in BLOCK_SIZES:
        raise ValueError(f"block_size is {block_size!r}; expected a power of two from 32 to 4096 (64 is usual)")


def _quantize(x: Tensor, block_size: int, quant_type: str) -> tuple[Tensor, Tensor]:
    _check_block_size(block_size)
    if x.dtype not in DTYPES:
        raise TypeError(f"x is {x.dtype}; expected float32, float16 or bfloat16: convert it first")
    return torch.ops.posttrain.quantize_4bit(x, block_size, quant_type)


def _dequantize(packed: Tensor, absmax: Tensor, shape, dtype, block_size: int, quant_type: str) -> Tensor:
    _check_block_size(block_size)
    shape = tuple(shape)
    n = math.prod(shape)
    if dtype not in DTYPES:
        raise TypeError(f"dtype is {dtype}; expected float32, float16 or bfloat16")
    if packed.dtype != torch.uint8 or absmax.dtype != torch.float32:
        raise TypeError(
            f"packed is {packed.dtype} and absmax {absmax.dtype}; expected uint8 and float32 "
            "(absmax in 8 bits goes through double_dequantize, or QuantizedWeight.dequantize)"
        )
    if packed.device != absmax.device:
        raise ValueError(f"packed is on {packed.device} and absmax on {absmax.device}; move one to the other")
    if packed.numel() != (n + 1) // 2 or absmax.numel() != -(-n // block_size):
        raise ValueError(
            f"shape {shape} at block_size {block_size} needs {(n + 1) // 2} packed bytes and "
            f"{-(-n // block_size)} absmax; given {packed.numel()} and {absmax.numel()}"
        )
    return torch.ops.posttrain.dequantize_4bit(
        packed.reshape(-1), absmax.reshape(-1), None, None, 256, shape, dtype, block_size, quant_type
    )


def quantize_nf4(x: Tensor, block_size: int = 64) -> tuple[Tensor, Tensor]:
    """Quantize to NF4, 4 bits a value and one float32 absmax a block.

    x: float32, float16 or bfloat16 of any shape and strides. block_size: a power of two from 32 to 4096; blocks run
    over x flattened, the last may be short. Returns packed uint8 (ceil(n/2),), first element in the high nibble, and
    absmax float32 (ceil(n/block_size),). Raises TypeError for another dtype, ValueError for another block_size.
    """
    return _quantize(x, block_size, "nf4")


def quantize_fp4(x: Tensor, block_size: int = 64) -> tuple[Tensor, Tensor]:
    """Quantize to FP4 (sign, two exponent bits, one mantissa bit). Arguments, results and errors as `quantize_nf4`."""
    return _quantize(x, block_size, "fp4")


def dequantize_nf4(packed: Tensor, absmax: Tensor, shape, dtype: torch.dtype, block_size: int = 64) -> Tensor:
    """The inverse of `quantize_nf4`: value[code] * absmax in float32, rounded once to `dtype`, in `shape`.

    packed: uint8 with ceil(n/2) elements, absmax: float32 with ceil(n/block_size), n = prod(shape), in any shape of
    their own. Raises TypeError for another dtype, ValueError for lengths that do not fit `shape`, or two devices.
    """
    return _dequantize(packed, absmax, shape, dtype, block_size, "nf4")


def dequantize_fp4(packed: Tensor, absmax: Tensor, shape, dtype: torch.dtype, block_size: int = 64) -> Tensor:
    """The inverse of `quantize_fp4`. Arguments, results and errors as `dequantize_nf4`."""
    return _dequantize(packed, absmax, shape, dtype, block_size, "fp4")


def aot_variants() -> Iterator[Variant]:
    """Every configuration that the launchers above can choose."""
    for quant_type in QUANT_TYPES:
        for dtype in ("fp32", "fp16", "bf16"):
            pointers = {"x_ptr": f"*{dtype}", "upper_ptr": "*fp32", "packed_ptr": "*u8", "absmax_ptr": "*fp32"}
            for block_size in BLOCK_SIZES:
                yield Variant(
                    f"quantize_{quant_type}_{dtype}_{block_size}",
                    _quantize_4bit_kernel,
                    pointers | {"n_blocks": "i32:16"},
                    {"BLOCK_SIZE": block_size, "ROWS": max(_QUANTIZE_TILE // block_size, 1), "QUANT_TYPE": quant_type},
                    num_warps=8,
                    options={"enable_fp_fusion": False},
                    unaligned=("x_ptr", "n_blocks"),
                )
            yield Variant(
                f"quantize_{quant_type}_{dtype}_short",
                _quantize_4bit_short_kernel,
                pointers | {"length": "i32"},
                {"TILE": BLOCK_SIZES[-1], "QUANT_TYPE": quant_type},
                num_warps=8,
                options={"enable_fp_fusion": False},
                unaligned=("x_ptr", "absmax_ptr"),
            )
    nesting = ("dynamic_map_ptr", "nested_absmax_ptr", "nested_offset_ptr")
    integers = {"n": "i32:16", "n_bytes": "i32:16", "block_shift": "i32"}
    for nested in (False, True):
        source = {"packed_ptr": "*u8", "absmax_ptr": "*u8" if nested else "*fp32"}
        source |= dict.fromkeys(nesting, "*fp32" if nested else "constexpr")
        constants = {"NESTED_BLOCK": 256 if nested else 0, "GROUPS": _GROUPS} | ({} if nested else dict.fromkeys(nesting))
        suffix = "_nested" if nested else ""
        for dtype in ("fp16", "bf16"):
            for quant_type in QUANT_TYPES:
                yield Variant(
                    f"dequantize_{quant_type}_{dtype}{suffix}",
                    _dequantize_4bit_words_kernel,
                    source | {"out_ptr": f"*{dtype}", "n_groups": "i32:16", "block_shift": "i32"},
                    constants | {"QUANT_TYPE": quant_type},
                    options={"enable_fp_fusion": False},
                    backends=("cuda",),
                    unaligned=("absmax_ptr", "nested_absmax_ptr", "n_groups"),
                )
        for dtype in ("fp32", "fp16", "bf16"):
            yield Variant(
                f"dequantize_gather_{dtype}{suffix}",
                _dequantize_4bit_kernel,
                source | {"values_ptr": "*fp32", "out_ptr": f"*{dtype}"} | integers,
                constants,
                options={"enable_fp_fusion": False},
                unaligned=("packed_ptr", "absmax_ptr", "nested_absmax_ptr", "out_ptr", "n", "n_bytes"),
            )
