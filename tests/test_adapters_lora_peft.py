"""LoRA's forms exchanged with PEFT both ways: DoRA, biases, whole modules, embeddings; equal logits to rounding."""

from __future__ import annotations

import copy
import json
import re
import warnings

import pytest
import torch
from model_cases import hf_config, random_model
from safetensors.torch import load_file, save_file
from test_adapters_lora import assert_unchanged, snapshot, wide
from tolerance import assert_as_accurate

from posttrain import adapters
from posttrain.adapters import LoraConfig, attach, load_adapter, save_adapter, serving
from posttrain.adapters.lora import lora_layers
from posttrain.adapters.lora_embedding import LoraEmbedding
from posttrain.adapters.saved_module import saved_modules
from posttrain.errors import PosttrainError
from posttrain.quantized import quantize_model

IDS = torch.arange(192).view(6, 32) * 31 % 97
FORMS = {
    "dora": ("smollm2", {"use_dora": True, "rank_pattern": {"q_proj": 2}}),
    "dora_rslora": ("smollm2", {"use_dora": True, "use_rslora": True, "lora_dropout": 0.1, "target_modules": ["up_proj"]}),
    "lora_bias": ("llama_biases", {"lora_bias": True, "target_modules": ["q_proj", "down_proj"]}),
    "bias_lora_only": ("llama_biases", {"bias": "lora_only", "target_modules": ["q_proj", "down_proj"]}),
    "bias_all": ("llama_biases", {"bias": "all", "target_modules": ["q_proj", "down_proj"]}),
    "bias_all_and_whole_modules": ("llama_biases", {"bias": "all", "modules_to_save": ["mlp"], "target_modules": ["q_proj"]}),
    "bias_all_and_whole_layers": ("llama_biases", {"bias": "all", "modules_to_save": ["o_proj"], "target_modules": ["q_proj"]}),
    "bias_where_there_is_none": ("smollm2", {"bias": "all", "target_modules": ["q_proj"]}),
    "head": ("llama2", {"modules_to_save": ["lm_head"], "target_modules": ["q_proj"]}),
    "head_and_embeddings": ("llama2", {"modules_to_save": ["lm_head", "embed_tokens"], "target_modules": ["q_proj"]}),
    "tied_embeddings": ("smollm2", {"modules_to_save": ["embed_tokens"], "target_modules": ["q_proj"]}),
    "embeddings": ("llama2", {"target_modules": ["embed_tokens", "q_proj"], "rank_pattern": {"embed_tokens": 2}}),
    "embeddings_of_a_tied_head": ("smollm2", {"target_modules": ["embed_tokens", "q_proj"], "lora_dropout": 0.1}),
    "norms": ("smollm2", {"modules_to_save": ["norm"], "target_modules": ["q_proj"], "use_dora": True}),
}

QUANTIZED = ("dora", "lora_bias", "bias_all", "head")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(5)  # the largest of 20,000 logits' errors is one draw: 0.8 to 2.2 times PEFT's, the rms 1.0 to 1.1 times


def logits(model):
    with torch.no_grad():
        return model(IDS)


def transformers_model(name, model):
    transformers = pytest.importorskip("transformers")
    peer = transformers.LlamaForCausalLM(transformers.LlamaConfig(**hf_config(name))).eval()
    peer.load_state_dict(model.state_dict(), strict=False)
    peer.tie_weights()
    return peer


def move(parameters):
    """Away from the start, every parameter, as training does."""
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(torch.randn_like(parameter) * 0.2)


def peft_logits(peer, dtype=torch.float32):
    with torch.no_grad():
        return peer.to(dtype)(IDS).logits


def agree(model, peer):
    theirs, exact = peft_logits(peer), peft_logits(peer, torch.float64)
    assert_as_accurate(logits(model), theirs, exact)
    assert_as_accurate(theirs, logits(model), exact)


@pytest.mark.peers
@pytest.mark.parametrize("form", FORMS)
def test_peft_loads_ours(tmp_path, form):
    peft = pytest.importorskip("peft")
    name, settings = FORMS[form]
    model = random_model(name)
    peer = transformers_model(name, model)
    attach(model, LoraConfig(r=4, lora_alpha=6, **settings))
    move(adapters.adapter_parameters(model).values())
    save_adapter(model, tmp_path)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(missing|unexpected).*")
        peer = peft.PeftModel.from_pretrained(peer, tmp_path)
    agree(model, peer)


@pytest.mark.peers
@pytest.mark.parametrize("form", FORMS)
def test_we_load_pefts(tmp_path, form):
    peft = pytest.importorskip("peft")
    name, settings = FORMS[form]
    model = random_model(name)
    bare = copy.deepcopy(model)
    settings = {"target_modules": "all-linear", **settings}
    peer = peft.get_peft_model(
        transformers_model(name, model), peft.LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=6, **settings)
    )
    move(p for p in peer.parameters() if p.requires_grad)
    peer.eval().save_pretrained(tmp_path)
    load_adapter(model, tmp_path)
    agree(model, peer)
    trained = [p for p in peer.parameters() if p.requires_grad]
    assert sum(p.numel() for p in adapters.adapter_parameters(model).values()) == sum(p.numel() for p in trained)
    save_adapter(model, tmp_path / "again")
    theirs, ours = (load_file(folder / "adapter_model.safetensors") for folder in (tmp_path, tmp_path / "again"))
    beside = re.compile(r".*(embed_tokens\.base_layer\.weight|\.(original_module|modules_to_save)\..*bias)")  # copies of others
    theirs = {key: tensor for key, tensor in theirs.items() if not beside.fullmatch(key)}
    assert theirs.keys() == ours.keys() and all(torch.equal(tensor, ours[key]) for key, tensor in theirs.items())
    adapters.delete_adapter(model, "default")
    assert_unchanged(model, snapshot(bare))


@pytest.mark.parametrize(("form", "quantized"), [*((form, False) for form in FORMS), *((form, True) for form in QUANTIZED)])
def test_attached_merged_saved_and_taken_off(tmp_path, form, quantized):
    name, settings = FORMS[form]
    model = random_model(name)
    if quantized:
        quantize_model(model)
    bare, before = copy.deepcopy(model), logits(model)
    attach(model, LoraConfig(r=4, lora_alpha=6, **settings))
    model(IDS).logsumexp(-1).sum().backward()
    trained = adapters.adapter_parameters(model)
    assert all(p.grad is not None for p in trained.values())
    assert {id(p) for p in model.parameters() if p.requires_grad} == {id(p) for p in trained.values()}
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
    move(trained.values())
    adapted = logits(model)
    save_adapter(model, tmp_path)
    twin = copy.deepcopy(bare)
    load_adapter(twin, tmp_path)
    assert torch.equal(logits(twin), adapted)
    with adapters.disabled(model):
        assert torch.equal(logits(model), before)
    adapters.merge(model)
    merged = logits(model)
    assert_as_accurate(merged, adapted, exact_logits(model))
    adapters.unmerge(model)
    assert torch.equal(logits(model), adapted)
    if "tied" in form:
        with pytest.raises(ValueError, match="embed_tokens is tied to the head"):
            adapters.merge_and_unload(twin)
        assert torch.equal(logits(twin), adapted)
    else:
        assert torch.equal(logits(adapters.merge_and_unload(twin)), merged)
    adapters.delete_adapter(model, "default")
    assert_unchanged(model, snapshot(bare))


def exact_logits(model):
    """Float64 logits of the merged model with its weights recomputed in float64."""
    exact = copy.deepcopy(model)
    for name, layer in lora_layers(exact).items():
        layer.merged = None
        layer.base_layer = wide(torch.nn.Sequential(layer.base_layer))[0]
        exact.set_submodule(name, layer.double().merge_dense("default"))
    for module in list(exact.modules()):
        if isinstance(module, LoraEmbedding):
            merged = module.double().merge_dense("default")
            module.merged = merged
    for name, module in saved_modules(exact).items():
        if not isinstance(module.original_module, torch.nn.Embedding):
            exact.set_submodule(name, module.unload("default"))
    return logits(wide(exact))


def test_a_second_adapter_beside_whole_modules_and_biases():
    model = random_model("llama_biases")
    first = LoraConfig(r=2, bias="all", modules_to_save=["lm_head"], target_modules=["q_proj"])
    attach(model, first, "a")
    move(adapters.adapter_parameters(model).values())
    alone = logits(model)
    attach(model, LoraConfig(r=2, init_lora_weights=False), "b")  # all linear layers but the head, and no copy of it
    other = logits(model)
    attach(model, first, "c")
    for name, expected in (("a", alone), ("b", other)):
        adapters.set_adapter(model, name)
        assert torch.equal(logits(model), expected)
        assert {id(p) for p in model.parameters() if p.requires_grad} == {
            id(p) for p in adapters.adapter_parameters(model).values()
        }


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("smollm2", {"modules_to_save": ["lm_head"]}, "'lm_head' matches no module; this model's head is tied"),
        ("llama2", {"modules_to_save": ["absent"]}, "'absent' matches no module"),
        (
            "llama2",
            {"modules_to_save": ["q_proj"], "target_modules": ["q_proj"]},
            "q_proj is a target module and one of modules_to_save",
        ),
        ("llama2", {"modules_to_save": ["self_attn"], "target_modules": ["q_proj"]}, "q_proj is a target module and one of"),
        ("llama2", {"modules_to_save": ["mlp", "up_proj"], "target_modules": ["q_proj"]}, "mlp.up_proj inside it"),
    ],
)
def test_refused_modules_change_nothing(name, settings, message):
    model = random_model(name)
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        attach(model, LoraConfig(r=2, **settings))
    assert_unchanged(model, before)


def test_biases_inside_a_module_that_trains_whole_are_its_copys():
    model = random_model("llama_biases")
    before = snapshot(model)
    attach(model, LoraConfig(r=4, bias="all", modules_to_save=["mlp"], target_modules=["q_proj"]))
    assert set(saved_modules(model)) == {f"model.layers.{i}.mlp" for i in range(3)}
    assert not any(".mlp." in name for name in lora_layers(model))
    adapters.delete_adapter(model, "default")
    assert_unchanged(model, before)


def test_a_module_in_4_bits_cannot_train_whole():
    model = random_model("llama2")
    quantize_model(model)
    with pytest.raises(ValueError, match="mlp is a MLP without weights of its own"):
        attach(model, LoraConfig(r=2, modules_to_save=["mlp"], target_modules=["q_proj"]))


def test_loftq_of_several_steps_is_refused_on_a_base_in_4_bits(tmp_path):
    model = random_model()
    quantized = copy.deepcopy(model)
    quantize_model(quantized)
    attach(model, LoraConfig(r=2, init_lora_weights="loftq", loftq_config={"loftq_iter": 2}))
    save_adapter(model, tmp_path)
    before = snapshot(quantized)
    with pytest.raises(
        PosttrainError, match="is in 4 bits, and the adapter was trained on what LoftQ made of the dense weight in 2 steps"
    ):
        load_adapter(quantized, tmp_path)
    assert_unchanged(quantized, before)


@pytest.mark.peers
@pytest.mark.parametrize("init", ["pissa", "olora", "mica"])
@pytest.mark.parametrize("settings", [{}, {"use_rslora": True, "use_dora": True, "rank_pattern": {"q_proj": 2}}])
def test_starts_that_peft_saved_unconverted(tmp_path, init, settings):
    """PEFT takes the same part of the base again when it loads such a file, and so do we."""
    peft = pytest.importorskip("peft")
    if init == "mica" and settings:
        settings = {"use_rslora": True}
    model = random_model("llama2")
    config = peft.LoraConfig(
        task_type="CAUSAL_LM", r=4, lora_alpha=6, target_modules="all-linear", init_lora_weights=init, **settings
    )
    peer = peft.get_peft_model(transformers_model("llama2", model), config)
    move(p for p in peer.parameters() if p.requires_grad)
    peer.eval().save_pretrained(tmp_path)
    bare = copy.deepcopy(model)
    load_adapter(model, tmp_path)
    ours, exact = logits(model), exact_logits(model)
    assert_as_accurate(peft_logits(peer), ours, exact)
    save_adapter(model, tmp_path / "again")
    converted = peft.PeftModel.from_pretrained(transformers_model("llama2", bare), tmp_path / "again")
    assert_as_accurate(ours, peft_logits(converted), exact)  # the same sums: the base's product and those of the factors and A0, B0
    plain = copy.deepcopy(bare)
    load_adapter(plain, tmp_path / "again")
    assert torch.equal(logits(plain), logits(model))
    adapters.delete_adapter(model, "default")
    assert_unchanged(model, snapshot(bare))


def test_an_unconverted_start_wants_the_dense_base(tmp_path):
    model = random_model()
    quantized = copy.deepcopy(model)
    quantize_model(quantized)
    attach(model, LoraConfig(r=2, init_lora_weights=False))
    save_adapter(model, tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "init_lora_weights": "pissa"}))
    before = snapshot(quantized)
    with pytest.raises(PosttrainError, match="trained beside what pissa left of the dense weight"):
        load_adapter(quantized, tmp_path)
    assert_unchanged(quantized, before)
    adapters.delete_adapter(model, "default")
    with pytest.raises(PosttrainError, match="init_lora_weights 'pissa', and not what that took from the base"):
        serving.load(model, "a", tmp_path)
    file.write_text(json.dumps({**json.loads(file.read_text()), "r": 65}))
    weights = tmp_path / "adapter_model.safetensors"
    larger = {k: torch.zeros(65, t.shape[1]) if "lora_A" in k else torch.zeros(len(t), 65) for k, t in load_file(weights).items()}
    save_file(larger, weights)
    with pytest.raises(PosttrainError, match="does not fit this model: the rank of .* is 65, and its weight"):
        load_adapter(model, tmp_path)
