"""Small random models of every architecture, for the model tests."""

from __future__ import annotations

import torch

from posttrain.model import CausalLM, ModelConfig

SIZES = {
    "vocab_size": 97, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.2, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16}

# name -> (architecture, what its config.json says besides SIZES, as transformers 5 writes it)
CASES: dict[str, tuple[str, dict]] = {
    "llama2": ("LlamaForCausalLM", {"num_key_value_heads": 4}),
    "llama3": ("LlamaForCausalLM", {"rope_parameters": LLAMA3}),
    "llama_linear": (
        "LlamaForCausalLM", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}},
    ),
    "llama_dynamic": (
        "LlamaForCausalLM",
        {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}, "max_position_embeddings": 16},
    ),
    "llama_yarn": ("LlamaForCausalLM", {"rope_parameters": YARN}),
    "llama_biases": ("LlamaForCausalLM", {"attention_bias": True, "mlp_bias": True}),
    "smollm2": (
        "LlamaForCausalLM",
        {"tie_word_embeddings": True, "rope_parameters": {"rope_type": "default", "rope_theta": 1e5}},
    ),
    "mistral": ("MistralForCausalLM", {"sliding_window": None}),
    "mistral_sliding": ("MistralForCausalLM", {"sliding_window": 7, "head_dim": 32}),
    "qwen2": ("Qwen2ForCausalLM", {"tie_word_embeddings": True}),
    "qwen2_sliding": ("Qwen2ForCausalLM", {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1}),
    "qwen3": ("Qwen3ForCausalLM", {"head_dim": 32}),
    "qwen3_yarn": ("Qwen3ForCausalLM", {"head_dim": 32, "attention_bias": True, "rope_parameters": YARN}),
}  # fmt: skip


def hf_config(name: str) -> dict:
    architecture, rest = CASES[name]
    return {**SIZES, "architectures": [architecture], **rest}


def random_model(name: str = "smollm2", dtype: torch.dtype = torch.float32, **changes) -> CausalLM:
    """A model with every tensor random, norms and biases included, so that none can be left out unnoticed."""
    model = CausalLM(ModelConfig.from_hf({**hf_config(name), **changes}))
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "norm" in parameter_name:
                parameter.uniform_(0.5, 1.5)
            elif parameter_name.endswith("bias"):
                parameter.normal_(0, 0.2)
    return model.to(dtype).eval()
