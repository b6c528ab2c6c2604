"""Trainable parameters from a configuration alone: published counts exactly, closed forms, and what is really attached.

(tests/test_adapters_interface.py compares with the attached parameters for every method.)
"""

from __future__ import annotations

from dataclasses import replace

import pytest
from model_cases import hf_config

from posttrain.adapters import (
    BottleneckConfig,
    IA3Config,
    LoraConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
)
from posttrain.adapters.counts import total_parameters, trainable_parameters
from posttrain.model.config import ModelConfig

# Llama-3.2-3B's config.json: what of it decides sizes.
LLAMA_3B = ModelConfig.from_hf(
    {
        "architectures": ["LlamaForCausalLM"], "vocab_size": 128256, "hidden_size": 3072, "intermediate_size": 8192,
        "num_hidden_layers": 28, "num_attention_heads": 24, "num_key_value_heads": 8, "head_dim": 128,
        "tie_word_embeddings": True, "max_position_embeddings": 131072,
    }
)  # fmt: skip
Q_V = {"target_modules": ["q_proj", "v_proj"]}
# What PEFT's method comparison (MetaMathQA, Llama-3.2-3B) reports as trainable, by its settings.
PUBLISHED = {
    "full": (None, 3_212_749_824),
    "LoRA r=32": (LoraConfig(r=32, **Q_V), 9_175_040),
    "LoRA r=32 after LoftQ": (LoraConfig(r=32, init_lora_weights="loftq", **Q_V), 9_175_040),
    "LoRA r=64, rank-stabilised": (LoraConfig(r=64, use_rslora=True, **Q_V), 18_350_080),
    "DoRA r=32": (LoraConfig(r=32, use_dora=True, **Q_V), 9_289_728),
    "prefix of 200": (PrefixTuningConfig(num_virtual_tokens=200), 11_468_800),
    "prefix of 50": (PrefixTuningConfig(num_virtual_tokens=50), 2_867_200),
    "prompt of 200": (PromptTuningConfig(num_virtual_tokens=200, prompt_tuning_init="SAMPLE_VOCAB"), 614_400),
    "P-tuning, 20 by an MLP": (PromptEncoderConfig(num_virtual_tokens=20), 28_382_208),
    "(IA)^3": (IA3Config(), 286_720),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_counts(name):
    config, published = PUBLISHED[name]
    assert trainable_parameters(LLAMA_3B, config) == published
    assert total_parameters(LLAMA_3B) == PUBLISHED["full"][1]


@pytest.mark.parametrize("name", ["llama2", "qwen2", "qwen3"])  # a head of its own or tied, grouped heads, q/k norms
def test_closed_forms(name):
    shape = ModelConfig.from_hf(hf_config(name))
    L, d, V = shape.num_hidden_layers, shape.hidden_size, shape.vocab_size
    m, r, n = 5, 3, 7
    K, Q, I = (shape.head_dim * shape.num_key_value_heads, shape.head_dim * shape.num_attention_heads, shape.intermediate_size)
    bottlenecks = L * 2 * (2 * m * d + d + m)
    norms = (2 * L + 1) * d + (2 * L * shape.head_dim if shape.qk_norm else 0)
    expected = {
        BottleneckConfig(bottleneck_size=m, train_norms=False): bottlenecks,
        BottleneckConfig(bottleneck_size=m): bottlenecks + norms,
    }
    if not shape.tie_word_embeddings:
        expected[BottleneckConfig(bottleneck_size=m, train_head=True)] = bottlenecks + norms + V * d
    for config, count in expected.items():
        assert trainable_parameters(shape, config) == count
    linear = 2 * (d + Q) + 2 * (d + K) + 3 * (d + I)  # in + out of a layer's seven
    assert trainable_parameters(shape, LoraConfig(r=r)) == L * r * linear
    assert trainable_parameters(shape, LoraConfig(r=r, use_dora=True)) == L * (r * linear + Q + 2 * K + 2 * I + 2 * d)
    assert trainable_parameters(shape, IA3Config()) == L * (2 * K + I)
    assert trainable_parameters(shape, PrefixTuningConfig(num_virtual_tokens=n)) == 2 * n * L * K
    assert trainable_parameters(shape, PromptTuningConfig(num_virtual_tokens=n)) == n * d
    assert trainable_parameters(shape, PromptEncoderConfig(num_virtual_tokens=n)) == n * d + 3 * (d * d + d)


def test_more_layers_than_any_model_has_are_not_built():
    many = replace(LLAMA_3B, num_hidden_layers=1_000_000)
    for count in (lambda: total_parameters(many), lambda: trainable_parameters(many, LoraConfig())):
        with pytest.raises(ValueError, match="num_hidden_layers is 1000000; expected at most 1000 "):
            count()


def test_a_configuration_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="matches no layer"):
        trainable_parameters(LLAMA_3B, LoraConfig(target_modules=["nothing"]))
    with pytest.raises(ValueError, match="tie_word_embeddings"):
        trainable_parameters(LLAMA_3B, BottleneckConfig(train_head=True))
