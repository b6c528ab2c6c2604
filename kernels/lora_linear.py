"""y = x W^T + bias + scaling x' A^T B^T: a frozen linear layer with a low-rank update (LoRA, Hu et al. 2021, arXiv:2106.09685,
eq. 3, with scaling = alpha / r), W dense or in 4 bits (QLoRA, Dettmers et al. 2023, arXiv:2305.14314, eq. 5).

    x' = drop(x)     V = scaling dY B     dX = dY W + drop'(V A)     dA = V^T x'     dB = scaling dY^T (x' A^T)     dbias = sum_m dY

x          float32 | float16 | bfloat16 (..., K)   any strides; M rows in all
weight     x's dtype (N, K)                        frozen; or packed uint8 (ceil(N K / 2),) with its absmax, as `quantized_linear`
lora_A     any float dtype (r, K)                  as lora_B (N, r); cast to x's dtype for the products, gradients in their own
bias       x's dtype (N,) or None
y          x's dtype (..., N)                      sums in float32

Dropout acts on the low-rank path alone. No mask is stored: whether element i of x (row-major) is kept is a function of (seed, i),
word i of Philox4x32-10's stream at or above floor(dropout 2^32); each engine computes the same bits. Kept values are multiplied
by 1 / (1 - dropout) in float32 and rounded once. Saved for the backward pass: x, W, A and B, as they are; x A^T is computed
again (2 M K r flops). A group of layers on one x (q, k and v; gate and up) shares x, x' and dX: `lora_linear_group`.
Oracles: reference/lora_linear.py, reference/philox.py.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import cpu, lora_linear_gpu
from ._library import define, differentiable
from ._rows import flattened, unflattened
from .nf4 import DTYPES
from .quantized_weight import QuantizedWeight

_BASE = "Tensor weight, Tensor? absmax, Tensor? nested_absmax, Tensor? nested_offset, int nested_block_size"
_BASES = "Tensor[] weight, Tensor[] absmax, Tensor[] nested_absmax, Tensor[] nested_offset, int nested_block_size"


def _lora_linear_cpu(x, weight, absmax, nested, offset, nested_block_size, A, B, scaling, bias, dropout, seed, N, K, *format):
    base = (weight, absmax, nested, offset, nested_block_size)
    y = cpu.lora_linear(flattened(x), *base, A, B, scaling, bias, dropout, seed, N, K, *format)
    return unflattened(y, x)


def _lora_linear_backward_cpu(
    dy, x, weight, absmax, nested, offset, nested_block_size, A, B, scaling, dropout, seed, N, K, block_size, quant_type, *need
):
    base = (weight, absmax, nested, offset, nested_block_size)
    rest = (scaling, dropout, seed, N, K, block_size, quant_type, *need)
    dx, dA, dB = cpu.lora_linear_backward(flattened(dy), flattened(x), *base, A, B, *rest)
    return dx.view(x.shape) if need[0] else dx, dA.contiguous(), dB.contiguous()


def _bases(weights, absmaxes, nested, offsets, nested_block_size, *format) -> list[tuple]:
    """The weight of each layer of a group as one tuple; a tensor that no layer has is None."""
    optional = (list(tensors) or [None] * len(weights) for tensors in (absmaxes, nested, offsets))
    return [(*tensors, nested_block_size, *format) for tensors in zip(weights, *optional, strict=True)]


def _lora_linear_group_cpu(x, *rest):
    *stored, As, Bs, scalings, biases, dropout, seed, Ns, K, block_size, quant_type = rest
    bases, biases = _bases(*stored, block_size, quant_type), biases or [None] * len(Ns)
    ys = cpu.lora_linear_group(flattened(x), bases, As, Bs, scalings, biases, dropout, seed, Ns, K)
    return [unflattened(y, x) for y in ys]


def _lora_linear_group_backward_cpu(dys, x, *rest):
    *stored, As, Bs, scalings, dropout, seed, Ns, K, block_size, quant_type, need_x, need_A, need_B = rest
    rows = [flattened(dy) for dy in dys]
    layers = (_bases(*stored, block_size, quant_type), As, Bs, scalings)
    needs = (need_x, need_A, need_B)
    dx, dAs, dBs = cpu.lora_linear_group_backward(rows, flattened(x), *layers, dropout, seed, Ns, K, *needs)
    return dx.view(x.shape) if need_x else dx, [dA.contiguous() for dA in dAs], [dB.contiguous() for dB in dBs]


def _lora_linear_cuda(x, *rest):
    *base, A, B, scaling, bias, dropout, seed, N, K, block_size, quant_type = rest
    layer = lora_linear_gpu.Layer((*base, N, K, block_size, quant_type), A, B, scaling)
    (y,) = lora_linear_gpu.forward(flattened(x), [layer], [bias], dropout, seed)
    return unflattened(y, x)


def _lora_linear_group_cuda(x, *rest):
    *stored, As, Bs, scalings, biases, dropout, seed, Ns, K, block_size, quant_type = rest
    ys = lora_linear_gpu.forward(
        flattened(x), _layers(stored, As, Bs, scalings, Ns, K, block_size, quant_type), biases or [None] * len(Ns), dropout, seed
    )
    return [unflattened(y, x) for y in ys]


def _layers(stored, As, Bs, scalings, Ns, K, block_size, quant_type) -> list[lora_linear_gpu.Layer]:
    bases = [(*base, N, K, block_size, quant_type) for base, N in zip(_bases(*stored), Ns, strict=True)]
    return [lora_linear_gpu.Layer(*layer) for layer in zip(bases, As, Bs, scalings, strict=True)]


def _lora_linear_backward_cuda(dy, x, *rest):
    *base, A, B, scaling, dropout, seed, N, K, block_size, quant_type, need_x, need_A, need_B = rest
    layer = lora_linear_gpu.Layer((*base, N, K, block_size, quant_type), A, B, scaling)
    dx, (dA,), (dB,) = lora_linear_gpu.backward([flattened(dy)], flattened(x), [layer], dropout, seed, need_x, need_A, need_B)
    return dx.view(x.shape) if need_x else dx, dA, dB


def _lora_linear_group_backward_cuda(dys, x, *rest):
    *stored, As, Bs, scalings, dropout, seed, Ns, K, block_size, quant_type, need_x, need_A, need_B = rest
    layers, rows = _layers(stored, As, Bs, scalings, Ns, K, block_size, quant_type), [flattened(dy) for dy in dys]
    dx, dAs, dBs = lora_linear_gpu.backward(rows, flattened(x), layers, dropout, seed, need_x, need_A, need_B)
    return dx.view(x.shape) if need_x else dx, dAs, dBs


def _empty_like(tensor: Tensor, wanted: bool) -> Tensor:
    return tensor.new_empty(tensor.shape if wanted else 0)


def _backward_fake(dy, x, *rest):
    A, B, need_x, need_A, need_B = *rest[5:7], *rest[-3:]
    return _empty_like(x, need_x), _empty_like(A, need_A), _empty_like(B, need_B)


def _group_backward_fake(dys, x, *rest):
    As, Bs, need_x, need_A, need_B = *rest[5:7], *rest[-3:]
    return _empty_like(x, need_x), [_empty_like(A, need_A) for A in As], [_empty_like(B, need_B) for B in Bs]


_REST = "float dropout, SymInt seed, SymInt N, SymInt K, int block_size, str quant_type"
_REST_GROUP = _REST.replace("SymInt N", "SymInt[] N")
_NEED = "bool need_x, bool need_A, bool need_B"
define(
    f"lora_linear(Tensor x, {_BASE}, Tensor lora_A, Tensor lora_B, float scaling, Tensor? bias, {_REST}) -> Tensor",
    lambda x, *rest: x.new_empty(*x.shape[:-1], rest[11]),
    CPU=_lora_linear_cpu,
    CUDA=_lora_linear_cuda,
)
define(
    f"lora_linear_backward(Tensor dy, Tensor x, {_BASE}, Tensor lora_A, Tensor lora_B, float scaling, {_REST}, {_NEED})"
    " -> (Tensor, Tensor, Tensor)",
    _backward_fake,
    CPU=_lora_linear_backward_cpu,
    CUDA=_lora_linear_backward_cuda,
)
define(
    f"lora_linear_group(Tensor x, {_BASES}, Tensor[] lora_A, Tensor[] lora_B, float[] scaling, Tensor[] bias, {_REST_GROUP})"
    " -> Tensor[]",
    lambda x, *rest: [x.new_empty(*x.shape[:-1], N) for N in rest[11]],
    CPU=_lora_linear_group_cpu,
    CUDA=_lora_linear_group_cuda,
)
define(
    f"lora_linear_group_backward(Tensor[] dy, Tensor x, {_BASES}, Tensor[] lora_A, Tensor[] lora_B, float[] scaling, "
    f"{_REST_GROUP}, {_NEED}) -> (Tensor, Tensor[], Tensor[])",
    _group_backward_fake,
    CPU=_lora_linear_group_backward_cpu,
    CUDA=_lora_linear_group_backward_cuda,
)


def _setup_context(ctx, inputs, output):
    x, weight, absmax, nested, offset, nested_block_size, A, B, scaling, bias, *rest = inputs
    ctx.save_for_backward(x, weight, absmax, nested, offset, A, B)
    ctx.nested_block_size, ctx.scaling, ctx.rest = nested_block_size, scaling, rest


def _backward(ctx, dy):
    # dX = dY W + drop'(V A)      dA = V^T x'      dB = scaling dY^T (x' A^T)      dbias = sum of dY's rows; a dense W: dY^T x
    x, weight, absmax, nested, offset, A, B = ctx.saved_tensors
    need_x, need_weight, need_A, need_B, need_bias = (ctx.needs[i] for i in (0, 1, 6, 7, 9))
    dx = dweight = dA = dB = None
    if need_x or need_A or need_B:
        base = (weight, absmax, nested, offset, ctx.nested_block_size)
        dx, dA, dB = _call_backward(dy, x, *base, A, B, ctx.scaling, *ctx.rest, need_x, need_A, need_B)
    if need_weight:
        dweight = flattened(dy).t() @ flattened(x)
    dbias = flattened(dy).sum(0) if need_bias else None
    gradients = (dx if need_x else None, dweight, None, None, None, None, dA if need_A else None, dB if need_B else None)
    return (*gradients, None, dbias, *[None] * 6)


def _setup_context_group(ctx, inputs, output):
    x, weights, absmaxes, nested, offsets, nested_block_size, As, Bs, scalings, biases, *rest = inputs
    lists = (weights, absmaxes, nested, offsets, As, Bs)
    ctx.save_for_backward(x, *(t for tensors in lists for t in tensors))
    ctx.counts = [len(tensors) for tensors in lists]
    ctx.nested_block_size, ctx.scalings, ctx.rest = nested_block_size, scalings, rest


def _backward_group(ctx, dys):
    # dX is the sum over layers of dY W + drop'(V A); the rest is each layer's own
    x, *saved = ctx.saved_tensors
    lists = []
    for count in ctx.counts:
        lists.append(saved[:count])
        saved = saved[count:]
    weights, absmaxes, nested, offsets, As, Bs = lists
    need_x, need_As, need_Bs, need_biases = (ctx.needs[i] for i in (0, 6, 7, 9))
    base = (weights, absmaxes, nested, offsets, ctx.nested_block_size, As, Bs, ctx.scalings)
    dx, dAs, dBs = _call_group_backward(dys, x, *base, *ctx.rest, need_x, any(need_As), any(need_Bs))
    dAs = [dA if need else None for dA, need in zip(dAs, need_As, strict=True)]
    dBs = [dB if need else None for dB, need in zip(dBs, need_Bs, strict=True)]
    dbiases = [flattened(dy).sum(0) if need else None for dy, need in zip(dys, need_biases, strict=False)]
    dweights = [flattened(dy).t() @ flattened(x) if need else None for dy, need in zip(dys, ctx.needs[1], strict=True)]
    frozen = ([None] * count for count in ctx.counts[1:4])
    return (dx if need_x else None, dweights, *frozen, None, dAs, dBs, None, dbiases, *[None] * 6)


def _no_double_backward(ctx, *gradients):
    raise RuntimeError(
        "the gradients of lora_linear cannot be differentiated again: call backward without create_graph=True, or write the layer "
        "as F.linear(x, W, bias) + scaling * F.linear(F.linear(x, A), B)"
    )


_call = differentiable("lora_linear", _backward, _setup_context)
_call_group = differentiable("lora_linear_group", _backward_group, _setup_context_group)
_call_backward = differentiable("lora_linear_backward", _no_double_backward)
_call_group_backward = differentiable("lora_linear_group_backward", _no_double_backward)


def _check(
    x: Tensor, w: Tensor | QuantizedWeight, lora_A: Tensor, lora_B: Tensor, scaling: float, bias: Tensor | None
) -> tuple[int, int]:
    """(N, K), or the error that says what does not fit."""
    dense = isinstance(w, Tensor)
    if not dense and not isinstance(w, QuantizedWeight):
        raise TypeError(f"w is a {type(w).__name__}; expected a tensor (out, in), or a QuantizedWeight made by quantize_weight(w)")
    if len(w.shape) != 2:
        raise ValueError(f"the weight has shape {tuple(w.shape)}; a linear layer's is (out, in)")
    N, K = w.shape
    r = lora_A.shape[0] if lora_A.dim() else -1
    if x.dim() == 0 or x.shape[-1] != K or lora_A.shape != (r, K) or lora_B.shape != (N, r):
        raise ValueError(
            f"x {tuple(x.shape)}, lora_A {tuple(lora_A.shape)} and lora_B {tuple(lora_B.shape)} do not fit a weight of {N} x {K}: "
            f"expected x (..., {K}), lora_A (r, {K}), lora_B ({N}, r)"
        )
    if r == 0:
        raise ValueError("lora_A and lora_B have rank 0; leave the adapter out, or give it a row")
    if x.dtype not in DTYPES and not (dense and x.dtype == torch.float64 and x.device.type == "cpu"):
        raise TypeError(f"x is {x.dtype}; expected float32, float16 or bfloat16 (on a CPU a dense weight takes float64 too)")
    if not (lora_A.is_floating_point() and lora_B.is_floating_point()):
        raise TypeError(f"lora_A is {lora_A.dtype} and lora_B {lora_B.dtype}; expected floating point")
    if isinstance(scaling, Tensor) and scaling.requires_grad:
        raise TypeError("scaling is a tensor that requires its gradient, and has none here; multiply lora_B by it instead")
    if dense and w.dtype != x.dtype:
        raise TypeError(f"the weight is {w.dtype} and x {x.dtype}; cast one to the other's")
    stored = w if isinstance(w, Tensor) else w.packed
    if not x.device == stored.device == lora_A.device == lora_B.device:
        raise ValueError(
            f"x is on {x.device}, the weight on {stored.device}, lora_A on {lora_A.device} and lora_B on {lora_B.device}; "
            "move them to one device"
        )
    if bias is not None and (bias.shape != (N,) or bias.dtype != x.dtype or bias.device != x.device):
        raise ValueError(
            f"bias is {bias.dtype} {tuple(bias.shape)} on {bias.device}; expected {x.dtype} ({N},) on {x.device}, as x's"
        )
    return N, K


def _seed(dropout: float, seed: int | None) -> int:
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"dropout is {dropout}; expected 0 <= dropout < 1")
    if dropout and seed is None:
        return int(torch.randint(2**63 - 1, ()))
    if seed is None or not dropout:
        return 0
    if not -(2**63) <= seed < 2**63:
        raise ValueError(f"seed is {seed}; expected a whole number from -2^63 to 2^63 - 1")
    return seed


def _format(w: Tensor | QuantizedWeight) -> tuple[int, str]:
    return (0, "none") if isinstance(w, Tensor) else (w.block_size, w.quant_type)


def lora_linear(
    x: Tensor, w: Tensor | QuantizedWeight, lora_A: Tensor, lora_B: Tensor, scaling: float, bias: Tensor | None = None,
    *, dropout: float = 0.0, seed: int | None = None,
) -> Tensor:  # fmt: skip
    """x W^T + bias + scaling drop(x) A^T B^T: (..., N) in x's dtype. Differentiable in x, lora_A, lora_B, bias and a dense w.

    x (..., K) float32, float16 or bfloat16, any strides; w (N, K) in x's dtype, or a QuantizedWeight of that shape; lora_A (r, K)
    and lora_B (N, r) of any float dtype; bias (N,). Dropout, 0 <= dropout < 1, acts on the low-rank path; `seed`, an int64, decides
    what falls, and without one it is drawn from torch's CPU generator. Gradients of gradients raise RuntimeError.
    Raises TypeError for dtypes, ValueError for shapes or devices that do not fit. Paper: arXiv:2106.09685, eq. 3.
    """
    N, K = _check(x, w, lora_A, lora_B, scaling, bias)
    base = (w, None, None, None, 0) if isinstance(w, Tensor) else w.tensors()
    seed = _seed(dropout, seed)
    return _call(x, *base, lora_A, lora_B, scaling, bias, dropout, seed, N, K, *_format(w))


Layer = tuple[Tensor | QuantizedWeight, Tensor, Tensor, float, Tensor | None]


def lora_linear_group(x: Tensor, layers: Sequence[Layer], *, dropout: float = 0.0, seed: int | None = None) -> list[Tensor]:
    """[lora_linear(x, *layer) for layer in layers] with x read and saved once, one dropout mask, and one dX.

    layers: (w, lora_A, lora_B, scaling, bias) each, as `lora_linear` takes them; ranks and widths may differ, the kind of weight
    (dense, or 4-bit of one block size, type and double quantization) may not. Raises as `lora_linear`, and ValueError for
    layers of different kinds.
    """
    layers = list(layers)
    if not layers:
        return []
    shapes = [_check(x, *layer) for layer in layers]
    weights, As, Bs, scalings, biases = (list(column) for column in zip(*layers, strict=True))
    kinds = {(*_format(w), *((w.tensors()[2] is None, w.tensors()[4]) if isinstance(w, QuantizedWeight) else ())) for w in weights}
    if len(kinds) > 1:
        raise ValueError(f"the layers' weights are of different kinds, {sorted(kinds)}; call lora_linear for each")
    stored = [(w, None, None, None, 0) if isinstance(w, Tensor) else w.tensors() for w in weights]
    *tensors, (nested_block_size, *_) = (list(column) for column in zip(*stored, strict=True))
    tensors = [[t for t in column if t is not None] for column in tensors]
    if any(bias is not None for bias in biases):
        biases = [x.new_zeros(N) if bias is None else bias for bias, (N, _) in zip(biases, shapes, strict=True)]
    return _call_group(
        x, *tensors, nested_block_size, As, Bs, scalings, [b for b in biases if b is not None], dropout,
        _seed(dropout, seed), [N for N, _ in shapes], shapes[0][1], *_format(weights[0]),
    )  # fmt: skip
