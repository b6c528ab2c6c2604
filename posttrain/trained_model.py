"""What every training method does with its model before and after: an adapter attached or all weights freed, and saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from .adapters import active_adapter, adapter_configs, attach, save_adapter
from .errors import PosttrainError
from .model.decoder import CausalLM
from .model.loading import save
from .quantized import QuantizedLinear
from .trainer import TrainConfig


def check_lengths(model: CausalLM, adapter: Any, longest: int, max_length: int | None) -> None:
    """PosttrainError where the longest example exceeds max_length, or what the adapter leaves of the model's context."""
    given = adapter if active_adapter(model) is None else model.virtual
    virtual = getattr(given, "num_virtual_tokens", 0)
    context = model.config.max_position_embeddings - virtual
    if longest > (room := min(max_length or longest, context)):
        beside = f" beside {virtual} virtual ones" if virtual else ""
        raise PosttrainError(
            f"the longest example has {longest} tokens; max_length is {max_length or 'not given'} and the model's context holds "
            f"{max(context, 0)}{beside}. "
            + (f"Load the data with a max_length of {room}, which names the row or cuts its prompt" if room > 0 else "Take fewer")
        )


def attach_for_training(model: CausalLM, adapter: Any, seed: int) -> Any:
    """Attach `adapter` unless the model already has one. Returns the configuration of what trains, None for the model's own
    weights. PosttrainError where those are in 4 bits."""
    if adapter is not None and active_adapter(model) is None:
        torch.manual_seed(seed)
        attach(model, adapter)
    name = active_adapter(model)
    if name is None and any(isinstance(module, QuantizedLinear) for module in model.modules()):
        raise PosttrainError("4-bit weights cannot be trained themselves; give an adapter, or load the model without quantize")
    return adapter_configs(model)[name] if name else None


def free_weights(model: CausalLM) -> None:
    """Let every weight train: the model will be another base from the first step on."""
    model.requires_grad_(True)
    model.fingerprint = None


def save_trained(model: CausalLM, trained: Any, config: TrainConfig) -> None:
    """The adapter in config.output_dir in PEFT's format; without one the whole model in its folder `model`."""
    if trained is None:
        save(model, model_folder(config))
    else:
        save_adapter(model, config.output_dir)


def model_folder(config: TrainConfig) -> Path:
    """Where a model is saved whose own weights were trained."""
    return Path(config.output_dir) / "model"
