"""Rotary position embedding and its gradient, one pass each way (Su et al., 2021, arXiv:2104.09864, eq. 34, halves for pairs).

    y = x cos + roll(x, D/2) sin          dx = dy cos + roll(dy sin, D/2)

x, dy     float32 | float16 | bfloat16 (B, T, heads, D)    D even. Of any strides, with 1 along D: a part of a fused projection
                                                           is read where it lies, and so are gradients of transposed heads
cos, sin  the same dtype (B or 1, T, 1, D)                 sin is signed: the first half of it is negated, for a rotation
y, dx     the same dtype (B, T, heads, D)                  contiguous

In float32, rounded once. A roll by half of D is its own inverse: dx is the transpose of y's map whatever cos and sin are, and it
is that map with the halves of sin exchanged. So one operation is its own backward, and its backward's. It saves cos and sin,
which get no gradient. Least bytes of n elements at P positions, in bfloat16, each way: 2 n + 4 P D read, 2 n written; 3 flops an
element. float64, and heads wider than 4096, take PyTorch's kernels. Oracle: reference/rope.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import torch
from torch import Tensor

from . import cpu
from ._library import define, differentiable
from ._triton import tl, triton
from ._variant import Variant
from .cpu import pytorch_rope
from .nf4 import DTYPES

# Pairs (x[i], x[i + D/2]) that a program turns at once: 8 a lane of one warp, so that 16-bit elements move 128 bits at a time. More
# warps would each fetch and widen cos and sin for fewer heads: up to twice the instructions an element.
_PAIRS = 256
_WIDEST = 4096


@triton.jit(do_not_specialize=["T", "heads"])
def _rope_kernel(
    x_ptr, cos_ptr, sin_ptr, y_ptr, T, heads, stride_xb, stride_xt, stride_xh, stride_cb, stride_ct, stride_sb, stride_st,
    HALF: tl.constexpr, TRANSPOSED: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # One program owns a position: its cosines and sines stay in registers for all heads, which it takes HEADS at a time.
    position = tl.program_id(0).to(tl.int64)
    b, t = position // T, position % T
    offs = tl.arange(0, BLOCK)[None, :]
    inside = offs < HALF
    cos_ptr += b * stride_cb + t * stride_ct + offs
    sin_ptr += b * stride_sb + t * stride_st + offs
    cos_lo = tl.load(cos_ptr, mask=inside, other=0.0).to(tl.float32)
    cos_hi = tl.load(cos_ptr + HALF, mask=inside, other=0.0).to(tl.float32)
    sin_lo = tl.load(sin_ptr + (HALF if TRANSPOSED else 0), mask=inside, other=0.0).to(tl.float32)
    sin_hi = tl.load(sin_ptr + (0 if TRANSPOSED else HALF), mask=inside, other=0.0).to(tl.float32)
    for first in range(0, heads, HEADS):
        head = first + tl.arange(0, HEADS)[:, None]
        mask = (head < heads) & inside
        x = x_ptr + b * stride_xb + t * stride_xt + head.to(tl.int64) * stride_xh + offs
        lo = tl.load(x, mask=mask, other=0.0).to(tl.float32)
        hi = tl.load(x + HALF, mask=mask, other=0.0).to(tl.float32)
        y = y_ptr + (position * heads + head) * (2 * HALF) + offs
        tl.store(y, (lo * cos_lo + hi * sin_lo).to(y_ptr.dtype.element_ty), mask=mask)
        tl.store(y + HALF, (hi * cos_hi + lo * sin_hi).to(y_ptr.dtype.element_ty), mask=mask)


def _tile(heads: int, half: int) -> tuple[int, int, int]:
    """(HEADS, BLOCK, warps)."""
    block = triton.next_power_of_2(half)
    return max(min(triton.next_power_of_2(heads), _PAIRS // block), 1), block, max(block // _PAIRS, 1)


def rope_triton(x: Tensor, cos: Tensor, sin: Tensor, transposed: bool) -> Tensor:
    """Launch the kernel, one program a position."""
    B, T, heads, D = x.shape
    if x.dtype not in DTYPES or not x.numel() or D > _WIDEST:
        return pytorch_rope.rope(x, cos, sin, transposed)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    x, cos, sin = (t if t.stride(3) == 1 else t.contiguous() for t in (x, cos.expand(B, -1, -1, -1), sin.expand(B, -1, -1, -1)))
    at_once, block, warps = _tile(heads, D // 2)
    _rope_kernel[(B * T,)](
        x, cos, sin, y, T, heads, *x.stride()[:3], *cos.stride()[:2], *sin.stride()[:2], HALF=D // 2, TRANSPOSED=transposed,
        HEADS=at_once, BLOCK=block, num_warps=warps,
    )  # fmt: skip
    return y


define(
    "rope(Tensor x, Tensor cos, Tensor sin, bool transposed) -> Tensor",
    lambda x, cos, sin, transposed: x.new_empty(x.shape),
    CPU=lambda x, cos, sin, transposed: cpu.rope(x, cos, sin, transposed),
    CUDA=rope_triton,
)


def _setup_context(ctx, inputs, output):
    _, cos, sin, ctx.transposed = inputs
    ctx.save_for_backward(cos, sin)


def _backward(ctx, dy):
    # dx = dy cos + roll(dy sin, D/2), the transpose of y = x cos + roll(x, D/2) sin; and the other way round
    return _call(dy, *ctx.saved_tensors, not ctx.transposed), None, None, None


_call = differentiable("rope", _backward, _setup_context)


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x cos + roll(x, D/2) sin of x (B, T, heads, D), cos and signed sin (B or 1, T, 1, D). Differentiable in x, at any order.

    Raises ValueError for other shapes, an odd D, devices that differ, and a cos or sin that asks for a gradient (it has none);
    TypeError for dtypes that differ.
    """
    x_shape, shape = x.shape, cos.shape
    if len(x_shape) != 4 or shape != sin.shape or shape[1:] != (x_shape[1], 1, x_shape[3]) or shape[0] not in (1, x_shape[0]):
        given = f"x {tuple(x_shape)}, cos {tuple(shape)}, sin {tuple(sin.shape)}"
        raise ValueError(f"{given}; expected (B, T, heads, D) and twice (B or 1, T, 1, D)")
    if x_shape[3] % 2:
        raise ValueError(f"D is {x_shape[3]}; expected an even number: it is rotated in pairs")
    if not x.dtype == cos.dtype == sin.dtype:
        raise TypeError(f"x is {x.dtype}, cos {cos.dtype} and sin {sin.dtype}; cast them to one")
    if not x.device == cos.device == sin.device:
        raise ValueError(f"x is on {x.device}, cos on {cos.device} and sin on {sin.device}; move them to one")
    if torch.is_grad_enabled() and (cos.requires_grad or sin.requires_grad):
        raise ValueError("rope has no gradient for cos and sin: detach them, or take it of x * cos + x.roll(D // 2, -1) * sin")
    return _call(x, cos, sin, False)


def aot_variants() -> Iterator[Variant]:
    """Every dtype and both directions, heads of 64 and, in bfloat16, of 128 and of a width that is no power of 2."""
    names = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
    chosen = [(dtype, 64, 12) for dtype in DTYPES] + [(torch.bfloat16, 128, 40), (torch.bfloat16, 80, 32)]
    strides = ("stride_xb", "stride_xt", "stride_xh", "stride_cb", "stride_ct", "stride_sb", "stride_st")
    for (dtype, D, heads), transposed in product(chosen, (False, True)):
        at_once, block, warps = _tile(heads, D // 2)
        of = f"*{names[dtype]}"
        pointers = {"x_ptr": of, "cos_ptr": of, "sin_ptr": of, "y_ptr": of}
        yield Variant(
            f"rope_{names[dtype]}_{D}{'_transposed' * transposed}",
            _rope_kernel,
            {**pointers, "T": "i32", "heads": "i32", **dict.fromkeys(strides, "i32:16")},
            {"HALF": D // 2, "TRANSPOSED": transposed, "HEADS": at_once, "BLOCK": block},
            warps,
            unaligned=("x_ptr", "cos_ptr", "sin_ptr", *strides) if D == 64 else (),
        )
