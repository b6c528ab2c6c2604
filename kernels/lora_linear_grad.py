"""Both gradients that a low-rank update takes from dY, in one pass over it: dB and V. And dA, which is dB's sum over x.

    dB[n, j] = scaling * sum_m dY[m, n] s[m, j]          s = x' A^T
    V[m, j]  = scaling * sum_n dY[m, n] B[n, j]          dE/ds
    dA[j, k] = sum_m x'[m, k] V[m, j]

z          float32 | float16 | bfloat16 (M, C)   dY, or x with dropout done on the way; any row stride
s          z's dtype (M, R)                      x' A^T, or V
b          any float dtype (C, R)                lora_B: V wanted; None: not
grad       float32 (PARTS, C, R)                 or (PARTS, R, C), partial sums of dB or dA over rows of z
v          float32 (ceil(C / BLOCK_C), M, R)     partial sums of V over columns of z

A sum over rows and one over columns of the same tile: whoever owns a tile finishes neither, so partial sums go out and are added
in a fixed order (no atomics: runs repeat bit for bit). A program keeps dB's tile while it walks down its part of the rows, and
writes V's partial sums as it goes. Bytes: itemsize M C + 4 R (PARTS C + M ceil(C / BLOCK_C)), and the partial sums once more when
they are added, in place of a second itemsize M C. In 16 bits that is fewer up to R = 32: 2 M C + 8 R M C / BLOCK_C with BLOCK_C =
512 (R <= 16) or 256; at R = 64 equal, so from there on V is `lora_linear_down` of dY. Oracle: reference/lora_linear.py.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ._dropout import arguments, drop, kept
from ._split_k import add_parts_triton
from ._triton import current_arch, tl, triton
from ._variant import Variant
from .lora_linear_down import rank_tile


@triton.jit(do_not_specialize=["M", "tiles_per_part", "seed", "threshold"])
def _lora_linear_grad_kernel(
    z_ptr, s_ptr, b_ptr, grad_ptr, v_ptr, M, C, R, stride_zm, stride_sm, stride_gc, stride_gj, tiles_per_part, scaling,
    seed, threshold, keep_scale,
    DROPOUT: tl.constexpr, EVEN_C: tl.constexpr, WITH_V: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    # One program owns BLOCK_C columns of z, one part of its rows and BLOCK_R columns of s.
    offs_c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    offs_j = tl.program_id(2) * BLOCK_R + tl.arange(0, BLOCK_R)
    mask_grad = (offs_c < C)[:, None] & (offs_j < R)[None, :]
    if WITH_V:
        b = tl.load(b_ptr + offs_c.to(tl.int64)[:, None] * R + offs_j[None, :], mask=mask_grad, other=0.0).to(
            z_ptr.dtype.element_ty
        )
    begin = tl.program_id(1) * tiles_per_part * BLOCK_M
    end = tl.minimum(begin + tiles_per_part * BLOCK_M, M)
    acc = tl.zeros((BLOCK_C, BLOCK_R), tl.float32)
    for m0 in range(begin, end, BLOCK_M):
        rows = m0 + tl.arange(0, BLOCK_M)
        mask_z, mask_s = (rows < M)[:, None], (rows < M)[:, None] & (offs_j < R)[None, :]
        if not EVEN_C:
            mask_z = mask_z & (offs_c < C)[None, :]
        z = tl.load(z_ptr + rows.to(tl.int64)[:, None] * stride_zm + offs_c[None, :], mask=mask_z, other=0.0)
        s = tl.load(s_ptr + rows.to(tl.int64)[:, None] * stride_sm + offs_j[None, :], mask=mask_s, other=0.0)
        if DROPOUT:
            z = drop(z, kept(rows, tl.program_id(0) * BLOCK_C, C, seed, threshold, BLOCK_M, BLOCK_C, DROPOUT == 2), keep_scale)
        acc = tl.dot(tl.trans(z), s, acc, input_precision="ieee")
        if WITH_V:
            v = tl.dot(z, b, input_precision="ieee") * scaling
            tl.store(v_ptr + (tl.program_id(0).to(tl.int64) * M + rows)[:, None] * R + offs_j[None, :], v, mask=mask_s)
    grad = grad_ptr + tl.program_id(1).to(tl.int64) * C * R + offs_c.to(tl.int64)[:, None] * stride_gc
    tl.store(grad + offs_j.to(tl.int64)[None, :] * stride_gj, acc * scaling, mask=mask_grad)


def grad_tile(R: int, itemsize: int, dropout: bool, with_v: bool, backend_name: str, arch: int | str) -> dict[str, int]:
    """Rows and columns of z and columns of s that a program takes at once, and its warps. Two sums at once: a tile of 64 KB, half
    of that where shared memory is small (AMD) or the two spill (sm_100)."""
    if with_v:
        columns = 512 if R <= 16 else 256
        if backend_name == "hip" or (isinstance(arch, int) and arch >= 100 and R <= 16):
            columns //= 2
        return {"BLOCK_M": 64, "BLOCK_C": columns, "BLOCK_R": rank_tile(R, 32), "num_warps": 8}
    narrow = dropout or itemsize == 4
    return {"BLOCK_M": 32 if narrow else 64, "BLOCK_C": 64 if narrow else 128, "BLOCK_R": rank_tile(R, 64), "num_warps": 4}


def one_pass(R: int, dtype: torch.dtype) -> bool:
    """Whether V's partial sums are fewer bytes than a second reading of dY: 8 R / BLOCK_C < itemsize, in 16 bits."""
    return dtype != torch.float32 and R <= 32


def lora_linear_grad_triton(
    z: Tensor, s: Tensor, b: Tensor | None, scaling: float = 1.0, dropout: float = 0.0, seed: int = 0, parts: int = 1,
    transposed: bool = False, grad_dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """(scaling drop(z)^T s in grad_dtype, (C, R) or transposed (R, C); scaling z b in z's dtype (M, R), or None without b).

    z (M, C) and s (M, R) of any row stride, b (C, R) contiguous. The rows are summed in `parts` parts.
    """
    (M, C), R = z.shape, s.shape[1]
    tile = grad_tile(R, z.element_size(), dropout > 0, b is not None, *current_arch())
    num_warps = tile.pop("num_warps")
    columns = triton.cdiv(C, tile["BLOCK_C"])
    partial = z.new_empty(parts, *((R, C) if transposed else (C, R)), dtype=torch.float32)
    v = None if b is None else z.new_empty(columns, M, R, dtype=torch.float32)
    strides = (1, C) if transposed else (R, 1)
    _lora_linear_grad_kernel[(columns, parts, triton.cdiv(R, tile["BLOCK_R"]))](
        z, s, b, partial, v, M, C, R, z.stride(0), s.stride(0), *strides,
        triton.cdiv(triton.cdiv(M, tile["BLOCK_M"]), parts), scaling,
        **arguments(dropout, seed, C), EVEN_C=C % tile["BLOCK_C"] == 0, WITH_V=b is not None,
        **tile, num_warps=num_warps, num_stages=2,
    )  # fmt: skip
    grad = z.new_empty(partial.shape[1:], dtype=grad_dtype)
    add_parts_triton(partial, None, grad)
    if v is None:
        return grad, None
    V = z.new_empty(M, R)
    add_parts_triton(v, None, V)
    return grad, V


def aot_variants() -> Iterator[Variant]:
    """Every tile, with and without V, of dB and of dA, each way of dropping; not all combined."""
    cases = [("bf16", 8, True, 0, False), ("bf16", 16, True, 0, True), ("bf16", 32, True, 0, True), ("fp16", 64, False, 1, False)]
    cases += [("bf16", R, False, dropout, True) for R in (16, 64) for dropout in (0, 2)] + [("fp32", 64, False, 2, True)]
    targets: list[tuple[str, int | str]] = [("cuda", 80), ("cuda", 90), ("cuda", 100), ("hip", "gfx942")]
    for (dtype, R, with_v, dropout, even), (backend_name, arch) in itertools.product(cases, targets):
        tile = grad_tile(R, 4 if dtype == "fp32" else 2, dropout > 0, with_v, backend_name, arch)
        num_warps = tile.pop("num_warps")
        integer = "i32:16" if R % 16 == 0 else "i32"
        signature = {"z_ptr": f"*{dtype}", "s_ptr": f"*{dtype}", "b_ptr": "*fp32" if with_v else "constexpr", "grad_ptr": "*fp32"}
        signature |= {
            "v_ptr": "*fp32" if with_v else "constexpr",
            "M": "i32",
            "C": "i32:16",
            "R": integer,
            "stride_zm": "i32:16",
            "stride_sm": integer,
        }
        signature |= {"stride_gc": integer} if with_v else {"stride_gj": "i32:16"}
        signature |= {"tiles_per_part": "i32", "scaling": "fp32", "seed": "i64", "threshold": "i32", "keep_scale": "fp32"}
        constexprs: dict[str, Any] = {
            "DROPOUT": dropout,
            "EVEN_C": even,
            "WITH_V": with_v,
            **tile,
            "stride_gj" if with_v else "stride_gc": 1,
        }
        constexprs |= {} if with_v else {"b_ptr": None, "v_ptr": None}
        yield Variant(
            f"lora_linear_grad_{dtype}_{R}" + "_v" * with_v + f"_drop{dropout}" * (dropout > 0) + "_odd" * (not even),
            _lora_linear_grad_kernel, signature | dict.fromkeys(constexprs, "constexpr"), constexprs,
            num_warps=num_warps, num_stages=2, backends=(backend_name,), archs=(arch,),
        )  # fmt: skip
