"""Adapters on disk: PEFT loads what we write, we load what PEFT writes, and every way a folder can be wrong."""

from __future__ import annotations

import errno
import json

import pytest
import torch
from model_cases import hf_config, random_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tolerance import assert_as_accurate

from posttrain import adapters
from posttrain.adapters import (
    BottleneckConfig,
    IA3Config,
    LoraConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    attach,
    load_adapter,
    peft_format,
    save_adapter,
)
from posttrain.adapters.lora import lora_layers
from posttrain.errors import PosttrainError
from posttrain.quantized import quantize_model

IDS = torch.arange(24).view(2, 12)
CONFIG = LoraConfig(
    r=4, lora_alpha=6, init_lora_weights=False, use_rslora=True, rank_pattern={"q_proj": 2}, alpha_pattern={"v_proj": 3}
)


def logits(model):
    with torch.no_grad():
        return model(IDS)


def transformers_model(model):
    transformers = pytest.importorskip("transformers")
    peer = transformers.LlamaForCausalLM(transformers.LlamaConfig(**hf_config("smollm2"))).eval()
    peer.load_state_dict(model.state_dict(), strict=False)
    peer.tie_weights()
    return peer


def exact_logits(model):
    """Float64 logits with the adapter's delta added to the weights."""
    exact = random_model()
    exact.load_state_dict({k.replace(".base_layer", ""): v for k, v in model.state_dict().items() if ".lora_" not in k})
    exact.double()
    for name, layer in lora_layers(model).items():
        A, B = layer.lora_A["default"].detach().double(), layer.lora_B["default"].detach().double()
        exact.get_submodule(name).weight.data += layer.scaling["default"] * B @ A
    return logits(exact)


@pytest.mark.peers
def test_peft_loads_ours(tmp_path):
    peft = pytest.importorskip("peft")
    model = random_model()
    peer = transformers_model(model)
    attach(model, CONFIG)
    save_adapter(model, tmp_path)
    peer = peft.PeftModel.from_pretrained(peer, tmp_path)
    with torch.no_grad():
        theirs = peer(IDS).logits
    exact = exact_logits(model)
    assert_as_accurate(logits(model), theirs, exact)
    assert_as_accurate(theirs, logits(model), exact)


@pytest.mark.peers
@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": "all-linear", "r": 3, "lora_alpha": 5},
        {"target_modules": ["q_proj", "up_proj"], "use_rslora": True, "rank_pattern": {r"layers\.1\..*": 2}},
        {"target_modules": r".*\.(1|2)\.mlp\..*_proj", "alpha_pattern": {"up_proj": 1}, "lora_dropout": 0.25},
        {"target_modules": ["v_proj"], "layers_to_transform": [0, 2], "init_lora_weights": "gaussian"},
    ],
)
def test_we_load_pefts(tmp_path, settings):
    peft = pytest.importorskip("peft")
    model = random_model()
    peer = peft.get_peft_model(transformers_model(model), peft.LoraConfig(task_type="CAUSAL_LM", **settings))
    for name, parameter in peer.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    peer.save_pretrained(tmp_path)
    with torch.no_grad():
        theirs = peer.eval()(IDS).logits
    load_adapter(model, tmp_path)
    exact = exact_logits(model)
    assert_as_accurate(logits(model), theirs, exact)
    assert_as_accurate(theirs, logits(model), exact)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == sum("lora_" in name for name, _ in peer.named_parameters())
    save_adapter(model, tmp_path / "again")
    ours = load_file(tmp_path / "again" / "adapter_model.safetensors")
    assert all(torch.equal(t, ours[k]) for k, t in load_file(tmp_path / "adapter_model.safetensors").items())


def saved(tmp_path, model=None, config=CONFIG):
    model = model or random_model()
    attach(model, config)
    save_adapter(model, tmp_path)
    return model


def test_round_trip(tmp_path):
    torch.manual_seed(1)
    first = random_model()
    base = {k: v.clone() for k, v in first.state_dict().items()}
    saved(tmp_path, first)
    second = random_model()
    second.load_state_dict(base)
    names = load_adapter(second, tmp_path, "reloaded")
    assert torch.equal(logits(second), logits(first))
    assert names == list(lora_layers(first)) and adapters.active_adapter(second) == "reloaded"
    assert adapters.adapter_configs(second)["reloaded"] == adapters.adapter_configs(first)["default"]
    assert {p.name for p in tmp_path.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}


def test_content_is_pefts(tmp_path):
    model = random_model()
    model.name_or_path = "a/base"
    fingerprint = adapters.base_fingerprint(model)
    saved(tmp_path, model)
    content = json.loads((tmp_path / "adapter_config.json").read_text())
    seven = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    expected = {
        "peft_type": "LORA",
        "r": 4,
        "lora_alpha": 6,
        "target_modules": seven,
        "base_model_name_or_path": "a/base",
    }
    assert expected.items() <= content.items() and content["inference_mode"] is True
    with safe_open(tmp_path / "adapter_model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "base_fingerprint": fingerprint}
        key = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
        assert file.get_tensor(key).shape == (2, 64) and len(file.keys()) == 2 * 7 * 3


def test_all_linear_is_written_as_whole_names_where_last_parts_say_more(tmp_path):
    model = torch.nn.ModuleDict({"a": torch.nn.ModuleDict({"x": torch.nn.Linear(3, 3)}), "x": torch.nn.Tanh()})
    saved(tmp_path, model, LoraConfig(r=2))
    assert json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"] == ["a.x"]


@pytest.mark.parametrize("quantized", [False, True])
def test_another_base_is_refused_with_both_fingerprints(tmp_path, quantized):
    model = random_model()
    mine = adapters.base_fingerprint(model)
    twin = random_model()
    twin.load_state_dict(model.state_dict())
    if quantized:
        quantize_model(model)
    saved(tmp_path, model)
    load_adapter(twin, tmp_path)  # the quantized base and the dense one it was made from are the same base
    torch.manual_seed(5)
    other = random_model()
    with pytest.raises(PosttrainError) as error:
        load_adapter(other, tmp_path)
    assert mine in str(error.value) and adapters.base_fingerprint(other) in str(error.value)
    assert not lora_layers(other)
    load_adapter(other, tmp_path, any_base=True)


def test_half_precision_files_are_widened(tmp_path):
    saved(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    save_file({k: v.bfloat16() for k, v in load_file(file).items()}, file)
    for dtype, expected in ((None, torch.float32), (torch.bfloat16, torch.bfloat16)):
        model = random_model()
        load_adapter(model, tmp_path, dtype=dtype)
        assert {p.dtype for p in adapters.adapter_parameters(model).values()} == {expected}


KEY = "base_model.model.model.layers.1.mlp.up_proj.lora_A.weight"


def edit(tmp_path, change):
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def config_with(**changes):
    def change(tmp_path):
        file = tmp_path / "adapter_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))

    return change


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda p: edit(p, lambda t: t.pop(KEY)), f"{KEY} is missing"),
        (lambda p: edit(p, lambda t: t.update(extra=torch.zeros(1))), "extra is of no layer that the config selects"),
        (
            lambda p: edit(p, lambda t: t.update({KEY: torch.zeros(4, 63)})),
            r"is \(4, 63\) and the layer takes \(4, 64\)",
        ),
        (lambda p: edit(p, lambda t: [t.pop(k) for k in list(t)[:9]]), "and 5 more"),
        (lambda p: (p / "adapter_model.safetensors").unlink(), "holds no adapter_model.safetensors"),
        (lambda p: (p / "adapter_config.json").unlink(), "holds no adapter_config.json"),
        (lambda p: (p / "adapter_model.safetensors").write_bytes(b"\x08" * 20), "is not a whole safetensors file"),
        (lambda p: (p / "adapter_config.json").write_text("{"), "is not JSON"),
        (lambda p: (p / "adapter_config.json").write_text("[" * 100_000), "is not JSON"),
        (lambda p: (p / "adapter_config.json").write_bytes(b"\xff"), "is not JSON in UTF-8"),
        (lambda p: (p / "adapter_config.json").write_text("[]"), "expected a JSON object"),
        (config_with(peft_type="LOHA"), "peft_type is 'LOHA'"),
        (config_with(use_dora=True), "lora_magnitude_vector is missing"),
        (config_with(use_qalora=True), "use_qalora is True; .*load the merged model"),
        (config_with(trainable_token_indices=[1]), r"trainable_token_indices is \[1\]; .*load the merged model"),
        (config_with(target_parameters=["x"]), "target_parameters is .*load the merged model"),
        (config_with(layer_replication=[[0, 2]]), "layer_replication is .*load the merged model"),
        (config_with(lora_dropout=1.0), "lora_dropout is 1.0; expected 0 <= lora_dropout < 1"),
        (
            lambda p: edit(p, lambda t: t.update({KEY.replace(".weight", ".other.weight"): t[KEY].clone()})),
            "holds .*up_proj.lora_A.weight of several adapters",
        ),
        (config_with(fan_in_fan_out=True), "fan_in_fan_out is True"),
        (config_with(r=0), "r is 0"),
        (config_with(peft_type=["LORA"]), r"peft_type is \['LORA'\]"),
        (config_with(rank_pattern=[1]), r"rank_pattern is \[1\], of another type than PEFT writes; expected dict"),
        (config_with(alpha_pattern={"q_proj": "x"}), "alpha_pattern is .*'x'}, of another type"),
        (config_with(lora_alpha="x"), "lora_alpha is 'x', of another type than PEFT writes; expected float"),
        (config_with(r=True), "r is True, of another type"),
        (config_with(target_modules=5), r"target_modules is 5, of another type than PEFT writes; expected str \| list\[str\]"),
        (config_with(target_modules=["q_proj", 5]), r"target_modules is \['q_proj', 5\], of another type"),
        (config_with(loftq_config=5), "loftq_config is 5, of another type"),
        (config_with(task_type="SEQ_CLS", modules_to_save=5), "modules_to_save is 5, of another type"),
        (config_with(bias="some"), "bias is 'some'"),
        (config_with(init_lora_weights="loftq", loftq_config={"loftq_bits": 4}), "init_lora_weights is 'loftq'"),
        (config_with(init_lora_weights="pissa_niter_4"), "path_initial_model_for_weight_conversion"),
        (config_with(modules_to_save=["lm_head"]), "head is tied to model.embed_tokens"),
        (config_with(modules_to_save=["model.norm"]), "base_model.model.model.norm.weight is missing"),
        (config_with(target_modules=["absent"]), "does not fit this model: .*matches no layer"),
    ],
)
def test_a_wrong_folder_is_one_error_and_leaves_the_model_alone(tmp_path, damage, message):
    saved(tmp_path)
    damage(tmp_path)
    model = random_model()
    with pytest.raises(PosttrainError, match=message):
        load_adapter(model, tmp_path, any_base=True)
    assert not lora_layers(model) and all(p.requires_grad for p in model.parameters())


def test_cut_short_at_any_length(tmp_path):
    saved(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    whole = file.read_bytes()
    for length in (0, 7, 8, 100, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:length])
        with pytest.raises(PosttrainError, match="is not a whole safetensors file"):
            load_adapter(random_model(), tmp_path, any_base=True)


def test_unknown_fields_are_named(tmp_path):
    saved(tmp_path)
    config_with(a_new_thing=3, another=None)(tmp_path)
    with pytest.warns(UserWarning, match="unknown field a_new_thing=3"):
        load_adapter(random_model(), tmp_path, any_base=True)


def test_a_full_disk_leaves_the_adapter_that_was_there(tmp_path, monkeypatch):
    saved(tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}

    def full(path, tensors, metadata):
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(peft_format, "write_safetensors", full)
    with pytest.raises(OSError, match="No space left"):
        saved(tmp_path, config=LoraConfig(r=1))
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


@pytest.mark.parametrize("field", ["r", "lora_alpha", "bias", "init_lora_weights"])
def test_null_is_no_default(tmp_path, field):
    saved(tmp_path, config=LoraConfig(r=2, lora_alpha=32))
    config_with(**{field: None})(tmp_path)
    with pytest.raises(PosttrainError, match=f"{field} is null; expected .*"):
        load_adapter(random_model(), tmp_path)


def test_null_is_nothing_where_that_is_the_default(tmp_path):
    saved(tmp_path, config=LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    off = ("target_modules", "rank_pattern", "lora_dropout", "use_dora", "modules_to_save", "loftq_config")
    config_with(**dict.fromkeys(off))(tmp_path)
    load_adapter(random_model(), tmp_path, any_base=True)


@pytest.mark.parametrize(
    ("kind", "field", "value"),
    [
        (IA3Config, "init_ia3_weights", "False"),
        (IA3Config, "feedforward_modules", 5),
        (PromptTuningConfig, "num_virtual_tokens", "5"),
        (PrefixTuningConfig, "prefix_projection", 1),
        (PromptEncoderConfig, "encoder_dropout", "0.1"),
        (BottleneckConfig, "train_norms", "False"),
    ],
)
def test_a_field_of_another_type_is_named(kind, field, value):
    with pytest.raises(ValueError, match=f"{field} is {value!r}; expected"):
        kind(**{field: value})


def test_a_path_and_a_tuple_are_kept_as_json_has_them(tmp_path):
    config = PromptTuningConfig(4, tokenizer_name_or_path=tmp_path)
    assert config.tokenizer_name_or_path == str(tmp_path)
    assert IA3Config(target_modules=("q_proj",), feedforward_modules=()).target_modules == ["q_proj"]


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(r=2, init_lora_weights=False, use_dora=True, target_modules=["q_proj"]),
        LoraConfig(r=2, init_lora_weights=False, target_modules=["embed_tokens"]),
        LoraConfig(r=2, init_lora_weights=False, lora_bias=True, target_modules=["q_proj"]),
        IA3Config(init_ia3_weights=False),
    ],
)
def test_keys_of_the_model_in_memory(tmp_path, config):
    """PEFT loads files that hold its modules' own keys: with the adapter's name, DoRA's magnitudes with .weight."""
    model = saved(tmp_path, config=config)
    before = logits(model)
    adapters.delete_adapter(model, "default")

    def named(key):
        last = key.rpartition(".")
        key = f"{last[0]}.default.{last[2]}" if last[2] in ("weight", "bias") else f"{key}.default"
        return f"{key}.weight" if "magnitude" in key else key

    def rename(tensors):
        for key in list(tensors):
            tensors[named(key)] = tensors.pop(key)

    edit(tmp_path, rename)
    load_adapter(model, tmp_path)
    assert torch.equal(logits(model), before)


def test_magnitudes_with_weight_after_them(tmp_path):
    model = saved(tmp_path, config=LoraConfig(r=2, use_dora=True, target_modules=["q_proj"]))
    adapters.delete_adapter(model, "default")
    edit(tmp_path, lambda t: [t.update({f"{key}.weight": t.pop(key)}) for key in list(t) if "magnitude" in key])
    load_adapter(model, tmp_path)


def test_a_file_that_names_no_targets_has_pefts(tmp_path):
    model = saved(tmp_path, config=LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    adapters.delete_adapter(model, "default")
    config_with(target_modules=None)(tmp_path)
    assert len(load_adapter(model, tmp_path)) == 6
