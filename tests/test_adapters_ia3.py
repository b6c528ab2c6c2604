"""(IA)^3: the paper's rescalings, exact merging on a dense and a 4-bit base, files with PEFT both ways.

(What every method must hold, on a dense and a 4-bit base: tests/test_adapters_interface.py.)
"""

from __future__ import annotations

import copy
import json

import pytest
import torch
from model_cases import hf_config, random_model
from safetensors.torch import load_file
from tolerance import assert_as_accurate
from torch import nn

from posttrain import adapters
from posttrain.adapters import IA3Config, adapter_parameters, attach, load_adapter, save_adapter
from posttrain.adapters.ia3 import ia3_layers
from posttrain.errors import PosttrainError
from posttrain.quantized import QuantizedLinear, quantize_model

IDS = torch.arange(24).view(2, 12)
RANDOM = IA3Config(init_ia3_weights=False)


@pytest.fixture(params=["dense", "nf4"])
def model(request):
    model = random_model("qwen2")  # keys and values with biases, which are rescaled too
    if request.param == "nf4":
        quantize_model(model)
    return model


def logits(model):
    with torch.no_grad():
        return model(IDS)


def exact_logits(model, name="default"):
    """A float64 model without adapters whose weights hold the vectors."""
    exact = copy.deepcopy(model)
    for layer_name, layer in ia3_layers(exact).items():
        base, scale = layer.base_layer, layer.ia3_l[name].detach().double()
        weight = base.weight.dequantize() if isinstance(base, QuantizedLinear) else base.weight.detach()
        dense = nn.Linear(layer.in_features, layer.out_features, bias=base.bias is not None, dtype=torch.float64)
        dense.weight = nn.Parameter(weight.double() * scale)
        if base.bias is not None:
            dense.bias = nn.Parameter(base.bias.double() * (scale.flatten() if scale.shape[1] == 1 else 1))
        exact.set_submodule(layer_name, dense)
    for layer_name, layer in list(exact.named_modules()):
        if isinstance(layer, QuantizedLinear):
            dense = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
            dense.weight, dense.bias = nn.Parameter(layer.weight.dequantize()), layer.bias
            exact.set_submodule(layer_name, dense)
    return logits(exact.double())


def test_rescales_keys_values_and_inner_activations(model):
    names = attach(model, IA3Config())
    assert {n.rpartition(".")[2] for n in names} == {"k_proj", "v_proj", "down_proj"} and len(names) == 9
    assert {tuple(p.shape) for p in adapter_parameters(model).values()} == {(32, 1), (1, 160)}
    assert all(torch.equal(p, torch.ones_like(p)) for p in adapter_parameters(model).values())
    layer = model.model.layers[1].mlp.down_proj
    x = torch.randn(5, 160)
    with torch.no_grad():
        layer.ia3_l["default"].normal_()
        assert torch.equal(layer(x), layer.base_layer(x * layer.ia3_l["default"]))
        layer = model.model.layers[1].self_attn.v_proj
        layer.ia3_l["default"].normal_()
        x = torch.randn(5, 64)
        assert torch.equal(layer(x), layer.base_layer(x) * layer.ia3_l["default"].T)


def test_merge_is_the_product_and_undone_exactly(model):
    base = logits(model)
    attach(model, RANDOM)
    adapted, exact = logits(model), exact_logits(model)
    layer = model.model.layers[0].self_attn.k_proj
    weight = layer.base_layer.weight
    weight = weight.dequantize() if isinstance(layer.base_layer, QuantizedLinear) else weight.detach()
    adapters.merge(model)
    assert torch.equal(layer.merged.weight, weight * layer.ia3_l["default"])
    assert torch.equal(layer.merged.bias, layer.base_layer.bias * layer.ia3_l["default"].flatten())
    assert_as_accurate(logits(model), adapted, exact)
    adapters.unmerge(model)
    assert torch.equal(logits(model), adapted)
    with adapters.disabled(model):
        assert torch.equal(logits(model), base)


def test_a_half_precision_base_is_merged_with_one_rounding():
    model = random_model(dtype=torch.bfloat16)
    attach(model, RANDOM)
    layer = model.model.layers[0].mlp.down_proj
    product = layer.base_layer.weight.double() * layer.ia3_l["default"].double()
    assert torch.equal(layer.merged_layer("default").weight, product.bfloat16())


def test_a_vector_acts_beyond_the_bases_precision():
    """1 + 3/1024 is one in bfloat16, but it moves each activation whose mantissa is above 4/3 to its neighbour."""
    model = random_model(dtype=torch.bfloat16)
    attach(model, IA3Config())
    before = logits(model)
    with torch.no_grad():
        for parameter in adapter_parameters(model).values():
            parameter.fill_(1 + 3 / 1024)
    assert not torch.equal(logits(model), before)


def test_infinite_weights_are_not_merged(model):
    attach(model, IA3Config())
    with torch.no_grad():
        model.model.layers[2].mlp.down_proj.ia3_l["default"][0, 0] = torch.inf
    for change in (adapters.merge, adapters.merge_and_unload):
        with pytest.raises(ValueError, match="merging model.layers.2.mlp.down_proj gives NaN or infinite"):
            change(model)
        assert not adapters.is_merged(model) and len(ia3_layers(model)) == 9


def test_fields():
    with pytest.raises(ValueError, match="feedforward_modules up_proj are not among target_modules"):
        IA3Config(target_modules=["k_proj"], feedforward_modules=["up_proj"])
    with pytest.raises(ValueError, match="target_modules is empty"):
        IA3Config(target_modules=[])
    with pytest.raises(ValueError, match="whole modules cannot be trained beside"):
        IA3Config(modules_to_save=["lm_head"])
    model = random_model()
    for config, message in (
        (IA3Config(target_modules=["nothing"]), "matches no layer; the model's linear layers end in: .*q_proj"),
        (IA3Config(target_modules=["embed_tokens"]), "embed_tokens is a Embedding"),
    ):
        with pytest.raises(ValueError, match=message):
            attach(model, config)
    attach(model, IA3Config(target_modules="ALL-LINEAR", feedforward_modules=["down_proj"]), "named")
    assert len(adapters.adapter_configs(model)["named"].target_modules) == 7 * 3
    adapters.delete_adapter(model, "named")
    attach(model, IA3Config(target_modules="all-linear", exclude_modules=["q_proj"]))
    found = adapters.adapter_configs(model)["default"]
    assert len(found.target_modules) == 6 * 3 and len(found.feedforward_modules) == 3
    shapes = {key.split(".")[-2]: tuple(p.shape) for key, p in adapter_parameters(model).items()}
    assert shapes["down_proj"] == (1, 160) and shapes["up_proj"] == (160, 1) and "q_proj" not in shapes


def transformers_model(model):
    transformers = pytest.importorskip("transformers")
    peer = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**hf_config("qwen2"))).eval()
    peer.load_state_dict(model.state_dict(), strict=False)
    peer.tie_weights()
    return peer


@pytest.mark.peers
@pytest.mark.parametrize("config", [RANDOM, IA3Config(target_modules="all-linear", init_ia3_weights=False)])
def test_peft_loads_ours(tmp_path, config):
    peft = pytest.importorskip("peft")
    model = random_model("qwen2")
    peer = transformers_model(model)
    attach(model, config)
    save_adapter(model, tmp_path)
    loaded = peft.PeftModel.from_pretrained(peer, tmp_path)
    with torch.no_grad():
        theirs = loaded(IDS).logits
    exact = exact_logits(model)
    assert_as_accurate(logits(model), theirs, exact)
    assert_as_accurate(theirs, logits(model), exact)


@pytest.mark.peers
@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
        {"target_modules": "all-linear", "feedforward_modules": r".*\.mlp\.down_proj"},
        {"target_modules": r".*\.(0|2)\..*(q|up)_proj", "feedforward_modules": r".*up_proj"},
    ],
)
def test_we_load_pefts(tmp_path, settings):
    peft = pytest.importorskip("peft")
    model = random_model("qwen2")
    config = peft.IA3Config(task_type="CAUSAL_LM", init_ia3_weights=False, **settings)
    peer = peft.get_peft_model(transformers_model(model), config)
    peer.save_pretrained(tmp_path)
    with torch.no_grad():
        theirs = peer.eval()(IDS).logits
    load_adapter(model, tmp_path)
    exact = exact_logits(model)
    assert_as_accurate(logits(model), theirs, exact)
    assert_as_accurate(theirs, logits(model), exact)
    save_adapter(model, tmp_path / "again")
    ours, first = (load_file(p / "adapter_model.safetensors") for p in (tmp_path / "again", tmp_path))
    assert ours.keys() == first.keys() and all(torch.equal(t, ours[k]) for k, t in first.items())


def test_what_is_not_supported_is_refused(tmp_path):
    model = random_model()
    attach(model, IA3Config())
    save_adapter(model, tmp_path)
    adapters.delete_adapter(model, "default")
    content = json.loads((tmp_path / "adapter_config.json").read_text())
    for change in ({"fan_in_fan_out": True}, {"modules_to_save": ["lm_head"]}):
        (tmp_path / "adapter_config.json").write_text(json.dumps(content | change))
        with pytest.raises(PosttrainError, match=next(iter(change))):
            load_adapter(model, tmp_path)
