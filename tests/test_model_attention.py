"""Attention's own backward pass beside autograd of the plain expression."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerance import assert_as_accurate

from posttrain.model import attention as module
from posttrain.model.attention import attention


def operands(B, heads, kv_heads, T, D, dtype=torch.float64):
    """q, k, v laid out as a decoder makes them: heads between positions and channels."""
    return [torch.randn(B, T, h, D, dtype=torch.float64).to(dtype).transpose(1, 2) for h in (heads, kv_heads, kv_heads)]


def segments(B, T, dtype):
    """Each row has two packed sequences; where they meet differs."""
    ids = torch.arange(T)[None] >= torch.arange(1, B + 1)[:, None]
    allowed = (ids[:, :, None] == ids[:, None]) & torch.ones(T, T, dtype=torch.bool).tril()
    return torch.zeros(B, 1, T, T, dtype=dtype).masked_fill_(~allowed[:, None], -torch.inf)


def plain(q, k, v, mask):
    """The heads that share keys and values are rows of one product, as in the code: sums of as many terms."""
    (B, heads, T, D), kv_heads = q.shape, k.shape[1]
    rows = q.reshape(B, kv_heads, -1, D)
    scores = (rows @ k.transpose(2, 3) * D**-0.5).view(B, heads, T, T)
    mask = q.new_full((T, T), -torch.inf).triu(1) if mask is None else mask
    return ((scores + mask).softmax(-1).view(B, kv_heads, -1, T) @ v).view(B, heads, T, D)


@settings(max_examples=12)
@given(st.integers(1, 3), st.sampled_from([(1, 1), (4, 2), (3, 1)]), st.integers(1, 5), st.integers(1, 3), st.booleans())
def test_gradcheck(B, heads, T, D, packed):
    inputs = [t.requires_grad_() for t in operands(B, *heads, T, D)]
    mask = segments(B, T, torch.float64) if packed else None
    assert torch.autograd.gradcheck(lambda *qkv: attention(*qkv, mask), inputs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("masked", [None, "packed", "one for all rows"])
@pytest.mark.parametrize("chunked", [False, True])
def test_as_accurate_as_the_plain_expression(dtype, masked, chunked, monkeypatch):
    B, T = 3, 65
    if chunked:  # two rows of the batch at once, then one
        monkeypatch.setattr(module, "_SCORES", 2 * 6 * T * T)
    qkv = operands(B, 6, 2, T, 32, dtype)
    mask = None if masked is None else segments(B if masked == "packed" else 1, T, dtype)
    dy = torch.randn(B, 6, T, 32).to(dtype)
    results = []
    for function, wide in ((attention, dtype), (plain, dtype), (plain, torch.float64)):
        leaves = [t.detach().to(wide).requires_grad_() for t in qkv]
        y = function(*leaves, mask if mask is None else mask.to(wide))
        y.backward(dy.to(wide))
        results.append([y, *(leaf.grad for leaf in leaves)])
    (y, *ours), (_, *theirs), (_, *exact) = results
    with torch.no_grad():
        assert torch.equal(y, attention(*qkv, mask))  # PyTorch's own
    for gradient, plain_gradient, exact_gradient in zip(ours, theirs, exact, strict=True):
        assert gradient.dtype == dtype
        assert_as_accurate(gradient, plain_gradient, exact_gradient)


def test_saves_its_inputs_alone():
    q, k, v = (t.requires_grad_() for t in operands(1, 2, 1, 8, 4))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.data_ptr()), lambda t: t):
        attention(q, k, v)
    assert saved == [t.data_ptr() for t in (q, k, v)]


def test_too_many_scores_go_to_pytorch(monkeypatch):
    monkeypatch.setattr(module, "_SCORES", 2 * 8 * 8 - 1)
    leaves = [t.requires_grad_() for t in operands(1, 2, 1, 8, 4)]
    assert "ScaledDot" in type(attention(*leaves).grad_fn).__name__
