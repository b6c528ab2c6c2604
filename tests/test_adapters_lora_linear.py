"""The adapted layer: whose tensors act, what is kept for the backward pass, dropout under activation checkpointing."""

from __future__ import annotations

import pytest
import torch
from model_cases import random_model
from tolerance import assert_as_accurate

from posttrain import adapters
from posttrain.adapters import LoraConfig
from posttrain.adapters.lora_linear import LoraLinear
from posttrain.quantized import QuantizedLinear, quantize_model

N, K, r = 96, 160, 8


@pytest.fixture(params=["dense", "nf4"])
def layer(request):
    linear = torch.nn.Linear(K, N).requires_grad_(False)
    made = LoraLinear(linear if request.param == "dense" else QuantizedLinear.from_linear(linear))
    made.add("a", {"lora_A": torch.randn(r, K), "lora_B": torch.randn(N, r)}, scaling=1.5)
    made.active_adapter = "a"
    return made


def dense_weight(layer):
    weight = layer.base_layer.weight
    return weight if isinstance(weight, torch.Tensor) else weight.dequantize()


def plain(x, W, bias, A, B, scaling):
    return torch.nn.functional.linear(x, W, bias) + scaling * ((x @ A.t()) @ B.t())


def test_computes_the_update_with_every_table(layer):
    x = torch.randn(3, 5, K)
    start = {"lora_A0": torch.randn(r, K), "lora_B0": torch.randn(N, r)}
    biases = {"lora_bias": torch.randn(N), "base_bias": torch.randn(N)}
    layer.add("b", {"lora_A": torch.randn(r, K), "lora_B": torch.randn(N, r), **start, **biases}, scaling=0.5)
    for name in ("a", "b"):
        layer.active_adapter = name
        A, B = layer.factors(name)
        bias = layer.base_layer.bias if name == "a" else biases["base_bias"] + 0.5 * biases["lora_bias"]
        operands = (dense_weight(layer), bias, A, B)
        exact = plain(x.double(), *(t.double() for t in operands), layer.scaling[name])
        assert_as_accurate(layer(x), plain(x, *operands, layer.scaling[name]), exact)
    product = layer.lora_B["b"] @ layer.lora_A["b"] + start["lora_B0"] @ start["lora_A0"]
    wide = [t.double() for t in (layer.lora_B["b"], layer.lora_A["b"], start["lora_B0"], start["lora_A0"])]
    assert_as_accurate(B @ A, product, wide[0] @ wide[1] + wide[2] @ wide[3])
    assert {n for n, p in layer.named_parameters() if p.requires_grad and n.endswith(".b")} == {
        "lora_A.b", "lora_B.b", "lora_bias.b", "base_bias.b"
    }  # fmt: skip


def test_a_bias_alone(layer):
    layer.add("bias", {"base_bias": torch.randn(N)})
    layer.active_adapter = "bias"
    x = torch.randn(4, K)
    expected = layer.base_layer(x)
    assert torch.equal(layer(x) - layer(x * 0), layer(x) - layer.base_bias["bias"])
    other = LoraLinear(layer.base_layer)
    other.add("same", {"base_bias": layer.base_layer.bias.clone()})
    other.active_adapter = "same"
    assert torch.equal(other(x), expected)


def test_saves_the_input_alone(layer):
    saved: list[torch.Tensor] = []

    def pack(tensor):
        saved.append(tensor)
        return tensor

    x = torch.randn(64, K).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        layer(x)
    own = {t.data_ptr() for t in (x, *layer.parameters(), *layer.buffers())}
    assert {t.data_ptr() for t in saved if t is not None} <= own


def test_empty_batch(layer):
    y = layer(torch.zeros(0, K))
    y.sum().backward()
    assert y.shape == (0, N) and torch.equal(layer.lora_A["a"].grad, torch.zeros(r, K))


@pytest.mark.parametrize(("use_dora", "quantized"), [(False, True), (True, False)])
def test_checkpointing_recomputes_the_same_dropout(use_dora, quantized):
    """Every gradient is bit for bit that of the run which kept its activations: the mask is drawn again from the same state."""
    model = random_model(num_hidden_layers=2)
    if quantized:
        quantize_model(model)
    adapters.attach(model, LoraConfig(r=4, lora_dropout=0.5, init_lora_weights=False, use_dora=use_dora))
    model.train()
    ids, gradients = torch.arange(24).view(2, 12), []
    for model.activation_checkpointing in (False, True):
        torch.manual_seed(7)
        loss = model(ids).float().logsumexp(-1).sum()
        after = torch.rand(1)
        loss.backward()
        gradients.append([after, *(p.grad.clone() for p in adapters.adapter_parameters(model).values())])
        model.zero_grad()
    assert all(torch.equal(kept, again) for kept, again in zip(*gradients, strict=True))
    torch.manual_seed(8)
    assert not torch.equal(model(ids).float().logsumexp(-1).sum(), loss)


def test_dropout_acts_on_the_update_alone_and_in_training_alone(layer):
    layer.dropout["a"] = 0.5
    x = torch.randn(2, K)
    assert not torch.equal(layer(x), layer(x))
    with torch.no_grad():
        layer.lora_B["a"].zero_()
    assert torch.equal(layer(x), layer(x))
    layer.eval()
    with torch.no_grad():
        layer.lora_B["a"].fill_(1)
    assert torch.equal(layer(x), layer(x))


def _layers_of_one_input(quantized: bool) -> list[LoraLinear]:
    layers = []
    for N in (24, 8, 16):
        base = torch.nn.Linear(64, N, bias=False)
        layer = LoraLinear(QuantizedLinear.from_linear(base) if quantized else base)
        layer.add("a", {"lora_A": torch.randn(4, 64), "lora_B": torch.randn(N, 4)}, 0.5)
        layer.active_adapter = "a"
        layers.append(layer)
    return layers


@pytest.mark.parametrize("quantized", (False, True))
def test_layers_of_one_input_are_one_product(quantized):
    layers, x = _layers_of_one_input(quantized), torch.randn(5, 64)
    ys = LoraLinear.forward_group(layers, x)
    assert all(torch.equal(y, layer(x)) for y, layer in zip(ys, layers, strict=True))


def test_layers_that_are_more_than_an_update_stay_apart():
    x = torch.randn(5, 64)
    changes = [
        lambda layer: setattr(layer, "active_adapter", None),
        lambda layer: layer.register_forward_hook(lambda *_: None),
        lambda layer: layer.dropout.update(a=0.5),
        lambda layer: setattr(layer, "merged", layer.merge_dense("a")),
    ]
    for change in changes:
        layers = _layers_of_one_input(False)
        assert LoraLinear.forward_group(layers, x) is not None
        change(layers[1])
        assert LoraLinear.forward_group(layers, x) is None
    assert LoraLinear.forward_group([*_layers_of_one_input(False), torch.nn.Linear(64, 8)], x) is None
    assert LoraLinear.forward_group(_layers_of_one_input(False)[:1] + _layers_of_one_input(True)[1:], x) is None
