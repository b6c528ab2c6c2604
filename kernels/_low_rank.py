"""The low-rank term of y = x W^T + scaling s B^T inside a kernel that computes x W^T: part of its sums, no pass of its own.

s          x's dtype (M, R), or float32 parts (S_PARTS, M, R) that add up to x' A^T, in order   (kernels/lora_linear_down.py)
lora_B     any float dtype (N, R)                                                               rounded to x's dtype

A program of the fused kernels owns whole rows of W, so it alone needs those rows of B, and every byte of B is read by one
column of programs: itemsize R a row of W, against K / 2 of the row itself: 1.6 % at R = 16 in bfloat16 and K = 4096. s stays in
the caches. No launch and no pass over y is added. Where K is cut into parts, the first part holds the term. Decoding starts from
it, its loads on their way beside W's; the GEMM ends with it, since before its loop it would cost registers that spill on an H100.
"""

# mypy: disable-error-code="assignment"
# (tuples of tensors grow while triton unrolls a loop)
from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from ._triton import tl, triton


class LowRank(NamedTuple):
    """scaling s lora_B^T: s (M, R) or float32 (parts, M, R), contiguous in its last axis; lora_B (N, R) contiguous."""

    s: Tensor
    lora_B: Tensor
    scaling: float


NONE: dict[str, Any] = {
    "s_ptr": None, "lora_B_ptr": None, "stride_sp": 0, "stride_sm": 0, "scaling": 0.0, "RANK": 0, "S_PARTS": 1,
}  # fmt: skip


def arguments(term: LowRank | None) -> dict[str, Any]:
    """What a fused kernel takes beside its own arguments."""
    if term is None:
        return NONE
    s = term.s if term.s.dim() == 3 else term.s[None]
    return {
        "s_ptr": s, "lora_B_ptr": term.lora_B, "stride_sp": s.stride(0), "stride_sm": s.stride(1), "scaling": term.scaling,
        "RANK": s.shape[2], "S_PARTS": s.shape[0],
    }  # fmt: skip


@triton.jit
def _add_parts_of_s(s_ptr, offs, mask, stride_sp, S_PARTS: tl.constexpr):
    s = tl.load(s_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    for _ in tl.static_range(1, S_PARTS):
        offs += stride_sp  # a constant where it is 1, so without methods; not p * stride_sp, which may pass 31 bits
        s += tl.load(s_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    return s


@triton.jit
def start_lanes(
    s_ptr, lora_B_ptr, stride_sp, stride_sm, scaling, M, N, m0, n0, lane, dtype: tl.constexpr,
    ROWS: tl.constexpr, TILE_M: tl.constexpr, LANES: tl.constexpr, RANK: tl.constexpr, S_PARTS: tl.constexpr,
):  # fmt: skip
    """ROWS * TILE_M tensors (WARPS, LANES): a lane's part of the sum over R for rows n0 (WARPS, 1) .. + ROWS and m0 .. + TILE_M."""
    rank = tl.where(tl.program_id(2) == 0, RANK, 0)  # nothing for the later parts of K
    acc = ()
    for j0 in tl.static_range(0, RANK, LANES):
        j = j0 + lane
        s = ()
        for m in tl.static_range(TILE_M):
            mask = (j < tl.where(m0 + m < M, rank, 0)) & (n0 < N)
            row = (m0 + m).to(tl.int64) * stride_sm + n0 * 0
            s = s + (_add_parts_of_s(s_ptr, row + j, mask, stride_sp, S_PARTS) * scaling,)
        following = ()
        for r in tl.static_range(ROWS):
            n = n0 + r
            b = tl.load(lora_B_ptr + n.to(tl.int64) * RANK + j, mask=(j < rank) & (n < N), other=0.0).to(dtype).to(tl.float32)
            for m in tl.static_range(TILE_M):
                following = following + (b * s[m] if j0 == 0 else tl.fma(b, s[m], acc[r * TILE_M + m]),)
        acc = following
    return acc


@triton.jit
def add_tile(
    acc, s_ptr, lora_B_ptr, stride_sp, stride_sm, scaling, M, N, m0, n0, dtype: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, RANK: tl.constexpr, S_PARTS: tl.constexpr,
):  # fmt: skip
    """acc float32 (BLOCK_N, BLOCK_M) plus the term of rows n0 .. of W and m0 .. of x, by tensor-core dots in x's dtype."""
    rank = tl.where(tl.program_id(2) == 0, RANK, 0)
    BLOCK_R: tl.constexpr = 16 if RANK <= 16 or BLOCK_M == 64 else 32
    rows_m = m0 + tl.arange(0, BLOCK_M)
    rows_n = n0 + tl.arange(0, BLOCK_N)
    for j0 in tl.range(0, RANK, BLOCK_R, num_stages=1):  # unrolled, 64 rows of x would not fit their 64 registers
        j = j0 + tl.arange(0, BLOCK_R)
        mask = (rows_m < M)[:, None] & (j < rank)[None, :]
        s = _add_parts_of_s(s_ptr, rows_m.to(tl.int64)[:, None] * stride_sm + j[None, :], mask, stride_sp, S_PARTS) * scaling
        mask = (rows_n < N)[:, None] & (j < rank)[None, :]
        b = tl.load(lora_B_ptr + rows_n.to(tl.int64)[:, None] * RANK + j[None, :], mask=mask, other=0.0)
        acc = tl.dot(b.to(dtype), tl.trans(s.to(dtype)), acc, input_precision="ieee")
    return acc
