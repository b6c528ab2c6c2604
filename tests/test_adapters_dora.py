"""DoRA: the norm without its matrix, the layer beside the paper's expression and PEFT's, merging, the cached norm."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from model_cases import random_model
from tolerance import assert_as_accurate

from posttrain import adapters
from posttrain.adapters import LoraConfig
from posttrain.adapters.dora import dora_linear, rescaling, row_squares, weight_norm
from posttrain.adapters.lora import lora_layers
from posttrain.kernels import quantize_weight
from posttrain.quantized import QuantizedLinear, quantize_model

N, K, r, SCALING = 96, 160, 8, 1.5
IDS = torch.arange(24).view(2, 12)
CONFIG = LoraConfig(r=4, lora_alpha=8, init_lora_weights=False, use_dora=True)


def operands(dtype, quantized):
    """x, W as the layer has it, W dense, A, B, magnitude, bias: as after some training."""
    x, W = torch.randn(40, K).to(dtype), torch.randn(N, K).to(dtype)
    weight = quantize_weight(W) if quantized else W
    dense = weight.dequantize() if quantized else W
    A, B, bias = torch.randn(r, K) / 4, torch.randn(N, r) / 4, torch.randn(N).to(dtype)
    return x, weight, dense, A, B, dense.float().norm(dim=1) * torch.empty(N).uniform_(0.5, 1.5), bias


def plain(x, W, A, B, magnitude, bias, dropped=None):
    """Equation 5 as written, with PEFT's dropout: W + s B A whole, its norm outside the graph."""
    update = (SCALING * (B @ A)).to(x.dtype)
    factor = (magnitude / torch.linalg.vector_norm(W + update.detach(), dim=1).detach()).to(x.dtype)
    if dropped is None:
        return factor * F.linear(x, W + update) + bias
    return F.linear(x, W, bias) + (factor - 1) * F.linear(dropped, W) + factor * F.linear(dropped, update)


def ours(x, weight, A, B, magnitude, bias, dropout=0.0):
    norm = weight_norm(weight, row_squares(weight), A, B, SCALING, x.dtype)
    return dora_linear(x, weight, A, B, SCALING, rescaling(magnitude, norm), bias, dropout=dropout)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.25])
def test_value_and_gradients_are_as_accurate_as_the_plain_expression(dtype, quantized, dropout):
    x, weight, dense, A, B, magnitude, bias = operands(dtype, quantized)
    dy = torch.randn(40, N).to(dtype)
    results = []
    for wide, function in ((None, ours), (None, plain), (torch.float64, plain)):
        leaves = [t.detach().to(wide or t.dtype).requires_grad_() for t in (x, A, B, magnitude, bias)]
        x_, *rest = leaves
        torch.manual_seed(3)
        if function is ours:
            y = ours(x_, weight, *rest, dropout)
        else:
            mask = F.dropout(torch.ones_like(x), dropout)
            y = plain(x_, dense.to(wide or dtype), *rest, x_ * mask if dropout else None)
        y.backward(dy.to(y.dtype))
        results.append([y, *(leaf.grad for leaf in leaves)])
    for mine, theirs, exact in zip(*results, strict=True):
        assert_as_accurate(mine, theirs, exact)


def test_gradcheck_with_the_norm_held_constant():
    x, weight, A, B = (torch.randn(shape, dtype=torch.float64) for shape in ((3, 5), (4, 5), (2, 5), (4, 2)))
    norm = weight_norm(weight, row_squares(weight), A, B, SCALING, torch.float64)
    leaves = [x, A, B, torch.rand(4, dtype=torch.float64), torch.randn(4, dtype=torch.float64)]

    def run(x, A, B, magnitude, bias):
        return dora_linear(x, weight, A, B, SCALING, rescaling(magnitude, norm), bias)

    assert torch.autograd.gradcheck(run, [t.requires_grad_() for t in leaves], fast_mode=True)


@given(N=st.integers(1, 70), K=st.integers(1, 70), block_size=st.sampled_from([32, 64, 128]), double=st.booleans())
def test_row_squares_of_any_shape(N, K, block_size, double):
    """Also where blocks run over the ends of rows and the weight has an odd number of elements."""
    from posttrain.adapters import dora

    weight = quantize_weight(torch.randn(N, K), "nf4", block_size, double)
    before, dora._CHUNK = dora._CHUNK, 128  # several chunks
    try:
        squares = row_squares(weight)
    finally:
        dora._CHUNK = before
    dense = weight.dequantize()
    exact = dense.double().square().sum(1)
    assert_as_accurate(squares, torch.linalg.vector_norm(dense, dim=1).square(), exact)
    assert_as_accurate(row_squares(dense), torch.linalg.vector_norm(dense, dim=1).square(), exact)


def test_norm_where_the_update_takes_most_of_a_row_away():
    W = torch.randn(4, 64)
    A, B = W.clone(), -0.99 * torch.eye(4)
    exact = (W.double() + B.double() @ A.double()).square().sum(1)
    squares = weight_norm(W, row_squares(W), A, B, 1.0, torch.float32).double().square()
    # 1 % of the row is left. A sum of K products in fp32 errs by at most K eps times the products' own sizes (Higham,
    # section 3.1), and these are at most ||W||^2 each for the cross term, twice, and the update's square.
    assert ((squares - exact).abs() <= 4 * 64 * torch.finfo(torch.float32).eps * W.double().square().sum(1)).all()


def test_a_zero_row_gives_the_bias_and_no_nan():
    x, W, _, A, B, magnitude, bias = operands(torch.float32, False)
    W[3], B[3], magnitude[3] = 0, 0, 0
    leaves = [t.requires_grad_() for t in (A, B, magnitude)]
    y = ours(x, W, *leaves, bias)
    y.sum().backward()
    assert torch.equal(y[:, 3], bias[3].expand(40)) and all(torch.isfinite(leaf.grad).all() for leaf in leaves)


@pytest.fixture(params=["dense", "nf4"])
def model(request):
    model = random_model("qwen2")
    if request.param == "nf4":
        quantize_model(model)
    return model


def logits(model):
    with torch.no_grad():
        return model(IDS)


def wide(model):
    """A dense float64 copy."""
    copied = copy.deepcopy(model)
    for name, layer in list(copied.named_modules()):
        if isinstance(layer, QuantizedLinear):
            dense = torch.nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
            dense.weight, dense.bias = torch.nn.Parameter(layer.weight.dequantize()), layer.bias
            copied.set_submodule(name, dense)
    return copied.double()


def test_starts_at_the_base_and_trains_the_magnitudes(model):
    before, exact = logits(model), logits(wide(model))
    names = adapters.attach(model, LoraConfig(r=4, use_dora=True))
    for name in names:
        layer = lora_layers(model)[name]
        magnitude = layer.lora_magnitude_vector["default"]
        assert torch.equal(magnitude, row_squares(layer.base_layer.weight).sqrt().float())
        assert torch.equal(layer.norm("default", torch.float32), magnitude)  # so that the factor is 1 exactly
    assert_as_accurate(logits(model), before, exact)
    model(IDS).logsumexp(-1).sum().backward()
    trained = {key.rpartition("lora_")[2] for key in adapters.adapter_parameters(model)}
    assert trained == {"A.weight", "B.weight", "magnitude_vector"}
    assert all(p.grad is not None for p in adapters.adapter_parameters(model).values())


def test_merge_is_the_paper_weight(model):
    adapters.attach(model, CONFIG)
    for layer in lora_layers(model).values():
        with torch.no_grad():
            layer.lora_magnitude_vector["default"].mul_(torch.empty(layer.out_features).uniform_(0.5, 1.5))
    for layer in lora_layers(model).values():
        weight = layer.base_layer.weight
        W = (weight if isinstance(weight, torch.Tensor) else weight.dequantize()).detach()
        A, B, m = (t.detach() for t in (*layer.factors("default"), layer.lora_magnitude_vector["default"]))

        def merged(W, A, B, m, s=layer.scaling["default"]):
            moved = W + s * (B @ A)
            return (m / moved.norm(dim=1))[:, None] * moved

        exact = merged(*(t.double() for t in (W, A, B, m)))
        assert_as_accurate(layer.merged_weight("default"), merged(W, A, B, m), exact)
    before = logits(model)
    adapters.merge(model)
    assert not torch.equal(logits(model), before)
    adapters.unmerge(model)
    assert torch.equal(logits(model), before)


def test_the_norm_is_kept_in_eval_mode_until_a_factor_changes(monkeypatch):
    from posttrain.adapters import lora_linear

    calls = []
    monkeypatch.setattr(lora_linear, "weight_norm", lambda *a: calls.append(1) or weight_norm(*a))
    model = random_model()
    adapters.attach(model, CONFIG)
    layers = len(lora_layers(model))
    first = logits(model)
    assert torch.equal(logits(model), first) and len(calls) == layers
    layer = model.model.layers[0].mlp.up_proj
    with torch.no_grad():
        layer.lora_B["default"].mul_(2)
    second = logits(model)
    assert not torch.equal(second, first) and len(calls) == layers + 1
    with torch.no_grad():
        layer.lora_magnitude_vector["default"].mul_(2)
    assert not torch.equal(logits(model), second) and len(calls) == layers + 2
    model(IDS).sum().backward()  # in eval mode gradients still reach the magnitudes
    assert layer.lora_magnitude_vector["default"].grad.any() and len(calls) == layers + 2
    model.train()
    logits(model), logits(model)
    assert len(calls) == 3 * layers + 2
    model.eval().to(torch.bfloat16)
    logits(model)
    assert len(calls) == 4 * layers + 2


def test_inference_tensors_are_not_taken_for_unchanged():
    model = random_model()
    with torch.inference_mode():
        adapters.attach(model, CONFIG)
        first = logits(model)
        model.model.layers[0].mlp.up_proj.lora_B["default"].mul_(2)
        assert not torch.equal(logits(model), first)


@pytest.mark.peers
@pytest.mark.parametrize("bias", [True, False])
def test_layer_and_gradients_are_pefts(bias):
    """In fp32 and float64: PEFT's DoRA layer on the same tensors, forward and backward."""
    peft = pytest.importorskip("peft")
    results = []
    base = torch.nn.Linear(K, N, bias=bias)
    state = {"A": torch.randn(r, K) / 4, "B": torch.randn(N, r) / 4, "m": torch.empty(N).uniform_(5, 8)}
    x0, dy = torch.randn(40, K), torch.randn(40, N)
    for dtype in (torch.float32, torch.float64):
        wrapped = torch.nn.Sequential(torch.nn.Linear(K, N, bias=bias)).to(dtype)
        wrapped[0].load_state_dict(base.state_dict())
        peer = peft.get_peft_model(
            wrapped, peft.LoraConfig(r=r, lora_alpha=12, target_modules=["0"], use_dora=True), autocast_adapter_dtype=False
        )
        layer = peer.base_model.model[0]
        parameters = layer.lora_A["default"].weight, layer.lora_B["default"].weight, layer.lora_magnitude_vector["default"].weight
        for parameter, value in zip(parameters, state.values(), strict=True):
            parameter.data = value.to(dtype)
        x = x0.to(dtype, copy=True).requires_grad_()
        y = peer(x)
        y.backward(dy.to(dtype))
        results.append([y, x.grad, *(p.grad for p in parameters)])
    leaves = [t.clone().requires_grad_() for t in (x0, *state.values())]
    y = ours(leaves[0], base.weight.detach(), *leaves[1:], base.bias)
    y.backward(dy)
    for mine, theirs, exact in zip([y, *(leaf.grad for leaf in leaves)], *results, strict=True):
        assert_as_accurate(mine, theirs, exact)


@pytest.mark.parametrize("training", (False, True))
def test_compiles_whole(training):
    model = random_model("smollm2").train(training)
    adapters.attach(model, CONFIG)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert torch.equal(compiled(IDS), model(IDS))
