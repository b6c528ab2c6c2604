"""Causal attention in AMX tiles: against float64 at tails of every dimension, with shared heads, in any layout, and the same
bits with any number of threads."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_model_attention import operands, plain
from tolerance import assert_as_accurate

from posttrain.model.attention import attention

native = pytest.importorskip("posttrain.kernels.cpu.native", reason="the native extension was not built")
native_attention = pytest.importorskip("posttrain.kernels.cpu.native_attention")
pytestmark = pytest.mark.skipif(native.ISA != "amx", reason="this machine has no AMX")
BF16 = torch.bfloat16


def results(function, dtype, q, k, v, dy):
    """y, dq, dk, dv in `dtype`."""
    leaves = [t.detach().to(dtype).requires_grad_() for t in (q, k, v)]
    y = function(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy.to(dtype))]


def ours(q, k, v, dy):
    assert native_attention.takes(q, k, v)
    y, softmax = native_attention.forward(q, k, v)
    return [y, *native_attention.backward(q, k, v, y, softmax, dy)]


def check(q, k, v, dy):
    found = ours(q, k, v, dy)
    obvious, exact = (results(lambda *qkv: plain(*qkv, None), dtype, q, k, v, dy) for dtype in (BF16, torch.float64))
    for one, plain_one, exact_one in zip(found, obvious, exact, strict=True):
        assert one.dtype == BF16
        assert_as_accurate(one, plain_one, exact_one)


def random(B, heads, kv_heads, T, D):
    return [*operands(B, heads, kv_heads, T, D, BF16), operands(B, heads, heads, T, D, BF16)[0]]


@pytest.mark.parametrize("heads, kv_heads", [(2, 2), (3, 1), (8, 2)])
@pytest.mark.parametrize("T, D", [(31, 64), (32, 32), (33, 128), (65, 64), (257, 128)])
def test_against_float64(heads, kv_heads, T, D):
    check(*random(2, heads, kv_heads, T, D))


@settings(max_examples=10)
@given(st.integers(1, 3), st.sampled_from([(1, 1), (4, 1), (6, 2)]), st.integers(9, 300), st.integers(8, 140))
def test_any_shape(B, heads, T, D):
    """With so many results at least that the largest of their errors is not one draw."""
    check(*random(B, *heads, T, D))


def test_one_position():
    """y = v and dv = dy. ds = dy v - delta is a difference of two sums of D products in different orders, p dy v and dy y: not
    quite zero, but below the bound of either sum's rounding."""
    B, heads, D = 2, 3, 64
    q, k, v, dy = random(B, heads, heads, 1, D)
    y, dq, dk, dv = ours(q, k, v, dy)
    assert torch.equal(y, v) and torch.equal(dv, dy)
    ds = 2 * D * torch.finfo(torch.float32).eps * (dy * v).double().abs().sum(-1, keepdim=True) * D**-0.5
    assert (dq.double().abs() <= ds * k.double().abs()).all() and (dk.double().abs() <= ds * q.double().abs()).all()


def test_queries_in_several_parts():
    """p and ds of all the queries at once would fill the cache: dK and dV are sums over parts."""
    check(*random(1, 3, 1, 1000, 64))


@pytest.mark.parametrize("layout", ["contiguous", "channels first", "one for all rows", "a part"])
def test_any_layout(layout):
    B, heads, kv_heads, T, D = 3, 4, 2, 70, 48
    lay = {
        "contiguous": lambda x: x.contiguous(),
        "channels first": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
        "one for all rows": lambda x: x[:1].expand_as(x),
        "a part": lambda x: torch.cat((x, x), 3)[..., D : 2 * D],
    }[layout]
    given = [lay(x) for x in random(B, heads, kv_heads, T, D)]
    for one, expected in zip(ours(*given), ours(*(x.clone() for x in given)), strict=True):
        assert torch.equal(one, expected)
        assert one.transpose(1, 2).is_contiguous()


def test_results_do_not_depend_on_the_number_of_threads():
    given, before, found = random(5, 6, 2, 150, 40), torch.get_num_threads(), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append(ours(*given))
    torch.set_num_threads(before)
    for other in found[1:]:
        for one, expected in zip(other, found[0], strict=True):
            assert torch.equal(one, expected)


@pytest.mark.parametrize("step", [0.3, 3.0, -3.0])
def test_scores_that_rise_or_fall_by_hundreds(step):
    """The weights' shift is an early block's largest score: where later ones are far above, they are made again."""
    q, k, v, dy = random(1, 2, 1, 200, 32)
    k = k + (step * torch.arange(200) * 32**0.5).to(BF16)[:, None] * torch.eye(1, 32, dtype=BF16)
    q = q * 0.1 + torch.eye(1, 32, dtype=BF16)
    check(q, k, v, dy)


def test_equal_scores_are_a_mean():
    """Of powers of two, the mean of whole numbers, to one rounding."""
    T, D = 64, 32
    q, v = torch.zeros(1, 1, T, D, dtype=BF16), torch.randint(-8, 8, (1, 1, T, D)).to(BF16)
    y, _ = native_attention.forward(q, q, v)
    counts = torch.arange(1, T + 1)[:, None]
    exact = counts.log2().frac() == 0
    mean = (v[0, 0].double().cumsum(0) / counts).to(BF16)
    assert torch.equal(y[0, 0][exact[:, 0]], mean[exact[:, 0]])


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("which", [0, 1, 2, 3])
def test_what_is_not_finite_stays_in_its_sequence(bad, which):
    given = random(3, 6, 2, 70, 32)
    clean = ours(*given)
    given[which][1, 1, 40, 5] = bad
    found = ours(*given)
    for one, expected in zip(found, clean, strict=True):
        assert torch.equal(one[[0, 2]], expected[[0, 2]])
    kv_head = 1 if which in (1, 2) else 0
    for one, expected in zip(found, clean, strict=True):
        group = one.shape[1] // 2
        other = [h for h in range(one.shape[1]) if h // group != kv_head]
        assert torch.equal(one[1, other], expected[1, other])
    seen = found[0 if which < 3 else 1][1]
    assert not torch.isfinite(seen).all()
    if which < 2:  # queries before it do not see a bad key, nor each other
        assert torch.isfinite(seen[:, :40]).all()


@settings(max_examples=5)
@given(st.integers(1, 70))
def test_in_the_model(T):
    """Both passes are this one, and gradients add up; without a gradient too, where there are positions enough."""
    q, k, v, dy = random(2, 6, 2, T, 32)
    y, *gradients = ours(q, k, v, dy)
    leaves = [t.detach().requires_grad_() for t in (q, k, v)]
    for times in (1, 2):
        made = attention(*leaves)
        assert torch.equal(made, y)
        made.backward(dy)
        for leaf, gradient in zip(leaves, gradients, strict=True):
            assert torch.equal(leaf.grad, times * gradient)
    if T >= 32:
        assert torch.equal(attention(q, k, v), y)


def test_has_no_second_derivative():
    q, k, v, dy = (t.requires_grad_() for t in random(1, 1, 1, 8, 32))
    (dq,) = torch.autograd.grad(attention(q, k, v), q, dy, create_graph=True)
    with pytest.raises(RuntimeError, match="causal_attention cannot be differentiated again"):
        dq.sum().backward()


def test_what_it_leaves_to_pytorch():
    q, k, v, _ = random(1, 4, 2, 40, 32)
    assert native_attention.takes(q, k, v)
    assert not native_attention.takes(q[:, :, :1], k, v)  # one more token
    assert not native_attention.takes(q.float(), k, v)
    assert not native_attention.takes(q[:, :3], k, v)
    assert not native_attention.takes(*(t.repeat(1, 1, 1, 9) for t in (q, k, v)))
    mask = torch.zeros(1, 1, 40, 40, dtype=BF16).masked_fill_(torch.ones(40, 40).triu(1).bool(), -torch.inf)
    assert "causal_attention" not in attention(q.requires_grad_(), k, v, mask).grad_fn.name()
    assert "causal_attention" in attention(q, k, v).grad_fn.name()
