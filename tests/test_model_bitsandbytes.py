"""bitsandbytes' 4-bit checkpoints both ways: with transformers and bitsandbytes, and what must be refused."""

from __future__ import annotations

import json

import pytest
import torch
from model_cases import random_model
from safetensors.torch import load_file, save_file
from test_model_loading import assert_same_tensors, rewrite

from posttrain.errors import PosttrainError
from posttrain.model import load, save
from posttrain.quantized import QuantizedLinear, quantize_model

# bitsandbytes' AVX-512 dequantization is wrong where blocks straddle rows: a multiple of 64, so that it can be
# compared with.
ROWS = {"intermediate_size": 192}


def quantized_model(quant_type="nf4", double_quant=True):
    model = random_model("qwen2", torch.bfloat16, **ROWS)
    quantize_model(model, quant_type, 64, double_quant)
    return model


@pytest.mark.parametrize("max_shard_bytes", [10**9, 20_000])
@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_round_trip(quant_type, double_quant, max_shard_bytes, tmp_path):
    model = quantized_model(quant_type, double_quant)
    save(model, tmp_path, max_shard_bytes)
    back = load(tmp_path)
    assert_same_tensors(model, back)
    assert back.fingerprint == model.fingerprint
    layer = back.model.layers[0].mlp.up_proj.weight
    assert (layer.quant_type, layer.block_size, layer.dtype) == (quant_type, 64, torch.bfloat16)
    with pytest.raises(ValueError, match="in 4 bits already"):
        load(tmp_path, quantize="nf4")


SKIPPED = [("lm_head",), ("lm_head", "q_proj"), ("lm_head", "gate_proj", "down_proj"), ()]


@pytest.mark.parametrize("skip", SKIPPED)
@pytest.mark.parametrize("name", ["llama2", "smollm2"])  # with a head, and without one of its own
def test_the_dense_layers_are_named_where_they_are_not_the_head_alone(name, skip, tmp_path):
    model = random_model(name, torch.bfloat16, **ROWS)
    quantize_model(model, skip=skip)
    save(model, tmp_path)
    named = json.loads((tmp_path / "config.json").read_text())["quantization_config"].get("llm_int8_skip_modules")
    dense = sorted(n for n, module in model.named_modules() if isinstance(module, torch.nn.Linear))
    dense = sorted({*dense, "lm_head"}) if name == "smollm2" else dense
    assert named == (None if dense == ["lm_head"] else dense)
    assert_same_tensors(model, load(tmp_path))


@pytest.mark.peers
@pytest.mark.parametrize("skip", SKIPPED)
@pytest.mark.parametrize("name", ["llama2", "smollm2"])
def test_transformers_loads_whatever_layers_are_quantized(name, skip, tmp_path):
    transformers, bnb = pytest.importorskip("transformers"), pytest.importorskip("bitsandbytes")
    model = random_model(name, torch.bfloat16, **ROWS)
    quantize_model(model, skip=skip)
    save(model, tmp_path)
    peer = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    for layer, ours in model.named_modules():
        if isinstance(ours, QuantizedLinear):
            theirs = peer.get_submodule(layer).weight
            assert torch.equal(bnb.functional.dequantize_4bit(theirs.data, theirs.quant_state), ours.weight.dequantize()), layer
        elif isinstance(ours, torch.nn.Linear):
            theirs = peer.get_submodule(layer)
            assert not isinstance(theirs, bnb.nn.Linear4bit) and torch.equal(theirs.weight, ours.weight), layer


@pytest.mark.peers
@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_transformers_and_bitsandbytes_load_ours(quant_type, double_quant, tmp_path):
    transformers, bnb = pytest.importorskip("transformers"), pytest.importorskip("bitsandbytes")
    model = quantized_model(quant_type, double_quant)
    save(model, tmp_path)
    peer = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, QuantizedLinear)}
    for name, layer in layers.items():
        theirs = peer.get_submodule(name)
        assert isinstance(theirs, bnb.nn.Linear4bit)
        dequantized = bnb.functional.dequantize_4bit(theirs.weight.data, theirs.weight.quant_state)
        assert torch.equal(dequantized, layer.weight.dequantize()), name
        assert torch.equal(theirs.bias, layer.bias) if layer.bias is not None else theirs.bias is None
    assert len(layers) == 21
    assert torch.equal(peer.model.embed_tokens.weight, model.model.embed_tokens.weight)


@pytest.mark.peers
@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_we_load_what_transformers_and_bitsandbytes_save(quant_type, double_quant, tmp_path):
    transformers, bnb = pytest.importorskip("transformers"), pytest.importorskip("bitsandbytes")
    dense = random_model("qwen2", torch.bfloat16, **ROWS)
    save(dense, tmp_path / "dense")
    config = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type=quant_type, bnb_4bit_use_double_quant=double_quant
    )
    peer = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "dense", quantization_config=config, dtype=torch.bfloat16, device_map="cpu"
    )
    peer.save_pretrained(tmp_path / "theirs")  # before any forward pass, which repacks the weights on some machines
    ours = load(tmp_path / "theirs")
    count = 0
    for name, module in ours.named_modules():
        if isinstance(module, QuantizedLinear):
            theirs = peer.get_submodule(name).weight
            assert torch.equal(module.weight.dequantize(), bnb.functional.dequantize_4bit(theirs.data, theirs.quant_state))
            count += 1
    assert count == 21
    assert ours.fingerprint.startswith("4bit:") and load(tmp_path / "theirs").fingerprint == ours.fingerprint
    if quant_type == "nf4":
        # The same bytes as quantizing here: the two agree on the dense checkpoint as well.
        streamed = load(tmp_path / "dense", quantize="nf4", double_quant=double_quant)
        for name, module in streamed.named_modules():
            if isinstance(module, QuantizedLinear):
                assert torch.equal(module.packed, ours.get_submodule(name).packed), name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: t.pop("model.layers.1.mlp.up_proj.weight.absmax"),
            r"layers\.1\.mlp\.up_proj\.weight\.absmax is missing",
        ),
        (lambda t: t.pop("model.layers.1.mlp.up_proj.weight"), r"lacks model\.layers\.1\.mlp\.up_proj\.weight"),
        (
            lambda t: t.update({"model.layers.1.mlp.up_proj.weight": torch.zeros(7, 1, dtype=torch.uint8)}),
            r"layers\.1\.mlp\.up_proj\.weight",
        ),
        (
            lambda t: t.update({"model.layers.0.self_attn.q_proj.weight.quant_map": torch.zeros(16)}),
            r"q_proj\.weight\.quant_map holds other code values",
        ),
        (
            lambda t: t.update(
                {"model.layers.0.self_attn.q_proj.weight.quant_state.bitsandbytes__nf4": torch.zeros(9, dtype=torch.uint8)}
            ),
            r"q_proj.*malformed",
        ),
    ],
)
def test_damaged_statistics_are_named(change, message, tmp_path):
    save(quantized_model(), tmp_path)
    rewrite(tmp_path, change)
    with pytest.raises(PosttrainError, match=message):
        load(tmp_path)


def test_a_quantized_weight_of_another_shape_is_named(tmp_path):
    save(quantized_model(), tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    for name in [name for name in tensors if ".0.mlp.gate_proj.weight" in name]:
        tensors[name] = tensors[name.replace("gate_proj", "down_proj")]
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, tmp_path / "model.safetensors")
    with pytest.raises(PosttrainError, match=r"0\.mlp\.gate_proj\.weight has shape \[64, 192\].*needs \[192, 64\]"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("quantization", "message"),
    [
        ({"quant_method": "gptq", "bits": 4}, "quant_method 'gptq'"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "8-bit"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "no 4-bit"),
    ],
)
def test_other_quantizations_are_refused(quantization, message, tmp_path):
    save(random_model("smollm2"), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}))
    with pytest.raises(PosttrainError, match=message):
        load(tmp_path)
