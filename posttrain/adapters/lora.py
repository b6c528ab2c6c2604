"""LoRA on a model's linear layers, dense or 4-bit (the functions that posttrain/adapters/interface.py asks of a method).

Hu et al. (arXiv:2106.09685); on a 4-bit base that is QLoRA (Dettmers et al., arXiv:2305.14314); rank-stabilised
scaling is Kalajdzievski's (arXiv:2312.03732). Fields, names and matching rules are PEFT's, so that its configurations
mean the same here.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from posttrain.quantized import QuantizedLinear

from .lora_config import LoraConfig, matches
from .lora_linear import LoraLinear
from .peft_format import PREFIX

LINEAR = (nn.Linear, QuantizedLinear)


def lora_layers(model: nn.Module) -> dict[str, LoraLinear]:
    """The layers that carry adapters, by the names they had before."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLinear)}


def _device(layer: Any) -> torch.device:
    weight = layer.weight
    return weight.device if isinstance(weight, Tensor) else weight.packed.device


def target_layers(model: nn.Module, config: LoraConfig) -> dict[str, Any]:
    """{name: linear layer or LoraLinear} that the config selects. ValueError where it selects none, or something not
    linear."""
    inside = tuple(f"{name}." for name in lora_layers(model))
    everything = {n: m for n, m in model.named_modules() if n and not n.startswith(inside)}
    chosen = {n: m for n, m in everything.items() if matches(config, n)}
    linear = {n: m for n, m in everything.items() if type(m) in (*LINEAR, LoraLinear)}
    if isinstance(config.target_modules, str) and config.target_modules.lower() == "all-linear":
        chosen = {n: m for n, m in chosen.items() if n in linear}
    if not chosen:
        known = sorted({n.rpartition(".")[2] for n in linear})
        raise ValueError(
            f"target_modules={config.target_modules!r} (exclude_modules={config.exclude_modules!r}) matches no layer; "
            f"the model's linear layers end in: {', '.join(known) or 'there are none'}"
        )
    if wrong := [n for n in chosen if n not in linear]:
        kind = type(chosen[wrong[0]]).__name__
        raise ValueError(f"target module {wrong[0]} is a {kind}; LoRA here goes on linear layers alone")
    return chosen


def _bases(model: nn.Module, config: LoraConfig) -> dict[str, Any]:
    """{name: linear layer} that the config selects, without the adapters that it may already carry."""
    return {n: m.base_layer if isinstance(m, LoraLinear) else m for n, m in target_layers(model, config).items()}


def resolve(model: nn.Module, config: LoraConfig) -> LoraConfig:
    """The config with "all-linear" replaced by the layers it means: last parts of names where these say the same."""
    targets = target_layers(model, config)
    if not (isinstance(config.target_modules, str) and config.target_modules.lower() == "all-linear"):
        return replace(config)
    by_ends = replace(config, target_modules=sorted({n.rpartition(".")[2] for n in targets}))
    skip = tuple(f"{n}." for n in targets)
    same = {n for n, _ in model.named_modules() if n and not n.startswith(skip) and matches(by_ends, n)} == set(targets)
    return by_ends if same else replace(config, target_modules=sorted(targets))


def shapes(model: nn.Module, config: LoraConfig) -> dict[str, tuple[int, ...]]:
    """{key: shape} of the adapter's tensors."""
    expected: dict[str, tuple[int, ...]] = {}
    for name, base in _bases(model, config).items():
        r = config.rank(name)
        expected[f"{PREFIX}{name}.lora_A.weight"] = (r, base.in_features)
        expected[f"{PREFIX}{name}.lora_B.weight"] = (base.out_features, r)
    return expected


def _initial(config: LoraConfig, name: str, base: Any, dtype: torch.dtype | None) -> tuple[Tensor, Tensor]:
    r, device = config.rank(name), _device(base)
    dtype = dtype or torch.promote_types(base.weight.dtype, torch.float32)
    A = torch.empty(r, base.in_features, dtype=dtype, device=device)
    B = torch.zeros(base.out_features, r, dtype=dtype, device=device)
    if config.init_lora_weights == "gaussian":
        nn.init.normal_(A, std=1 / r)
    else:
        nn.init.kaiming_uniform_(A, a=math.sqrt(5))
        if config.init_lora_weights is False:
            nn.init.kaiming_uniform_(B, a=math.sqrt(5))
    return A, B


def insert(
    model: nn.Module, config: LoraConfig, name: str, dtype: torch.dtype | None, tensors: dict[str, Tensor] | None
) -> list[str]:
    """Put the adapter on the layers that `config` selects; returns their names."""
    bases = _bases(model, config)
    values = {}
    for layer_name, base in bases.items():
        if tensors is None:
            values[layer_name] = _initial(config, layer_name, base, dtype)
        else:
            A, B = (tensors[f"{PREFIX}{layer_name}.{part}.weight"] for part in ("lora_A", "lora_B"))
            values[layer_name] = A.to(_device(base)), B.to(_device(base))
    for layer_name, base in bases.items():
        layer = model.get_submodule(layer_name)
        if not isinstance(layer, LoraLinear):
            layer = LoraLinear(base).train(model.get_submodule(layer_name.rpartition(".")[0]).training)
            model.set_submodule(layer_name, layer)
        layer.add(name, *values[layer_name], config.scaling(layer_name), config.lora_dropout)
    return list(bases)


def parameters(model: nn.Module, name: str) -> dict[str, nn.Parameter]:
    """The adapter's parameters under PEFT's keys."""
    found = {}
    for layer_name, layer in lora_layers(model).items():
        if name in layer.lora_A:
            found[f"{PREFIX}{layer_name}.lora_A.weight"] = layer.lora_A[name]
            found[f"{PREFIX}{layer_name}.lora_B.weight"] = layer.lora_B[name]
    return found


def activate(model: nn.Module, name: str | None) -> None:
    """Let that adapter act where it is, and the base alone elsewhere."""
    for layer in lora_layers(model).values():
        layer.active_adapter = name if name in layer.lora_A else None


def remove(model: nn.Module, name: str) -> None:
    """Drop the adapter; layers without any become what they were."""
    for layer_name, layer in lora_layers(model).items():
        if name in layer.lora_A:
            layer.drop(name)
        if not len(layer.lora_A):
            model.set_submodule(layer_name, layer.base_layer)


def _finite(name: str, weight: Tensor) -> Tensor:
    if not torch.isfinite(weight).all():
        raise ValueError(f"merging {name} gives NaN or infinite weights; the adapter or the base is broken there")
    return weight


def merge(model: nn.Module, name: str) -> None:
    """Compute with W + scaling B A as one dense layer, the base's beside it."""
    layers = {n: layer for n, layer in lora_layers(model).items() if name in layer.lora_A}
    merged = {layer: _finite(n, layer.merged_weight(name)) for n, layer in layers.items()}
    for layer, weight in merged.items():
        layer.merged = layer.dense(weight)


def unmerge(model: nn.Module) -> None:
    """Drop the merged layers."""
    for layer in lora_layers(model).values():
        layer.merged = None


def unload(model: nn.Module, name: str) -> None:
    """Replace adapted layers by dense ones with the adapter merged in, one after another."""
    layers = lora_layers(model)
    for layer_name, layer in layers.items():
        if name in layer.lora_A:
            _finite(layer_name, layer.merged_weight(name))
    while layers:
        layer_name, layer = layers.popitem()
        base = layer.base_layer
        model.set_submodule(layer_name, layer.dense(layer.merged_weight(name)) if name in layer.lora_A else base)
