"""x W^T for a few rows of x, W in 4 bits: the kernel of token-by-token decoding, bound by the bytes of W.

    y[m, n] = sum_b absmax[n, b] * ( sum_{k in b} value[code[n, k]] * x[m, k] ) + bias[n]

x          float32 | float16 | bfloat16 (M, K)   any row stride
packed     uint8 (N K / 2,)                      two codes a byte, the first element in the high nibble; K % 32 == 0
absmax     float32 (ceil(N K / block_size),)     or uint8 codes of it (double quantization)
y          x's dtype (M, N)

How: a lane owns 32 consecutive weights of a row (16 bytes: one 128-bit load), which lie in one block, so absmax multiplies
their sum once. The 16 code values sit in a warp's lanes, two copies, and a code is looked up by a warp shuffle (`tl.gather`
along an axis that one warp owns): no shared memory, hence no bank conflicts, and no 64-bit addresses.
Products and sums are float32 throughout: no rounding to x's dtype but the last.

Least bytes: N K / 2 + N K / block_size + 4 N K / (256 block_size) + itemsize (M K + M N): 4.127 bits a weight at M = 1.
Least instructions per weight, a lane's: 1 to cut out the code, 1 to look it up, M multiply-adds. M = 1: 3 / 32 = 0.094 warp
instructions a weight. Measured in the emulator at 4096 x 4096, sm_80: 0.177, with every warp slot of the SM filled (32 registers);
converting x takes 0.031, absmax, addresses and the sum over lanes the rest. Two rows of W a warp would share x and
need 0.15, but 40 registers, so that is left to larger M.
A block whose absmax is NaN makes its row NaN; one whose absmax is infinite makes it infinite or NaN (dequantized: NaN).
Oracle: reference/quantized_linear.py.
"""

# mypy: disable-error-code="assignment, misc, var-annotated"
# (tuples of tensors grow while triton unrolls a loop)
from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from . import codebooks
from ._lookup import decode_absmax
from ._low_rank import NONE, LowRank, arguments, start_lanes
from ._rows import contiguous
from ._split_k import add_parts_triton
from ._triton import backend, tl, triton
from ._variant import Variant

GROUP = 32  # weights a lane owns: 16 bytes, and the smallest block
WARPS = 4
ROW_TILES = (1, 2, 4)  # rows of x that share one decoding of W


@triton.jit
def split4(v, WARPS: tl.constexpr, LANES: tl.constexpr):
    """(WARPS, LANES, 4) -> four (WARPS, LANES), in order; a lane keeps what it has."""
    even, odd = v.reshape(WARPS, LANES, 2, 2).split()
    v0, v2 = even.split()
    v1, v3 = odd.split()
    return v0, v1, v2, v3


@triton.jit
def _load8(ptr, offs, mask, WARPS: tl.constexpr, LANES: tl.constexpr):
    """Eight consecutive values for each of (WARPS, LANES) offsets, as eight tensors, 16 bytes to a load."""
    if ptr.dtype.element_ty.primitive_bitwidth == 32:
        quad = tl.arange(0, 4)[None, None, :]
        first = tl.load(ptr + (offs[:, :, None] + quad), mask=mask[:, :, None], other=0.0)
        second = tl.load(ptr + (offs[:, :, None] + 4 + quad), mask=mask[:, :, None], other=0.0)
        return split4(first, WARPS, LANES) + split4(second, WARPS, LANES)
    else:
        v = tl.load(ptr + (offs[:, :, None] + tl.arange(0, 8)[None, None, :]), mask=mask[:, :, None], other=0.0)
        even, odd = v.reshape(WARPS, LANES, 2, 2, 2).split()
        v04, v26 = even.split()
        v15, v37 = odd.split()
        v0, v4 = v04.split()
        v2, v6 = v26.split()
        v1, v5 = v15.split()
        v3, v7 = v37.split()
        return v0, v1, v2, v3, v4, v5, v6, v7


@triton.jit(do_not_specialize=["M", "chunks_per_part", "block_shift"])
def _quantized_linear_decode_kernel(
    x_ptr, packed_ptr, absmax_ptr, dynamic_map_ptr, nested_absmax_ptr, nested_offset_ptr, values_ptr, bias_ptr, y_ptr,
    M, N, K, stride_xm, chunks_per_part, block_shift, s_ptr, lora_B_ptr, stride_sp, stride_sm, scaling,
    NESTED_BLOCK: tl.constexpr, HAS_BIAS: tl.constexpr,
    TILE_M: tl.constexpr, ROWS: tl.constexpr, WARPS: tl.constexpr, LANES: tl.constexpr,
    RANK: tl.constexpr, S_PARTS: tl.constexpr,
):  # fmt: skip
    # One program owns WARPS * ROWS rows of W, TILE_M rows of x and one part of K; a warp ROWS rows of W.
    # y is (parts, M, N): one part holds the whole sums, several are float32.
    warp = tl.arange(0, WARPS)[:, None]
    lane = tl.arange(0, LANES)[None, :]
    n0 = (tl.program_id(0) * WARPS + warp) * ROWS
    m0 = tl.program_id(1) * TILE_M
    table = tl.load(values_ptr + lane % 16 + warp * 0)
    word_ptr = packed_ptr.to(tl.pointer_type(tl.int32))
    chunks = K // 32
    begin = tl.program_id(2) * chunks_per_part
    end = tl.minimum(begin + chunks_per_part, chunks)

    acc = ()
    if RANK == 0:
        for _ in tl.static_range(ROWS * TILE_M):
            acc = acc + (tl.zeros((WARPS, LANES), tl.float32),)
    else:
        acc = start_lanes(
            s_ptr, lora_B_ptr, stride_sp, stride_sm, scaling, M, N, m0, n0, lane, x_ptr.dtype.element_ty,
            ROWS, TILE_M, LANES, RANK, S_PARTS,
        )  # fmt: skip
    for first in range(begin, end, LANES):
        c = first + lane  # this lane's chunk of the row: k from 32 c to 32 c + 31
        inside = c < end
        words = ()
        absmax = ()
        part = ()
        for r in tl.static_range(ROWS):
            n = n0 + r
            mask = inside & (n < N)
            chunk = n * chunks + c  # below 2^31: `plan` sends 2^36 weights elsewhere
            word = tl.load(
                word_ptr + (chunk.to(tl.int64) * 4)[:, :, None] + tl.arange(0, 4)[None, None, :], mask=mask[:, :, None], other=0
            )
            words = words + (split4(word, WARPS, LANES),)
            block = chunk.to(tl.uint32) >> block_shift
            absmax = absmax + (
                decode_absmax(absmax_ptr, block, mask, dynamic_map_ptr, nested_absmax_ptr, nested_offset_ptr, NESTED_BLOCK),
            )
        for i in tl.static_range(4):
            xs = ()
            for m in tl.static_range(TILE_M):
                x_row = x_ptr + (m0 + m).to(tl.int64) * stride_xm
                x_end = tl.where(m0 + m < M, end, 0)  # a row beyond M has no columns
                xs = xs + (_load8(x_row, c * 32 + i * 8 + warp * 0, c < x_end, WARPS, LANES),)
            sums = ()
            for r in tl.static_range(ROWS):
                row_sums = ()
                for e in tl.static_range(8):  # element e of a word: byte e // 2, the high nibble first
                    code = (words[r][i] >> (8 * (e // 2) + 4 - 4 * (e % 2))) & 15
                    value = tl.gather(table, code, 1)
                    following = ()
                    for m in tl.static_range(TILE_M):
                        xe = xs[m][e].to(tl.float32)
                        following = following + (value * xe if e == 0 else tl.fma(value, xe, row_sums[m]),)
                    row_sums = following
                word_sums = ()  # short chains: they round less and wait less than one of 32
                for m in tl.static_range(TILE_M):
                    word_sums = word_sums + (row_sums[m] if i == 0 else part[r * TILE_M + m] + row_sums[m],)
                sums = sums + word_sums
            part = sums
        total = ()
        for r in tl.static_range(ROWS):
            for m in tl.static_range(TILE_M):
                # a masked lane has part 0 and absmax 0 or the offset: it adds nothing
                total = total + (tl.fma(part[r * TILE_M + m], absmax[r], acc[r * TILE_M + m]),)
        acc = total

    for r in tl.static_range(ROWS):
        offs_n = (tl.program_id(0) * WARPS + tl.arange(0, WARPS)) * ROWS + r
        for m in tl.static_range(TILE_M):
            y = tl.sum(acc[r * TILE_M + m], 1)
            mask_y = offs_n < tl.where(m0 + m < M, N, 0)
            if HAS_BIAS:
                y += tl.load(bias_ptr + offs_n, mask=offs_n < N, other=0.0).to(tl.float32)
            row = tl.program_id(2).to(tl.int64) * M + m0 + m
            tl.store(y_ptr + row * N + offs_n, y.to(y_ptr.dtype.element_ty), mask=mask_y)


def quantized_linear_decode_triton(
    x: Tensor, packed: Tensor, absmax: Tensor, nested_absmax: Tensor | None, nested_offset: Tensor | None,
    nested_block_size: int, bias: Tensor | None, N: int, K: int, block_size: int, quant_type: str, split_k: int = 1,
    low_rank: LowRank | None = None,
) -> Tensor:  # fmt: skip
    """Launch the decode kernel on x (M, K), K a multiple of 32 and packed aligned to 16 bytes. Returns (M, N) in x's dtype,
    with the term of `low_rank` added."""
    M = x.shape[0]
    packed, absmax = packed.contiguous(), absmax.contiguous()
    nested_absmax, bias = contiguous(nested_absmax), contiguous(bias)
    y = x.new_empty(M, N)
    out = y if split_k == 1 else x.new_empty(split_k, M, N, dtype=torch.float32)
    tile_m = next((t for t in ROW_TILES if M <= t), ROW_TILES[-1])
    rows = rows_per_warp(tile_m)
    lanes = 64 if backend() == "hip" else 32  # a wavefront of gfx942 has 64
    nested_block = 0 if nested_absmax is None else nested_block_size
    _quantized_linear_decode_kernel[(triton.cdiv(N, WARPS * rows), triton.cdiv(M, tile_m), split_k)](
        x, packed, absmax, codebooks.on("DYNAMIC_MAP", x.device) if nested_block else None, nested_absmax, nested_offset,
        codebooks.on(quant_type.upper(), x.device), bias if split_k == 1 else None, out,
        M, N, K, x.stride(0), triton.cdiv(K // GROUP, split_k), (block_size // GROUP).bit_length() - 1,
        NESTED_BLOCK=nested_block, HAS_BIAS=bias is not None and split_k == 1,
        TILE_M=tile_m, ROWS=rows, WARPS=WARPS, LANES=lanes, **arguments(low_rank), num_warps=WARPS, enable_fp_fusion=False,
    )  # fmt: skip
    if split_k > 1:
        add_parts_triton(out, bias, y)
    return y


def rows_per_warp(tile_m: int) -> int:
    """Rows of W a warp owns: one where registers bound occupancy (M = 1), two where converting x costs more."""
    return 1 if tile_m == 1 else 2


def aot_variants() -> Iterator[Variant]:
    """Everything that `quantized_linear` can launch: 16-bit x of several rows goes to the GEMM, and parts of K take no bias."""
    pointers = ("x", "packed", "absmax", "dynamic_map", "nested_absmax", "nested_offset", "values", "bias", "y")
    tiles = [("fp32", tile_m) for tile_m in ROW_TILES] + [("bf16", 1), ("fp16", 1)]
    for (dtype, tile_m), nested, end, (backend_name, lanes) in itertools.product(
        tiles, (False, True), ("", "bias", "part"), (("cuda", 32), ("hip", 64))
    ):
        if dtype == "fp32" and end == "part":
            continue  # float32 sums without a bias, as the whole ones are
        types = dict.fromkeys(pointers, "*fp32") | {"x": f"*{dtype}", "packed": "*u8", "absmax": "*u8" if nested else "*fp32"}
        types |= {"bias": f"*{dtype}" if end == "bias" else "constexpr", "y": "*fp32" if end == "part" else f"*{dtype}"}
        types |= {} if nested else dict.fromkeys(("dynamic_map", "nested_absmax", "nested_offset"), "constexpr")
        signature = {f"{name}_ptr": types[name] for name in pointers}
        signature |= {"M": "i32", "N": "i32:16", "K": "i32:16", "stride_xm": "i32:16"}
        signature |= {"chunks_per_part": "i32", "block_shift": "i32"}
        constexprs: dict[str, Any] = {name: None for name, kind in signature.items() if kind == "constexpr"}
        constexprs |= {"NESTED_BLOCK": 256 if nested else 0, "HAS_BIAS": end == "bias", "TILE_M": tile_m}
        constexprs |= {"ROWS": rows_per_warp(tile_m), "WARPS": WARPS, "LANES": lanes} | NONE
        yield Variant(
            f"quantized_linear_decode_{dtype}_{tile_m}" + "_nested" * nested + f"_{end}" * bool(end),
            _quantized_linear_decode_kernel,
            signature | dict.fromkeys(constexprs, "constexpr"),
            constexprs,
            num_warps=WARPS,
            options={"enable_fp_fusion": False},
            backends=(backend_name,),
            unaligned=("x_ptr", "absmax_ptr", "nested_absmax_ptr", "bias_ptr", "N", "stride_xm"),
        )
