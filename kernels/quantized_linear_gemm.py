"""x W^T with W in 4 bits on tensor cores: a GEMM that decodes its weights in registers, for tens to hundreds of rows.

    y[m, n] = sum_k round(value[code[n, k]] * absmax[n, b(k)]) * x[m, k] + bias[n]         round: once, to x's dtype

x          float32 | float16 | bfloat16 (M, K)   any row stride; copied where a row does not start at a multiple of 16 bytes
packed     uint8 (N K / 2,)                      two codes a byte, the first element in the high nibble; K % 32 == 0
absmax     float32 (ceil(N K / block_size),)     or uint8 codes of it (double quantization)
y          x's dtype (M, N)

The weights are exactly those of `dequantize`, so a row of y differs from the unfused one by the order of its sum alone.
How: the product is computed transposed, W x^T, with W as the tensor core's first operand, which every NVIDIA generation
takes from registers. Lane 4 a + q of a warp holds row a of an 8-row tile in that operand, so it loads 32 consecutive weights of
that row (16 bytes), chunk q of the tile's 128 columns, decodes them where they are, a word of eight for each dot, and they *are*
the fragment: weights pass through no shared memory but the pipeline's. That fixes which columns a fragment holds, a permutation
of k; a sum over k does not care, so x is loaded with its columns permuted in the same way (`columns` below). K_WIDTH is the
number of consecutive k a lane holds in a fragment: 8 for mma.sync (x then comes in longer pieces), 2 for wgmma. Where a
compiler wants another fragment (AMD), it moves the weights through shared memory by itself; results stay right.
For 64 rows of x that would take 32 sums a lane, 128 registers and three quarters of the SM's warp slots. There twice the warps
share a tile (SHARED): each decodes 16 weights a lane, and they pass through shared memory to be read as fragments by several.

Least bytes: those of `quantized_linear_decode`, with x read once for each column of programs.
Least instructions per weight of a tile of BLOCK_M rows, a lane's: cut out the code 1, look it up 1, multiply 1, convert 1/2;
one MMA (16 x 8 x 16) for every 256 weights and 8 rows of x. M = 16: 3.5 / 32 + 2 / 256 = 0.117 warp instructions; M = 64: 0.141.
Measured in the emulator at 4096 x 4096: 0.172 (M = 16) and 0.239 (M = 64) on sm_80, without a bank conflict, half of the warp
slots filled; absmax, addresses and x are the rest. On sm_90 0.19 (packed words conflict, 1.65) and 0.311, half filled too.
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
from ._low_rank import NONE, LowRank, add_tile, arguments
from ._rows import contiguous
from ._split_k import add_parts_triton
from ._triton import current_arch, tl, triton
from ._variant import Variant
from .quantized_linear_decode import split4

BLOCK_N = 64
TILES = (16, 32, 64)  # rows of x that share one decoding of W


@triton.jit
def _join8(v):
    """Eight tensors of one shape -> that shape, 2, 2, 2: the lowest bit of the index first; a lane keeps what it has."""
    first = tl.join(tl.join(v[0], v[1]), tl.join(v[2], v[3]))
    return tl.join(first, tl.join(tl.join(v[4], v[5]), tl.join(v[6], v[7])))


@triton.jit
def _decode8(table, words, absmax, j: tl.constexpr, ROWS: tl.constexpr, dtype: tl.constexpr):
    """Word j of each of a lane's ROWS rows -> dtype (WARPS, 32[, ROWS if 2], 2, 2, 2), `_join8` of its elements."""
    weights = ()
    for e in tl.static_range(8):  # element e of a word: byte e // 2, the high nibble first
        w = tl.gather(table, (words[0][j] >> (e // 2 * 8 + 4 - 4 * (e % 2))) & 15, 1) * absmax[0]
        if ROWS == 2:
            w = tl.join(w, tl.gather(table, (words[1][j] >> (e // 2 * 8 + 4 - 4 * (e % 2))) & 15, 1) * absmax[1])
        weights = weights + (w.to(dtype),)
    return _join8(weights)


@triton.jit(do_not_specialize=["M", "tiles_per_part", "block_shift"])
def _quantized_linear_gemm_kernel(
    x_ptr, packed_ptr, absmax_ptr, dynamic_map_ptr, nested_absmax_ptr, nested_offset_ptr, values_ptr, bias_ptr, y_ptr,
    M, N, K, stride_xm, tiles_per_part, block_shift, s_ptr, lora_B_ptr, stride_sp, stride_sm, scaling,
    NESTED_BLOCK: tl.constexpr, HAS_BIAS: tl.constexpr, EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr, TILES_M: tl.constexpr, K_WIDTH: tl.constexpr,
    WARPS: tl.constexpr, SHARED: tl.constexpr, OPAQUE: tl.constexpr, RANK: tl.constexpr, S_PARTS: tl.constexpr,
):  # fmt: skip
    # One program owns BLOCK_N rows of W, TILES_M tiles of BLOCK_M rows of x and one part of K.
    # y is (parts, M, N): one part holds the whole sums, several are float32. A lane holds ROWS rows' WORDS words of eight weights.
    ROWS: tl.constexpr = 1 if SHARED else 2
    WORDS: tl.constexpr = 2 if SHARED else 4
    BLOCK_N: tl.constexpr = 8 * ROWS * WARPS
    BLOCK_K: tl.constexpr = 32 * WORDS
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    warp = tl.arange(0, WARPS)[:, None]
    lane = tl.arange(0, 32)[None, :]
    table = tl.load(values_ptr + lane % 16 + warp * 0)
    everywhere = tl.full((WARPS, 32), True, tl.int1)
    word_ptr = packed_ptr.to(tl.pointer_type(tl.int32))
    chunks = K // 32
    n0 = tl.program_id(0) * BLOCK_N
    m0 = tl.program_id(1) * BLOCK_M * TILES_M
    begin = tl.program_id(2) * tiles_per_part * 128
    end = tl.minimum(begin + tiles_per_part * 128, K)

    if SHARED:
        columns = tl.arange(0, BLOCK_K)
    else:
        # element u of group s of lane q's word sits in column (s, q, u) of a 32-column slice; k lies 32 q further for lane q
        column = tl.arange(0, 32)
        columns = column // K_WIDTH % 4 * 32 + column // (4 * K_WIDTH) * K_WIDTH + column % K_WIDTH
        columns = tl.max_contiguous(tl.multiple_of(columns, K_WIDTH), K_WIDTH)
    rows_x = tl.arange(0, BLOCK_M)
    offs_x = rows_x[:, None] * stride_xm + columns[None, :]
    acc = ()
    for _ in tl.static_range(TILES_M):
        acc = acc + (tl.zeros((BLOCK_N, BLOCK_M), tl.float32),)
    for k0 in range(begin, end, BLOCK_K):
        c = k0 // 32 + lane % 4 * WORDS // 4
        inside = c < chunks
        if not EVEN_K:
            c = tl.minimum(c, chunks - 1)
        words = ()
        absmax = ()
        for i in tl.static_range(ROWS):
            # rows past N repeat the last one; nothing of theirs is stored
            n = tl.minimum(n0 + (warp * ROWS + i) * 8 + lane // 4, N - 1)
            chunk = n * chunks + c  # below 2^31: `plan` sends 2^36 weights elsewhere
            first = chunk.to(tl.int64) * 4 + lane % (4 // WORDS) * WORDS
            word = tl.load(word_ptr + first[:, :, None] + tl.arange(0, WORDS)[None, None, :])
            words = words + (word.split() if SHARED else split4(word, WARPS, 32),)
            scale = decode_absmax(
                absmax_ptr, chunk.to(tl.uint32) >> block_shift, everywhere,
                dynamic_map_ptr, nested_absmax_ptr, nested_offset_ptr, NESTED_BLOCK,
            )  # fmt: skip
            absmax = absmax + (scale if EVEN_K else tl.where(inside, scale, 0.0),)
        if SHARED:
            even = _decode8(table, words, absmax, 0, ROWS, dtype)
            odd = _decode8(table, words, absmax, 1, ROWS, dtype)
            # axes: warp, lane (row, q), element e bit by bit (lowest first), word -> (warp, row) by (q, word, e)
            w = tl.join(even, odd).permute(0, 1, 5, 4, 3, 2).reshape(BLOCK_N, BLOCK_K)
            if OPAQUE and x_ptr.dtype.element_ty.primitive_bitwidth == 16:
                w = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [w], dtype=w.dtype, is_pure=False, pack=2)
            mask = rows_x[:, None] < M - m0
            if not EVEN_K:
                mask = mask & (columns < K - k0)[None, :]
            x = tl.load(x_ptr + (m0.to(tl.int64) * stride_xm + k0) + offs_x, mask=mask, other=0.0)
            acc = (tl.dot(w, tl.trans(x), acc[0], input_precision="ieee"),)
        else:
            for j in tl.static_range(WORDS):
                # axes: warp, row a, chunk q, half i, element e bit by bit (lowest first) -> (warp, i, a) by (s, q, u)
                w = _decode8(table, words, absmax, j, ROWS, dtype).reshape(WARPS, 8, 4, 2, 2, 2, 2)
                if K_WIDTH == 8:
                    w = w.permute(0, 3, 1, 2, 6, 5, 4)
                else:
                    w = w.permute(0, 3, 1, 6, 5, 2, 4)
                w = w.reshape(BLOCK_N, 32)
                k = k0 + 8 * j
                sums = ()
                for t in tl.static_range(TILES_M):
                    mask = rows_x[:, None] < M - m0 - t * BLOCK_M
                    if not EVEN_K:
                        mask = mask & (columns < K - k)[None, :]
                    x = tl.load(x_ptr + ((m0 + t * BLOCK_M).to(tl.int64) * stride_xm + k) + offs_x, mask=mask, other=0.0)
                    sums = sums + (tl.dot(w, tl.trans(x), acc[t], input_precision="ieee"),)
                acc = sums

    offs_n = n0 + tl.arange(0, BLOCK_N)
    for j in tl.static_range(TILES_M):
        offs_m = m0 + j * BLOCK_M + tl.arange(0, BLOCK_M)
        sums = acc[j]
        if RANK > 0:
            sums = add_tile(
                sums, s_ptr, lora_B_ptr, stride_sp, stride_sm, scaling, M, N, m0 + j * BLOCK_M, n0, dtype,
                BLOCK_M, BLOCK_N, RANK, S_PARTS,
            )  # fmt: skip
        y = tl.trans(sums)
        if HAS_BIAS:
            y += tl.load(bias_ptr + offs_n, mask=offs_n < N, other=0.0).to(tl.float32)[None, :]
        row = tl.program_id(2).to(tl.int64) * M + offs_m
        mask = (offs_m < M)[:, None] & (offs_n < N)[None, :]
        tl.store(y_ptr + row[:, None] * N + offs_n[None, :], y.to(y_ptr.dtype.element_ty), mask=mask)


def gemm_tile(M: int, N: int, backend_name: str, arch: int | str) -> tuple[dict[str, int], dict[str, int | bool]]:
    """The kernel's tile for M rows of x and N of W, and the compiler's options.

    mma.sync lays four warps along W's rows only for tiles of 16 rows of x, so a program takes several; wgmma and tcgen05 take
    more at once, wgmma in fragments of two consecutive k. 64 rows are shared by eight warps on NVIDIA; held to 64 registers,
    half of the warp slots fill and nothing spills. For mma.sync that takes two more things: no pipeline's addresses, and weights
    whose origin the compiler does not see (OPAQUE), since for operands loaded as bytes it chooses long fragments, all live at once.
    For wgmma, where N is no multiple of 16 and every element of y has an address of its own, it takes 72 (0.38 of the slots).
    """
    rows = next((r for r in TILES if M <= r), TILES[-1])
    options: dict[str, int | bool] = {"enable_fp_fusion": False, "num_warps": 4, "num_stages": 2}
    tile = {"BLOCK_M": rows, "TILES_M": 1, "K_WIDTH": 8, "WARPS": 4, "SHARED": False, "OPAQUE": False}
    generation = arch // 10 if isinstance(arch, int) else 0  # 9: wgmma, 10 and 11: tcgen05
    small = generation not in (9, 10, 11)
    if backend_name == "cuda" and rows == 64:
        tile |= {"WARPS": 8, "SHARED": True, "OPAQUE": small}
        options |= {"num_warps": 8, "num_stages": 1 if small else 2, "maxnreg": 72 if generation == 9 and N % 16 else 64}
    elif small:
        tile |= {"BLOCK_M": 16, "TILES_M": rows // 16}
    elif generation == 9:
        tile["K_WIDTH"] = 2
    return tile, options


def quantized_linear_gemm_triton(
    x: Tensor, packed: Tensor, absmax: Tensor, nested_absmax: Tensor | None, nested_offset: Tensor | None,
    nested_block_size: int, bias: Tensor | None, N: int, K: int, block_size: int, quant_type: str, split_k: int = 1,
    low_rank: LowRank | None = None,
) -> Tensor:  # fmt: skip
    """Launch the GEMM on x (M, K), K a multiple of 32 and packed aligned to 16 bytes. Returns (M, N) in x's dtype, with
    the term of `low_rank` added."""
    M = x.shape[0]
    # Loaded one by one, values of x have more addresses than 64 rows' registers leave room for. A tile's offsets are 32-bit.
    aligned = x.data_ptr() % 16 == 0 and x.stride(0) % 16 == 0
    x = x if aligned and x.stride(0) < 2**25 else x.clone(memory_format=torch.contiguous_format)
    y = x.new_empty(M, N)
    out = y if split_k == 1 else x.new_empty(split_k, M, N, dtype=torch.float32)
    nested_block = 0 if nested_absmax is None else nested_block_size
    packed, absmax = packed.contiguous(), absmax.contiguous()
    nested_absmax, bias = contiguous(nested_absmax), contiguous(bias)
    tile, options = gemm_tile(M, N, *current_arch())
    _quantized_linear_gemm_kernel[(triton.cdiv(N, BLOCK_N), triton.cdiv(M, tile["BLOCK_M"] * tile["TILES_M"]), split_k)](
        x, packed, absmax, codebooks.on("DYNAMIC_MAP", x.device) if nested_block else None, nested_absmax, nested_offset,
        codebooks.on(quant_type.upper(), x.device), bias if split_k == 1 else None, out,
        M, N, K, x.stride(0), triton.cdiv(triton.cdiv(K, 128), split_k), (block_size // 32).bit_length() - 1,
        NESTED_BLOCK=nested_block, HAS_BIAS=bias is not None and split_k == 1, EVEN_K=K % 128 == 0,
        **tile, **arguments(low_rank), **options,
    )  # fmt: skip
    if split_k > 1:
        add_parts_triton(out, bias, y)
    return y


def aot_variants() -> Iterator[Variant]:
    """Everything that `quantized_linear` can launch on each target: 16-bit x, and parts of K take no bias."""
    pointers = ("x", "packed", "absmax", "dynamic_map", "nested_absmax", "nested_offset", "values", "bias", "y")
    targets: tuple[tuple[str, int | str], ...] = (("cuda", 80), ("cuda", 90), ("cuda", 100), ("hip", "gfx942"))
    choices = itertools.product(TILES, ("bf16", "fp16"), (False, True), ("", "bias", "part"), (True, False))
    for (backend_name, arch), (M, dtype, nested, end, even_k) in itertools.product(targets, choices):
        tile, options = gemm_tile(M, 16, backend_name, arch)
        types = dict.fromkeys(pointers, "*fp32") | {"x": f"*{dtype}", "packed": "*u8", "absmax": "*u8" if nested else "*fp32"}
        types |= {"bias": f"*{dtype}" if end == "bias" else "constexpr", "y": "*fp32" if end == "part" else f"*{dtype}"}
        types |= {} if nested else dict.fromkeys(("dynamic_map", "nested_absmax", "nested_offset"), "constexpr")
        signature = {f"{name}_ptr": types[name] for name in pointers}
        signature |= {"M": "i32", "N": "i32:16", "K": "i32:16", "stride_xm": "i32:16"}
        signature |= {"tiles_per_part": "i32", "block_shift": "i32"}
        constexprs: dict[str, Any] = {name: None for name, kind in signature.items() if kind == "constexpr"}
        constexprs |= {"NESTED_BLOCK": 256 if nested else 0, "HAS_BIAS": end == "bias", "EVEN_K": even_k} | tile | NONE
        yield Variant(
            f"quantized_linear_gemm_{dtype}_{M}" + "_nested" * nested + f"_{end}" * bool(end) + "_tail" * (not even_k),
            _quantized_linear_gemm_kernel,
            signature | dict.fromkeys(constexprs, "constexpr"),
            constexprs,
            num_warps=tile["WARPS"],
            options=options,
            backends=(backend_name,),
            archs=(arch,),
            unaligned=("absmax_ptr", "nested_absmax_ptr", "bias_ptr", "N"),
            unaligned_options=gemm_tile(M, 1, backend_name, arch)[1],
        )
