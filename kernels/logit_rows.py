"""Rows of logits to log-probabilities, entropies and the gradient by the logits, in place: what lies between the head's products.

    lse = log sum_v exp z[v]     log p = z[y] - lse     H = lse - sum_v p[v] z[v]     z <- onehot(y) - p   (where asked for)

logits     float32 | float16 | bfloat16 (N, V)     rows contiguous; overwritten where `gradient` is asked for
labels     int64 (N,)                              a row of label ignore_index gives zeros everywhere; another label outside
                                                   [0, V) is an error on a CPU, on a GPU a NaN log p
logprobs, entropy  float32 (N,)                    entropy is 0 unless asked for; float64 logits, on a CPU, give float64

The sums are online: the largest logit so far, and the sums rescaled where it grows. Sums in float32; onehot - p is rounded once, as
the difference, since near a certain label a softmax rounded first would lose it.
Least bytes: a row read twice and written once (4 N V + 2 N V in bfloat16), or read once without the gradient. The second read comes
from the cache: a row of 152k is 300 KB. Oracle: reference/logit_rows.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import torch
from torch import Tensor

from . import cpu
from ._library import define
from ._triton import tl, triton
from ._variant import Variant
from .nf4 import DTYPES

_WARPS = 8


def _tile(aligned: bool) -> int:
    """Logits at once: 16 a thread, 8 where they are loaded one by one and their addresses take the registers."""
    return 4096 if aligned else 2048


@triton.jit(do_not_specialize=["ignore_index"])
def _logit_rows_kernel(
    logits_ptr, labels_ptr, logprobs_ptr, entropy_ptr, stride, V, ignore_index,
    GRADIENT: tl.constexpr, ENTROPY: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    # One program owns a row.
    # Exponents are taken of differences to the largest logit, which are exact near it, and in base 2.
    LOG2E: tl.constexpr = 1.4426950408889634
    row = tl.program_id(0)
    label = tl.load(labels_ptr + row)
    learned = label != ignore_index
    row_ptr = logits_ptr + row.to(tl.int64) * stride
    lanes = tl.arange(0, TILE)
    inside = (label >= 0) & (label < V)
    # Read before the row is overwritten, with the reductions below as barriers between.
    chosen = tl.load(row_ptr + tl.where(inside, label, 0)).to(tl.float32)
    top = tl.full((), -1.0e38, tl.float32)
    total, moment = tl.zeros((TILE,), tl.float32), tl.zeros((TILE,), tl.float32)
    if learned:
        for start in range(0, V, TILE):
            z = tl.load(row_ptr + start + lanes, mask=start + lanes < V, other=-float("inf")).to(tl.float32)
            new_top = tl.maximum(top, tl.max(z, axis=0))
            below, shift = (z - new_top) * LOG2E, (top - new_top) * LOG2E
            scale, p = tl.exp2(shift), tl.exp2(below)
            if ENTROPY:  # sum of p log2(p), in which a logit of -inf counts nothing
                moment = (moment + total * shift) * scale + tl.where(p > 0.0, p * below, 0.0)
            total = total * scale + p
            top = new_top
    sums = tl.sum(total, axis=0)
    logprob = tl.where(inside, (chosen - top) - tl.log2(sums) / LOG2E, float("nan"))
    tl.store(logprobs_ptr + row, tl.where(learned, logprob, 0.0))
    if ENTROPY:
        tl.store(entropy_ptr + row, tl.where(learned, (tl.log2(sums) - tl.sum(moment, axis=0) / sums) / LOG2E, 0.0))
    if GRADIENT:
        if learned:
            inverse = 1.0 / sums
            for start in range(0, V, TILE):
                mask = start + lanes < V
                z = tl.load(row_ptr + start + lanes, mask=mask, other=0.0).to(tl.float32)
                dz = tl.where(start + lanes == label, 1.0, 0.0) - tl.exp2((z - top) * LOG2E) * inverse
                tl.store(row_ptr + start + lanes, dz.to(logits_ptr.dtype.element_ty), mask=mask)
        else:
            for start in range(0, V, TILE):
                zero = tl.zeros((TILE,), logits_ptr.dtype.element_ty)
                tl.store(row_ptr + start + lanes, zero, mask=start + lanes < V)


def logit_rows_triton(logits: Tensor, labels: Tensor, ignore_index: int, gradient: bool, entropy: bool) -> tuple[Tensor, Tensor]:
    """Launch the kernel, one program a row: (logprobs, entropy); with `gradient` the logits become onehot - softmax."""
    N, V = logits.shape
    labels = labels.contiguous()
    logprobs = torch.empty(N, dtype=torch.float32, device=logits.device)
    entropies = torch.empty_like(logprobs) if entropy else torch.zeros_like(logprobs)
    if N:
        aligned = logits.stride(0) % 16 == 0  # which triton sees too, and then loads 128 bits at a time
        _logit_rows_kernel[(N,)](
            logits, labels, logprobs, entropies, logits.stride(0), V, ignore_index, GRADIENT=gradient,
            ENTROPY=entropy, TILE=_tile(aligned), num_warps=_WARPS, enable_fp_fusion=True,
        )  # fmt: skip
    return logprobs, entropies


def check_labels(labels: Tensor, V: int, ignore_index: int) -> None:
    outside = (labels != ignore_index) & ((labels < 0) | (labels >= V))
    if outside.any():
        row = int(outside.nonzero()[0])
        raise ValueError(
            f"label {int(labels[row])} of row {row} is outside the vocabulary of {V}; rows without a label have "
            f"ignore_index={ignore_index}"
        )


def _logit_rows_cpu(logits: Tensor, labels: Tensor, ignore_index: int, gradient: bool, entropy: bool) -> tuple[Tensor, Tensor]:
    check_labels(labels, logits.shape[1], ignore_index)
    return cpu.logit_rows(logits, labels, ignore_index, gradient, entropy)


def _fake(logits, labels, ignore_index, gradient, entropy):
    wide = torch.promote_types(logits.dtype, torch.float32)
    return logits.new_empty(len(logits), dtype=wide), logits.new_empty(len(logits), dtype=wide)


define(
    "logit_rows(Tensor(a!) logits, Tensor labels, int ignore_index, bool gradient, bool entropy) -> (Tensor, Tensor)",
    _fake,
    CPU=_logit_rows_cpu,
    CUDA=logit_rows_triton,
)


def aot_variants() -> Iterator[Variant]:
    """Every dtype, with the gradient and without, with the entropy and without, with rows aligned and not."""
    names = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
    for dtype, gradient, entropy, aligned in product(DTYPES, (False, True), (False, True), (False, True)):
        suffix = "_gradient" * gradient + "_entropy" * entropy + "_unaligned" * (not aligned)
        integer = "i32:16" if aligned else "i32"
        signature = {
            "logits_ptr": f"*{names[dtype]}", "labels_ptr": "*i64", "logprobs_ptr": "*fp32", "entropy_ptr": "*fp32",
            "stride": integer, "V": integer, "ignore_index": "i32",
        }  # fmt: skip
        constants = {"GRADIENT": gradient, "ENTROPY": entropy, "TILE": _tile(aligned)}
        options = {"enable_fp_fusion": True}  # sums and products, not bytes: fused they are fewer and nearer
        name = f"logit_rows_{names[dtype]}{suffix}"
        yield Variant(name, _logit_rows_kernel, signature, constants, num_warps=_WARPS, options=options)
