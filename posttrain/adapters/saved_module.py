"""Modules that train whole beside an adapter (PEFT's `modules_to_save`): the head, the embeddings, a norm.

The module stays as it was; each adapter trains a copy of its own, saved whole as base_model.model.<name>.<parameter>.
Where the embeddings are tied to the head, the head keeps the original's weight, as in PEFT.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .base_copies import is_tied
from .lora_config import LoraConfig


class SavedModule(nn.Module):
    """A module and trained copies of it by adapter. Copies are kept in the adapter's dtype, and compute in the original's."""

    def __init__(self, original_module: nn.Module):
        super().__init__()
        self.original_module = original_module
        self.copies = nn.ModuleDict()
        self.active_adapter: str | None = None

    @property
    def weight(self) -> Tensor:
        """The original's, for what is tied to it."""
        return self.original_module.weight  # type: ignore[return-value]

    def add(self, name: str, parameters: dict[str, Tensor]) -> None:
        """Add an adapter's copy, with a value for each of the original's parameters."""
        self.copies[name] = nn.ParameterDict({_flat(key): nn.Parameter(tensor) for key, tensor in parameters.items()})

    def parameters_of(self, name: str) -> dict[str, nn.Parameter]:
        """The copy's parameters by the original's names; empty where the adapter has no copy."""
        if name not in self.copies:
            return {}
        return {key: self.copies[name][_flat(key)] for key, _ in self.original_module.named_parameters()}  # type: ignore[index]

    def values(self, name: str) -> dict[str, Tensor]:
        """The copy's parameters in the dtypes of the original's."""
        copies = self.parameters_of(name)
        return {key: copies[key].to(parameter.dtype) for key, parameter in self.original_module.named_parameters()}

    def unload(self, name: str) -> nn.Module:
        """The original with the adapter's values in it."""
        for key, value in self.values(name).items():
            owner, _, last = key.rpartition(".")
            setattr(self.original_module.get_submodule(owner), last, nn.Parameter(value.detach(), requires_grad=False))
        return self.original_module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.active_adapter is None:
            return self.original_module(*args, **kwargs)
        return torch.func.functional_call(self.original_module, self.values(self.active_adapter), args, kwargs)


def _flat(key: str) -> str:
    """A parameter's name as one that a ParameterDict can hold."""
    return key.replace(".", "/")


def saved_modules(model: nn.Module) -> dict[str, SavedModule]:
    """The modules that train whole, by the names they had before."""
    return {name: module for name, module in model.named_modules() if isinstance(module, SavedModule)}


def modules_to_save(model: nn.Module, config: LoraConfig) -> dict[str, nn.Module]:
    """{name: module, or the SavedModule in its place} that the config trains whole: those whose name ends in one of
    modules_to_save (PEFT's rule). ValueError where one of these names nothing, or something that cannot train whole."""
    chosen: dict[str, nn.Module] = {}
    wrapped = tuple(f"{name}." for name in saved_modules(model))
    for end in config.modules_to_save or ():
        found = {n: m for n, m in model.named_modules() if n.endswith(end) and not n.startswith(wrapped)}
        if not found:
            why = "; this model's head is tied to model.embed_tokens" if is_tied(model) and end.endswith("lm_head") else ""
            raise ValueError(f"modules_to_save={config.modules_to_save!r}: {end!r} matches no module{why}")
        chosen |= found
    for name, module in chosen.items():
        if isinstance(module, SavedModule):
            continue
        if any(hasattr(inner, "active_adapter") for inner in module.modules()):
            raise ValueError(f"{name} carries an adapter and cannot train whole beside it; delete_adapter that first")
        if next(module.buffers(), None) is not None or next(module.parameters(), None) is None:
            raise ValueError(f"{name} is a {type(module).__name__} without weights of its own that could train (is it in 4 bits?)")
        if inside := [other for other in chosen if other != name and other.startswith(f"{name}.")]:
            raise ValueError(f"modules_to_save={config.modules_to_save!r} names {name} and {inside[0]} inside it")
    return chosen


def parameter_shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """{name: shape} of the parameters of a module that may be wrapped."""
    original = module.original_module if isinstance(module, SavedModule) else module
    return {key: tuple(parameter.shape) for key, parameter in original.named_parameters()}
