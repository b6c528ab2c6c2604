"""LoRA adapters on a model's linear layers, dense or 4-bit: attach, switch, merge, take off.

Hu et al. (arXiv:2106.09685); on a 4-bit base that is QLoRA (Dettmers et al., arXiv:2305.14314); rank-stabilised
scaling is Kalajdzievski's (arXiv:2312.03732). Fields, names and matching rules are PEFT's, so that its configurations
mean the same here.

    names = attach(model, LoraConfig(r=8, lora_alpha=16))     # freezes the base; returns the layers that got an adapter
    ...train...
    save_adapter(model, "adapter")                            # posttrain/peft_format.py

Every function below that changes a model checks everything first: when it raises, the model is as it was.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from .errors import PosttrainError
from .fingerprint import fingerprint
from .lora_config import LoraConfig, matches
from .lora_linear import LoraLinear
from .model.config import ModelConfig
from .peft_format import PREFIX, read_adapter, write_adapter
from .quantized import QuantizedLinear

LINEAR = (nn.Linear, QuantizedLinear)


def lora_layers(model: nn.Module) -> dict[str, LoraLinear]:
    """The layers that carry adapters, by the names they had before."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLinear)}


def adapter_configs(model: nn.Module) -> dict[str, LoraConfig]:
    """What each adapter of the model was attached with, by name in the order of attaching."""
    return getattr(model, "_adapter_configs", {})


def adapters(model: nn.Module) -> list[str]:
    """Names of the model's adapters, in the order in which they were attached."""
    return list(adapter_configs(model))


def _set_configs(model: nn.Module, configs: dict[str, LoraConfig]) -> None:
    object.__setattr__(model, "_adapter_configs", configs)


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


def _check_new_name(model: nn.Module, name: str) -> None:
    if not re.fullmatch(r"[A-Za-z0-9_-]+", name) or hasattr(nn.ParameterDict, name):
        raise ValueError(
            f"{name!r} cannot name an adapter; use letters, digits, '_' and '-', "
            "and no name of a module's own, such as 'train'"
        )
    if name in adapters(model):
        raise ValueError(f"the model already has an adapter named {name!r}; give another name, or delete_adapter first")
    if is_merged(model):
        raise ValueError("an adapter is merged into the base; unmerge first")


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


def attach(
    model: nn.Module,
    config: LoraConfig,
    name: str = "default",
    *,
    dtype: torch.dtype | None = None,
    weights: dict[str, tuple[Tensor, Tensor]] | None = None,
) -> list[str]:
    """Put an adapter on the layers that `config` selects and make it the active one; the base freezes. Returns names.

    Adapters are fp32 on a half-precision or 4-bit base (the base's dtype if that is wider), unless `dtype` is given.
    `weights` ({layer: (lora_A, lora_B)}, shapes checked by the caller) takes the place of the initial values.
    """
    _check_new_name(model, name)
    targets = target_layers(model, config)
    base = {n: m.base_layer if isinstance(m, LoraLinear) else m for n, m in targets.items()}
    values = weights or {n: _initial(config, n, layer, dtype) for n, layer in base.items()}
    modules = dict(model.named_modules())
    if base_fingerprint(model) is not None:
        # Of the bare base, and kept: the names of its tensors change now.
        object.__setattr__(model, "fingerprint", base_fingerprint(model))
    model.requires_grad_(False)
    for layer_name, layer in targets.items():
        if not isinstance(layer, LoraLinear):
            parent, _, attribute = layer_name.rpartition(".")
            layer = LoraLinear(layer).train(modules[parent].training)
            setattr(modules[parent], attribute, layer)
        layer.add(name, *values[layer_name], config.scaling(layer_name), config.lora_dropout)
    _set_configs(model, {**adapter_configs(model), name: _written_out(model, config, targets)})
    set_adapter(model, name)
    return list(targets)


def _written_out(model: nn.Module, config: LoraConfig, targets: dict[str, nn.Module]) -> LoraConfig:
    """The config with "all-linear" replaced by the layers it meant: last parts of names where these say the same."""
    if not (isinstance(config.target_modules, str) and config.target_modules.lower() == "all-linear"):
        return replace(config)
    by_ends = replace(config, target_modules=sorted({n.rpartition(".")[2] for n in targets}))
    skip = tuple(f"{n}." for n in targets)
    same = {n for n, _ in model.named_modules() if n and not n.startswith(skip) and matches(by_ends, n)} == set(targets)
    return by_ends if same else replace(config, target_modules=sorted(targets))


def set_adapter(model: nn.Module, name: str) -> None:
    """Switch to the adapter of that name: it alone acts and trains."""
    _known(model, name)
    if is_merged(model):
        raise ValueError("an adapter is merged into the base; unmerge first")
    for layer in lora_layers(model).values():
        layer.activate(name if name in layer.lora_A else None)


def active_adapter(model: nn.Module) -> str | None:
    """Name of the adapter that acts, None without one."""
    return next((layer.active_adapter for layer in lora_layers(model).values() if layer.active_adapter), None)


def disable(model: nn.Module) -> None:
    """Let the base act alone until `enable`."""
    if is_merged(model):
        raise ValueError("an adapter is merged into the base; unmerge instead of disabling")
    for layer in lora_layers(model).values():
        layer.disabled = True


def enable(model: nn.Module) -> None:
    """Undo `disable`."""
    for layer in lora_layers(model).values():
        layer.disabled = False


@contextlib.contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """Within the block the base acts alone: the reference model of preference training costs no second copy."""
    before = {layer: layer.disabled for layer in lora_layers(model).values()}
    disable(model)
    try:
        yield
    finally:
        for layer, state in before.items():
            layer.disabled = state


def is_merged(model: nn.Module) -> bool:
    """Whether an adapter is merged at present."""
    return any(layer._merged is not None for layer in lora_layers(model).values())


def _known(model: nn.Module, name: str | None) -> str:
    name = active_adapter(model) if name is None else name
    if name is None or name not in adapters(model):
        raise ValueError(f"no adapter named {name!r}; the model has: {', '.join(adapters(model)) or 'none'}")
    return name


def merge(model: nn.Module, name: str | None = None) -> None:
    """Compute with W + scaling B A (the active adapter unless named) as one dense layer, exactly undone by `unmerge`.

    The base weights stay in memory beside the merged ones. A 4-bit base is dequantized: the merged layers take 16 bits
    a weight (its `dtype`) and equal the trained model up to one rounding. ValueError if a merged weight is not finite.
    """
    name = _known(model, name)
    if is_merged(model):
        raise ValueError("an adapter is merged already; unmerge first")
    layers = {n: layer for n, layer in lora_layers(model).items() if name in layer.lora_A}
    merged = {layer: _finite(n, layer.merged_weight(name)) for n, layer in layers.items()}
    for layer, weight in merged.items():
        layer._merged = layer.dense(weight)


def _finite(name: str, weight: Tensor) -> Tensor:
    if not torch.isfinite(weight).all():
        raise ValueError(f"merging {name} gives NaN or infinite weights; the adapter or the base is broken there")
    return weight


def unmerge(model: nn.Module) -> None:
    """Go back to the base and its adapters, bit for bit (a 4-bit base to its packed tensors)."""
    for layer in lora_layers(model).values():
        layer._merged = None


def delete_adapter(model: nn.Module, name: str) -> None:
    """Drop an adapter. With the last one the model gets its own layers back."""
    _known(model, name)
    if is_merged(model):
        raise ValueError("an adapter is merged into the base; unmerge first")
    _set_configs(model, {n: c for n, c in adapter_configs(model).items() if n != name})
    active = active_adapter(model)
    for layer_name, layer in lora_layers(model).items():
        if name in layer.lora_A:
            for table in (layer.lora_A, layer.lora_B, layer.scaling, layer.dropout):
                del table[name]
        layer.activate(active if active not in (None, name) and active in layer.lora_A else None)
        if not len(layer.lora_A):
            model.set_submodule(layer_name, layer.base_layer)


def merge_and_unload(model: nn.Module, name: str | None = None) -> nn.Module:
    """Replace adapted layers by dense ones with the adapter (the active one unless named) merged in; all adapters go.

    Layer by layer, so that memory holds one base weight more than the result. Not undone: reload the base for that.
    """
    name = _known(model, name)
    unmerge(model)
    layers = lora_layers(model)
    for layer_name, layer in layers.items():
        if name in layer.lora_A:
            _finite(layer_name, layer.merged_weight(name))
    while layers:
        layer_name, layer = layers.popitem()
        base = layer.base_layer
        model.set_submodule(layer_name, layer.dense(layer.merged_weight(name)) if name in layer.lora_A else base)
    _set_configs(model, {})
    return model


def base_fingerprint(model: nn.Module) -> str | None:
    """The base's fingerprint (posttrain/fingerprint.py); None for a model that is not one of posttrain.model's."""
    return fingerprint(model) if isinstance(getattr(model, "config", None), ModelConfig) else None


def adapter_parameters(model: nn.Module, name: str | None = None) -> dict[str, nn.Parameter]:
    """The adapter's parameters (the active adapter's unless named) under PEFT's keys."""
    name = _known(model, name)
    parameters = {}
    for layer_name, layer in lora_layers(model).items():
        if name in layer.lora_A:
            parameters[f"{PREFIX}{layer_name}.lora_A.weight"] = layer.lora_A[name]
            parameters[f"{PREFIX}{layer_name}.lora_B.weight"] = layer.lora_B[name]
    return parameters


def save_adapter(model: nn.Module, path: str | os.PathLike, name: str | None = None) -> None:
    """Write the adapter (the active one unless named) into the folder `path` in PEFT's format.

    Each file is written whole or not at all; the safetensors metadata holds the fingerprint of the base.
    """
    name = _known(model, name)
    config, base_model = adapter_configs(model)[name], getattr(model, "name_or_path", None)
    write_adapter(path, config, adapter_parameters(model, name), base_fingerprint(model), base_model)


def load_adapter(
    model: nn.Module,
    path: str | os.PathLike,
    name: str = "default",
    *,
    dtype: torch.dtype | None = None,
    any_base: bool = False,
) -> list[str]:
    """Attach the adapter in the folder `path`, saved here or by PEFT, as the active one. Returns its layers' names.

    Half-precision tensors are widened to fp32, as PEFT does, unless `dtype` is given. PosttrainError where a file is
    missing, broken or asks for what is not supported, where keys or shapes do not fit the model, or where the adapter
    was trained on another base (any_base=True loads it all the same). The model is unchanged then.
    """
    _check_new_name(model, name)
    config, tensors, trained_on = read_adapter(path)
    here = base_fingerprint(model)
    if not any_base and None not in (trained_on, here) and trained_on != here:
        raise PosttrainError(
            f"the adapter in {path} was trained on the base {trained_on}, and this model is {here}; "
            "load that base, or say that any base will do (any_base=True, --any-base)"
        )
    try:
        targets = target_layers(model, config)
    except ValueError as error:
        raise PosttrainError(f"the adapter in {path} does not fit this model: {error}") from error
    expected = {}
    for layer_name, layer in targets.items():
        base = layer.base_layer if isinstance(layer, LoraLinear) else layer
        r = config.rank(layer_name)
        expected[f"{PREFIX}{layer_name}.lora_A.weight"] = (r, base.in_features)
        expected[f"{PREFIX}{layer_name}.lora_B.weight"] = (base.out_features, r)
    _check_keys(path, expected, tensors)

    def ready(key: str, layer: nn.Module) -> Tensor:
        device = _device(layer.base_layer if isinstance(layer, LoraLinear) else layer)
        tensor = tensors[f"{PREFIX}{key}.weight"]
        return tensor.to(device, dtype or torch.promote_types(tensor.dtype, torch.float32))

    weights = {n: (ready(f"{n}.lora_A", m), ready(f"{n}.lora_B", m)) for n, m in targets.items()}
    return attach(model, config, name, weights=weights)


def _check_keys(path, expected: dict[str, tuple[int, int]], tensors: dict[str, Tensor]) -> None:
    problems = [f"{key} is missing" for key in expected.keys() - tensors.keys()]
    problems += [f"{key} is of no layer that the config selects" for key in tensors.keys() - expected.keys()]
    problems += [
        f"{key} is {tuple(tensors[key].shape)} and the layer takes {shape}"
        for key, shape in expected.items()
        if key in tensors and tuple(tensors[key].shape) != shape
    ]
    if problems:
        shown = "; ".join(sorted(problems)[:4])
        more = f"; and {len(problems) - 4} more" if len(problems) > 4 else ""
        raise PosttrainError(f"the adapter in {path} does not fit this model: {shown}{more}")
