"""What every adapter method shares: attach, switch, disable, train, save, load, merge, take off.

    names = attach(model, LoraConfig(r=8, lora_alpha=16))     # the base freezes; returns where the adapter acts
    ...train...
    save_adapter(model, "adapter")                            # PEFT's files (posttrain/adapters/peft_format.py)

The configuration's type is the method. A model carries adapters of one method at a time, any number of them, of which at
most one acts. Each method is a module with the same functions, found in METHODS:

    resolve(model, config) -> config          as saved (what "all-linear" meant); ValueError where it does not fit
    shapes(model, config) -> {key: shape}     of the tensors in the adapter's file
    insert(model, config, name, dtype, tensors) -> places     tensors by the file's keys, or None: initial values
    parameters(model, name) -> {key: Parameter}               what trains
    activate(model, name | None)              that adapter acts, no other; None: the base alone
    remove(model, name)                       the last one gives the model its own layers back, still frozen
and where they make sense
    saved(model, name) -> {key: Tensor}       what goes to the file where that is not what trains
    optional_shapes(model, config)            of tensors that a file may hold besides, all of them or none
    merge(model, name), unmerge(model), unload(model, name)

Every function below that changes a model checks everything first: when it raises, the model is as it was.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from posttrain.errors import PosttrainError
from posttrain.fingerprint import dense_fingerprint, fingerprint
from posttrain.model.config import ModelConfig
from posttrain.quantized import QuantizedLinear

from . import bottleneck, ia3, lora, p_tuning, prefix, prompt
from .base_copies import without_base_copies
from .bottleneck import BottleneckConfig
from .ia3 import IA3Config
from .lora_config import LoraConfig
from .p_tuning import PromptEncoderConfig
from .peft_format import check_keys, check_types, read_adapter, write_adapter
from .prefix import PrefixTuningConfig
from .prompt import PromptTuningConfig

METHODS: dict[type[Any], ModuleType] = {
    LoraConfig: lora,
    BottleneckConfig: bottleneck,
    IA3Config: ia3,
    PromptTuningConfig: prompt,
    PrefixTuningConfig: prefix,
    PromptEncoderConfig: p_tuning,
}
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass
class _State:
    """A model's adapters: their configurations by name in the order of attaching, and which acts."""

    configs: dict[str, Any] = field(default_factory=dict)
    active: str | None = None
    disabled: bool = False
    merged: str | None = None


def _state(model: nn.Module) -> _State:
    return model.__dict__.get("_adapters") or model.__dict__.setdefault("_adapters", _State())


def _method(config: Any) -> ModuleType:
    try:
        return METHODS[type(config)]
    except KeyError:
        known = ", ".join(kind.__name__ for kind in METHODS)
        raise TypeError(f"{type(config).__name__} configures no adapter; expected one of {known}") from None


def _method_of(model: nn.Module) -> ModuleType | None:
    """The method of the model's adapters, None without any."""
    return next((_method(config) for config in adapter_configs(model).values()), None)


def adapter_configs(model: nn.Module) -> dict[str, Any]:
    """What each adapter of the model was attached with, by name in the order of attaching."""
    return _state(model).configs


def adapter_names(model: nn.Module) -> list[str]:
    """Names of the model's adapters, in the order in which they were attached."""
    return list(adapter_configs(model))


def active_adapter(model: nn.Module) -> str | None:
    """Name of the adapter that acts (once enabled, where it is disabled), None without one."""
    return _state(model).active


def is_merged(model: nn.Module) -> bool:
    """Whether an adapter is merged at present."""
    return _state(model).merged is not None


def _not_merged(model: nn.Module) -> None:
    if is_merged(model):
        raise ValueError(f"the adapter {_state(model).merged!r} is merged into the base; unmerge first")


def _check_new(model: nn.Module, config: Any, name: str, dtype: torch.dtype | None = None) -> None:
    method, present = _method(config), _method_of(model)
    if dtype not in (None, *DTYPES):
        raise ValueError(f"dtype is {dtype!r}; expected None or one of {', '.join(map(str, DTYPES))}, in which adapters train")
    if "served_adapters" in model.__dict__:
        served = ", ".join(model.__dict__["served_adapters"].ids)
        raise ValueError(f"the model serves adapters ({served}), and none can be attached beside; serving.remove those first")
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9_-]+", name) or hasattr(nn.ParameterDict(), name):
        raise ValueError(
            f"{name!r} cannot name an adapter; use letters, digits, '_' and '-', and no name of a module's own, such as 'train'"
        )
    if name in adapter_names(model):
        raise ValueError(f"the model already has an adapter named {name!r}; give another name, or delete_adapter first")
    if present not in (None, method):
        kind = type(next(iter(adapter_configs(model).values()))).__name__
        raise ValueError(
            f"the model's adapters are of {kind}, and this one is of {type(config).__name__}; delete_adapter those first"
        )
    if alone := [other for other, config in adapter_configs(model).items() if getattr(config, "own_base", False)]:
        raise ValueError(
            f"adapter {alone[0]!r} brought the base that LoftQ quantized with it in several steps, and the file of another adapter "
            "could not name that base: train one alone, or on quantize_model's base with loftq_iter=1"
        )
    _not_merged(model)


def attach(model: nn.Module, config: Any, name: str = "default", *, dtype: torch.dtype | None = None) -> list[str]:
    """Put an adapter on the model and make it the active one; the base freezes. Returns the names of where it acts.

    Adapters are fp32 on a half-precision or 4-bit base (the base's dtype if that is wider), unless `dtype` is given.
    Initial values come from torch's generator. Raises TypeError for what is no adapter's configuration and ValueError
    where it does not fit the model, or for a dtype in which nothing trains.
    """
    _check_new(model, config, name, dtype)
    config = _method(config).resolve(model, config)
    check_targets(model, config)
    return _attach(model, config, name, dtype, None)


def check_targets(model: nn.Module, config: Any) -> None:
    """ValueError naming what is listed in target_modules and ends the name of no layer. (A file's list may hold such names, as
    PEFT's do: there the tensors say where the adapter is.)"""
    targets = getattr(config, "target_modules", None)
    if not isinstance(targets, list):
        return
    layers = [f".{name}" for name, _ in model.named_modules()]
    lost = [target for target in targets if not any(layer.endswith(f".{target}") for layer in layers)]
    if lost:
        raise ValueError(f"target_modules={targets!r}: {', '.join(map(repr, lost))} matches no layer; leave it out or correct it")


def _attach(model: nn.Module, config: Any, name: str, dtype: torch.dtype | None, tensors: dict[str, Tensor] | None) -> list[str]:
    method, state = _method(config), _state(model)
    base = base_fingerprint(model)
    places = method.insert(model, config, name, dtype, tensors)
    if base is not None:
        # Of the bare base, and kept: the names of its tensors have changed now.
        object.__setattr__(model, "fingerprint", base)
    model.requires_grad_(False)
    state.configs[name] = config
    state.disabled = False
    set_adapter(model, name)
    return places


def _use(model: nn.Module, name: str | None) -> None:
    """Let one adapter act and train; the others rest."""
    state, method = _state(model), _method_of(model)
    state.active = name
    if method is None:
        return
    method.activate(model, None if state.disabled else name)
    for other in state.configs:
        for parameter in method.parameters(model, other).values():
            parameter.requires_grad_(other == name)


def set_adapter(model: nn.Module, name: str) -> None:
    """Switch to the adapter of that name: it alone acts and trains."""
    _known(model, name)
    _not_merged(model)
    _use(model, name)


def _set_disabled(model: nn.Module, disabled: bool) -> None:
    state, method = _state(model), _method_of(model)
    if disabled:
        _not_merged(model)
    state.disabled = disabled
    if method is not None:
        method.activate(model, None if disabled else state.merged or state.active)


def disable(model: nn.Module) -> None:
    """Let the base act alone until `enable`."""
    _set_disabled(model, True)


def enable(model: nn.Module) -> None:
    """Undo `disable`."""
    _set_disabled(model, False)


@contextlib.contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """Within the block the base acts alone: the reference model of preference training costs no second copy."""
    before = _state(model).disabled
    disable(model)
    try:
        yield
    finally:
        _set_disabled(model, before)


def _known(model: nn.Module, name: str | None) -> str:
    name = active_adapter(model) if name is None else name
    if name is None or name not in adapter_names(model):
        raise ValueError(f"no adapter named {name!r}; the model has: {', '.join(adapter_names(model)) or 'none'}")
    return name


def _mergeable(model: nn.Module, name: str) -> ModuleType:
    method = _method(adapter_configs(model)[name])
    if not hasattr(method, "merge"):
        kind = type(adapter_configs(model)[name]).__name__
        raise ValueError(f"an adapter of {kind} is no change of weights and cannot be merged; keep it attached")
    return method


def merge(model: nn.Module, name: str | None = None) -> None:
    """Compute with the adapter (the active one unless named) in dense weights, exactly undone by `unmerge`.

    The base weights stay in memory beside the merged ones. A 4-bit base is dequantized: the merged layers take 16 bits
    a weight (its `dtype`) and equal the trained model up to one rounding. ValueError if a merged weight is not finite.
    """
    name = _known(model, name)
    if is_merged(model):
        raise ValueError("an adapter is merged already; unmerge first")
    _mergeable(model, name).merge(model, name)
    _state(model).merged = name


def unmerge(model: nn.Module) -> None:
    """Go back to the base and its adapters, bit for bit (a 4-bit base to its packed tensors)."""
    state = _state(model)
    if state.merged is not None:
        method = _mergeable(model, state.merged)
        method.unmerge(model)
        method.activate(model, None if state.disabled else state.active)
        state.merged = None


def merge_and_unload(model: nn.Module, name: str | None = None) -> nn.Module:
    """Replace adapted layers by dense ones with the adapter (the active one unless named) merged in; all adapters go.

    Layer by layer, so that memory holds one base weight more than the result. Not undone: reload the base for that. The
    model is another base from then on, with a fingerprint of its own.
    """
    name = _known(model, name)
    _mergeable(model, name).unload(model, name)  # which checks first; merged layers go with those that carry them
    model.__dict__.pop("_adapters")
    _new_fingerprint(model)
    return model


def _new_fingerprint(model: nn.Module) -> None:
    """The weights are others now, and what was loaded has no say. Where some are in 4 bits the fingerprint is taken here, since
    `save` writes it beside them; else whenever it is asked for, as of any model made in memory."""
    if base_fingerprint(model) is not None:
        packed = any(isinstance(module, QuantizedLinear) for module in model.modules())
        object.__setattr__(model, "fingerprint", dense_fingerprint(model) if packed else None)


def delete_adapter(model: nn.Module, name: str) -> None:
    """Drop an adapter. With the last one the model gets its own layers back."""
    _known(model, name)
    _not_merged(model)
    state = _state(model)
    config = state.configs.pop(name)
    _method(config).remove(model, name)
    _use(model, None if state.active == name else state.active)
    if getattr(config, "own_base", False):  # it stays
        _new_fingerprint(model)


def base_fingerprint(model: nn.Module) -> str | None:
    """The base's fingerprint (posttrain/fingerprint.py); None for a model that is not one of posttrain.model's."""
    return fingerprint(model) if isinstance(getattr(model, "config", None), ModelConfig) else None


def adapter_parameters(model: nn.Module, name: str | None = None) -> dict[str, nn.Parameter]:
    """What trains of an adapter (the active one unless named), under the file's keys: PEFT's where PEFT has them."""
    name = _known(model, name)
    return _method(adapter_configs(model)[name]).parameters(model, name)


def saved_tensors(model: nn.Module, name: str | None = None) -> dict[str, Tensor]:
    """What `save_adapter` writes of an adapter (the active one unless named)."""
    name = _known(model, name)
    method = _method(adapter_configs(model)[name])
    return getattr(method, "saved", method.parameters)(model, name)


def save_adapter(model: nn.Module, path: str | os.PathLike, name: str | None = None) -> None:
    """Write the adapter (the active one unless named) into the folder `path` in PEFT's format.

    Each file is written whole or not at all; the safetensors metadata holds the fingerprint of the base.
    """
    name = _known(model, name)
    content = adapter_configs(model)[name].to_peft(model)
    content["base_model_name_or_path"] = getattr(model, "name_or_path", None)
    write_adapter(path, content, saved_tensors(model, name), base_fingerprint(model))


def load_adapter(
    model: nn.Module,
    path: str | os.PathLike,
    name: str = "default",
    *,
    dtype: torch.dtype | None = None,
    any_base: bool = False,
) -> list[str]:
    """Attach the adapter in the folder `path`, saved here or by PEFT, as the active one. Returns where it acts.

    Half-precision tensors are widened to fp32, as PEFT does, unless `dtype` is given. PosttrainError where a file is
    missing, broken or asks for what is not supported, where keys or shapes do not fit the model, or where the adapter
    was trained on another base (any_base=True loads it all the same). ValueError for a name or a dtype that none can have. The
    model is unchanged then.
    """
    content, tensors, trained_on = read_adapter(path)
    config = config_from_peft(content, path)
    _check_new(model, config, name, dtype)
    config, tensors = fitting(model, path, config, tensors, trained_on, any_base)
    wide = {key: tensor.to(dtype or torch.promote_types(tensor.dtype, torch.float32)) for key, tensor in tensors.items()}
    return _attach(model, config, name, dtype, wide)


def fitting(
    model: nn.Module, path: str | os.PathLike, config: Any, tensors: dict[str, Tensor], trained_on: str | None, any_base: bool
) -> tuple[Any, dict[str, Tensor]]:
    """(configuration, own tensors) of an adapter read from `path`, resolved on this model. PosttrainError where its keys or shapes
    do not fit the model, or where it was trained on another base, unless any base will do."""
    here = base_fingerprint(model)
    if not any_base and None not in (trained_on, here) and trained_on != here:
        raise PosttrainError(
            f"the adapter in {path} was trained on the base {trained_on}, and this model is {here}; "
            "load that base, or say that any base will do (any_base=True, --any-base)"
        )
    try:
        config = _method(config).resolve(model, config)
        expected = _shapes_in(tensors, model, config)
    except ValueError as error:
        raise PosttrainError(f"the adapter in {path} does not fit this model: {error}") from error
    tensors = without_base_copies(model, tensors, expected)
    check_keys(path, expected, tensors)
    return config, tensors


def config_from_peft(content: dict, source: str | os.PathLike) -> Any:
    """The configuration that an adapter_config.json describes. PosttrainError where it asks for what is not supported."""
    given = content.get("peft_type")
    kind = next((kind for kind in METHODS if given == kind.PEFT_TYPE), None)
    if kind is None:
        raise PosttrainError(f"{source}: peft_type is {given!r}; supported are {', '.join(kind.PEFT_TYPE for kind in METHODS)}")
    check_types(kind, content, source)
    return kind.from_peft(content, source)


def _shapes_in(tensors: dict[str, Tensor], model: nn.Module, config: Any) -> dict[str, tuple[int, ...]]:
    """What a file with these tensors should hold, key by key."""
    method = _method(config)
    expected: dict[str, tuple[int, ...]] = method.shapes(model, config)
    optional = method.optional_shapes(model, config) if hasattr(method, "optional_shapes") else {}
    return expected | optional if optional.keys() & tensors.keys() else expected
