"""Fused projections: the same bytes, nothing left behind, and nothing fused that must not be."""

from __future__ import annotations

import copy

import pytest
import torch
from model_cases import random_model

from posttrain.model import KVCache, generate
from posttrain.model.fused import fused_projections
from posttrain.quantized import QuantizedLinear, quantize_model


def quantized(name="smollm2", double_quant=True, dtype=torch.float32, **changes):
    model = random_model(name, dtype, **changes)
    quantize_model(model, double_quant=double_quant)
    return model


def fused_owners(model):
    return [module for module in model.modules() if getattr(module, "fused", None) is not None]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("name", ["smollm2", "qwen2", "qwen3", "llama_biases"])
def test_every_projection_is_equal_to_the_bit(name, double_quant, dtype):
    model = quantized(name, double_quant, dtype)
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with torch.inference_mode():
        for rows in (1, 5):
            x = torch.randn(1, rows, 64).to(dtype)
            layer = model.model.layers[1]
            attention, mlp = layer.self_attn, layer.mlp
            alone = [attention.q_proj(x), attention.k_proj(x), attention.v_proj(x), mlp.gate_proj(x), mlp.up_proj(x)]
            with fused_projections(model):
                assert len(fused_owners(model)) == 6
                together = torch.cat((attention.fused(x), mlp.fused(x)), -1)
            assert torch.equal(together, torch.cat(alone, -1))
    assert not fused_owners(model)
    assert state.keys() == model.state_dict().keys()
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[key]), key


@pytest.mark.parametrize("name", ["smollm2", "qwen2", "qwen3"])
def test_decoding_is_equal_to_the_bit(name):
    model = quantized(name)
    input_ids = torch.randint(0, 97, (1, 9))

    def decode():
        cache = KVCache(model.config, 1, 9, torch.float32)
        return torch.cat([model(input_ids[:, i : i + 1], cache=cache) for i in range(9)], 1)

    with torch.inference_mode():
        alone = decode()
        with fused_projections(model):
            assert torch.equal(decode(), alone)


def test_the_packed_bytes_are_shared_not_copied():
    model = quantized()
    with fused_projections(model):
        pass
    attention = model.model.layers[0].self_attn
    storages = {getattr(attention, name).packed.untyped_storage().data_ptr() for name in ("q_proj", "k_proj", "v_proj")}
    assert len(storages) == 1
    first = attention.__dict__["_fused_before"]
    with fused_projections(model):
        assert attention.fused is first  # and made once


def test_training_an_adapter_after_generating_works():
    """The buffers the layers are left with are ordinary tensors, although generating runs in inference mode."""
    model = quantized()
    generate(model, [[1, 2, 3]], 3)
    hidden = model.hidden(torch.randint(0, 97, (1, 6)))
    hidden.sum().backward()
    assert model.model.embed_tokens.weight.grad.abs().sum() > 0


def test_new_weights_are_noticed():
    model, other = quantized(), quantized(initializer_range=0.3)
    generate(model, [[1, 2]], 2)
    model.load_state_dict(other.state_dict())
    assert generate(model, [[5, 6, 7]], 8) == generate(other, [[5, 6, 7]], 8)
    model.model.layers[0].mlp.up_proj = copy.deepcopy(other.model.layers[1].mlp.up_proj)
    expected = copy.deepcopy(model)
    for layer in expected.model.layers:
        layer.mlp.__dict__.pop("_fused_before")
    assert generate(model, [[5, 6, 7]], 8) == generate(expected, [[5, 6, 7]], 8)
    biased = quantized("qwen2")
    generate(biased, [[1, 2]], 2)
    with torch.no_grad():
        biased.model.layers[0].self_attn.q_proj.bias.add_(1)
    plain = copy.deepcopy(biased)
    for module in plain.modules():
        if isinstance(module, QuantizedLinear):
            module.register_forward_hook(lambda *_: None)  # never fused
    assert generate(biased, [[5, 6, 7]], 8) == generate(plain, [[5, 6, 7]], 8)


def test_what_is_not_fused():
    dense = random_model()
    straddling = quantized(hidden_size=96, head_dim=16)  # rows of one block and a half
    hooked = quantized()
    seen = []
    hooked.model.layers[0].self_attn.k_proj.register_forward_hook(lambda *_: seen.append(1))
    mixed = quantized()
    mixed.model.layers[0].mlp.up_proj = torch.nn.Linear(64, 160, bias=False)
    for model, count in ((dense, 0), (straddling, 0), (hooked, 5), (mixed, 5)):
        with fused_projections(model):
            assert len(fused_owners(model)) == count
        assert not fused_owners(model)
    generate(hooked, [[1, 2]], 3)
    assert len(seen) == 3


def test_an_error_inside_leaves_nothing_fused():
    model = quantized()
    with pytest.raises(RuntimeError, match="stop"):
        generate(model, [[1]], 4, on_token=lambda *_: (_ for _ in ()).throw(RuntimeError("stop")))
    assert not fused_owners(model)
