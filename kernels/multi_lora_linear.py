"""A frozen linear layer where every row of the batch has a LoRA adapter of its own, or none: many fine-tunes of one model served at
once (Punica, Chen et al. 2023, arXiv:2310.18547; S-LoRA, Sheng et al. 2023, arXiv:2311.03285; one row: arXiv:2106.09685, eq. 3).

    y[m] = x[m] W^T + bias + scaling[i] (x[m] A[i]^T) B[i]^T,  i = adapter_ids[m];   i = -1: the base alone

x            float32 | float16 | bfloat16 (..., K)   M rows in all
weight       x's dtype (N, K), or packed uint8 with its absmax, as `quantized_linear`
lora_A       x's dtype (n, r, K)                     lora_B x's dtype (n, N, r); n adapters, room for rank r each
scaling      float32 (n,)
ranks        int32 (n,) or None                      adapter i uses rows of A[i] and columns of B[i] below ranks[i]: what lies past
                                                     them may hold anything and costs no work. None: r everywhere
adapter_ids  int64                                   one a row of x, or one for each of its first dimensions
y            x's dtype (..., N)                      the base's result rounded once, the sum with the low-rank term once more

Rows are sorted by adapter and the low-rank term is computed segment by segment, on the device, in a fixed order: for a given x[m]
and adapter it is the same to the bit whatever the rest of the batch holds (on NVIDIA and in the native CPU engine; tested). The
base's product is F.linear's or quantized_linear's, whose sums may depend on how many rows there are (not those of up to 32 rows of
bfloat16 and a dense W on a CPU with AMX: kernels/cpu/multi_lora_dense.c).
Forward only: serving needs no gradient, and asking for one is an error that says so (`lora_linear` trains).
An id that names no adapter is a ValueError on a CPU. On a GPU that would take a sync, so there the row becomes NaN (never the
base's values, and nothing is read out of bounds); `check_adapter_ids` raises the same error there, with a sync, when asked.
Least bytes and flops: the base's, and those in kernels/_multi_lora.py. Oracle: reference/multi_lora_linear.py.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import cpu
from ._library import define, differentiable
from ._multi_lora import multi_lora_add_triton
from ._rows import flattened, unflattened
from ._segments import segment_rows_triton
from .cpu.pytorch_multi_lora import check_ids
from .nf4 import DTYPES
from .quantized_weight import QuantizedWeight

_BASE = "Tensor weight, Tensor? absmax, Tensor? nested_absmax, Tensor? nested_offset, int nested_block_size"


class AdapterSegments(NamedTuple):
    """A batch's adapter ids, sorted once for all the layers that they go through; made by `segment_rows`."""

    adapter_ids: Tensor  # int64, each for rows // len of the batch's rows
    order: Tensor | None  # a GPU's; a CPU sorts on the way
    tiles: Tensor | None
    rows: int
    num_adapters: int


def segment_rows(adapter_ids: Tensor, num_adapters: int, rows: int | None = None) -> AdapterSegments:
    """Sort a batch of `rows` rows (one for each id unless given) by adapter, for use in place of the ids in `multi_lora_linear`.

    adapter_ids int64, any shape, each id for rows / numel consecutive rows. Raises TypeError for another dtype, ValueError
    for a number of rows that is no multiple of the ids' and, on a CPU, for an id outside [-1, num_adapters).
    """
    if adapter_ids.dtype != torch.int64:
        raise TypeError(f"adapter_ids is {adapter_ids.dtype}; expected int64")
    ids = adapter_ids.reshape(-1).contiguous()
    rows = ids.numel() if rows is None else rows
    if rows % max(ids.numel(), 1) or (rows and not ids.numel()):
        raise ValueError(f"{ids.numel()} adapter ids for {rows} rows; expected one a row, or one for equally many rows each")
    if ids.device.type == "cpu":
        check_ids(ids, num_adapters, None, 0)
        return AdapterSegments(ids, None, None, rows, num_adapters)
    return AdapterSegments(ids, *segment_rows_triton(ids, num_adapters, rows), rows, num_adapters)


def check_adapter_ids(adapter_ids: Tensor, num_adapters: int) -> None:
    """ValueError naming the first id outside [-1, num_adapters). On a GPU this waits for the device: for debugging, and for ids
    that come from elsewhere."""
    check_ids(adapter_ids.reshape(-1), num_adapters, None, 0)


def _multi_lora_linear_cpu(
    x, weight, absmax, nested, offset, nested_block_size, A, B, scaling, ranks, ids, order, tiles, bias, N, K, *form
):  # fmt: skip
    rows = flattened(x).contiguous()
    if form == (0, "none"):
        y = cpu.dense_linear(rows, weight, bias)
    else:
        y = cpu.linear_4bit(rows, weight, absmax, nested, offset, nested_block_size, bias, N, K, *form)
    if ids.numel() != rows.shape[0]:
        ids = ids.repeat_interleave(rows.shape[0] // ids.numel())
    ranks = None if ranks is None else ranks.contiguous()
    cpu.multi_lora_add(y, rows, A.contiguous(), B.contiguous(), scaling.contiguous(), ranks, ids.contiguous())
    return unflattened(y, x)


def _multi_lora_linear_cuda(
    x, weight, absmax, nested, offset, nested_block_size, A, B, scaling, ranks, ids, order, tiles, bias, N, K, *form
):  # fmt: skip
    rows = flattened(x)
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    if form == (0, "none"):
        y = F.linear(rows, weight, bias)
    else:
        base = (weight, absmax, nested, offset, nested_block_size)
        y = torch.ops.posttrain.quantized_linear(rows, *base, bias, N, K, *form)
    if rows.shape[0]:
        if order is None:
            order, tiles = segment_rows_triton(ids, A.shape[0], rows.shape[0])
        multi_lora_add_triton(y, rows, A.contiguous(), B.contiguous(), scaling, ranks, order, tiles)
    return unflattened(y, x)


define(
    f"multi_lora_linear(Tensor x, {_BASE}, Tensor lora_A, Tensor lora_B, Tensor scaling, Tensor? ranks, Tensor adapter_ids, "
    "Tensor? order, Tensor? tiles, Tensor? bias, SymInt N, SymInt K, int block_size, str quant_type) -> Tensor",
    lambda x, *rest: x.new_empty(*x.shape[:-1], rest[13]),
    CPU=_multi_lora_linear_cpu,
    CUDA=_multi_lora_linear_cuda,
)


def _forward_only(ctx, inputs, output):
    raise RuntimeError(
        "multi_lora_linear serves and has no gradient, and one of its inputs requires it: call it under torch.no_grad(), or train "
        "each adapter by lora_linear"
    )


_call = differentiable("multi_lora_linear", _forward_only, _forward_only)


def multi_lora_linear(
    x: Tensor, w: Tensor | QuantizedWeight, lora_A: Tensor, lora_B: Tensor, scaling: Tensor, adapter_ids: Tensor | AdapterSegments,
    bias: Tensor | None = None, *, ranks: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """x W^T + bias + scaling[i] (x A[i]^T) B[i]^T, i each row's adapter id: (..., N) in x's dtype. Not differentiable.

    x (..., K) float32, float16 or bfloat16; w (N, K) in x's dtype, or a QuantizedWeight of that shape; lora_A (n, r, K) and lora_B
    (n, N, r) in x's dtype (cast them once, not here for every batch); scaling float32 (n,); bias (N,) or None.
    adapter_ids int64: one a row of x, -1 for the base alone; of x's shape but the last dimension, flattened or not, or of its first
    dimensions (x (B, T, K) and ids (B,): all of a sequence). A model makes `segment_rows(ids, n, B * T)` once and passes it here.
    ranks int32 (n,): how many of the r columns each adapter uses, 0 to r; None: all.

    Raises TypeError for dtypes, ValueError for shapes or devices that do not fit and, on a CPU, for an id outside [-1, n), naming
    it (on a GPU its row becomes NaN); RuntimeError where a gradient is asked for. Papers: arXiv:2310.18547, arXiv:2311.03285.
    """
    segments = adapter_ids if isinstance(adapter_ids, AdapterSegments) else None
    ids = adapter_ids.adapter_ids if isinstance(adapter_ids, AdapterSegments) else adapter_ids
    N, K = _check(x, w, lora_A, lora_B, scaling, ranks, bias)
    n, rows = lora_A.shape[0], math.prod(x.shape[:-1])
    if segments is not None:
        if (segments.rows, segments.num_adapters) != (rows, n):
            raise ValueError(
                f"segments of {segments.rows} rows and {segments.num_adapters} adapters, for x with {rows} rows and {n} adapters; "
                "sort again with segment_rows"
            )
    elif ids.dtype != torch.int64:
        raise TypeError(f"adapter_ids is {ids.dtype}; expected int64")
    elif ids.shape != (rows,) and ids.shape not in [x.shape[:d] for d in range(1, x.dim())]:
        raise ValueError(
            f"adapter_ids has shape {tuple(ids.shape)} and x {tuple(x.shape)}; expected an id for each row, ({rows},), or for each "
            "entry of x's first dimensions"
        )
    if ids.device != x.device:
        raise ValueError(f"x is on {x.device} and adapter_ids on {ids.device}; move one to the other")
    order, tiles = (None, None) if segments is None else segments[1:3]
    base = (w, None, None, None, 0) if isinstance(w, Tensor) else w.tensors()
    form = (0, "none") if isinstance(w, Tensor) else (w.block_size, w.quant_type)
    return _call(x, *base, lora_A, lora_B, scaling, ranks, ids.reshape(-1).contiguous(), order, tiles, bias, N, K, *form)


def _check(x, w, lora_A, lora_B, scaling, ranks, bias) -> tuple[int, int]:
    """(N, K), or the error that says what does not fit."""
    if not isinstance(w, Tensor | QuantizedWeight):
        raise TypeError(f"w is a {type(w).__name__}; expected a tensor (out, in), or a QuantizedWeight made by quantize_weight(w)")
    if len(w.shape) != 2:
        raise ValueError(f"the weight has shape {tuple(w.shape)}; a linear layer's is (out, in)")
    N, K = w.shape
    n, r = lora_A.shape[:2] if lora_A.dim() == 3 else (-1, -1)
    if x.dim() == 0 or x.shape[-1] != K or lora_A.shape != (n, r, K) or lora_B.shape != (n, N, r):
        raise ValueError(
            f"x {tuple(x.shape)}, lora_A {tuple(lora_A.shape)} and lora_B {tuple(lora_B.shape)} do not fit a weight of {N} x {K}: "
            f"expected x (..., {K}), lora_A (n, r, {K}), lora_B (n, {N}, r)"
        )
    if x.dtype not in DTYPES:
        raise TypeError(f"x is {x.dtype}; expected float32, float16 or bfloat16")
    expected = {"lora_A": (lora_A, x.dtype, lora_A.shape), "lora_B": (lora_B, x.dtype, lora_B.shape)}
    expected |= {"scaling": (scaling, torch.float32, (n,)), "ranks": (ranks, torch.int32, (n,)), "bias": (bias, x.dtype, (N,))}
    expected["the weight"] = (w, x.dtype, w.shape) if isinstance(w, Tensor) else (w.packed, torch.uint8, w.packed.shape)
    for name, (tensor, dtype, shape) in expected.items():
        if tensor is not None and (tensor.dtype != dtype or tensor.shape != shape or tensor.device != x.device):
            given, wanted = f"{tensor.dtype} {tuple(tensor.shape)} on {tensor.device}", f"{dtype} {tuple(shape)} on {x.device}"
            kind = TypeError if tensor.dtype != dtype else ValueError
            raise kind(f"{name} is {given}; expected {wanted}, beside x, {x.dtype} {tuple(x.shape)}")
    return N, K
