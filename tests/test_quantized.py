"""QuantizedLinear: values, gradients, moves between dtypes, state dicts, whole models."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from model_cases import random_model
from tolerance import assert_as_accurate
from torch import nn

from posttrain.adapters.lora_linear import LoraLinear
from posttrain.adapters.serving import Batch, MultiLoraLinear
from posttrain.fingerprint import dense_fingerprint
from posttrain.kernels import quantize_weight, quantized_linear
from posttrain.quantized import QuantizedLinear, bits_per_parameter, quantize_model


@given(
    st.integers(1, 40), st.integers(1, 80), st.integers(0, 5), st.booleans(), st.booleans(),
    st.sampled_from(["nf4", "fp4"]), st.sampled_from([32, 64, 128]), st.sampled_from([torch.float32, torch.bfloat16]),
)  # fmt: skip
def test_forward_and_gradient_are_the_kernels(n, k, rows, bias, double_quant, quant_type, block_size, dtype):
    """To the bit: the layer adds nothing to the operation of the weight it was made from."""
    linear = nn.Linear(k, n, bias=bias)
    weight = quantize_weight(linear.weight.detach(), quant_type, block_size, double_quant)
    layer = QuantizedLinear.from_linear(linear, quant_type, block_size, double_quant).to(dtype)
    gradients = []
    for function in (layer, lambda x: quantized_linear(x, weight, layer.bias)):
        x = torch.linspace(-2, 2, rows * k).reshape(rows, k).to(dtype).requires_grad_()
        y = function(x)
        y.backward(torch.linspace(-1, 3, rows * n).reshape(rows, n).to(dtype))
        gradients.append((y.detach(), x.grad))
    assert gradients[0][0].shape == (rows, n) and gradients[0][0].dtype == dtype
    assert torch.equal(gradients[0][0], gradients[1][0]) and torch.equal(gradients[0][1], gradients[1][1])
    assert torch.equal(layer.weight.dequantize(), weight.dequantize())
    assert not any(parameter.requires_grad for parameter in layer.parameters())


HALF = torch.bfloat16


@pytest.mark.parametrize("rows", (1, 3, 80))
@pytest.mark.parametrize(("of_bias", "of_x"), [(HALF, torch.float32), (torch.float32, HALF), (torch.float16, HALF)])
def test_a_bias_of_another_dtype_than_x(rows, of_bias, of_x):
    """As in bitsandbytes' layer: the bias is taken in x's dtype, by the layer and with an adapter on it."""
    layer = QuantizedLinear.from_linear(nn.Linear(128, 64).to(of_bias))
    x = torch.randn(rows, 128).to(of_x)
    expected = quantized_linear(x, layer.weight, layer.bias.to(of_x))
    assert torch.equal(layer(x), expected)
    adapted = LoraLinear(layer)
    adapted.add("default", {"lora_A": torch.randn(4, 128), "lora_B": torch.zeros(64, 4)})
    adapted.active_adapter = "default"
    assert torch.equal(adapted(x), expected)
    served = MultiLoraLinear(layer, Batch(), of_bias)
    served.grow(1, 4)
    served.batch.set(torch.zeros(rows, dtype=torch.int64))
    assert torch.equal(served(x), expected) or of_bias == of_x


def test_what_the_engine_cannot_read_is_refused():
    layer = QuantizedLinear.from_linear(nn.Linear(64, 32))
    for x in (torch.randn(2, 64, dtype=torch.float64), torch.ones(2, 64, dtype=torch.int64)):
        with pytest.raises(TypeError, match=f"x is {x.dtype}; expected float32, float16 or bfloat16"):
            layer(x)
    _, tensors, sizes = layer._prepare()
    with pytest.raises(TypeError, match="bias is torch.float32 and x is torch.bfloat16; give both in one dtype"):
        torch.ops.posttrain.quantized_linear(torch.randn(2, 64).to(HALF), *tensors, layer.bias, *sizes)


@pytest.mark.parametrize("double_quant", [True, False])
def test_dtype_moves_keep_the_format(double_quant):
    layer = QuantizedLinear.from_linear(nn.Linear(96, 32), double_quant=double_quant)
    before = {name: tensor.clone() for name, tensor in layer.named_buffers()}
    x = torch.randn(3, 96)
    y = layer(x)
    layer.to(torch.bfloat16).half().double().float().to("cpu")
    assert before.keys() == dict(layer.named_buffers()).keys()
    for name, tensor in layer.named_buffers():
        assert tensor.dtype == before[name].dtype and torch.equal(tensor, before[name]), name
    assert layer.bias.dtype == torch.float32
    half = layer.to(torch.bfloat16)(x.bfloat16())
    assert half.dtype == torch.bfloat16
    assert torch.equal(layer.weight.packed, before["packed"]) and y.shape == half.shape


@pytest.mark.parametrize("assign", [True, False])
def test_state_dict_round_trip_reaches_the_kernel(assign):
    source = QuantizedLinear.from_linear(nn.Linear(64, 32))
    target = QuantizedLinear.from_linear(nn.Linear(64, 32))
    x = torch.randn(2, 64)
    assert not torch.equal(target(x), source(x))  # and the target's arguments are cached now
    expected = source(x)
    target.load_state_dict(source.state_dict(), assign=assign)
    assert torch.equal(target(x), expected)
    twin = copy.deepcopy(target)
    target.packed.zero_()
    assert torch.equal(twin(x), expected) and not torch.equal(target(x), expected)


def test_moving_to_meta_moves_every_buffer():
    layer = QuantizedLinear.from_linear(nn.Linear(64, 32)).to("meta")
    assert {b.device.type for b in layer.buffers()} == {"meta"}
    assert layer(torch.empty(5, 64, device="meta")).shape == (5, 32)


def test_a_weight_of_other_than_two_dimensions_is_refused():
    with pytest.raises(ValueError, match="two dimensions"):
        QuantizedLinear(quantize_weight(torch.randn(4, 4, 4)))


@pytest.mark.parametrize("name", ["smollm2", "llama3", "qwen2"])
def test_quantize_model_replaces_all_but_the_head(name):
    model = random_model(name)
    print_before = dense_fingerprint(model)
    dense = copy.deepcopy(model)
    names = quantize_model(model)
    assert len(names) == 7 * 3
    assert model.fingerprint == print_before
    for layer in names:
        exact = quantize_weight(dense.get_submodule(layer).weight.detach()).dequantize()
        dense.get_submodule(layer).weight.data = exact
        assert torch.equal(model.get_submodule(layer).weight.dequantize(), exact)
    input_ids = torch.randint(0, 97, (2, 12))
    with torch.no_grad():
        exact_logits = copy.deepcopy(dense).double()(input_ids)
        assert_as_accurate(model(input_ids), dense(input_ids), exact_logits)
    assert isinstance(getattr(model, "lm_head", nn.Linear(1, 1)), nn.Linear)


def test_bits_per_parameter_counts_what_is_stored():
    model = nn.Sequential(nn.Linear(4096, 512), nn.Linear(512, 4096))
    with pytest.raises(ValueError, match="no quantized layer"):
        bits_per_parameter(model)
    quantize_model(model)
    blocks = 4096 * 512 // 64
    by_hand = 4 + 8 * blocks / (4096 * 512) + 32 * (blocks / 256 + 1) / (4096 * 512)
    assert bits_per_parameter(model) == by_hand


def test_a_skipped_layer_is_skipped_under_an_adapter_too():
    model = nn.ModuleDict({name: nn.ModuleDict({"base_layer": nn.Linear(64, 32)}) for name in ("lm_head", "q_proj")})
    assert quantize_model(model) == ["q_proj.base_layer"]
