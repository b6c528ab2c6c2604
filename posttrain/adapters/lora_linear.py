"""A frozen linear layer with low-rank updates by name: LoRA, and DoRA where an update has magnitudes.

    y = x W^T + bias + scaling dropout(x) A^T B^T                       posttrain/kernels/lora_linear.py
    y = (m / ||W + scaling B A||) (x W^T + scaling x A^T B^T) + bias    posttrain/adapters/dora.py

Initialisations that take a part of W into the adapter (PiSSA, OLoRA: lora_init.py) leave W - scaling B0 A0 as the base
to train against. That matrix is never made: the layer computes with A' = [A; A0] and B' = [B, -B0] on W as it is, which
is what PEFT writes when such an adapter is converted for the original base. It costs r more columns of low-rank work,
and saves a second copy of the weight, its rounding, and, in 4 bits, quantizing it twice.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from posttrain.kernels import QuantizedWeight, lora_linear, lora_linear_group
from posttrain.quantized import QuantizedLinear, in_dtype_of

from .dora import dora_linear, linear, rescaling, row_squares, weight_norm

_lora_linear = torch.ops.posttrain.lora_linear.default


def _groupable(layer: nn.Module, dtype: torch.dtype) -> tuple | None:
    """What layers must have in common to be one product; None for a layer that is more than W, A and B."""
    if not isinstance(layer, LoraLinear) or layer.merged is not None or layer._forward_hooks or layer._forward_pre_hooks:
        return None
    name = layer.active_adapter
    if name is None or not layer.is_low_rank(name):
        return None
    if layer.training and layer.dropout[name]:
        return None  # each layer drops on its own
    weight, bias = layer.base_layer.weight, layer.bias(name)
    if bias is not None and bias.dtype != dtype:
        return None
    if isinstance(weight, QuantizedWeight):
        *_, nested, _, nested_block_size = weight.tensors()
        return weight.block_size, weight.quant_type, nested is None, nested_block_size
    return (weight.dtype,)


class LoraLinear(nn.Module):
    """A frozen linear layer and its adapters by name, of which at most one acts.

    An adapter's tensors, each in the table of that name:
        lora_A (r, K), lora_B (N, r)     the update; without them the adapter is a trained bias
        lora_A0 (r, K), lora_B0 (N, r)   A and -B as they started, where they started with a part of the weight; frozen
        lora_magnitude_vector (N,)       makes it DoRA
        lora_bias (N,)                   added, times the scaling
        base_bias (N,)                   stands in for the base's bias
        loftq_A (r, K), loftq_B (N, r)   what LoftQ left out of the weight when it quantized the base; frozen, saved
    base_layer is never written to: merging makes a second, dense layer, and unmerging drops it.
    """

    FROZEN = ("lora_A0", "lora_B0", "loftq_A", "loftq_B")
    TABLES = ("lora_A", "lora_B", "lora_magnitude_vector", "lora_bias", "base_bias", *FROZEN)
    lora_A: nn.ParameterDict
    lora_B: nn.ParameterDict

    def __init__(self, base_layer: nn.Linear | QuantizedLinear):
        super().__init__()
        self.base_layer = base_layer
        self.in_features, self.out_features = base_layer.in_features, base_layer.out_features
        self.lora_A, self.lora_B = nn.ParameterDict(), nn.ParameterDict()  # the other tables when they are needed
        self.scaling: dict[str, float] = {}
        self.dropout: dict[str, float] = {}
        self.active_adapter: str | None = None
        self.merged: nn.Linear | None = None
        self._plain: set[str] = set()  # adapters that are lora_A and lora_B, no more
        self._squares: Tensor | None = None
        self._kept: tuple[tuple, Tensor, Tensor] | None = None

    def add(self, name: str, tensors: Mapping[str, Tensor], scaling: float = 1.0, dropout: float = 0.0) -> None:
        """Add an adapter: `tensors` by the names of TABLES."""
        for table, tensor in tensors.items():
            if table not in self._modules:
                setattr(self, table, nn.ParameterDict())
            self._table(table)[name] = nn.Parameter(tensor, requires_grad=table not in self.FROZEN)
        self.scaling[name], self.dropout[name] = scaling, dropout
        if tensors.keys() == {"lora_A", "lora_B"}:
            self._plain.add(name)

    def drop(self, name: str) -> None:
        """Take an adapter away."""
        for table in self.tensors(name):
            del self._table(table)[name]
            if table not in ("lora_A", "lora_B") and not self._table(table):
                delattr(self, table)
        del self.scaling[name], self.dropout[name]
        self._plain.discard(name)
        if self.active_adapter == name:
            self.active_adapter = None

    def _table(self, table: str) -> Any:
        found = self._modules.get(table)
        return {} if found is None else found

    def has(self, table: str, name: str) -> bool:
        """Whether an adapter has a tensor in that one of TABLES."""
        return name in self._table(table)

    def is_low_rank(self, name: str) -> bool:
        """Whether all that the adapter adds is a low-rank product and, for its base's, another bias."""
        return name in self.lora_A and not self.has("lora_magnitude_vector", name) and not self.has("lora_bias", name)

    def tensors(self, name: str) -> dict[str, nn.Parameter]:
        """An adapter's tensors by the names of TABLES; empty where it has none here."""
        return {t: self._table(t)[name] for t in self.TABLES if self.has(t, name)}

    def factors(self, name: str) -> tuple[Tensor, Tensor]:
        """(A, B) whose product, scaled, the adapter adds to the base's weight."""
        A, B = self.lora_A[name], self.lora_B[name]
        if not self.has("lora_A0", name):
            return A, B
        return torch.cat((A, self._table("lora_A0")[name])), torch.cat((B, self._table("lora_B0")[name]), 1)

    def bias(self, name: str) -> Tensor | None:
        """The layer's bias with the adapter."""
        bias = self._table("base_bias").get(name, self.base_layer.bias)
        if not self.has("lora_bias", name):
            return bias
        scaled = self._table("lora_bias")[name] * self.scaling[name]
        return scaled if bias is None else scaled + bias

    def norm(self, name: str, dtype: torch.dtype) -> Tensor:
        """||W + scaling B A|| row by row."""
        if self._squares is None:
            self._squares = row_squares(self.base_layer.weight)
        return weight_norm(self.base_layer.weight, self._squares, *self.factors(name), self.scaling[name], dtype)

    def rescaling(self, name: str, dtype: torch.dtype) -> Tensor:
        """DoRA's m / norm. Norm and factor are kept while the layer is in eval mode and their sources are the same tensors,
        unchanged (in place, by autograd's count: a write through `.data` is not seen)."""
        sources = [self._table(t)[name] for t in ("lora_A", "lora_B", "lora_magnitude_vector")]
        magnitude = sources[-1]
        if self.training or torch.compiler.is_compiling() or any(source.is_inference() for source in sources):
            return rescaling(magnitude, self.norm(name, dtype))
        key = (name, dtype, *((id(source), source._version) for source in sources))
        if self._kept is None or self._kept[0] != key:
            norm = self.norm(name, dtype)
            self._kept = key, norm, rescaling(magnitude.detach(), norm)
        _, norm, factor = self._kept
        return rescaling(magnitude, norm) if torch.is_grad_enabled() else factor

    def merged_weight(self, name: str) -> Tensor:
        """The adapted weight, summed in fp32 and rounded once to the base's dtype (a 4-bit base is dequantized first)."""
        weight = self.base_layer.weight
        weight = weight.detach() if isinstance(weight, Tensor) else weight.dequantize()
        if name not in self.lora_A:
            return weight
        wide = torch.promote_types(weight.dtype, torch.float32)
        A, B = (factor.detach().to(wide) for factor in self.factors(name))
        merged = torch.addmm(weight.to(wide), B, A, alpha=self.scaling[name])
        if self.has("lora_magnitude_vector", name):
            norm = torch.linalg.vector_norm(merged, dim=1)
            merged *= (self._table("lora_magnitude_vector")[name].detach() / norm.where(norm > 0, 1)).to(wide)[:, None]
        return merged.to(weight.dtype)

    def dense(self, weight: Tensor, bias: Tensor | None) -> nn.Linear:
        """A frozen nn.Linear of that weight and bias."""
        layer = nn.Linear(self.in_features, self.out_features, bias=bias is not None, device="meta", dtype=weight.dtype)
        layer.weight = nn.Parameter(weight, requires_grad=False)
        if bias is not None:
            layer.bias = nn.Parameter(bias.detach().to(weight.dtype), requires_grad=False)
        return layer

    def merge_dense(self, name: str) -> nn.Linear:
        """A dense layer that computes what this one does with the adapter. ValueError if its weight is not finite."""
        weight = self.merged_weight(name)
        if not torch.isfinite(weight).all():
            raise ValueError("merging gives NaN or infinite weights; the adapter or the base is broken there")
        return self.dense(weight, self.bias(name))

    def forward(self, x: Tensor) -> Tensor:
        if self.merged is not None:
            return self.merged(x)
        name = self.active_adapter
        if name is None:
            return self.base_layer(x)
        dropout = self.dropout[name] if self.training else 0.0
        if name in self._plain and not dropout:
            return self._product(x, name)
        weight, bias = self.base_layer.weight, in_dtype_of(x, self.bias(name))
        if name not in self.lora_A:
            return linear(x, weight, bias)
        A, B = self.factors(name)
        if not self.has("lora_magnitude_vector", name):
            return lora_linear(x, weight, A, B, self.scaling[name], bias, dropout=dropout)
        return dora_linear(x, weight, A, B, self.scaling[name], self.rescaling(name, x.dtype), bias, dropout=dropout)

    def _product(self, x: Tensor, name: str) -> Tensor:
        """What lora_linear computes, its arguments known to fit: a decoded token calls every layer, and looking them up and over
        costs as much as a small layer's product."""
        tables, base = self._modules, self.base_layer
        A, B = tables["lora_A"]._parameters[name], tables["lora_B"]._parameters[name]  # type: ignore[union-attr]
        weight, sizes = base.weight, (self.out_features, self.in_features)
        tensors: tuple
        if isinstance(weight, QuantizedWeight):
            tensors, format = weight.tensors(), (weight.block_size, weight.quant_type)
        else:
            tensors, format = (weight, None, None, None, 0), (0, "none")
        return _lora_linear(x, *tensors, A, B, self.scaling[name], in_dtype_of(x, base.bias), 0.0, 0, *sizes, *format)

    @staticmethod
    def forward_group(layers: Sequence[Any], x: Tensor) -> list[Tensor] | None:
        """What each of the layers makes of x, as one product; None where they are not all plain LoRA layers of a kind."""
        kinds = {_groupable(layer, x.dtype) for layer in layers}
        if len(kinds) != 1 or None in kinds:
            return None
        names = [layer.active_adapter for layer in layers]
        return lora_linear_group(
            x,
            [
                (layer.base_layer.weight, *layer.factors(name), layer.scaling[name], layer.bias(name))
                for layer, name in zip(layers, names, strict=True)
            ],
        )

    def _apply(self, fn, recurse=True):
        self._squares = self._kept = None
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, *args, **kwargs) -> None:
        self._squares = self._kept = None
        super()._load_from_state_dict(*args, **kwargs)

    def extra_repr(self) -> str:
        return f"active_adapter={self.active_adapter!r}, merged={self.merged is not None}"
