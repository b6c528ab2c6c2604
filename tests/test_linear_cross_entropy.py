"""The head's loss without whole logits, beside the plain expression."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tolerance import assert_as_accurate

from posttrain.linear_cross_entropy import linear_cross_entropy


def plain(hidden, weight, labels):
    logits = hidden @ weight.t()
    return torch.nn.functional.cross_entropy(
        logits.to(torch.promote_types(logits.dtype, torch.float32)), labels, reduction="sum"
    )


@given(N=st.integers(0, 9), D=st.integers(1, 5), V=st.integers(1, 7), chunk=st.integers(1, 10), frozen=st.booleans())
def test_gradcheck(N, D, V, chunk, frozen):
    hidden = torch.randn(N, D, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(V, D, dtype=torch.float64, requires_grad=not frozen)
    labels = torch.randint(0, V, (N,))
    assert torch.autograd.gradcheck(lambda h, w: linear_cross_entropy(h, w, labels, chunk), (hidden, weight))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("scale", [0.1, 3.0])  # a flat and a nearly certain distribution
def test_as_accurate_as_the_plain_expression(dtype, scale):
    N, D, V = 70, 64, 1000
    hidden, weight = torch.randn(N, D).to(dtype), (torch.randn(V, D) * scale / 8).to(dtype)
    labels = torch.where(torch.rand(N) < 0.5, (hidden @ weight.t()).argmax(1), torch.randint(0, V, (N,)))
    results = []
    for function, wide in ((linear_cross_entropy, dtype), (plain, dtype), (plain, torch.float64)):
        h, w = (t.detach().to(wide).requires_grad_() for t in (hidden, weight))
        loss = function(h, w, labels) if function is plain else function(h, w, labels, 32)
        (loss * 0.01).backward()
        results.append((loss, h.grad, w.grad))
    for ours, theirs, exact in zip(*results, strict=True):
        assert ours.dtype == theirs.dtype
        assert_as_accurate(ours, theirs, exact)


def test_the_chunk_does_not_matter():
    hidden, weight, labels = torch.randn(40, 8), torch.randn(11, 8), torch.randint(0, 11, (40,))
    exact = plain(hidden.double(), weight.double(), labels)
    for chunk in (1, 7, 40, 1000):
        assert_as_accurate(linear_cross_entropy(hidden, weight, labels, chunk), plain(hidden, weight, labels), exact)


def test_keeps_only_the_gradient_of_hidden():
    hidden, weight = torch.randn(64, 8, requires_grad=True), torch.randn(1000, 8)
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        linear_cross_entropy(hidden, weight, torch.zeros(64, dtype=torch.int64))
    assert [tuple(t.shape) for t in saved] == [(64, 8)]


def test_no_gradient_is_computed_without_need(monkeypatch):
    products = []
    real = torch.mm
    monkeypatch.setattr(torch, "mm", lambda *a, **k: products.append(1) or real(*a, **k))
    linear_cross_entropy(torch.randn(4, 3), torch.randn(5, 3), torch.zeros(4, dtype=torch.int64), 2)
    assert len(products) == 2  # the logits of two chunks


def test_infinite_and_nan_hidden_states_show_in_the_loss():
    weight, labels = torch.randn(5, 3), torch.zeros(2, dtype=torch.int64)
    for bad in (torch.nan, torch.inf):
        hidden = torch.zeros(2, 3)
        hidden[1, 1] = bad
        assert not torch.isfinite(linear_cross_entropy(hidden, weight, labels))


@pytest.mark.parametrize("shapes", [((4, 3), (5, 2), (4,)), ((4, 3), (5, 3), (3,)), ((2, 2, 3), (5, 3), (4,))])
def test_shapes_that_do_not_fit(shapes):
    hidden, weight, labels = (torch.zeros(s) for s in shapes)
    with pytest.raises(ValueError, match=r"expected \(N, D\), \(V, D\) and \(N,\)"):
        linear_cross_entropy(hidden, weight, labels.long())
