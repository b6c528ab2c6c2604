"""Whole embeddings and heads in an adapter's file: PEFT's load where they are the base's, and no others do."""

from __future__ import annotations

import pytest
import torch
from model_cases import random_model
from safetensors.torch import load_file, save_file
from test_adapters_lora import assert_unchanged, snapshot
from test_adapters_lora_peft import agree, move, transformers_model

from posttrain import adapters
from posttrain.adapters import IA3Config, LoraConfig, attach, load_adapter, save_adapter, serving
from posttrain.errors import PosttrainError
from posttrain.quantized import quantize_model

HEAD, EMBEDDINGS = "base_model.model.lm_head.", "base_model.model.model.embed_tokens."
QUERIES = {"target_modules": ["q_proj"]}
# What PEFT saves: (model, method, settings, whether with the embeddings whether or not an adapter is on them).
SAVED = {
    "lora_on_the_head": ("llama2", "LoraConfig", {"target_modules": ["q_proj", "lm_head"]}, "auto"),
    "dora_on_the_head": ("llama2", "LoraConfig", {"target_modules": ["q_proj", "lm_head"], "use_dora": True}, "auto"),
    "lora_on_both": ("llama2", "LoraConfig", {"target_modules": ["embed_tokens", "lm_head"]}, "auto"),
    "ia3_on_the_head": ("llama2", "IA3Config", {"target_modules": ["k_proj", "lm_head"], "feedforward_modules": []}, "auto"),
    "lora": ("llama2", "LoraConfig", QUERIES, True),
    "lora_tied": ("smollm2", "LoraConfig", QUERIES, True),
    "ia3": ("smollm2", "IA3Config", {"target_modules": ["k_proj"], "feedforward_modules": []}, True),
    "whole_embeddings": ("llama2", "LoraConfig", {**QUERIES, "modules_to_save": ["embed_tokens"]}, True),
    "whole_embeddings_tied": ("smollm2", "LoraConfig", {**QUERIES, "modules_to_save": ["embed_tokens"]}, True),
    "whole_head": ("llama2", "LoraConfig", {**QUERIES, "modules_to_save": ["lm_head"]}, True),
    "prompt": ("llama2", "PromptTuningConfig", {"num_virtual_tokens": 3}, True),
    "prompt_tied": ("smollm2", "PromptTuningConfig", {"num_virtual_tokens": 3}, True),
}


@pytest.mark.peers
@pytest.mark.parametrize("case", SAVED)
def test_what_peft_saves_beside_an_adapter(tmp_path, case):
    peft = pytest.importorskip("peft")
    torch.manual_seed(1)
    name, method, settings, save_embedding_layers = SAVED[case]
    model = random_model(name)
    peer = transformers_model(name, model)
    peer = peft.get_peft_model(peer, getattr(peft, method)(task_type="CAUSAL_LM", **settings))
    move(p for p in peer.parameters() if p.requires_grad)
    peer.eval().save_pretrained(tmp_path, save_embedding_layers=save_embedding_layers)
    load_adapter(model, tmp_path)
    if method == "PromptTuningConfig":
        assert torch.equal(model_prompt(model), load_file(tmp_path / "adapter_model.safetensors")["prompt_embeddings"])
    else:
        agree(model, peer)
    save_adapter(model, tmp_path / "again")
    theirs, ours = (load_file(folder / "adapter_model.safetensors") for folder in (tmp_path, tmp_path / "again"))
    assert len(theirs) > len(ours) and all(torch.equal(tensor, theirs[key]) for key, tensor in ours.items())


def model_prompt(model):
    return adapters.adapter_parameters(model)["prompt_embeddings"]


def adapted(tmp_path, name="llama2", targets=("q_proj", "lm_head"), config=None):
    """(a model, the file of an adapter that was on it)."""
    model = random_model(name)
    attach(model, config or LoraConfig(r=2, init_lora_weights=False, target_modules=list(targets)))
    save_adapter(model, tmp_path)
    adapters.delete_adapter(model, "default")
    return model, tmp_path / "adapter_model.safetensors"


def add(file, **tensors):
    save_file({**load_file(file), **tensors}, file)


@pytest.mark.parametrize("targets", [("embed_tokens",), ("lm_head",), ("q_proj",)])
@pytest.mark.parametrize("part", [HEAD, EMBEDDINGS])
@pytest.mark.parametrize("end", ["weight", "base_layer.weight", "original_module.weight"])
def test_another_tensor_than_the_models_is_refused(tmp_path, targets, part, end):
    model, file = adapted(tmp_path, targets=targets)
    weight = model.get_submodule(part.removeprefix("base_model.model.")[:-1]).weight.detach()
    add(file, **{f"{part}{end}": weight.clone()})
    load_adapter(model, tmp_path)
    load_adapter(model, tmp_path, "under_an_adapter")
    for name in ("default", "under_an_adapter"):
        adapters.delete_adapter(model, name)
    before = snapshot(model)
    for other in (weight + 1, weight[1:].clone(), torch.cat((weight, weight))):
        add(file, **{f"{part}{end}": other})
        with pytest.raises(PosttrainError, match="brings another .*weight than this model has.*load it on the base"):
            load_adapter(model, tmp_path)
        assert_unchanged(model, before)


def test_in_another_dtype(tmp_path):
    model, file = adapted(tmp_path)
    add(file, **{f"{HEAD}base_layer.weight": model.lm_head.weight.detach().clone()})
    load_adapter(model.bfloat16(), tmp_path, any_base=True)


@pytest.mark.parametrize("settings", [{}, {"quant_type": "fp4", "double_quant": False}])
def test_a_head_in_4_bits_is_compared_with_what_the_tensor_quantizes_to(tmp_path, settings):
    model, file = adapted(tmp_path)
    weight = model.lm_head.weight.detach()
    quantize_model(model, skip=(), **settings)
    add(file, **{f"{HEAD}base_layer.weight": weight.clone()})
    load_adapter(model, tmp_path)
    adapters.delete_adapter(model, "default")
    for other in (weight + 1, weight[1:].clone(), weight * torch.nan, weight.to(torch.uint8)):
        add(file, **{f"{HEAD}base_layer.weight": other})
        with pytest.raises(PosttrainError, match=r"brings another lm_head.base_layer.weight"):
            load_adapter(model, tmp_path)


def test_a_trained_copy_that_is_there_twice_must_be_one(tmp_path):
    model, file = adapted(tmp_path, config=LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]))
    trained = load_file(file)[f"{HEAD}weight"]
    add(file, **{f"{HEAD}modules_to_save.weight": trained.clone(), f"{HEAD}original_module.weight": model.lm_head.weight.detach()})
    load_adapter(model, tmp_path)
    adapters.delete_adapter(model, "default")
    add(file, **{f"{HEAD}modules_to_save.weight": trained + 1})
    with pytest.raises(PosttrainError, match=r"brings another lm_head.modules_to_save.weight"):
        load_adapter(model, tmp_path)


def test_biases_of_a_module_that_trains_whole_are_the_bases_and_the_copys(tmp_path):
    """As PEFT writes them with bias="all", whatever the adapter's name was."""
    config = LoraConfig(r=2, bias="all", target_modules=["q_proj"], modules_to_save=["mlp", "o_proj"])
    model, file = adapted(tmp_path, "llama_biases", config=config)
    good, mlp, o_proj = load_file(file), "base_model.model.model.layers.1.mlp", "base_model.model.model.layers.1.self_attn.o_proj"
    trained = {key: good[key] + 1 for key in (f"{mlp}.up_proj.bias", f"{o_proj}.bias")}
    layer = model.model.layers[1]
    copies = {
        f"{mlp}.original_module.up_proj.bias": layer.mlp.up_proj.bias.detach(),
        f"{o_proj}.original_module.bias": layer.self_attn.o_proj.bias.detach(),
        f"{mlp}.modules_to_save.mine.up_proj.bias": trained[f"{mlp}.up_proj.bias"].clone(),
        f"{o_proj}.modules_to_save.mine.bias": trained[f"{o_proj}.bias"].clone(),
        f"{o_proj}.modules_to_save.bias": trained[f"{o_proj}.bias"].clone(),
    }
    save_file({**good, **trained, **copies}, file)
    load_adapter(model, tmp_path)
    load_adapter(model, tmp_path, "beside_another")
    for name in ("default", "beside_another"):
        assert torch.equal(adapters.adapter_parameters(model, name)[f"{mlp}.up_proj.bias"], trained[f"{mlp}.up_proj.bias"])
    for name in ("default", "beside_another"):
        adapters.delete_adapter(model, name)
    before = snapshot(model)
    for key, tensor in copies.items():
        save_file({**good, **trained, **copies, key: tensor + 1}, file)
        with pytest.raises(PosttrainError, match=f"brings another {key.removeprefix('base_model.model.')} than this model has"):
            load_adapter(model, tmp_path)
        assert_unchanged(model, before)


def test_an_adapter_on_a_tied_head_is_refused_with_the_reason(tmp_path):
    model, file = adapted(tmp_path, "smollm2", ("q_proj",))
    add(file, **{f"{HEAD}lora_A.weight": torch.zeros(2, 64), f"{HEAD}lora_B.weight": torch.zeros(97, 2)})
    with pytest.raises(PosttrainError, match=r"lm_head.lora_A.weight, and this model's head is tied to model.embed_tokens"):
        load_adapter(model, tmp_path)
    for config in (LoraConfig(target_modules=["lm_head"]), IA3Config(target_modules=["lm_head"])):
        with pytest.raises(ValueError, match=r"matches no layer; .*its head is tied to model.embed_tokens"):
            attach(model, config)


def test_served_adapters_may_bring_the_head(tmp_path):
    model, file = adapted(tmp_path)
    add(file, **{f"{HEAD}base_layer.weight": model.lm_head.weight.detach().clone()})
    serving.load(model, "a", tmp_path)
    serving.load(model, "b", tmp_path)
    assert serving.names(model) == ["a", "b"]
