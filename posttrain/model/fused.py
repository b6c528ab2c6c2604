"""q/k/v and gate/up as one quantized product each, while generating; and dense products by few_rows.py.

A token's work in a small model is mostly the calling of operations, so fewer and larger ones decode faster. Rows of blocks that
do not straddle them can be laid end to end without changing a value: the fused weight has the layers' packed bytes in one
buffer, of which the layers' own become views, and their absmax decoded to float32 (0.5 bits a parameter more, of these layers,
kept until the model is freed). The modules, their names and their state dict stay as they are.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from posttrain.kernels import DoubleQuantized, QuantizedWeight, double_dequantize
from posttrain.quantized import QuantizedLinear, in_dtype_of

from .few_rows import dense_few_rows

if TYPE_CHECKING:
    from .decoder import CausalLM

_quantized_linear = torch.ops.posttrain.quantized_linear.default
# Held while a model's layers are fused, or exchanged for others: threads share the model.
layers_change = threading.RLock()
_PROJECTIONS = (("self_attn", ("q_proj", "k_proj", "v_proj")), ("mlp", ("gate_proj", "up_proj")))


class FusedLinear:
    """Several QuantizedLinear of the same input as one: x (..., K) -> (..., sum of N). Not a module: it owns no weight."""

    def __init__(self, layers: list[QuantizedLinear]):
        weights = [layer.weight for layer in layers]
        packed = torch.cat([weight.packed for weight in weights])
        absmax = torch.cat([_absmax(weight) for weight in weights])
        start = 0
        for layer in layers:
            end = start + layer.packed.numel()
            layer.share_packed(packed[start:end])
            start = end
        first = weights[0]
        N = sum(layer.out_features for layer in layers)
        weight = QuantizedWeight(packed, absmax, (N, layers[0].in_features), first.dtype, first.block_size, first.quant_type)
        self._tensors, self._sizes = weight.tensors(), (*weight.shape, weight.block_size, weight.quant_type)
        self._parts = [layer.weight for layer in layers]
        self._bias: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        return _quantized_linear(x, *self._tensors, in_dtype_of(x, self._bias), *self._sizes)

    def is_of(self, layers: list[QuantizedLinear]) -> bool:
        """Whether these layers still have the weights it was made of."""
        return all(layer.weight is weight for layer, weight in zip(layers, self._parts, strict=True))

    def take_biases(self, layers: list[QuantizedLinear]) -> None:
        """Biases are small and may have been trained since: they are put together anew each time."""
        biases: list[Tensor] = [layer.bias for layer in layers if layer.bias is not None]
        self._bias = torch.cat(biases).detach() if biases else None


def _absmax(weight: QuantizedWeight) -> Tensor:
    return double_dequantize(weight.absmax) if isinstance(weight.absmax, DoubleQuantized) else weight.absmax


def _fusable(layers: list[nn.Module]) -> list[QuantizedLinear]:
    """The layers if they are plain quantized ones of one format, without adapters or hooks, all or none with a bias, and
    their rows hold whole blocks; else nothing."""
    plain = [
        layer for layer in layers if type(layer) is QuantizedLinear and not layer._forward_hooks and not layer._forward_pre_hooks
    ]
    formats = {
        (w.block_size, w.quant_type, w.shape[1] % w.block_size, w.packed.device, layer.bias is None)
        for layer, w in ((layer, layer.weight) for layer in plain)
    }
    return plain if len(plain) == len(layers) and len(formats) == 1 and formats.pop()[2] == 0 else []


@contextmanager
def fused_projections(model: CausalLM) -> Iterator[None]:
    """While open, layers that can be fused are, and dense ones take few rows faster. What is fused is made once a model and checked
    each time; training between is unaffected."""
    owners: list[nn.Module] = []
    try:
        with layers_change:
            _fuse(model, owners)
        with dense_few_rows(model):
            yield
    finally:
        for owner in owners:
            owner.fused = None  # type: ignore[assignment]


def _fuse(model: CausalLM, owners: list[nn.Module]) -> None:
    """Set `fused` where it can be, and append whose it is to `owners`."""
    for layer in model.model.layers:
        for name, projections in _PROJECTIONS:
            owner = getattr(layer, name)
            layers = _fusable([getattr(owner, projection) for projection in projections])
            if not layers:
                continue
            made = owner.__dict__.get("_fused_before")
            if made is None or not made.is_of(layers):
                with torch.inference_mode(False):  # the layers keep views of the buffer, and may train an adapter next
                    made = owner.__dict__["_fused_before"] = FusedLinear(layers)
            made.take_biases(layers)
            owner.fused = made
            owners.append(owner)
