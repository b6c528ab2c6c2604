"""Sums over K cut into parts, added in a fixed order: what a kernel with too few programs to fill the GPU ends with.

    y[m, n] = sum_s partial[s, m, n] (s ascending) + bias[n]

partial    float32 (SPLIT_K, M, N)    each part written whole by the program that owns it; no atomics, so runs repeat bit for bit
bias       (N,) or None
y          float32 | float16 | bfloat16 (M, N)
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

from torch import Tensor

from ._triton import tl, triton
from ._variant import Variant

_BLOCK = 1024
MOST = tl.constexpr(16)


@triton.jit(do_not_specialize=["parts"])
def _add_parts_kernel(
    partial_ptr, bias_ptr, y_ptr, size, N, parts, SPLIT_K: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK: tl.constexpr
):
    # One program owns BLOCK elements of the flattened y. The first SPLIT_K parts are read at once, any further in a loop.
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < size
    acc = tl.load(partial_ptr + offs, mask=mask, other=0.0)
    for _ in tl.static_range(1, SPLIT_K):
        partial_ptr += size  # not s * size, which may pass 31 bits
        acc += tl.load(partial_ptr + offs, mask=mask, other=0.0)
    if SPLIT_K == MOST:
        for _ in range(SPLIT_K, parts):
            partial_ptr += size
            acc += tl.load(partial_ptr + offs, mask=mask, other=0.0)
    if HAS_BIAS:
        acc += tl.load(bias_ptr + offs % N, mask=mask, other=0.0).to(tl.float32)
    tl.store(y_ptr + offs, acc.to(y_ptr.dtype.element_ty), mask=mask)


def add_parts_triton(partial: Tensor, bias: Tensor | None, y: Tensor) -> None:
    """y (M, N) = the sum of partial (SPLIT_K, M, N) over its first axis, plus bias (N,)."""
    _add_parts_kernel[(triton.cdiv(y.numel(), _BLOCK),)](
        partial, bias, y, y.numel(), y.shape[1], partial.shape[0],
        SPLIT_K=min(partial.shape[0], MOST.value), HAS_BIAS=bias is not None, BLOCK=_BLOCK, num_warps=4,
    )  # fmt: skip


def aot_variants() -> Iterator[Variant]:
    """Every split that `quantized_linear` can choose."""
    for dtype, split_k, has_bias in itertools.product(("fp32", "fp16", "bf16"), (1, 2, 4, 8, 16), (False, True)):
        signature = {"partial_ptr": "*fp32", "bias_ptr": f"*{dtype}" if has_bias else "constexpr", "y_ptr": f"*{dtype}"}
        signature |= {"size": "i32:16", "N": "i32:16", "parts": "i32"}
        constexprs: dict[str, Any] = {"SPLIT_K": split_k, "HAS_BIAS": has_bias, "BLOCK": _BLOCK}
        constexprs |= {} if has_bias else {"bias_ptr": None}
        yield Variant(
            f"add_parts_{dtype}_{split_k}" + "_bias" * has_bias,
            _add_parts_kernel,
            signature | dict.fromkeys(constexprs, "constexpr"),
            constexprs,
            unaligned=("bias_ptr", "size", "N"),
        )
