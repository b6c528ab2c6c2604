"""The LoRA product: gradients, accuracy beside the plain expression, dropout, what is kept for the backward pass."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tolerance import assert_as_accurate

from posttrain.adapters.lora_linear import LoraLinear, lora_linear
from posttrain.kernels import quantize_weight

shapes = st.lists(st.integers(1, 4), max_size=2).map(tuple)


def operands(lead, N, K, r, dtype, bias=True):
    x = torch.randn(*lead, K, dtype=torch.float64).to(dtype)
    weight, A = torch.randn(N, K, dtype=torch.float64).to(dtype), torch.randn(r, K, dtype=torch.float64)
    B, bias = torch.randn(N, r, dtype=torch.float64), torch.randn(N, dtype=torch.float64).to(dtype) if bias else None
    return x, weight, A, B, bias


def plain(x, weight, A, B, scaling, bias, mask=None):
    """The expression of the paper, by autograd."""
    dropped = x if mask is None else x * mask
    return torch.nn.functional.linear(x, weight, bias) + scaling * ((dropped @ A.to(x.dtype).t()) @ B.to(x.dtype).t())


@given(
    lead=shapes, N=st.integers(1, 6), K=st.integers(1, 6), r=st.integers(1, 4), bias=st.booleans(), drop=st.booleans()
)
def test_gradcheck(lead, N, K, r, bias, drop):
    x, weight, A, B, b = operands(lead, N, K, r, torch.float64, bias)
    keep = torch.rand(x.shape) > 0.5 if drop else None
    inputs = [t.requires_grad_() for t in (x, weight, A, B, b) if t is not None]
    dropout = 0.5 if drop else 0.0

    def run(x, weight, A, B, b=None):
        return lora_linear(x, weight, A, B, 1.7, b, dropout=dropout, keep=keep)

    assert torch.autograd.gradcheck(run, inputs)


@given(lead=shapes, N=st.integers(1, 6), K=st.integers(1, 6), r=st.integers(1, 4), drop=st.booleans())
def test_any_shape(lead, N, K, r, drop):
    """On small whole numbers every product and sum is exact, so the result is too."""
    x, weight, A, B, bias = (t.mul(2).round().float() for t in operands(lead, N, K, r, torch.float64))
    keep = torch.rand(x.shape) > 0.5 if drop else None
    mask, dropout = (keep * 2.0, 0.5) if drop else (None, 0.0)
    ours = lora_linear(x, weight, A, B, 2.0, bias, dropout=dropout, keep=keep)
    assert torch.equal(ours, plain(x, weight, A, B, 2.0, bias, mask))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("rows", [(1,), (3, 17), (130,)])
def test_as_accurate_as_the_plain_expression(dtype, quantized, rows):
    N, K, r, scaling = 96, 160, 8, 2.0
    x, weight, A, B, bias = operands(rows, N, K, r, dtype)
    A, B = A.float(), B.float()
    used = quantize_weight(weight) if quantized else weight
    dense = used.dequantize() if quantized else weight
    dy = torch.randn(*rows, N).to(dtype)
    grads = []
    for function, w, wide in ((lora_linear, used, dtype), (plain, dense, dtype), (plain, dense, torch.float64)):
        leaves = [
            t.to(wide if t is x or t is bias else max_dtype(t, wide)).detach().requires_grad_() for t in (x, A, B, bias)
        ]
        weight_here = w if not isinstance(w, torch.Tensor) else w.to(wide)
        y = function(leaves[0], weight_here, leaves[1], leaves[2], scaling, leaves[3])
        y.backward(dy.to(wide))
        grads.append([y, *(leaf.grad for leaf in leaves)])
    for ours, theirs, exact in zip(*grads, strict=True):
        assert ours.dtype == theirs.dtype
        assert_as_accurate(ours, theirs, exact)


def max_dtype(tensor, wide):
    return torch.promote_types(tensor.dtype, wide)


def test_dropout_is_the_mask_scaled_on_the_low_rank_path_alone():
    x, weight, A, B, bias = operands((500,), 8, 12, 4, torch.float32)
    torch.manual_seed(3)
    first = lora_linear(x, weight, A, B, 1.0, bias, dropout=0.25)
    torch.manual_seed(3)
    keep = torch.empty(x.shape, dtype=torch.bool).bernoulli_(0.75)
    torch.manual_seed(3)
    assert torch.equal(first, lora_linear(x, weight, A, B, 1.0, bias, dropout=0.25))
    wide = [t.double() for t in (x, weight, A, B)]
    exact = plain(*wide, 1.0, bias.double(), keep.double() / 0.75)
    assert_as_accurate(first, plain(x, weight, A, B, 1.0, bias, keep / 0.75), exact)
    # 6,000 draws: the kept share is within five standard deviations of 0.75.
    assert abs(keep.double().mean() - 0.75) < 5 * (0.75 * 0.25 / keep.numel()) ** 0.5


def test_saves_the_input_alone():
    x, weight, A, B, _ = operands((64,), 32, 48, 4, torch.bfloat16)
    saved: list[torch.Tensor] = []

    def pack(tensor):
        saved.append(tensor)
        return tensor

    leaves = x.requires_grad_(), A.float().requires_grad_(), B.float().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        lora_linear(leaves[0], weight, leaves[1], leaves[2], 1.0)
    own = {leaf.data_ptr() for leaf in (*leaves, weight)}
    assert {t.data_ptr() for t in saved} == own


def test_only_needed_gradients_are_computed():
    x, weight, A, B, _ = operands((4,), 6, 5, 2, torch.float64)
    A.requires_grad_()
    lora_linear(x, weight, A, B, 1.0).sum().backward()
    assert x.grad is None and weight.grad is None and B.grad is None and A.grad is not None


@pytest.mark.parametrize(
    ("x", "A", "B", "dropout", "message"),
    [
        ((2, 4), (2, 5), (3, 2), 0.0, "do not fit a weight of 3 x 5"),
        ((2, 5), (2, 4), (3, 2), 0.0, "do not fit"),
        ((2, 5), (2, 5), (3, 1), 0.0, "do not fit"),
        ((2, 5), (2, 5), (3, 2), 1.0, "0 <= dropout < 1"),
    ],
)
def test_shapes_that_do_not_fit(x, A, B, dropout, message):
    with pytest.raises(ValueError, match=message):
        lora_linear(torch.zeros(x), torch.zeros(3, 5), torch.zeros(A), torch.zeros(B), 1.0, dropout=dropout)


def test_empty_batch():
    layer = LoraLinear(torch.nn.Linear(5, 3))
    layer.add("a", torch.randn(2, 5), torch.randn(3, 2), 1.0, 0.0)
    layer.active_adapter = "a"
    y = layer(torch.zeros(0, 5))
    y.sum().backward()
    assert y.shape == (0, 3) and torch.equal(layer.lora_A["a"].grad, torch.zeros(2, 5))
