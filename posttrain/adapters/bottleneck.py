"""Bottleneck adapters (the functions that posttrain/adapters/interface.py asks of a method).

Houlsby et al., "Parameter-Efficient Transfer Learning for NLP" (arXiv:1902.00751), section 2.1 and figure 2: two in
every layer, one after the attention's output projection and one after the MLP's, each before the residual sum,

    adapter(y) = y + up(f(down(y)))      down (m, d), up (d, m), both with a bias: 2 m d + d + m parameters

and beside them the layer norms train, and the head where asked. The weights start at a normal of deviation 1e-2 cut
at two deviations (section 3.6) and the biases at zero, so that each adapter is nearly the identity.

PEFT has no such method. The files have its layout: adapter_config.json with peft_type BOTTLENECK, and the tensors

    base_model.model.<projection>.adapter_down.weight (m, d), .bias (m,), adapter_up.weight (d, m), .bias (d,)
    base_model.model.<norm>.weight (its size,), base_model.model.lm_head.weight (V, d)     as trained, not a difference
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from posttrain.model.decoder import CausalLM, RMSNorm
from posttrain.model.functional import rms_norm

from .peft_format import PREFIX, plain_fields, read_config

NONLINEARITIES: dict[str, Callable[[Tensor], Tensor]] = {"gelu": F.gelu, "relu": F.relu, "silu": F.silu}
PARTS = ("adapter_down.weight", "adapter_down.bias", "adapter_up.weight", "adapter_up.bias")


@dataclass(frozen=True)
class BottleneckConfig:
    """bottleneck_size: m. nonlinearity: "gelu" (what the paper's code has), "relu" or "silu". train_norms: every RMSNorm
    trains too, as a copy that belongs to the adapter. train_head: so does the output head, where it is not tied to
    the embeddings."""

    PEFT_TYPE: ClassVar[str] = "BOTTLENECK"

    bottleneck_size: int = 64
    nonlinearity: str = "gelu"
    init_std: float = 1e-2
    train_norms: bool = True
    train_head: bool = False

    def __post_init__(self):
        plain_fields(self)
        if self.bottleneck_size < 1:
            raise ValueError(f"bottleneck_size is {self.bottleneck_size!r}; expected a whole number of at least 1")
        if self.nonlinearity not in NONLINEARITIES:
            raise ValueError(f"nonlinearity is {self.nonlinearity!r}; expected one of {', '.join(NONLINEARITIES)}")
        if not 0.0 < self.init_std < math.inf:
            raise ValueError(f"init_std is {self.init_std}; expected a deviation above 0 (with 0 nothing would ever train)")

    def to_peft(self, model: nn.Module) -> dict[str, Any]:
        """adapter_config.json's content."""
        return {**asdict(self), "peft_type": self.PEFT_TYPE, "task_type": "CAUSAL_LM", "inference_mode": True}

    @classmethod
    def from_peft(cls, content: dict[str, Any], source: str | os.PathLike) -> BottleneckConfig:
        """What an adapter_config.json describes. PosttrainError where it asks for what is not supported."""
        return read_config(cls, content, source)


class Bottleneck(nn.Module):
    """y (..., d) -> y + up(f(down(y))), in y's dtype: weights of another one are cast for the products."""

    def __init__(self, down: nn.Parameter, down_bias: nn.Parameter, up: nn.Parameter, up_bias: nn.Parameter, nonlinearity: str):
        super().__init__()
        self.down, self.down_bias, self.up, self.up_bias = down, down_bias, up, up_bias
        self.nonlinearity = nonlinearity

    def parts(self) -> dict[str, nn.Parameter]:
        """The parameters by the ends of their names in the file."""
        return dict(zip(PARTS, (self.down, self.down_bias, self.up, self.up_bias), strict=True))

    def forward(self, y: Tensor) -> Tensor:
        down, down_bias, up, up_bias = (p.to(y.dtype) for p in self.parts().values())
        return y + F.linear(NONLINEARITIES[self.nonlinearity](F.linear(y, down, down_bias)), up, up_bias)


class BottleneckLinear(nn.Module):
    """A frozen projection and the adapters by name that may follow it, of which at most one acts."""

    def __init__(self, base_layer: nn.Module):
        super().__init__()
        self.base_layer = base_layer
        self.adapters = nn.ModuleDict()
        self.active_adapter: str | None = None

    def forward(self, x: Tensor) -> Tensor:
        y = self.base_layer(x)
        return y if self.active_adapter is None else self.adapters[self.active_adapter](y)


class AdaptedWeight(nn.Module):
    """A norm or head of which each adapter may train a copy of the weight; the base's stays as it was."""

    def __init__(self, base_layer: RMSNorm | nn.Linear):
        super().__init__()
        self.base_layer = base_layer
        self.adapters = nn.ParameterDict()
        self.active_adapter: str | None = None

    def forward(self, x: Tensor) -> Tensor:
        base = self.base_layer
        if self.active_adapter is None:
            return base(x)
        weight = self.adapters[self.active_adapter]
        if isinstance(base, RMSNorm):
            return rms_norm(x, weight, base.eps)
        return F.linear(x, weight.to(x.dtype), base.bias)


def _inserted(model: nn.Module) -> dict[str, BottleneckLinear | AdaptedWeight]:
    return {n: m for n, m in model.named_modules() if isinstance(m, BottleneckLinear | AdaptedWeight)}


def _bases(model: nn.Module, config: BottleneckConfig) -> tuple[dict[str, Any], dict[str, Any]]:
    """(projections, norms and head) that the adapter goes on, by name, without what they may carry already."""
    if not isinstance(model, CausalLM):
        raise ValueError(f"bottleneck adapters go on the decoders of posttrain.model, and this is a {type(model).__name__}")
    if config.train_head and model.config.tie_word_embeddings:
        raise ValueError("train_head: this model's head is its embeddings (tie_word_embeddings), which stay frozen")
    layers = range(len(model.model.layers))
    places = [f"model.layers.{i}.{name}" for i in layers for name in ("self_attn.o_proj", "mlp.down_proj")]
    bare = {n.removesuffix(".base_layer"): m for n, m in model.named_modules()}
    copied: dict[str, Any] = {n: m for n, m in bare.items() if config.train_norms and isinstance(m, RMSNorm)}
    if config.train_head:
        if type(bare["lm_head"]) is not nn.Linear:
            raise ValueError(f"train_head: the head is a {type(bare['lm_head']).__name__}; only a dense one can train")
        copied["lm_head"] = bare["lm_head"]
    return {n: bare[n] for n in places}, copied


def resolve(model: nn.Module, config: BottleneckConfig) -> BottleneckConfig:
    """The config itself, once it fits the model."""
    _bases(model, config)
    return replace(config)


def shapes(model: nn.Module, config: BottleneckConfig) -> dict[str, tuple[int, ...]]:
    """{key: shape} of the adapter's tensors."""
    projections, copied = _bases(model, config)
    m = config.bottleneck_size
    expected: dict[str, tuple[int, ...]] = {}
    for name, base in projections.items():
        d = base.out_features
        expected |= {f"{PREFIX}{name}.{part}": s for part, s in zip(PARTS, ((m, d), (m,), (d, m), (d,)), strict=True)}
    return expected | {f"{PREFIX}{name}.weight": tuple(base.weight.shape) for name, base in copied.items()}


def _initial(model: CausalLM, config: BottleneckConfig, dtype: torch.dtype | None) -> dict[str, Tensor]:
    """Values to start from, by the file's keys: a near-identity, and the base's own norms and head."""
    copied = _bases(model, config)[1]
    base = next(m for m in model.modules() if isinstance(m, RMSNorm)).weight
    dtype = dtype or torch.promote_types(base.dtype, torch.float32)
    values = {}
    for key, shape in shapes(model, config).items():
        if (owner := key.removeprefix(PREFIX).removesuffix(".weight")) in copied:
            values[key] = copied[owner].weight.detach().to(dtype, copy=True)
            continue
        values[key] = torch.zeros(shape, dtype=dtype, device=base.device)
        if len(shape) == 2:
            cut = 2 * config.init_std
            nn.init.trunc_normal_(values[key], std=config.init_std, a=-cut, b=cut)
    return values


def _wrapped(model: nn.Module, place: str, kind: type) -> Any:
    """What holds the adapters at that place, put there where it is not yet."""
    module = model.get_submodule(place)
    if not isinstance(module, kind):
        module = kind(module).train(module.training)
        model.set_submodule(place, module)
    return module


def insert(
    model: nn.Module, config: BottleneckConfig, name: str, dtype: torch.dtype | None, tensors: dict[str, Tensor] | None
) -> list[str]:
    """Put the adapter into every layer; returns the names of the projections that it follows."""
    projections, copied = _bases(model, config)
    model = cast(CausalLM, model)  # _bases raises for anything else
    device = model.model.embed_tokens.weight.device
    tensors = _initial(model, config, dtype) if tensors is None else tensors
    values = {key.removeprefix(PREFIX): nn.Parameter(tensor.to(device)) for key, tensor in tensors.items()}
    for place in projections:
        down, down_bias, up, up_bias = (values[f"{place}.{part}"] for part in PARTS)
        adapter = Bottleneck(down, down_bias, up, up_bias, config.nonlinearity)
        _wrapped(model, place, BottleneckLinear).adapters[name] = adapter
    for place in copied:
        _wrapped(model, place, AdaptedWeight).adapters[name] = values[f"{place}.weight"]
    return list(projections)


def parameters(model: nn.Module, name: str) -> dict[str, nn.Parameter]:
    """All that the adapter holds, under the file's keys."""
    found = {}
    for place, module in _inserted(model).items():
        if isinstance(module, AdaptedWeight):
            if name in module.adapters:
                found[f"{PREFIX}{place}.weight"] = module.adapters[name]
        elif name in module.adapters:
            found |= {f"{PREFIX}{place}.{part}": p for part, p in cast(Bottleneck, module.adapters[name]).parts().items()}
    return found


def activate(model: nn.Module, name: str | None) -> None:
    """Let that adapter act where it is, and the base alone elsewhere."""
    for module in _inserted(model).values():
        module.active_adapter = name if name is not None and name in module.adapters else None


def remove(model: nn.Module, name: str) -> None:
    """Drop the adapter; layers without any become what they were."""
    for place, module in _inserted(model).items():
        if name in module.adapters:
            del module.adapters[name]
        if module.active_adapter == name:
            module.active_adapter = None
        if not len(module.adapters):
            model.set_submodule(place, module.base_layer)
