"""How many parameters a method trains, from the model's configuration alone: no weight is read or made.

The model and the adapter are put together on PyTorch's meta device, where tensors have shapes and no values, by the
same functions that attach the real one. In closed form, for L layers of width d, K = head_dim num_key_value_heads, n
virtual tokens (tests/test_adapters_counts.py holds the two together):

    LoRA            r (in + out) for each target; DoRA + out
    bottlenecks     2 L (2 m d + d + m), and (2 L + 1) d for the norms (+ V d for the head)
    prefix tuning   2 n L K
    prompt tuning   n d
    P-tuning (MLP)  n d + 3 (d^2 + d) with an encoder as wide as the model
    (IA)^3          L (2 K + intermediate_size)
    full            all
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from posttrain.model.config import ModelConfig
from posttrain.model.decoder import CausalLM

from .interface import METHODS, check_targets

MOST_LAYERS = 1000  # ten times the deepest models: each is built, since a target may be named by its layer's number


def _on_meta(config: ModelConfig) -> CausalLM:
    if config.num_hidden_layers > MOST_LAYERS:
        given = f"num_hidden_layers is {config.num_hidden_layers}"
        raise ValueError(f"{given}; expected at most {MOST_LAYERS} to count what trains in them; is config.json whole?")
    with torch.device("meta"):
        return CausalLM(config)


def total_parameters(config: ModelConfig) -> int:
    """Parameters of the model, a tied head counted once."""
    return sum(parameter.numel() for parameter in _on_meta(config).parameters())


def trainable_parameters(config: ModelConfig, adapter: Any) -> int:
    """Parameters that train with this adapter's configuration; None: all of the model's. ValueError where it does not fit, and for
    more layers than any model has."""
    if adapter is None:
        return total_parameters(config)
    model, method = _on_meta(config), METHODS[type(adapter)]
    adapter = method.resolve(model, adapter)
    check_targets(model, adapter)
    if getattr(adapter, "init_lora_weights", None) == "loftq":  # quantizes values; what it adds to the tables is frozen
        adapter = replace(adapter, init_lora_weights=True)
    with torch.device("meta"):
        method.insert(model, adapter, "default", None, None)
    return sum(parameter.numel() for parameter in method.parameters(model, "default").values())
