"""config.json as transformers 4 and 5 write it, and what must be refused."""

from __future__ import annotations

import json

import pytest
import torch
from model_cases import CASES, hf_config

from posttrain.model import ModelConfig, parse_dtype
from posttrain.model.config import ARCHITECTURES


def as_transformers_4(config: dict) -> dict:
    """The same configuration in the older spelling: rope_theta and rope_scaling (with "type"), torch_dtype."""
    config = dict(config)
    rope = dict(config.pop("rope_parameters", {"rope_type": "default", "rope_theta": 10000.0}))
    config["rope_theta"] = rope.pop("rope_theta")
    rope["type"] = rope.pop("rope_type")
    config["rope_scaling"] = None if rope["type"] == "default" else rope
    return config


@pytest.mark.parametrize("name", CASES)
def test_both_spellings_and_the_round_trip_agree(name):
    config = ModelConfig.from_hf(hf_config(name))
    assert ModelConfig.from_hf(as_transformers_4(hf_config(name))) == config
    assert ModelConfig.from_hf(json.loads(json.dumps(config.to_hf()))) == config
    hash(config)  # frozen through and through


@pytest.mark.peers
@pytest.mark.parametrize("name", CASES)
def test_transformers_reads_ours_and_we_read_its(name, tmp_path):
    transformers = pytest.importorskip("transformers")
    cls = getattr(transformers, CASES[name][0].replace("ForCausalLM", "Config"))
    ours = ModelConfig.from_hf(hf_config(name))
    cls(**hf_config(name)).save_pretrained(tmp_path / "theirs")
    assert ModelConfig.from_hf(json.loads((tmp_path / "theirs/config.json").read_text())) == ours
    (tmp_path / "ours").mkdir()
    (tmp_path / "ours/config.json").write_text(json.dumps(ours.to_hf()))
    back = transformers.AutoConfig.from_pretrained(tmp_path / "ours")
    assert type(back) is cls
    assert ModelConfig.from_hf(json.loads(back.to_json_string(use_diff=False))) == ours


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "GPT2LMHeadModel.*LlamaForCausalLM, MistralForCausalLM"),
        ({"architectures": None, "model_type": "gemma"}, "gemma"),
        ({"hidden_size": None}, "hidden_size is None"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
        ({"vocab_size": "97"}, "vocab_size is '97'"),
        ({"num_key_value_heads": 3}, "4 attention heads.*3 key-value heads"),
        ({"head_dim": 15}, "head_dim is 15"),
        ({"head_dim": "64"}, "head_dim is '64'"),
        ({"num_key_value_heads": -1}, "num_key_value_heads is -1"),
        ({"max_position_embeddings": "64"}, "max_position_embeddings is '64'"),
        ({"rms_norm_eps": -1}, "rms_norm_eps is -1; expected a positive number"),
        ({"rope_scaling": "linear"}, "rope_scaling is 'linear'; expected an object"),
        ({"rope_scaling": {"type": "linear", "factor": 0}}, "factor is 0; expected a positive number"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"rope_scaling": {"rope_type": "longrope"}}, "longrope.*default, linear, dynamic, yarn, llama3"),
        ({"rope_scaling": {"type": "linear"}}, "needs factor"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "needs low_freq_factor, high_freq_factor"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        ({"rope_theta": 10**400}, "rope_theta is 1000.*; expected a positive number"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings is 'false'; expected true or false"),
        ({"attention_bias": "false"}, "attention_bias is 'false'; expected true or false"),
        ({"mlp_bias": 0}, "mlp_bias is 0; expected true or false"),
        ({"pad_token_id": "x"}, "pad_token_id is 'x'; expected one token id"),
        ({"bos_token_id": [1]}, r"bos_token_id is \[1\]; expected one token id"),
        ({"initializer_range": "x"}, "initializer_range is 'x'; expected a positive number"),
        ({"torch_dtype": 7}, "dtype is 7; expected a name"),
        ({"architectures": None, "model_type": ["llama"]}, r"architecture is \[\['llama'\]\]"),
        ({"hidden_size": 2**63}, f"hidden_size is {2**63}; expected at most {2**31 - 1}"),
    ],
)
def test_what_cannot_be_run_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        ModelConfig.from_hf({**hf_config("smollm2"), "rope_parameters": None, **change})


@pytest.mark.parametrize("key", ["beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim"])
@pytest.mark.parametrize("value", ["1", -1, True, [1], float("nan")])
def test_yarn_s_numbers_are_checked(key, value):
    scaling = {"rope_type": "yarn", "factor": 4.0, key: value}
    with pytest.raises(ValueError, match=f"config.json: {key} is .*; expected a positive number"):
        ModelConfig.from_hf({**hf_config("llama2"), "rope_scaling": scaling})


@pytest.mark.parametrize("name", ["mistral_sliding", "qwen2_sliding"])
@pytest.mark.parametrize("window", [0, -1, 7.5, "7", True])
def test_a_window_is_a_number_of_tokens(name, window):
    with pytest.raises(ValueError, match="sliding_window is .*; expected a positive integer"):
        ModelConfig.from_hf({**hf_config(name), "sliding_window": window})


def test_a_window_is_not_turned_on_by_a_text():
    with pytest.raises(ValueError, match="use_sliding_window is 'false'; expected true or false"):
        ModelConfig.from_hf({**hf_config("qwen2_sliding"), "use_sliding_window": "false"})


def test_layer_types_must_fit_the_layers():
    with pytest.raises(ValueError, match="layer_types has 2 entries"):
        ModelConfig.from_hf({**hf_config("qwen2"), "layer_types": ["full_attention"] * 2})
    for wrong in (3, "full", [["full_attention"]] * 3, {"full_attention": 3}):
        with pytest.raises(ValueError, match="config.json: layer_types .* expected a list of 3, each full_attention or sliding"):
            ModelConfig.from_hf({**hf_config("qwen2"), "layer_types": wrong})
    for wrong in ("1", -1, 1.5):
        with pytest.raises(ValueError, match="config.json: max_window_layers is .* 0 or more"):
            ModelConfig.from_hf({**hf_config("qwen2"), "max_window_layers": wrong})


def test_model_type_stands_in_for_architectures():
    for name in ARCHITECTURES:
        config = ModelConfig.from_hf({**hf_config("llama2"), "architectures": [name]})
        written = {key: value for key, value in config.to_hf().items() if key != "architectures"}
        assert ModelConfig.from_hf(written).architecture == name


def test_dtype_names():
    assert parse_dtype("bf16") is parse_dtype("bfloat16") is parse_dtype(torch.bfloat16) is torch.bfloat16
    for wrong in ("int8", "fp8", torch.int8, None):
        with pytest.raises(ValueError, match="fp32, float32, bf16"):
            parse_dtype(wrong)


def test_weights_may_start_as_zeros():
    assert ModelConfig.from_hf({**hf_config("smollm2"), "initializer_range": 0}).initializer_range == 0.0
