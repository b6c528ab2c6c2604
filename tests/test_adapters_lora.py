"""Adapters on a model: attaching, switching, merging, taking off; and that a refused change changes nothing."""

from __future__ import annotations

import copy

import pytest
import torch
from model_cases import random_model
from tolerance import assert_as_accurate
from torch import nn

from posttrain import adapters
from posttrain.adapters import LoraConfig
from posttrain.adapters.lora import lora_layers
from posttrain.quantized import QuantizedLinear, quantize_model

IDS = torch.arange(24).view(2, 12)
RANDOM = LoraConfig(r=4, lora_alpha=8, init_lora_weights=False)
SEVEN = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


@pytest.fixture(params=["dense", "nf4"])
def model(request):
    model = random_model("qwen2")  # it has biases
    if request.param == "nf4":
        quantize_model(model)
    return model


def logits(model):
    with torch.no_grad():
        return model(IDS)


def snapshot(model):
    return {k: v.clone() for k, v in model.state_dict().items()}, [type(m) for m in model.modules()]


def assert_unchanged(model, before):
    state, types = before
    assert [type(m) for m in model.modules()] == types and model.state_dict().keys() == state.keys()
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


def test_attach_starts_at_the_base_and_trains_the_adapter_alone(model):
    before, exact = logits(model), logits(wide(model))
    names = adapters.attach(model, LoraConfig(r=4))
    assert {n.rpartition(".")[2] for n in names} == SEVEN and len(names) == 7 * 3
    assert_as_accurate(logits(model), before, exact)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained == {f"{n}.{part}.default" for n in names for part in ("lora_A", "lora_B")}
    assert all(p.dtype == torch.float32 for p in model.parameters() if p.requires_grad)
    model(IDS).float().logsumexp(-1).sum().backward()
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())


def test_initial_values():
    layer = nn.Linear(400, 300)
    model = nn.Sequential(layer)
    adapters.attach(model, LoraConfig(r=16, target_modules=["0"]))
    A = model[0].lora_A["default"].detach()
    assert A.abs().max() <= 400**-0.5 < 1.01 * A.abs().max()  # uniform in +-1/sqrt(in), of 6,400 draws
    assert not model[0].lora_B["default"].any()
    adapters.attach(model, LoraConfig(r=16, target_modules=["0"], init_lora_weights="gaussian"), "g")
    # A sample deviation of n normal draws lies within 5 / sqrt(2 n) of the true one, relatively.
    assert abs(model[0].lora_A["g"].std() * 16 - 1) < 5 / (2 * A.numel()) ** 0.5


def test_adapter_is_fp32_on_a_half_precision_base():
    model = random_model(dtype=torch.bfloat16)
    adapters.attach(model, RANDOM)
    assert {p.dtype for p in adapters.adapter_parameters(model).values()} == {torch.float32}
    assert logits(model).dtype == torch.bfloat16
    adapters.attach(model, RANDOM, "narrow", dtype=torch.bfloat16)
    assert {p.dtype for p in adapters.adapter_parameters(model).values()} == {torch.bfloat16}


def test_rank_and_alpha_patterns_reach_the_layers(model):
    config = LoraConfig(r=4, rank_pattern={"q_proj": 2, r"layers\.1\.mlp\..*": 6}, alpha_pattern={"q_proj": 10}, use_rslora=True)
    adapters.attach(model, config)
    layers = lora_layers(model)
    assert layers["model.layers.0.self_attn.q_proj"].lora_A["default"].shape == (2, 64)
    assert layers["model.layers.1.mlp.up_proj"].lora_B["default"].shape == (160, 6)
    assert layers["model.layers.0.mlp.up_proj"].lora_B["default"].shape == (160, 4)
    assert layers["model.layers.0.self_attn.q_proj"].scaling["default"] == 10 / 2**0.5


def test_several_adapters_and_switching(model):
    base = logits(model)
    adapters.attach(model, RANDOM, "first")
    first = logits(model)
    adapters.attach(model, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False), "second")
    second = logits(model)
    assert adapters.adapter_names(model) == ["first", "second"] and adapters.active_adapter(model) == "second"
    assert not torch.equal(first, second) and not torch.equal(second, base)
    adapters.set_adapter(model, "first")
    assert torch.equal(logits(model), first)
    assert {n.rpartition(".")[2] for n, p in model.named_parameters() if p.requires_grad} == {"first"}
    with adapters.disabled(model):
        assert torch.equal(logits(model), base)
    assert torch.equal(logits(model), first)
    adapters.disable(model)
    assert torch.equal(logits(model), base)
    adapters.enable(model)
    adapters.delete_adapter(model, "first")
    assert torch.equal(logits(model), base) and adapters.active_adapter(model) is None
    adapters.set_adapter(model, "second")
    assert torch.equal(logits(model), second)


def test_deleting_the_last_adapter_gives_the_layers_back(model):
    before = snapshot(model)
    adapters.attach(model, RANDOM)
    adapters.delete_adapter(model, "default")
    assert_unchanged(model, before)


def test_merge_computes_the_same_and_unmerges_exactly(model):
    base = logits(model)
    adapters.attach(model, RANDOM)
    state, adapted = snapshot(model), logits(model)
    adapters.merge(model)
    merged = logits(model)
    adapters.unmerge(model)
    assert_unchanged(model, state)
    assert torch.equal(logits(model), adapted)
    adapters.delete_adapter(model, "default")
    assert torch.equal(logits(model), base)
    assert_as_accurate(merged, adapted, exact_logits(model, state))


def wide(model):
    """A dense float64 copy."""
    copied = copy.deepcopy(model)
    for name, layer in list(copied.named_modules()):
        if isinstance(layer, QuantizedLinear):
            dense = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
            dense.weight = nn.Parameter(layer.weight.dequantize())
            dense.bias = layer.bias
            copied.set_submodule(name, dense)
    return copied.double()


def exact_logits(base, state):
    """The float64 model with the adapter of `state` added to its weights."""
    exact = wide(base)
    for name, layer in exact.named_modules():
        key = f"{name}.lora_A.default"
        if key in state[0]:
            B = state[0][f"{name}.lora_B.default"].double()
            layer.weight.data += RANDOM.scaling(name) * B @ state[0][key].double()
    return logits(exact)


def test_merge_and_unload_leaves_plain_dense_layers(model):
    adapters.attach(model, RANDOM)
    adapters.merge(model)
    merged = logits(model)
    adapters.unmerge(model)
    assert adapters.merge_and_unload(model) is model
    assert torch.equal(logits(model), merged)
    assert not lora_layers(model) and not adapters.adapter_names(model)
    assert {type(m) for n, m in model.named_modules() if n.endswith("_proj")} == {nn.Linear}


def test_merged_weight_is_rounded_once():
    model = random_model(dtype=torch.bfloat16)
    adapters.attach(model, RANDOM)
    layer = model.model.layers[0].mlp.up_proj
    A, B = layer.lora_A["default"].detach(), layer.lora_B["default"].detach()
    exact = layer.base_layer.weight.double() + layer.scaling["default"] * B.double() @ A.double()
    assert_as_accurate(layer.merged_weight("default"), exact.bfloat16(), exact)


def test_refused_changes_change_nothing(model):
    before = snapshot(model)
    for config, message in (
        (LoraConfig(target_modules=["nothing"]), "matches no layer; the model's linear layers end in: .*q_proj"),
        (LoraConfig(target_modules=["q_proj"], exclude_modules=["q_proj"]), "matches no layer"),
        (LoraConfig(target_modules=["q_proj", "nothing"]), "'nothing' matches no layer"),
        (LoraConfig(target_modules=["q_proj", "embed_tokens"], use_dora=True), "embed_tokens is an embedding: it takes"),
        (LoraConfig(target_modules=["embed_tokens"], r=65), "the rank of model.embed_tokens is 65"),
        (LoraConfig(target_modules=r".*layers\.0\.mlp"), "is a MLP"),
    ):
        with pytest.raises(ValueError, match=message):
            adapters.attach(model, config)
        assert_unchanged(model, before)
    for name in ("", "a.b", "train"):
        with pytest.raises(ValueError, match="cannot name an adapter"):
            adapters.attach(model, RANDOM, name)
    for change in (adapters.set_adapter, adapters.delete_adapter, adapters.merge, adapters.merge_and_unload):
        with pytest.raises(ValueError, match="no adapter named 'absent'; the model has: none"):
            change(model, "absent")
    assert_unchanged(model, before)
    adapters.attach(model, RANDOM)
    before = snapshot(model)
    with pytest.raises(ValueError, match="already has an adapter named 'default'"):
        adapters.attach(model, RANDOM)
    with torch.no_grad():
        model.model.layers[2].mlp.down_proj.lora_B["default"][0, 0] = torch.inf
    for change in (adapters.merge, adapters.merge_and_unload):
        with pytest.raises(ValueError, match="model.layers.2.mlp.down_proj: merging gives NaN or infinite"):
            change(model)
        assert not adapters.is_merged(model) and len(lora_layers(model)) == 21


def test_nothing_else_while_merged(model):
    adapters.attach(model, RANDOM)
    adapters.merge(model)
    for call in (
        lambda: adapters.merge(model),
        lambda: adapters.attach(model, RANDOM, "other"),
        lambda: adapters.set_adapter(model, "default"),
        lambda: adapters.disable(model),
        lambda: adapters.delete_adapter(model, "default"),
    ):
        with pytest.raises(ValueError, match="unmerge"):
            call()


def test_moves_and_dropout_with_the_model(model):
    adapters.attach(model, LoraConfig(lora_dropout=0.5, init_lora_weights=False))
    assert torch.equal(logits(model), logits(model))
    model.train()
    assert not torch.equal(logits(model), logits(model))


@pytest.mark.parametrize("layers", [7, [7, 9]])
def test_layers_that_are_none_are_named_and_not_the_targets(layers):
    with pytest.raises(ValueError, match=r"layers_to_transform=.*7.* is none of the layers that have target_modules=\['q_proj'\]"):
        adapters.attach(random_model(), LoraConfig(target_modules=["q_proj"], layers_to_transform=layers))


def test_merging_for_good_does_not_depend_on_what_is_merged_at_present(model):
    adapters.attach(model, RANDOM, "a")
    adapters.attach(model, LoraConfig(r=2, target_modules=["v_proj"], init_lora_weights=False), "b")
    twin = copy.deepcopy(model)
    adapters.merge(model, "a")
    adapters.merge_and_unload(model, "b")
    assert_unchanged(adapters.merge_and_unload(twin, "b"), snapshot(model))
    assert torch.equal(logits(model), logits(twin))


def test_merging_for_good_that_fails_leaves_what_is_merged():
    model = random_model("smollm2")  # with a tied head
    adapters.attach(model, LoraConfig(r=4, target_modules=["q_proj", "embed_tokens"], init_lora_weights=False))
    adapters.merge(model)
    before, merged = snapshot(model), logits(model)
    with pytest.raises(ValueError, match="embed_tokens is tied to the head"):
        adapters.merge_and_unload(model)
    assert adapters.is_merged(model) and torch.equal(logits(model), merged)
    assert_unchanged(model, before)
    adapters.unmerge(model)
    assert not adapters.is_merged(model)
