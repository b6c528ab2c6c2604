"""The low-rank terms of a batch whose rows have adapters of their own, on tensor cores: shrink, then expand, tile by tile.

    s[p, j] = sum_k x[m, k] A[i, j, k]               shrink     p a place in the sorted order, m = order[p], i its adapter
    y[m, o] += scaling[i] sum_j s[p, j] B[i, o, j]   expand     j below ranks[i]; s rounded to x's dtype, as x A^T is anywhere

x          float32 | float16 | bfloat16 (M, K)   any row stride
lora_A     x's dtype (n, r, K)                   lora_B x's dtype (n, N, r), scaling float32 (n,), ranks int32 (n,) or None
order, tiles   int32                             what `segment_rows_triton` found (kernels/_segments.py)
s          float32 (parts, M, r)                 of which a tile fills its rows and its rank
y          x's dtype (M, N)                      in place: what the base left there

A tile is up to BLOCK_M rows of one adapter, so A and B are read once a tile, and a row of another adapter costs a tile of its own.
With one of 16 rows filled that is the batched matrix-vector product (BGMV) of Punica, and a tensor core still does it in fewer
instructions than multiply-adds would take; filled tiles are Punica's segmented product (SGMV). K is cut into parts of PART columns,
each summed from zero, and the parts are added in ascending order: by `expand` where rows are few and programs are wanted (SPLIT),
else right in `shrink`, which gives the same sums. A row's result is fixed by K, r and its own values, whatever the rest of
the batch is, to the bit. Columns past an adapter's rank are neither computed nor, but for what shares their 16 bytes, read.

Least bytes: with b bytes a value, a adapters in the batch and m rows that have one, b (a r (K + N) + m (K + 2 N)) + 8 m r.
Least flops: 2 m r (K + N). At m = a = 32, r = 16, K = N = 4096, bf16: 9.2 MB and 0.13 GFlop, so bytes rule; the base in NF4 takes
8.7 MB more. Least instructions per value of A or B, a lane's: 1/8 to load it, 1/8 to read it as a fragment, and one MMA
(16 x 8 x 16) for every 128: 0.25 / 32 + 1 / 128 = 0.016 warp instructions. Oracle: reference/multi_lora_linear.py.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ._rows import contiguous
from ._segments import FEW_ROWS, tile_rows
from ._triton import backend, tl, triton
from ._variant import Variant

PART = 512  # columns of K summed on their own


@triton.jit(do_not_specialize=["n", "M", "slots", "rank"])
def _multi_lora_shrink_kernel(
    x_ptr, A_ptr, ranks_ptr, order_ptr, tiles_ptr, s_ptr, n, M, K, stride_xm, slots, rank,
    R: tl.constexpr, HAS_RANKS: tl.constexpr, SPLIT: tl.constexpr, PART: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    # One program owns a tile's rows, BLOCK_R columns of s and, where SPLIT, one part of K.
    slot = tl.program_id(0)
    rows = tl.load(tiles_ptr + 2 * slots + slot)
    adapter = tl.load(tiles_ptr + slot)
    if (rows == 0) | (adapter >= n):
        return
    if HAS_RANKS:
        rank = tl.minimum(tl.load(ranks_ptr + adapter), R)
    r0 = tl.program_id(1) * BLOCK_R
    if r0 >= rank:
        return
    offs_m = tl.arange(0, BLOCK_M)
    offs_r = r0 + tl.arange(0, BLOCK_R)
    offs_k = tl.arange(0, BLOCK_K)
    place = tl.load(tiles_ptr + slots + slot) + offs_m
    filled = offs_m < rows
    m = tl.load(order_ptr + place, mask=filled, other=0)
    x_rows = x_ptr + m.to(tl.int64)[:, None] * stride_xm
    a_rows = A_ptr + (adapter.to(tl.int64) * R + offs_r)[:, None] * K
    begin = tl.program_id(2) * PART if SPLIT else 0
    end = begin + PART if SPLIT else K
    total = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for part in range(begin, end, PART):
        acc = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
        for k0 in range(part, tl.minimum(part + PART, K), BLOCK_K):
            k = k0 + offs_k
            x = tl.load(x_rows + k[None, :], mask=filled[:, None] & (k < K)[None, :], other=0.0)
            a = tl.load(a_rows + k[None, :], mask=(offs_r < rank)[:, None] & (k < K)[None, :], other=0.0)
            acc = tl.dot(x, tl.trans(a), acc, input_precision="ieee")
        total += acc
    s = s_ptr + (tl.program_id(2).to(tl.int64) * M + place)[:, None] * R + offs_r[None, :]
    tl.store(s, total, mask=filled[:, None] & (offs_r < rank)[None, :])


@triton.jit
def _add_columns(
    acc, s_rows, b_rows, filled, inside, r0, rank, M, parts, dtype: tl.constexpr, R: tl.constexpr, BLOCK_R: tl.constexpr
):
    """acc plus s B^T over the rank's columns from r0 on."""
    offs_r = r0 + tl.arange(0, BLOCK_R)
    kept = offs_r < rank
    s = tl.load(s_rows + offs_r[None, :], mask=filled[:, None] & kept[None, :], other=0.0)
    for part in range(1, parts):
        s += tl.load(s_rows + (part * M * R + offs_r)[None, :], mask=filled[:, None] & kept[None, :], other=0.0)
    # eight columns at a time, so that a lane reads 16 bytes; what lies past the rank in them becomes zero
    near = offs_r // 8 < (rank + 7) // 8 if R % 8 == 0 else kept
    b = tl.where(kept[None, :], tl.load(b_rows + offs_r[None, :], mask=inside & near[None, :], other=0.0), 0.0)
    return tl.dot(s.to(dtype), tl.trans(b), acc, input_precision="ieee")


@triton.jit(do_not_specialize=["n", "M", "slots", "parts", "rank"])
def _multi_lora_expand_kernel(
    s_ptr, B_ptr, scaling_ptr, ranks_ptr, order_ptr, tiles_ptr, y_ptr, n, M, N, slots, parts, rank,
    R: tl.constexpr, HAS_RANKS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    # One program owns a tile's rows and BLOCK_N columns of y.
    slot = tl.program_id(1)
    rows = tl.load(tiles_ptr + 2 * slots + slot)
    if rows == 0:
        return
    adapter = tl.load(tiles_ptr + slot)
    dtype: tl.constexpr = y_ptr.dtype.element_ty
    offs_m = tl.arange(0, BLOCK_M)
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    place = (tl.load(tiles_ptr + slots + slot) + offs_m).to(tl.int64)
    filled = offs_m < rows
    m = tl.load(order_ptr + place, mask=filled, other=0)
    out = y_ptr + m.to(tl.int64)[:, None] * N + offs_n[None, :]
    mask = filled[:, None] & (offs_n < N)[None, :]
    if adapter >= n:  # an id that names no adapter: NaN, never the base
        tl.store(out, tl.full((BLOCK_M, BLOCK_N), float("nan"), dtype), mask=mask)
        return
    if HAS_RANKS:
        rank = tl.minimum(tl.load(ranks_ptr + adapter), R)
    s_rows = s_ptr + place[:, None] * R
    b_rows = B_ptr + (adapter.to(tl.int64) * N + offs_n)[:, None] * R
    inside = (offs_n < N)[:, None]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if R <= BLOCK_R:
        acc = _add_columns(acc, s_rows, b_rows, filled, inside, 0, rank, M, parts, dtype, R, BLOCK_R)
    else:
        for r0 in range(0, rank, BLOCK_R):
            acc = _add_columns(acc, s_rows, b_rows, filled, inside, r0, rank, M, parts, dtype, R, BLOCK_R)
    y = tl.load(out, mask=mask, other=0.0).to(tl.float32) + tl.load(scaling_ptr + adapter) * acc
    tl.store(out, y.to(dtype), mask=mask)


def tiles_of(M: int, r: int, dtype: torch.dtype) -> tuple[dict[str, int], dict[str, int]]:
    """Blocks and warps of shrink and of expand for M rows of rank up to r. Shrink has a warp for every eight columns of s. float32,
    which tensor cores would round, is multiplied by the ordinary ones, in smaller blocks."""
    block_m, power = tile_rows(M), max(16, triton.next_power_of_2(r))
    half = dtype != torch.float32
    block_r = min(64 if half else 16, power)
    shrink = {"BLOCK_M": block_m, "BLOCK_R": block_r, "BLOCK_K": 128 if half else 32}
    expand = {"BLOCK_M": block_m, "BLOCK_R": min(32 if half else 16, power), "BLOCK_N": 128 if half else 32}
    return shrink | {"num_warps": min(4, block_r // 8), "num_stages": 3}, expand | {"num_warps": 4, "num_stages": 1}


def multi_lora_add_triton(
    y: Tensor, x: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: Tensor, ranks: Tensor | None, order: Tensor, tiles: Tensor
) -> None:
    """Launch shrink and expand on x (M, K), y (M, N) contiguous; rows of unknown ids become NaN."""
    (n, r, K), (M, N), slots = lora_A.shape, y.shape, tiles.shape[1]
    if not slots or not N:
        return
    scaling, ranks = scaling.contiguous(), contiguous(ranks)
    shrink, expand = tiles_of(M, r, x.dtype)
    split = M <= FEW_ROWS
    parts = triton.cdiv(K, PART) if split else 1
    s = x.new_empty(parts, M, r, dtype=torch.float32)
    common = {"R": r, "HAS_RANKS": ranks is not None, "enable_fp_fusion": False}
    if backend() == "hip":  # one shape of matrix instruction, so that tiles of 16 and of 32 rows add in the same order
        common["matrix_instr_nonkdim"] = 16
    if s.numel():
        _multi_lora_shrink_kernel[(slots, triton.cdiv(r, shrink["BLOCK_R"]), parts)](
            x, lora_A, ranks, order, tiles, s, n, M, K, x.stride(0), slots, r,
            SPLIT=split, PART=PART, **common, **shrink,
        )  # fmt: skip
    _multi_lora_expand_kernel[(triton.cdiv(N, expand["BLOCK_N"]), slots)](
        s, lora_B, scaling, ranks, order, tiles, y, n, M, N, slots, parts, r, **common, **expand,
    )  # fmt: skip


CASES = (  # dtype, rows, rank, whether each adapter's rank is given
    ("bf16", 1, 16, False), ("bf16", 1, 16, True), ("bf16", 1, 64, True), ("bf16", 1, 64, False), ("bf16", 1, 32, True),
    ("bf16", 1024, 16, True), ("bf16", 1024, 64, False), ("fp16", 1, 8, True), ("fp16", 1024, 256, False), ("fp32", 1, 5, True),
    ("fp32", 1024, 64, False),
)  # fmt: skip


def aot_variants() -> Iterator[Variant]:
    """Each dtype, few rows and many, ranks that fill a tile, half of one and several, given and not: not all combinations."""
    for backend_name, extra in (("cuda", {}), ("hip", {"matrix_instr_nonkdim": 16})):
        for dtype, M, r, has_ranks in CASES:
            common = {"R": r, "HAS_RANKS": has_ranks}
            options = {"enable_fp_fusion": False, **extra}
            index = {"ranks_ptr": "*i32", "order_ptr": "*i32", "tiles_ptr": "*i32"}
            shrink, expand = tiles_of(M, r, torch.float32 if dtype == "fp32" else torch.bfloat16)
            arguments = {"x_ptr": f"*{dtype}", "A_ptr": f"*{dtype}", **index, "s_ptr": "*fp32", "n": "i32", "M": "i32"}
            arguments |= {"K": "i32:16", "stride_xm": "i32:16", "slots": "i32", "rank": "i32"}
            launches = [("shrink", _multi_lora_shrink_kernel, arguments, shrink | {"SPLIT": M <= FEW_ROWS, "PART": PART})]
            arguments = {"s_ptr": "*fp32", "B_ptr": f"*{dtype}", "scaling_ptr": "*fp32", **index, "y_ptr": f"*{dtype}"}
            arguments |= {"n": "i32", "M": "i32", "N": "i32:16", "slots": "i32", "parts": "i32", "rank": "i32"}
            launches.append(("expand", _multi_lora_expand_kernel, arguments, expand))
            for name, kernel, signature, blocks in launches:
                warps, stages = blocks.pop("num_warps"), blocks.pop("num_stages")
                constexprs = common | blocks
                yield Variant(
                    f"multi_lora_{name}_{dtype}_{M}_{r}" + "_ranks" * has_ranks, kernel,
                    signature | dict.fromkeys(constexprs, "constexpr"), constexprs, warps, stages, options, (backend_name,),
                )  # fmt: skip
