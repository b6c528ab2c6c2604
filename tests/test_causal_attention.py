"""causal_attention: its oracle by hand and by differences, the op beside the oracle, registration, models that compile whole."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from model_cases import random_model
from test_model_attention import plain
from tolerance import assert_as_accurate

from posttrain import adapters
from posttrain.kernels.causal_attention import causal_attention, causal_attention_takes
from posttrain.quantized import quantize_model
from posttrain.reference import causal_attention as oracle

BF16 = torch.bfloat16


def operands(B, heads, kv_heads, T, D):
    """q, k, v, dy in bfloat16."""
    return [torch.randn(B, h, T, D).to(BF16) for h in (heads, kv_heads, kv_heads, heads)]


def here(*qkv) -> bool:
    return causal_attention_takes(*qkv, trained=True)


needs_engine = pytest.mark.skipif(not here(*operands(1, 1, 1, 32, 32)[:3]), reason="the CPU engine has no attention here")


def test_oracle_by_hand():
    """Two positions of one channel: scores 0 and ln 3 weigh the second query's values by 1/4 and 3/4."""
    q, k, v = np.array([[5.0], [1.0]]), np.array([[0.0], [np.log(3.0)]]), np.array([[2.0], [6.0]])
    y, p = oracle.attend(q, k, v)
    assert np.array_equal(p[0], [1, 0]) and np.allclose(p[1], [0.25, 0.75]) and np.allclose(y, [[2], [5]])
    # dy = (0, 1): delta = 5, ds = (1/4 (2 - 5), 3/4 (6 - 5)) = (-3/4, 3/4)
    dq, dk, dv = oracle.attend_backward(np.array([[0.0], [1.0]]), q, k, v, y, p)
    assert np.allclose(dq, [[0], [0.75 * np.log(3.0)]]) and np.allclose(dk, [[-0.75], [0.75]]) and np.allclose(dv, [[0.25], [0.75]])


@settings(max_examples=8)
@given(st.integers(1, 2), st.sampled_from([(1, 1), (4, 2), (3, 1)]), st.integers(1, 4), st.integers(1, 3))
def test_oracle_is_autograd_s(B, heads, T, D):
    q, k, v, dy = (torch.randn(B, h, T, D, dtype=torch.float64).requires_grad_() for h in (heads[0], heads[1], heads[1], heads[0]))
    y = plain(q, k, v, None)
    found = oracle.causal_attention(*(t.detach().numpy() for t in (q, k, v)))
    assert np.allclose(found, y.detach().numpy())
    gradients = oracle.causal_attention_backward(*(t.detach().numpy() for t in (dy, q, k, v)))
    for one, expected in zip(gradients, torch.autograd.grad(y, (q, k, v), dy), strict=True):
        assert np.allclose(one, expected.numpy())


@needs_engine
@pytest.mark.parametrize("shape", [(1, 2, 1, 33, 32), (2, 3, 3, 65, 40)])
def test_op_beside_the_oracle(shape):
    q, k, v, dy = operands(*shape)
    wide = [t.double().numpy() for t in (q, k, v)]
    exact = [oracle.causal_attention(*wide), *oracle.causal_attention_backward(dy.double().numpy(), *wide)]
    results = []
    for function in (causal_attention, lambda *qkv: plain(*qkv, None)):
        leaves = [t.clone().requires_grad_() for t in (q, k, v)]
        y = function(*leaves)
        results.append([y.detach(), *torch.autograd.grad(y, leaves, dy)])
    for found, obvious, expected in zip(*results, exact, strict=True):
        assert_as_accurate(found, obvious, torch.from_numpy(expected))


@needs_engine
def test_opcheck():
    q, k, v, dy = operands(2, 4, 2, 40, 32)
    torch.library.opcheck(torch.ops.posttrain.causal_attention, tuple(t.requires_grad_() for t in (q, k, v)))
    q, k, v = (t.detach() for t in (q, k, v))
    saved = torch.ops.posttrain.causal_attention(q, k, v)
    torch.library.opcheck(torch.ops.posttrain.causal_attention_backward, (q, k, v, *saved, dy))


@needs_engine
@pytest.mark.parametrize("quantized", (False, True))
def test_a_model_in_bfloat16_compiles_whole(quantized):
    """With LoRA: the same bits as without compiling, forward and backward."""
    model = random_model("qwen3", BF16)
    if quantized:
        quantize_model(model)
    adapters.attach(model, adapters.LoraConfig(r=4, init_lora_weights=False))
    ids, parameters = torch.arange(64).view(1, 64) % 97, list(adapters.adapter_parameters(model).values())
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    found, expected = (torch.autograd.grad(f(ids).float().square().sum(), parameters) for f in (compiled, model))
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
