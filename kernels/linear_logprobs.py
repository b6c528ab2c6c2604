"""Per-token log-probabilities through a language-model head; the (N, V) logits never exist whole.

    z = hidden W^T + bias      log p_t = z_t[y_t] - log sum_v exp z_t[v]      entropy_t = -sum_v p_t[v] log p_t[v]
    dhidden_t = g_t (W[y_t] - softmax(z_t) W)         dW = sum_t g_t (onehot(y_t) - softmax(z_t)) hidden_t^T        dbias likewise

hidden     float32 | float16 | bfloat16 (N, H)
weight     hidden's dtype (V, H), or 4-bit (QLoRA's arithmetic, see quantized_linear.py)
labels     int64 (N,)                                 rows of label ignore_index give zeros and no gradient
bias       hidden's dtype (V,) or None
logprobs, entropy  float32 (N,)                       entropy takes no gradient

Rows go through a scratch of `chunk_rows` x V logits: the vendor's product, logit_rows.py in place, the vendor's product. Where the
head is frozen (LoRA, QLoRA) the forward pass saves the direction W[y] - softmax(z) W (N, H), and backward is one scale a row: two
products of 2 N V H flops in all instead of three, whatever the loss on the log-probabilities is. A trained head computes the
logits again in the backward pass: four products.

Why the tile is not kept on chip: the direction's product needs a whole row's softmax and H accumulators a row, which at
H = 4096 is four times a multiprocessor's registers for 64 rows; splitting H computes the logits again for every part. By the
scratch each logit is written twice and read three times beside the products: at most 10 bytes of bfloat16 against 4 H flops, on
an H100 (3.35 TB/s, 600 Tflop/s reached) 3.0 ps against 3.8 ps at H = 576 and 27 ps at H = 4096, were it all DRAM. But 256 rows of
V = 32k to 49k are 17 to 25 MB and stay in its L2 of 50 MB; of V = 152k (78 MB) half does, and H is 4096 there. Fewer rows would
make the products wait for W: with M rows a product does M flops per byte of W, and an H100 needs 179, an A100 200.
Least bytes: 2 (N + V) H read, 4 N H of direction written and read. Oracle: reference/linear_logprobs.py.

A CPU with AMX has a second-level cache for what a multiprocessor has no registers for: many rows of bfloat16 are multiplied by
kernels/cpu/amx_logprobs.c, as attention whose keys and values are both W, without the scratch and without rounding a logit.
"""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import cpu
from . import logit_rows as _logit_rows  # also defines the op
from ._library import define, differentiable
from .nf4 import DTYPES
from .quantized_weight import QuantizedWeight

_BASE = "Tensor weight, Tensor? absmax, Tensor? nested_absmax, Tensor? nested_offset, int nested_block_size"
_FORMAT = "SymInt V, SymInt H, int block_size, str quant_type"
_LEAST_ROWS = 256  # above what keeps the products from waiting for W, see above
_SCRATCH = 2**24  # logits
_ROWS = 32  # of which a chunk's rows are a multiple


def chunk_rows(V: int) -> int:
    """Rows that share the scratch: 2^24 logits' worth (32 MB in bfloat16) in multiples of 128, and never fewer than 256."""
    return max(_LEAST_ROWS, _SCRATCH // max(V, 1) // 128 * 128)


def _logits(rows: Tensor, base: tuple, bias: Tensor | None, out: Tensor) -> Tensor:
    """rows W^T + bias, into `out` where the product can be told to."""
    weight, absmax, nested, offset, nested_block_size, *format = base
    if format[3] == "none":
        return torch.mm(rows, weight.t(), out=out) if bias is None else torch.addmm(bias, rows, weight.t(), out=out)
    return torch.ops.posttrain.quantized_linear(rows, weight, absmax, nested, offset, nested_block_size, bias, *format)


def _times_weight(dz: Tensor, base: tuple) -> Tensor:
    weight, absmax, nested, offset, nested_block_size, *format = base
    if format[3] == "none":
        return torch.mm(dz, weight)
    return torch.ops.posttrain.quantized_linear_dx(dz, weight, absmax, nested, offset, nested_block_size, *format)


def _chunks(hidden: Tensor, base: tuple, bias: Tensor | None):
    """(slice, logits (rows, V)) one chunk after another, in one scratch.

    Rows of zeros fill the last one up to a multiple of 32, and their logits come behind the others: on a CPU oneDNN keeps two MB
    for every number of rows that it has ever multiplied, and in training that number is another one in every step. Up to 32 rows
    stay as many as they are.
    """
    N, V = len(hidden), base[5]
    fill = -N % _ROWS if N > _ROWS else 0
    step = min(chunk_rows(V), N + fill)
    scratch = hidden.new_empty(step, V) if base[8] == "none" else hidden.new_empty(0, V)
    for start in range(0, N, max(step, 1)):
        part = slice(start, min(start + step, N))
        rows = hidden[part]
        if part.stop == N and fill:
            rows = torch.nn.functional.pad(rows, (0, 0, 0, fill))
        yield part, _logits(rows, base, bias, scratch[: len(rows)])


def _forward(hidden, weight, absmax, nested, offset, nested_block_size, labels, bias, ignore_index, direction, measure, *format):
    base = (weight, absmax, nested, offset, nested_block_size, *format)
    logprobs, entropy, saved = _fake(
        hidden, weight, absmax, nested, offset, nested_block_size, labels, bias, ignore_index, direction, measure
    )
    for part, logits in _chunks(hidden, base, bias):
        n = part.stop - part.start
        logprobs[part], entropy[part] = torch.ops.posttrain.logit_rows(logits[:n], labels[part], ignore_index, direction, measure)
        if direction:
            saved[part] = _times_weight(logits, base)[:n]
    return logprobs, entropy, saved


def _forward_cpu(hidden, *rest):
    weight, absmax, nested, offset, nested_block_size, labels, bias, ignore_index, direction, measure, V, _, *format = rest
    _logit_rows.check_labels(labels, V, ignore_index)
    base = (weight, absmax, nested, offset, nested_block_size, *format)
    fused = cpu.fused_logprobs(hidden, base, V, bias, labels, ignore_index, direction, measure)
    return fused or _forward(hidden, *rest)


def _backward_of_head(
    gradient, hidden, weight, absmax, nested, offset, nested_block_size, labels, bias, ignore_index, need_weight, need_bias, *format
):
    """(dhidden, dweight, dbias) where the head trains; dweight and dbias are summed in float32."""
    base = (weight, absmax, nested, offset, nested_block_size, *format)
    dhidden, dweight, dbias = torch.empty_like(hidden), *_head_gradients(hidden, format[0], need_weight, need_bias)
    for part, logits in _chunks(hidden, base, bias):
        n = part.stop - part.start
        dz = logits[:n]
        torch.ops.posttrain.logit_rows(dz, labels[part], ignore_index, True, False)
        dz.mul_(gradient[part, None].to(logits.dtype))
        dhidden[part] = _times_weight(logits, base)[:n]
        if need_weight:
            dweight += dz.t() @ hidden[part]
        if need_bias:
            dbias += dz.sum(0, dtype=dbias.dtype)
    return dhidden, dweight.to(hidden.dtype), dbias.to(hidden.dtype)


def _head_gradients(hidden: Tensor, V: int, need_weight: bool, need_bias: bool) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(hidden.dtype, torch.float32)
    dweight = hidden.new_zeros((V, hidden.shape[1]) if need_weight else 0, dtype=wide)
    return dweight, hidden.new_zeros(V if need_bias else 0, dtype=wide)


def _fake(hidden, weight, absmax, nested, offset, nested_block_size, labels, bias, ignore_index, direction, measure, *format):
    wide = torch.promote_types(hidden.dtype, torch.float32)
    logprobs, entropy = (hidden.new_empty(len(hidden), dtype=wide) for _ in range(2))
    return logprobs, entropy, hidden.new_empty(hidden.shape if direction else 0)


def _backward_fake(gradient, hidden, *rest):
    need_weight, need_bias, V = rest[-6], rest[-5], rest[-4]
    dhidden, dweight, dbias = torch.empty_like(hidden), *_head_gradients(hidden, V, need_weight, need_bias)
    return dhidden, dweight.to(hidden.dtype), dbias.to(hidden.dtype)


define(
    f"linear_logprobs(Tensor hidden, {_BASE}, Tensor labels, Tensor? bias, int ignore_index, bool direction, bool entropy, "
    f"{_FORMAT}) -> (Tensor, Tensor, Tensor)",
    _fake,
    CPU=_forward_cpu,
    CUDA=_forward,
)
define(
    f"linear_logprobs_backward(Tensor gradient, Tensor hidden, {_BASE}, Tensor labels, Tensor? bias, int ignore_index, "
    f"bool need_weight, bool need_bias, {_FORMAT}) -> (Tensor, Tensor, Tensor)",
    _backward_fake,
    CPU=_backward_of_head,
    CUDA=_backward_of_head,
)


def _setup_context(ctx, inputs, output):
    hidden, weight, absmax, nested, offset, nested_block_size, labels, bias, ignore_index, direction, _, *format = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.has_direction, ctx.rest = direction, (nested_block_size, ignore_index, format)
    if direction:
        ctx.save_for_backward(output[2])
    else:
        ctx.save_for_backward(hidden, weight, absmax, nested, offset, labels, bias)


@once_differentiable  # the direction was saved as a number: its own derivative would be missing
def _backward(ctx, gradient, *_):
    # dhidden_t = g_t (W[y_t] - softmax(z_t) W): the direction was saved, or the logits are computed again
    dweight = dbias = None
    if ctx.has_direction:
        (direction,) = ctx.saved_tensors
        dhidden = direction * gradient[:, None].to(direction.dtype)
    else:
        hidden, weight, absmax, nested, offset, labels, bias = ctx.saved_tensors
        nested_block_size, ignore_index, format = ctx.rest
        base = (weight, absmax, nested, offset, nested_block_size)
        needs = ctx.needs[1], ctx.needs[7]
        op = torch.ops.posttrain.linear_logprobs_backward
        dhidden, dweight, dbias = op(gradient, hidden, *base, labels, bias, ignore_index, *needs, *format)
        dweight, dbias = dweight if needs[0] else None, dbias if needs[1] else None
    return dhidden, dweight, *(None,) * 5, dbias, *(None,) * 7


differentiable("linear_logprobs", _backward, _setup_context)


@overload
def linear_logprobs(
    hidden: Tensor,
    weight: Tensor | QuantizedWeight,
    labels: Tensor,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    return_entropy: Literal[False] = False,
) -> Tensor: ...
@overload
def linear_logprobs(
    hidden: Tensor,
    weight: Tensor | QuantizedWeight,
    labels: Tensor,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    *,
    return_entropy: Literal[True],
) -> tuple[Tensor, Tensor]: ...
def linear_logprobs(
    hidden: Tensor,
    weight: Tensor | QuantizedWeight,
    labels: Tensor,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    return_entropy: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Log-probability (N,) of each label under softmax(hidden weight^T + bias), in float32; with return_entropy also the entropies.

    hidden (N, H) float32, float16 or bfloat16; weight (V, H) in its dtype or a QuantizedWeight; labels int64 (N,), a row of
    `ignore_index` gives 0. Differentiable in hidden, a dense weight and bias; the entropy is a measurement without gradient.
    Rows without a label cost as much as others: leave them out where you can. Raises TypeError for dtypes and ValueError for
    shapes or devices that do not fit, and on a CPU for labels outside the vocabulary (on a GPU these give NaN).
    """
    quantized = isinstance(weight, QuantizedWeight)
    V, H = weight.shape if len(weight.shape) == 2 else (-1, -1)
    if hidden.dim() != 2 or hidden.shape[1] != H or labels.shape != hidden.shape[:1] or (bias is not None and bias.shape != (V,)):
        given = "" if bias is None else f", bias {tuple(bias.shape)}"
        raise ValueError(
            f"hidden {tuple(hidden.shape)}, weight {tuple(weight.shape)}, labels {tuple(labels.shape)}{given}; "
            "expected (N, H), (V, H), (N,) and (V,)"
        )
    wide = hidden.dtype == torch.float64 and hidden.device.type == "cpu" and not quantized
    if hidden.dtype not in DTYPES and not wide:
        raise TypeError(f"hidden is {hidden.dtype}; expected float32, float16 or bfloat16 (float64 for a dense head on a CPU)")
    for name, tensor in (("weight", None if quantized else weight), ("bias", bias)):
        if isinstance(tensor, Tensor) and tensor.dtype != hidden.dtype:
            raise TypeError(f"{name} is {tensor.dtype} and hidden {hidden.dtype}; cast one to the other's")
    if labels.dtype != torch.int64:
        raise TypeError(f"labels are {labels.dtype}; expected int64")
    base = weight.tensors() if isinstance(weight, QuantizedWeight) else (weight, None, None, None, 0)
    format = (V, H, weight.block_size, weight.quant_type) if isinstance(weight, QuantizedWeight) else (V, H, 0, "none")
    for name, tensor in (("weight", base[0]), ("labels", labels), ("bias", bias)):
        if isinstance(tensor, Tensor) and tensor.device != hidden.device:
            raise ValueError(f"hidden is on {hidden.device} and {name} on {tensor.device}; move one to the other")
    trained = any(isinstance(t, Tensor) and t.requires_grad for t in (weight, bias))
    direction = torch.is_grad_enabled() and hidden.requires_grad and not trained
    options = (ignore_index, direction, return_entropy)
    logprobs, entropy, _ = torch.ops.posttrain.linear_logprobs(hidden, *base, labels, bias, *options, *format)
    return (logprobs, entropy) if return_entropy else logprobs
