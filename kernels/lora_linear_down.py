"""s = x' A^T: the first factor of a low-rank update, x to a few columns, with dropout done on the way.

    s[m, j] = scaling * sum_k x'[m, k] a[j, k]             scaling 1 for x' A^T; V = scaling dY B is the same sum with a = B^T

x          float32 | float16 | bfloat16 (M, K)   any row stride; x' = drop(x), never in memory
a          any float dtype (R, K)                any strides; rounded to x's dtype; a group's A's lie one under the other
s          x's dtype (M, R)                      or float32 partial sums (SPLIT_K, M, R) for the reader to add, in order

Least bytes: itemsize (M K + R K + M R), and 4 M R a part of K where K is cut; flops 2 M K R. Up to R = 64 that is 64 flops a byte
at the most, half of what a GPU needs to be bound by its arithmetic, so the vendor's GEMM could not be faster; it would need x' in
memory. K is cut only while x has too few rows to fill the GPU (`lora_linear_plan.down_parts`). Oracle: reference/lora_linear.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ._dropout import arguments, drop, kept
from ._triton import tl, triton
from ._variant import Variant


@triton.jit(do_not_specialize=["M", "R", "tiles_per_part", "seed", "threshold"])  # R known, rank 128 spills on sm_100
def _lora_linear_down_kernel(
    x_ptr, a_ptr, s_ptr, M, K, R, stride_xm, stride_aj, stride_ak, tiles_per_part, scaling, seed, threshold, keep_scale,
    DROPOUT: tl.constexpr, EVEN_K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    # One program owns BLOCK_M rows of x, BLOCK_R rows of a and one part of K. DROPOUT: 0 none, 1 any K, 2 K in fours.
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_j = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    offs_k = tl.arange(0, BLOCK_K)
    x_row = x_ptr + rows.to(tl.int64)[:, None] * stride_xm
    a_row = a_ptr + offs_j.to(tl.int64)[:, None] * stride_aj
    begin = tl.program_id(2) * tiles_per_part * BLOCK_K
    end = tl.minimum(begin + tiles_per_part * BLOCK_K, K)
    acc = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for k0 in range(begin, end, BLOCK_K):
        k = k0 + offs_k
        mask_x, mask_a = (rows < M)[:, None], (offs_j < R)[:, None]
        if not EVEN_K:
            mask_x, mask_a = mask_x & (k < K)[None, :], mask_a & (k < K)[None, :]
        x = tl.load(x_row + k[None, :], mask=mask_x, other=0.0)
        a = tl.load(a_row + k.to(tl.int64)[None, :] * stride_ak, mask=mask_a, other=0.0).to(x.dtype)
        if DROPOUT:
            x = drop(x, kept(rows, k0, K, seed, threshold, BLOCK_M, BLOCK_K, DROPOUT == 2), keep_scale)
        acc = tl.dot(x, tl.trans(a), acc, input_precision="ieee")
    s = s_ptr + (tl.program_id(2).to(tl.int64) * M + rows)[:, None] * R + offs_j[None, :]
    tl.store(s, (acc * scaling).to(s_ptr.dtype.element_ty), mask=(rows < M)[:, None] & (offs_j < R)[None, :])


def down_tile(M: int, R: int, itemsize: int, dropout: bool) -> dict[str, int]:
    """Rows of x, columns and rows of a that a program takes at once. Random words and fp32 sums want registers: less at once."""
    narrow = dropout or itemsize == 4
    rows = 16 if M <= 16 or (dropout and R > 32) else 32 if narrow or R > 64 or (M <= 2048 and R <= 32) else 64
    columns = (256 if R <= 32 and not narrow else 64 if R > 32 and dropout and itemsize == 2 else 128) // itemsize
    return {"BLOCK_M": rows, "BLOCK_K": columns, "BLOCK_R": rank_tile(R, 64 if narrow else 128)}


def down_options(tile: dict[str, int]) -> dict[str, Any]:
    """Warps: no more than the result has tensor-core tiles of 16 x 8. Stages: two keep enough bytes of a wide tile on their way,
    and three spill (sm_80, sm_100)."""
    return {"num_warps": min(4, tile["BLOCK_M"] * tile["BLOCK_R"] // 128), "num_stages": 2 if tile["BLOCK_R"] >= 64 else 3}


def rank_tile(R: int, most: int) -> int:
    """R rounded up to a power of two that a tensor core takes, `most` at the most."""
    return min(max(triton.next_power_of_2(R), 16), most)


def lora_linear_down_triton(
    x: Tensor, a: Tensor, scaling: float = 1.0, dropout: float = 0.0, seed: int = 0, parts: int = 1
) -> Tensor:
    """scaling drop(x) a^T for x (M, K) and a (R, K): (M, R) in x's dtype, or float32 (parts, M, R), which add up to it."""
    (M, K), R = x.shape, a.shape[0]
    s = x.new_empty(M, R) if parts == 1 else x.new_empty(parts, M, R, dtype=torch.float32)
    tile = down_tile(M, R, x.element_size(), dropout > 0)
    tiles = triton.cdiv(K, tile["BLOCK_K"])
    _lora_linear_down_kernel[(triton.cdiv(M, tile["BLOCK_M"]), triton.cdiv(R, tile["BLOCK_R"]), parts)](
        x, a, s, M, K, R, x.stride(0), a.stride(0), a.stride(1), triton.cdiv(tiles, parts), scaling,
        **arguments(dropout, seed, K), EVEN_K=K % tile["BLOCK_K"] == 0, **tile, **down_options(tile),
    )  # fmt: skip
    return s


def aot_variants() -> Iterator[Variant]:
    """Every tile that can be chosen in bf16, with each way of dropping and either operand transposed, not all combined."""
    cases = [(M, R, "bf16", 0, "fp32", True) for M in (16, 2048) for R in (16, 32, 64, 128)]
    cases += [(4096, R, "bf16", 0, "fp32", True) for R in (16, 32)]
    cases += [(16, 16, "bf16", 2, "fp32", True), (2048, 16, "bf16", 2, "fp32", True), (4096, 64, "bf16", 2, "bf16", False)]
    cases += [(2048, 128, "bf16", 2, "fp32", True), (2048, 16, "fp16", 1, "fp16", False), (2048, 16, "fp32", 2, "fp32", True)]
    cases += [(4096, 64, "fp32", 1, "fp32", False)]
    for M, R, dtype, dropout, a, even in cases:
        tile = down_tile(M, R, 4 if dtype == "fp32" else 2, dropout > 0)
        signature = {"x_ptr": f"*{dtype}", "a_ptr": f"*{a}", "s_ptr": "*fp32" if M == 16 else f"*{dtype}"}
        signature |= {"M": "i32", "K": "i32:16", "R": "i32", "stride_xm": "i32:16", "tiles_per_part": "i32"}
        # A's rows are contiguous; B^T's columns are
        signature |= {"stride_aj": "i32:16"} if even else {"stride_ak": "i32:16"}
        signature |= {"scaling": "fp32", "seed": "i64", "threshold": "i32", "keep_scale": "fp32"}
        constexprs = {"DROPOUT": dropout, "EVEN_K": even, **tile, "stride_ak" if even else "stride_aj": 1}
        yield Variant(
            f"lora_linear_down_{dtype}_{tile['BLOCK_M']}_{R}" + f"_drop{dropout}" * (dropout > 0) + "_odd" * (not even),
            _lora_linear_down_kernel, signature | dict.fromkeys(constexprs, "constexpr"), constexprs, **down_options(tile),
        )  # fmt: skip
