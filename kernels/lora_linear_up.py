"""y0 = scaling s B^T + bias: the second factor of a low-rank update, written where the vendor's GEMM then adds x W^T.

    y[m, n] = drop'(scaling * sum_j s[m, j] b[n, j]) + bias[n]

s          x's dtype (M, R)                      x' A^T; in the backward pass V, with b = A^T
b          any float dtype (N, R)                any strides; rounded to s's dtype
bias       s's dtype (N,) or None
y          s's dtype (M, N)                      drop' multiplies by the forward pass's mask (dX), or does nothing (y)

Order: low-rank term first, then y.addmm_(x, W^T), whose kernel reads y as its addend (beta = 1). Adding the term to a finished
x W^T reads and writes y again in a pass of its own: 2 itemsize M N bytes. This way it is itemsize M N here, and as much read in
the epilogue of a GEMM that is bound by its arithmetic; the bias costs nothing, and with dropout dX needs no second pass either.
Least bytes: itemsize (M N + M R + N R). Oracle: reference/lora_linear.py.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from ._dropout import arguments, kept
from ._rows import contiguous
from ._triton import tl, triton
from ._variant import Variant
from .lora_linear_down import rank_tile


@triton.jit(do_not_specialize=["M", "seed", "threshold"])
def _lora_linear_up_kernel(
    s_ptr, b_ptr, bias_ptr, y_ptr, M, N, stride_sm, stride_bn, stride_bj, scaling, seed, threshold, keep_scale,
    RANK: tl.constexpr, HAS_BIAS: tl.constexpr, DROPOUT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    # One program owns BLOCK_M rows and BLOCK_N columns of y. DROPOUT: 0 none, 1 any N, 2 N in fours.
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for j0 in range(0, RANK, BLOCK_R):
        j = j0 + tl.arange(0, BLOCK_R)
        mask_s, mask_b = (rows < M)[:, None] & (j < RANK)[None, :], (offs_n < N)[:, None] & (j < RANK)[None, :]
        s = tl.load(s_ptr + rows.to(tl.int64)[:, None] * stride_sm + j[None, :], mask=mask_s, other=0.0)
        b = b_ptr + offs_n.to(tl.int64)[:, None] * stride_bn + j.to(tl.int64)[None, :] * stride_bj
        acc = tl.dot(s, tl.trans(tl.load(b, mask=mask_b, other=0.0).to(s.dtype)), acc, input_precision="ieee")
    y = acc * scaling
    if DROPOUT:
        keep = kept(rows, tl.program_id(1) * BLOCK_N, N, seed, threshold, BLOCK_M, BLOCK_N, DROPOUT == 2)
        y = tl.where(keep, y * keep_scale, 0.0)
    if HAS_BIAS:
        y += tl.load(bias_ptr + offs_n, mask=offs_n < N, other=0.0).to(tl.float32)[None, :]
    mask = (rows < M)[:, None] & (offs_n < N)[None, :]
    tl.store(y_ptr + rows.to(tl.int64)[:, None] * N + offs_n[None, :], y.to(y_ptr.dtype.element_ty), mask=mask)


def up_tile(R: int, itemsize: int, dropout: bool) -> dict[str, int]:
    """Rows and columns of y and columns of s that a program takes at once: less where random words and fp32 want registers."""
    narrow = dropout or itemsize == 4
    return {"BLOCK_M": 32 if narrow else 64, "BLOCK_N": 64 if narrow else 128, "BLOCK_R": rank_tile(R, 32)}


def lora_linear_up_triton(
    s: Tensor, b: Tensor, scaling: float = 1.0, bias: Tensor | None = None, dropout: float = 0.0, seed: int = 0
) -> Tensor:
    """drop'(scaling s b^T) + bias for s (M, R), contiguous in rows, and b (N, R): (M, N) in s's dtype."""
    (M, R), N = s.shape, b.shape[0]
    y = s.new_empty(M, N)
    tile = up_tile(R, s.element_size(), dropout > 0)
    bias = contiguous(bias)
    _lora_linear_up_kernel[(triton.cdiv(M, tile["BLOCK_M"]), triton.cdiv(N, tile["BLOCK_N"]))](
        s, b, bias, y, M, N, s.stride(0), b.stride(0), b.stride(1), scaling, **arguments(dropout, seed, N),
        RANK=R, HAS_BIAS=bias is not None, **tile, num_warps=4, num_stages=1,
    )  # fmt: skip
    return y


def aot_variants() -> Iterator[Variant]:
    """Ranks of each tile and of two, either layout of b, each way of dropping; not all combined."""
    cases = [("bf16", R, 0, True) for R in (8, 16, 32, 128)] + [("bf16", R, 2, False) for R in (16, 128)]
    cases += [("fp16", 16, 1, False), ("fp32", 64, 2, False)]
    for dtype, R, dropout, forward in cases:
        signature = {"s_ptr": f"*{dtype}", "b_ptr": "*fp32", "bias_ptr": f"*{dtype}", "y_ptr": f"*{dtype}"}
        signature |= {"M": "i32", "N": "i32:16", "stride_sm": "i32:16" if R % 16 == 0 else "i32"}
        signature |= {"stride_bn" if forward else "stride_bj": "i32:16" if R % 16 == 0 or not forward else "i32"}
        signature |= {"scaling": "fp32", "seed": "i64", "threshold": "i32", "keep_scale": "fp32"}
        constexprs = {"RANK": R, "HAS_BIAS": forward, "DROPOUT": dropout, "stride_bj" if forward else "stride_bn": 1}
        constexprs |= up_tile(R, 4 if dtype == "fp32" else 2, dropout > 0)
        yield Variant(
            f"lora_linear_up_{dtype}_{R}" + f"_drop{dropout}" * (dropout > 0), _lora_linear_up_kernel,
            signature | dict.fromkeys(constexprs, "constexpr"), constexprs, num_stages=1,
        )  # fmt: skip
