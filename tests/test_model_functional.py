"""RMSNorm and SwiGLU: values, gradients, what they save."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from tolerance import assert_as_accurate

from posttrain.model.functional import rms_norm, swiglu

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def plain_rms_norm(x, weight, eps):
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


def plain_swiglu(gate, up):
    return F.silu(gate) * up


@given(st.integers(1, 5), st.integers(1, 3), st.sampled_from([1, 3, 8]))
def test_gradcheck(rows, columns, batch):
    x, gate, up = (torch.randn(batch, rows, columns, dtype=torch.float64, requires_grad=True) for _ in range(3))
    weight = torch.randn(columns, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, w: rms_norm(x, w, 1e-2), (x, weight))
    assert torch.autograd.gradcheck(swiglu, (gate, up))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 576), (7, 576), (2, 3, 96), (4, 5, 6, 128)])
def test_values_and_gradients_are_as_accurate_as_plain_pytorch(shape, dtype):
    x, dy = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
    weight, up = torch.rand(shape[-1]).to(dtype) + 0.5, torch.randn(shape).to(dtype)
    for ours, plain, first, second in (
        (lambda a, b: rms_norm(a, b, 1e-5), lambda a, b: plain_rms_norm(a, b, 1e-5), x, weight),
        (swiglu, plain_swiglu, x, up),
    ):
        results = []
        for function, wide in ((ours, False), (plain, False), (plain, True)):
            a, b = (t.double() if wide else t.clone() for t in (first, second))
            a.requires_grad_()
            b.requires_grad_()
            y = function(a, b)
            y.backward(dy.to(y.dtype))
            results.append((y, a.grad, b.grad))
        assert results[0][0].dtype == dtype
        for triple in zip(*results, strict=True):
            assert_as_accurate(*triple)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 6])
def test_inference_is_as_accurate_as_plain_pytorch(rows, dtype):
    x, weight, up = torch.randn(rows, 576).to(dtype), torch.rand(576).to(dtype) + 0.5, torch.randn(rows, 576).to(dtype)
    with torch.inference_mode():
        exact = plain_rms_norm(x.double(), weight.double(), 1e-5)
        assert_as_accurate(rms_norm(x, weight, 1e-5), plain_rms_norm(x, weight, 1e-5), exact)
        before = x.clone()
        assert_as_accurate(swiglu(x, up), plain_swiglu(x, up), plain_swiglu(x.double(), up.double()))
        assert torch.equal(x, before)


def test_extremes():
    with torch.inference_mode():
        for rows in (1, 3):
            zero = torch.zeros(rows, 8)
            assert torch.equal(rms_norm(zero, torch.ones(8), 1e-6), zero)
            assert rms_norm(torch.full((rows, 8), torch.nan), torch.ones(8), 1e-6).isnan().all()
            assert rms_norm(torch.full((rows, 8), 30000.0, dtype=torch.float16), torch.ones(8).half(), 1e-6).eq(1).all()
        assert rms_norm(torch.zeros(0, 8), torch.ones(8), 1e-6).shape == (0, 8)


@pytest.mark.parametrize("weight_grad", [True, False])
@pytest.mark.parametrize("x_grad", [True, False])
def test_only_the_gradients_asked_for(x_grad, weight_grad):
    x, weight = torch.randn(3, 8, requires_grad=x_grad), torch.randn(8, requires_grad=weight_grad)
    y = rms_norm(x, weight, 1e-6)
    assert y.requires_grad == (x_grad or weight_grad)
    if y.requires_grad:
        y.sum().backward()
    assert (x.grad is not None, weight.grad is not None) == (x_grad, weight_grad)


def test_bf16_saves_no_wider_copy():
    x, weight = torch.randn(64, 128).bfloat16().requires_grad_(), torch.ones(128).bfloat16().requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.nbytes) or t, lambda t: t):
        swiglu(rms_norm(x, weight, 1e-6), x)
    norm = x.nbytes + weight.nbytes + 4 * 64
    assert sum(saved) == norm + 2 * x.nbytes
