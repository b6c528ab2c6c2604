"""(IA)^3 on a model's linear layers (the functions that posttrain/adapters/interface.py asks of a method).

Liu et al., "Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context Learning" (arXiv:2205.05638),
section 3.3: learned vectors rescale keys, values and the MLP's inner activations,

    y = l * (x W^T + bias)      on most layers, l (out_features,)
    y = (l * x) W^T + bias      on feedforward ones, l (in_features,)

starting at one. Fields, names and matching rules are PEFT's, and so are the files: `<layer>.ia3_l`, (out, 1) or (1, in).
A vector is a change of the weight's rows or columns, so it merges: W' = diag(l) W (and l * bias), or W diag(l).
"""

from __future__ import annotations

import os
import re
from dataclasses import asdict, dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from posttrain.quantized import QuantizedLinear

from .base_copies import is_tied
from .lora_config import LoraConfig, check_patterns, matches
from .peft_format import PREFIX, plain_fields, read_config

REFUSED = ("fan_in_fan_out",)


@dataclass(frozen=True)
class IA3Config:
    """PEFT's field names and meanings; the defaults are the paper's places: keys, values and the MLP's inner activations.

    target_modules, exclude_modules: as in LoraConfig. feedforward_modules: which of the targets are rescaled at their
    input, by a regular expression for the whole name or a list of name endings; None means the down_proj among them.
    init_ia3_weights=False starts at normal values: the output changes at once, for tests.
    """

    PEFT_TYPE: ClassVar[str] = "IA3"

    target_modules: str | list[str] = field(default_factory=lambda: ["k_proj", "v_proj", "down_proj"])
    feedforward_modules: str | list[str] | None = None
    exclude_modules: str | list[str] | None = None
    init_ia3_weights: bool = True
    modules_to_save: list[str] | None = None

    def __post_init__(self):
        plain_fields(self)
        if self.modules_to_save:
            raise ValueError(f"modules_to_save is {self.modules_to_save}; whole modules cannot be trained beside (IA)^3")
        if not self.target_modules:
            raise ValueError("target_modules is empty; expected 'all-linear', a regular expression or a list of names")
        targets, feedforward = self.target_modules, self.feedforward_modules
        check_patterns(target_modules=targets, feedforward_modules=feedforward, exclude_modules=self.exclude_modules)
        if isinstance(targets, list) and isinstance(feedforward, list):
            # targets may be whole names, as PEFT and `resolve` write "all-linear" down, and these their ends
            if extra := [part for part in feedforward if not any(target.endswith(part) for target in targets)]:
                raise ValueError(f"feedforward_modules {', '.join(extra)} are not among target_modules {targets}")

    def to_peft(self, model: nn.Module) -> dict[str, Any]:
        """adapter_config.json's content."""
        return {**asdict(self), "peft_type": "IA3", "task_type": "CAUSAL_LM", "fan_in_fan_out": False, "inference_mode": True}

    @classmethod
    def from_peft(cls, content: dict[str, Any], source: str | os.PathLike) -> IA3Config:
        """What an adapter_config.json describes. PosttrainError where it asks for what is not supported."""
        return read_config(cls, content, source, REFUSED)

    def is_feedforward(self, name: str) -> bool:
        """Whether the layer of that name is rescaled at its input."""
        which = ["down_proj"] if self.feedforward_modules is None else self.feedforward_modules
        return re.fullmatch(which, name) is not None if isinstance(which, str) else name.endswith(tuple(which))


class IA3Linear(nn.Module):
    """A frozen linear layer and its vectors by name, of which at most one acts.

    base_layer is never written to: merging makes a second, dense layer, and unmerging drops it.
    """

    def __init__(self, base_layer: nn.Linear | QuantizedLinear):
        super().__init__()
        self.base_layer = base_layer
        self.in_features, self.out_features = base_layer.in_features, base_layer.out_features
        self.ia3_l = nn.ParameterDict()  # (out_features, 1), or (1, in_features) where it acts on the input
        self.active_adapter: str | None = None
        self.merged: nn.Linear | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.merged is not None:
            return self.merged(x)
        if self.active_adapter is None:
            return self.base_layer(x)
        scale = self.ia3_l[self.active_adapter]
        if scale.shape[1] != 1:
            return self.base_layer(_scaled(x, scale))
        return _scaled(self.base_layer(x), scale)

    def merged_layer(self, name: str) -> nn.Linear:
        """A frozen dense layer with the vector in its weight, each product taken in fp32 and rounded once to the base's
        dtype (a 4-bit base is dequantized first)."""
        weight, bias, scale = self.base_layer.weight, self.base_layer.bias, self.ia3_l[name].detach()
        weight = weight.detach() if isinstance(weight, Tensor) else weight.dequantize()
        layer = nn.Linear(self.in_features, self.out_features, bias=bias is not None, device="meta", dtype=weight.dtype)
        layer.weight = nn.Parameter((weight * scale).to(weight.dtype), requires_grad=False)
        if bias is not None:
            values = bias.detach()
            layer.bias = nn.Parameter(_scaled(values, scale) if scale.shape[1] == 1 else values, requires_grad=False)
        return layer


def _scaled(x: Tensor, scale: Tensor) -> Tensor:
    """x (..., n) times n values, in the wider of the two dtypes and rounded once to x's: an fp32 vector that has moved
    from one by less than bf16 tells acts all the same."""
    return (x * scale.flatten()).to(x.dtype)


def ia3_layers(model: nn.Module) -> dict[str, IA3Linear]:
    """The layers that carry vectors, by the names they had before."""
    return {name: module for name, module in model.named_modules() if isinstance(module, IA3Linear)}


def _everywhere(config: IA3Config) -> bool:
    return isinstance(config.target_modules, str) and config.target_modules.lower() == "all-linear"


def _bases(model: nn.Module, config: IA3Config) -> dict[str, Any]:
    """{name: linear layer} that the config selects. ValueError where it selects none, or something not linear."""
    carried = ia3_layers(model)
    inside = tuple(f"{name}." for name in carried)
    bare = {n: m.base_layer if n in carried else m for n, m in model.named_modules() if n and not n.startswith(inside)}
    linear = {n: m for n, m in bare.items() if type(m) in (nn.Linear, QuantizedLinear)}
    selection = LoraConfig(target_modules=config.target_modules, exclude_modules=config.exclude_modules)
    everywhere = _everywhere(config)
    chosen = {n: m for n, m in bare.items() if matches(selection, n) and (n in linear or not everywhere)}
    if not chosen:
        known = ", ".join(sorted({n.rpartition(".")[2] for n in linear})) or "there are none"
        raise ValueError(
            f"target_modules={config.target_modules!r} (exclude_modules={config.exclude_modules!r}) matches no layer; "
            f"the model's linear layers end in: {known}" + (" (its head is tied to model.embed_tokens)" if is_tied(model) else "")
        )
    if wrong := [n for n in chosen if n not in linear]:
        raise ValueError(
            f"target module {wrong[0]} is a {type(chosen[wrong[0]]).__name__}; (IA)^3 here goes on linear layers alone"
        )
    return chosen


def resolve(model: nn.Module, config: IA3Config) -> IA3Config:
    """The config with "all-linear" replaced by the names of the layers it means, and the feedforward ones among the
    targets named."""
    chosen, targets = _bases(model, config), config.target_modules
    targets = sorted(chosen) if _everywhere(config) else targets
    feedforward = config.feedforward_modules
    if feedforward is None:
        feedforward = ["down_proj"] if isinstance(targets, str) else [t for t in targets if t.endswith("down_proj")]
    return replace(config, target_modules=targets, feedforward_modules=feedforward)


def shapes(model: nn.Module, config: IA3Config) -> dict[str, tuple[int, ...]]:
    """{key: shape} of the adapter's tensors."""
    return {
        f"{PREFIX}{n}.ia3_l": (1, base.in_features) if config.is_feedforward(n) else (base.out_features, 1)
        for n, base in _bases(model, config).items()
    }


def insert(
    model: nn.Module, config: IA3Config, name: str, dtype: torch.dtype | None, tensors: dict[str, Tensor] | None
) -> list[str]:
    """Put the vectors on the layers that `config` selects; returns their names."""
    bases, values = _bases(model, config), {}
    for key, shape in shapes(model, config).items():
        layer_name = key.removeprefix(PREFIX).removesuffix(".ia3_l")
        weight = bases[layer_name].weight
        device = weight.device if isinstance(weight, Tensor) else weight.packed.device
        if tensors is not None:
            values[layer_name] = tensors[key].to(device)
        else:
            start = torch.ones if config.init_ia3_weights else torch.randn
            values[layer_name] = start(shape, dtype=dtype or torch.promote_types(weight.dtype, torch.float32), device=device)
    for layer_name, base in bases.items():
        layer = model.get_submodule(layer_name)
        if not isinstance(layer, IA3Linear):
            layer = IA3Linear(base).train(base.training)
            model.set_submodule(layer_name, layer)
        layer.ia3_l[name] = nn.Parameter(values[layer_name])
    return list(bases)


def parameters(model: nn.Module, name: str) -> dict[str, nn.Parameter]:
    """The vectors under PEFT's keys."""
    return {f"{PREFIX}{n}.ia3_l": layer.ia3_l[name] for n, layer in ia3_layers(model).items() if name in layer.ia3_l}


def activate(model: nn.Module, name: str | None) -> None:
    """Let those vectors act where they are, and the base alone elsewhere."""
    for layer in ia3_layers(model).values():
        layer.active_adapter = name if name is not None and name in layer.ia3_l else None


def remove(model: nn.Module, name: str) -> None:
    """Drop the vectors; layers without any become what they were."""
    for layer_name, layer in ia3_layers(model).items():
        if name in layer.ia3_l:
            del layer.ia3_l[name]
            layer.active_adapter = None if layer.active_adapter == name else layer.active_adapter
        if not len(layer.ia3_l):
            model.set_submodule(layer_name, layer.base_layer)


def _merged(layer_name: str, layer: IA3Linear, name: str) -> nn.Linear:
    dense = layer.merged_layer(name)
    if not all(torch.isfinite(tensor).all() for tensor in dense.parameters()):
        raise ValueError(f"merging {layer_name} gives NaN or infinite weights; the adapter or the base is broken there")
    return dense


def merge(model: nn.Module, name: str) -> None:
    """Compute with the vectors in dense layers, the bases beside them."""
    layers = ia3_layers(model)
    merged = {n: _merged(n, layer, name) for n, layer in layers.items() if name in layer.ia3_l}
    activate(model, name)
    for layer_name, dense in merged.items():
        layers[layer_name].merged = dense


def unmerge(model: nn.Module) -> None:
    """Drop the merged layers."""
    for layer in ia3_layers(model).values():
        layer.merged = None


def unload(model: nn.Module, name: str) -> None:
    """Replace the layers by dense ones with the vectors merged in, one after another."""
    layers = ia3_layers(model)
    for layer_name, layer in layers.items():
        if name in layer.ia3_l:
            _merged(layer_name, layer, name)
    while layers:
        layer_name, layer = layers.popitem()
        model.set_submodule(layer_name, layer.merged_layer(name) if name in layer.ia3_l else layer.base_layer)
