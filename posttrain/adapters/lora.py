"""LoRA on a model's linear layers, dense or 4-bit (the functions that posttrain/adapters/interface.py asks of a method).

Hu et al. (arXiv:2106.09685); on a 4-bit base that is QLoRA (Dettmers et al., arXiv:2305.14314); rank-stabilised
scaling is Kalajdzievski's (arXiv:2312.03732); DoRA is in dora.py, the initialisations are in lora_init.py. Fields, names
and matching rules are PEFT's, so that its configurations mean the same here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from posttrain.errors import PosttrainError
from posttrain.quantized import QuantizedLinear

from .base_copies import is_tied
from .lora_config import LoraConfig, check_rank, matches
from .lora_embedding import LoraEmbedding
from .lora_embedding import initial as initial_embedding
from .lora_init import initial, quantize_less, taken
from .lora_linear import LoraLinear
from .peft_format import PREFIX
from .saved_module import SavedModule, modules_to_save, parameter_shapes, saved_modules

LINEAR = (nn.Linear, QuantizedLinear)
WRAPPERS = (LoraLinear, LoraEmbedding)
# The wrappers' tables by the end of their keys in the file. A layer with a trained bias and no update has the key "bias".
KEYS = {
    "lora_A": "lora_A.weight",
    "lora_B": "lora_B.weight",
    "lora_magnitude_vector": "lora_magnitude_vector",
    "lora_bias": "lora_B.bias",
    "base_bias": "base_layer.bias",
    "loftq_A": "loftq_A.weight",
    "loftq_B": "loftq_B.weight",
    "lora_embedding_A": "lora_embedding_A",
    "lora_embedding_B": "lora_embedding_B",
}


def lora_layers(model: nn.Module) -> dict[str, LoraLinear]:
    """The linear layers that carry adapters, by the names they had before."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLinear)}


def _adapted(model: nn.Module) -> dict[str, Any]:
    """The linear layers and embeddings that carry adapters, by the names they had before."""
    return {name: module for name, module in model.named_modules() if isinstance(module, WRAPPERS)}


def _everything(model: nn.Module) -> dict[str, nn.Module]:
    """The model's modules by name, as they would be without adapters: nothing inside those that carry one."""
    inside = tuple(f"{name}." for name in (*_adapted(model), *saved_modules(model)))
    return {n: m for n, m in model.named_modules() if n and not n.startswith(inside)}


def target_layers(model: nn.Module, config: LoraConfig) -> dict[str, Any]:
    """{name: linear layer, embedding, or their wrapper} that the config selects. ValueError where it selects none, or
    something else."""
    everything = _everything(model)
    whole = modules_to_save(model, config)
    chosen = {n: m for n, m in everything.items() if matches(config, n)}
    linear = {n: m for n, m in everything.items() if type(m) in (*LINEAR, LoraLinear)}
    if isinstance(config.target_modules, str) and config.target_modules.lower() == "all-linear":
        saved = (*whole, *(f"{name}." for name in whole))
        chosen = {n: m for n, m in chosen.items() if n in linear and n not in whole and not n.startswith(saved)}
    if not chosen and config.layers_to_transform not in (None, []):
        every = replace(config, layers_to_transform=None, layers_pattern=None)
        if any(matches(every, n) for n in everything):
            pattern = f" with layers_pattern={config.layers_pattern!r}" if config.layers_pattern else ""
            raise ValueError(
                f"layers_to_transform={config.layers_to_transform!r}{pattern} is none of the layers that have "
                f"target_modules={config.target_modules!r}; their numbers count from 0"
            )
    if not chosen:
        known = sorted({n.rpartition(".")[2] for n in linear})
        raise ValueError(
            f"target_modules={config.target_modules!r} (exclude_modules={config.exclude_modules!r}) matches no layer; "
            f"the model's linear layers end in: {', '.join(known) or 'there are none'}"
            + (" (its head is tied to model.embed_tokens)" if is_tied(model) else "")
        )
    if both := [n for n in chosen if any(n == name or n.startswith(f"{name}.") for name in whole)]:
        raise ValueError(f"{both[0]} is a target module and one of modules_to_save={config.modules_to_save!r}; leave out one")
    embeddings = {n: m for n, m in chosen.items() if isinstance(m, nn.Embedding | LoraEmbedding)}
    if wrong := [n for n in chosen if n not in linear and n not in embeddings]:
        kind = type(chosen[wrong[0]]).__name__
        raise ValueError(f"target module {wrong[0]} is a {kind}; LoRA here goes on linear layers and embeddings alone")
    beyond = config.use_dora or config.lora_bias or config.init_lora_weights not in (True, False, "gaussian")
    for name, module in embeddings.items():
        if beyond or _base(module).max_norm is not None:
            raise ValueError(
                f"{name} is an embedding: it takes init_lora_weights True or False, no use_dora, no lora_bias and no max_norm"
            )
    return chosen


def _base(layer: Any) -> Any:
    return layer.base_layer if isinstance(layer, WRAPPERS) else layer


def _bases(model: nn.Module, config: LoraConfig) -> dict[str, Any]:
    """{name: linear layer} that the config selects, without the adapters that it may already carry."""
    return {n: _base(m) for n, m in target_layers(model, config).items()}


def _biased(model: nn.Module, config: LoraConfig) -> dict[str, Any]:
    """{name: linear layer} without an update whose bias the config trains. (In a module that trains whole, the copy's does.)"""
    if config.bias != "all":
        return {}
    skip, whole = target_layers(model, config), tuple(f"{n}." for n in modules_to_save(model, config))
    found = {n: _base(m) for n, m in _everything(model).items() if n not in skip and not f"{n}.".startswith(whole)}
    found = {n: m for n, m in found.items() if isinstance(getattr(m, "bias", None), Tensor)}
    if wrong := [n for n, m in found.items() if type(m) not in LINEAR]:
        raise ValueError(
            f"bias='all' and {wrong[0]}, a {type(found[wrong[0]]).__name__}, has one; only those of linear layers train"
        )
    return found


def resolve(model: nn.Module, config: LoraConfig) -> LoraConfig:
    """The config with "all-linear" replaced by the layers it means: last parts of names where these say the same."""
    targets = target_layers(model, config)
    _biased(model, config)
    if not (isinstance(config.target_modules, str) and config.target_modules.lower() == "all-linear"):
        return replace(config)
    by_ends = replace(config, target_modules=sorted({n.rpartition(".")[2] for n in targets}))
    same = {n for n in _everything(model) if matches(by_ends, n)} == set(targets)
    return by_ends if same else replace(config, target_modules=sorted(targets))


def shapes(model: nn.Module, config: LoraConfig) -> dict[str, tuple[int, ...]]:
    """{key: shape} of the adapter's tensors."""
    expected: dict[str, tuple[int, ...]] = {}
    for name, base in _bases(model, config).items():
        r = config.rank(name)
        if isinstance(base, nn.Embedding):
            expected[f"{PREFIX}{name}.lora_embedding_A"] = (r, base.num_embeddings)
            expected[f"{PREFIX}{name}.lora_embedding_B"] = (base.embedding_dim, r)
            continue
        N, K = base.out_features, base.in_features
        if config.takes_weight:
            check_rank(config, name, N, K)
        tables: dict[str, tuple[int, ...]] = {"lora_A": (r, K), "lora_B": (N, r)}
        if config.own_base:
            tables |= {"loftq_A": (r, K), "loftq_B": (N, r)}
        if config.use_dora:
            tables["lora_magnitude_vector"] = (N,)
        if config.lora_bias:
            tables["lora_bias"] = (N,)
        if config.bias != "none" and base.bias is not None:
            tables["base_bias"] = (N,)
        expected |= {f"{PREFIX}{name}.{KEYS[table]}": shape for table, shape in tables.items()}
    expected |= {f"{PREFIX}{name}.bias": (base.out_features,) for name, base in _biased(model, config).items()}
    for name, module in modules_to_save(model, config).items():
        expected |= {f"{PREFIX}{name}.{key}": shape for key, shape in parameter_shapes(module).items()}
    return expected


def _from_file(config: LoraConfig, name: str, base: Any, tensors: dict[str, Tensor]) -> tuple[Any, dict[str, Tensor]]:
    """(base, tensors by table) of a layer's part of a file."""
    device = next(iter(base.state_dict().values())).device
    keys = {table: f"{PREFIX}{name}.{end}" for table, end in KEYS.items()}
    values = {table: tensors[key].to(device) for table, key in keys.items() if key in tensors}
    if config.takes_weight:
        if not isinstance(base.weight, Tensor):
            raise PosttrainError(
                f"{name} is in 4 bits, and the adapter was trained beside what {config.init_lora_weights} left of the dense "
                "weight; load it on the dense model, from which save_adapter writes a plain one"
            )
        A0, B0 = (tensor.to(values["lora_A"].dtype).contiguous() for tensor in taken(config, name, base))
        values |= {"lora_A0": A0, "lora_B0": -B0}
    if config.own_base:
        if not isinstance(base.weight, Tensor):
            raise PosttrainError(
                f"{name} is in 4 bits, and the adapter was trained on what LoftQ made of the dense weight in "
                f"{config.loftq['loftq_iter']} steps; load it on the dense model, which is then quantized the same way"
            )
        A, B = values["loftq_A"], values["loftq_B"]
        base = QuantizedLinear(quantize_less(base.weight.detach(), A, B, config.scaling(name), config.loftq), base.bias)
    return base, values


def insert(
    model: nn.Module, config: LoraConfig, name: str, dtype: torch.dtype | None, tensors: dict[str, Tensor] | None
) -> list[str]:
    """Put the adapter on the layers that `config` selects; returns their names. Everything is made before the model is
    touched."""

    def value(key: str, parameter: Tensor) -> Tensor:
        """The file's, or a copy of the base's in the adapter's dtype."""
        if tensors is not None:
            return tensors[f"{PREFIX}{key}"].to(parameter.device)
        return parameter.detach().to(dtype or torch.promote_types(parameter.dtype, torch.float32), copy=True)

    bases = _bases(model, config)
    if config.init_lora_weights == "loftq" and (present := _adapted(model)):
        raise ValueError(f"LoftQ quantizes the base, and {next(iter(present))} carries an adapter; delete_adapter first")
    planned: dict[str, tuple[Any, dict[str, Tensor]]] = {}
    for layer, base in bases.items():
        if tensors is not None:
            made = _from_file(config, layer, base, tensors)
        elif isinstance(base, nn.Embedding):
            made = base, initial_embedding(config, layer, base, dtype)
        else:
            made = initial(config, layer, base, dtype)
        if tensors is None and config.bias != "none" and getattr(base, "bias", None) is not None:
            made[1]["base_bias"] = value(f"{layer}.base_layer.bias", base.bias)
        planned[layer] = made
    for layer, base in _biased(model, config).items():
        planned[layer] = base, {"base_bias": value(f"{layer}.bias", base.bias)}
    copies = {}
    for layer, module in modules_to_save(model, config).items():
        original = module.original_module if isinstance(module, SavedModule) else module
        copies[layer] = original, {key: value(f"{layer}.{key}", p) for key, p in original.named_parameters()}

    for layer, (base, values) in planned.items():
        wrapper = _wrapper(model, layer, LoraEmbedding if isinstance(base, nn.Embedding) else LoraLinear, base)
        wrapper.add(name, values, config.scaling(layer) if layer in bases else 1.0, config.lora_dropout)
    for layer, (original, parameters) in copies.items():
        _wrapper(model, layer, SavedModule, original).add(name, parameters)
    return [*planned, *copies]


def _wrapper(model: nn.Module, name: str, kind: type, base: nn.Module) -> Any:
    """The wrapper of that kind in place of the module of that name; a new one around `base` where there is none."""
    module = model.get_submodule(name)
    if not isinstance(module, kind):
        module = kind(base).train(model.get_submodule(name.rpartition(".")[0]).training)
        model.set_submodule(name, module)
    return module


def _tensors(model: nn.Module, name: str) -> Iterator[tuple[str, str, Any]]:
    """(the layer's prefix in the file, the table, the layer) of each tensor that goes by itself into the file."""
    for layer_name, layer in _adapted(model).items():
        for table in layer.tensors(name):
            if table in KEYS:
                end = "bias" if layer.tensors(name).keys() == {"base_bias"} else KEYS[table]
                yield f"{PREFIX}{layer_name}.{end}", table, layer


def parameters(model: nn.Module, name: str) -> dict[str, nn.Parameter]:
    """The adapter's parameters under PEFT's keys."""
    found = {key: layer.tensors(name)[t] for key, t, layer in _tensors(model, name) if t not in LoraLinear.FROZEN}
    for layer_name, module in saved_modules(model).items():
        found |= {f"{PREFIX}{layer_name}.{key}": p for key, p in module.parameters_of(name).items()}
    return found


def saved(model: nn.Module, name: str) -> dict[str, Tensor]:
    """What goes to the file: an update that started with a part of the weight as one on the whole weight, of twice the
    rank."""
    found: dict[str, Tensor] = dict(parameters(model, name))
    for key, table, layer in _tensors(model, name):
        if table in LoraLinear.FROZEN:
            found[key] = layer.tensors(name)[table]
        elif table in ("lora_A", "lora_B") and layer.has("lora_A0", name):
            found[key] = layer.factors(name)[table == "lora_B"].detach()
    return found


def activate(model: nn.Module, name: str | None) -> None:
    """Let that adapter act where it is, and the base alone elsewhere."""
    for layer in _adapted(model).values():
        layer.active_adapter = name if name in layer.scaling else None
    for module in saved_modules(model).values():
        module.active_adapter = name if name is not None and name in module.copies else None


def remove(model: nn.Module, name: str) -> None:
    """Drop the adapter; layers without any become what they were (4-bit ones where LoftQ quantized them)."""
    for layer_name, layer in _adapted(model).items():
        if name in layer.scaling:
            layer.drop(name)
        if not layer.scaling:
            model.set_submodule(layer_name, layer.base_layer)
    for layer_name, module in saved_modules(model).items():
        if name in module.copies:
            del module.copies[name]
        if not module.copies:
            model.set_submodule(layer_name, module.original_module)


def _merged(layer_name: str, layer: Any, name: str) -> nn.Module:
    try:
        return layer.merge_dense(name)
    except ValueError as error:
        raise ValueError(f"{layer_name}: {error}") from error


def merge(model: nn.Module, name: str) -> None:
    """Compute with the adapted weights as dense layers, the bases beside them. Copies of whole modules act as before."""
    layers = {n: layer for n, layer in _adapted(model).items() if name in layer.scaling}
    merged = {layer: _merged(n, layer, name) for n, layer in layers.items()}
    activate(model, name)
    for layer, dense in merged.items():
        layer.merged = dense


def unmerge(model: nn.Module) -> None:
    """Drop the merged layers."""
    for layer in _adapted(model).values():
        layer.merged = None


def unload(model: nn.Module, name: str) -> None:
    """Replace adapted layers by dense ones with the adapter merged in, one after another."""
    layers, tied = _adapted(model), is_tied(model)
    changed = [n for n, layer in layers.items() if isinstance(layer, LoraEmbedding) and name in layer.scaling]
    changed += [n for n, m in saved_modules(model).items() if isinstance(m.original_module, nn.Embedding) and name in m.copies]
    if tied and changed:
        raise ValueError(
            f"{changed[0]} is tied to the head, which the adapter left as it was: one weight cannot be both; keep it attached"
        )
    for layer_name, layer in layers.items():
        if name in layer.scaling:
            _merged(layer_name, layer, name)
    while layers:
        layer_name, layer = layers.popitem()
        model.set_submodule(layer_name, _merged(layer_name, layer, name) if name in layer.scaling else layer.base_layer)
    for layer_name, module in saved_modules(model).items():
        model.set_submodule(layer_name, module.unload(name) if name in module.copies else module.original_module)
