"""RMSNorm and its gradients, each in one pass (Zhang and Sennrich, 2019, arXiv:1910.07467, eq. 4, with Hugging Face's eps).

    r = (mean(x^2) + eps)^-1/2        y = w n,  n = x r
    dw = sum over rows of dy n        dx = r (w dy - n mean(w dy n))

x, y, dy, dx  float32 | float16 | bfloat16 (..., D)    x and dy may be strided
weight        any of these (D,)                        dweight has its dtype, its sums are float32
rstd          float32 (N,)                             r, the one thing saved beside x and the weight; N = rows of x

Sums and products in float32, rounded once. dweight is summed over 8 rows at a time (32 on a CPU), then over these sums: the
same bits however many threads there are, and no long chain of additions. Least bytes, in bfloat16: 2 N D read and 2 N D written
forward; 4 N D read and 2 N D written backward, and 4 D for every 8 rows where dweight is asked for. A row is one program's
registers, up to 8192 wide (over 4096 in multiples of 16: else registers spill); others, and float64, take PyTorch's kernels.
Oracle: reference/rms_norm.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from math import prod

import torch
from torch import Tensor

from . import cpu
from ._library import define, differentiable
from ._rows import rows_of
from ._triton import tl, triton
from ._variant import Variant
from .cpu import pytorch_rms_norm
from .nf4 import DTYPES

_WIDEST, _WIDEST_UNALIGNED = 8192, 4096
_ROWS = 8


@triton.jit
def _rms_norm_fwd_kernel(x_ptr, weight_ptr, y_ptr, rstd_ptr, stride, D, eps, BLOCK: tl.constexpr):
    # One program owns a row, in registers: it is read once.
    row = tl.program_id(0).to(tl.int64)
    offs = tl.arange(0, BLOCK)
    mask = offs < D
    x = tl.load(x_ptr + row * stride + offs, mask=mask, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    rstd = tl.rsqrt(tl.sum(x * x, axis=0) / D + eps)
    tl.store(rstd_ptr + row, rstd)
    tl.store(y_ptr + row * D + offs, (x * rstd * weight).to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["N"])
def _rms_norm_bwd_kernel(
    x_ptr, dy_ptr, weight_ptr, rstd_ptr, dx_ptr, dweight_ptr, stride, dy_stride, N, D,
    ROWS: tl.constexpr, DWEIGHT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # One program owns ROWS rows, one after another, and their row of dweight, which stays in registers.
    first = tl.program_id(0).to(tl.int64) * ROWS
    offs = tl.arange(0, BLOCK)
    mask = offs < D
    weight = tl.load(weight_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    dweight = tl.zeros((BLOCK,), tl.float32)
    for i in range(0, tl.minimum(ROWS, N - tl.program_id(0) * ROWS)):
        row = first + i
        rstd = tl.load(rstd_ptr + row)
        n = tl.load(x_ptr + row * stride + offs, mask=mask, other=0.0).to(tl.float32) * rstd
        dy = tl.load(dy_ptr + row * dy_stride + offs, mask=mask, other=0.0).to(tl.float32)
        if DWEIGHT:
            dweight += dy * n
        dn = dy * weight
        dx = rstd * (dn - n * (tl.sum(dn * n, axis=0) / D))
        tl.store(dx_ptr + row * D + offs, dx.to(dx_ptr.dtype.element_ty), mask=mask)
    if DWEIGHT:
        tl.store(dweight_ptr + tl.program_id(0).to(tl.int64) * D + offs, dweight, mask=mask)


def _block(D: int) -> tuple[int, int]:
    """(BLOCK, warps) of a row of D: 16 elements a thread, fewer in short rows."""
    block = max(triton.next_power_of_2(D), 32)
    return block, min(max(block // 512, 1), 16)


def _takes(x: Tensor) -> bool:
    D = x.shape[-1]
    return x.dtype in DTYPES and x.numel() > 0 and (D <= _WIDEST_UNALIGNED or (D <= _WIDEST and D % 16 == 0))


def _rows(tensor: Tensor) -> Tensor:
    """(N, D), the widest of them at multiples of 16 elements."""
    rows = rows_of(tensor)
    return rows if rows.shape[1] <= _WIDEST_UNALIGNED or rows.stride(0) % 16 == 0 else rows.contiguous()


def rms_norm_triton(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Launch the forward kernel, one program a row: (y, rstd)."""
    if not _takes(x):
        return pytorch_rms_norm.rms_norm(x, weight, eps)
    rows, weight = _rows(x), weight.contiguous()
    N, D = rows.shape
    y, rstd = torch.empty(x.shape, dtype=x.dtype, device=x.device), torch.empty(N, dtype=torch.float32, device=x.device)
    block, warps = _block(D)
    _rms_norm_fwd_kernel[(N,)](rows, weight, y, rstd, rows.stride(0), D, eps, BLOCK=block, num_warps=warps)
    return y, rstd


def rms_norm_backward_triton(dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, need_weight: bool) -> tuple[Tensor, Tensor]:
    """Launch the backward kernel: (dx, dweight), one program a row, or 8 rows where dweight is asked for."""
    if not _takes(x):
        return pytorch_rms_norm.rms_norm_backward(dy, x, weight, rstd, need_weight)
    rows, dy_rows, weight = _rows(x), _rows(dy), weight.contiguous()
    (N, D), each = rows.shape, _ROWS if need_weight else 1
    dx, programs = torch.empty(x.shape, dtype=x.dtype, device=x.device), triton.cdiv(N, each)
    parts = torch.empty(programs if need_weight else 0, D, dtype=torch.float32, device=x.device)
    block, warps = _block(D)
    _rms_norm_bwd_kernel[(programs,)](
        rows, dy_rows, weight, rstd, dx, parts, rows.stride(0), dy_rows.stride(0), N, D, ROWS=each, DWEIGHT=need_weight,
        BLOCK=block, num_warps=warps,
    )  # fmt: skip
    return dx, parts.sum(0).to(weight.dtype) if need_weight else weight.new_empty(0)


def _fake(x, weight, eps):
    wide = torch.promote_types(x.dtype, torch.float32)
    return x.new_empty(x.shape), x.new_empty(prod(x.shape[:-1]), dtype=wide)


define(
    "rms_norm(Tensor x, Tensor weight, float eps) -> (Tensor, Tensor)",
    _fake,
    CPU=lambda x, weight, eps: cpu.rms_norm(x, weight, eps),
    CUDA=rms_norm_triton,
)
define(
    "rms_norm_backward(Tensor dy, Tensor x, Tensor weight, Tensor rstd, bool need_weight) -> (Tensor, Tensor)",
    lambda dy, x, weight, rstd, need_weight: (x.new_empty(x.shape), weight.new_empty(weight.shape if need_weight else 0)),
    CPU=lambda dy, x, weight, rstd, need_weight: cpu.rms_norm_backward(dy, x, weight, rstd, need_weight),
    CUDA=rms_norm_backward_triton,
)


def _setup_context(ctx, inputs, output):
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*inputs[:2], output[1])


def _backward(ctx, dy, _):
    # dx = r (w dy - n mean(w dy n)),  dw = sum over rows of dy n
    need_x, need_weight, _ = ctx.needs
    dx, dweight = _call_backward(dy, *ctx.saved_tensors, need_weight)
    return dx if need_x else None, dweight if need_weight else None, None


def _no_second_derivative(ctx, *_):
    raise RuntimeError("rms_norm has no second derivative; take it of the plain expression x * rsqrt(mean(x^2) + eps) * weight")


_call = differentiable("rms_norm", _backward, _setup_context)
_call_backward = differentiable("rms_norm_backward", _no_second_derivative)


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    """x (..., D) over its root mean square, times weight (D,), in x's dtype. Differentiable once in x and weight.

    Raises ValueError where the weight's shape is not x's last dimension, or its device another.
    """
    if weight.shape != x.shape[-1:] or x.dim() == 0:
        raise ValueError(f"x {tuple(x.shape)}, weight {tuple(weight.shape)}; expected (..., D) and (D,)")
    if weight.device != x.device:
        raise ValueError(f"x is on {x.device} and weight on {weight.device}; move one to the other")
    return _call(x, weight, eps)[0]


def aot_variants() -> Iterator[Variant]:
    """Every dtype, a narrow row and the widest, with dweight and without."""
    names = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
    for dtype, D in product(DTYPES, (1024, _WIDEST)):
        (block, warps), of = _block(D), f"*{names[dtype]}"
        same = {"x_ptr": of, "weight_ptr": of, "rstd_ptr": "*fp32", "stride": "i32:16", "D": "i32:16"}
        forward, backward = {"y_ptr": of, "eps": "fp32"}, {"dy_ptr": of, "dx_ptr": of, "dweight_ptr": "*fp32"}
        yield Variant(
            f"rms_norm_{names[dtype]}_{D}", _rms_norm_fwd_kernel, same | forward, {"BLOCK": block}, warps,
            unaligned=("stride", "D") * (D <= _WIDEST_UNALIGNED),
        )  # fmt: skip
        for need_weight in (False, True):
            constants = {"ROWS": _ROWS if need_weight else 1, "DWEIGHT": need_weight, "BLOCK": block}
            yield Variant(
                f"rms_norm_backward_{names[dtype]}_{D}{'_dweight' * need_weight}", _rms_norm_bwd_kernel,
                same | backward | {"dy_stride": "i32:16", "N": "i32"}, constants, warps,
                unaligned=("stride", "dy_stride", "D") * (D <= _WIDEST_UNALIGNED),
            )  # fmt: skip
