"""Linear layers whose weight stays in 4 bits."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .fingerprint import dense_fingerprint
from .kernels import DoubleQuantized, QuantizedWeight, quantize_weight

if TYPE_CHECKING:
    from .model.decoder import CausalLM

_quantized_linear = torch.ops.posttrain.quantized_linear.default
_BUFFERS = ("packed", "absmax", "nested_absmax", "nested_offset")


class QuantizedLinear(nn.Module):
    """y = x W^T + bias with W a QuantizedWeight (out_features, in_features): frozen, differentiable in x.

    Its tensors are buffers (packed, absmax or its codes, nested_absmax, nested_offset), so `.to(device)` and
    `state_dict` work. Their dtypes are the format's: `.to(dtype)`, `.half()` and `.bfloat16()` leave them alone and
    convert the bias.
    """

    packed: Tensor
    absmax: Tensor
    nested_absmax: Tensor | None
    nested_offset: Tensor | None
    bias: nn.Parameter | None

    def __init__(self, weight: QuantizedWeight, bias: Tensor | None = None):
        super().__init__()
        if len(weight.shape) != 2:
            raise ValueError(f"a linear layer's weight has two dimensions, and this one's shape is {tuple(weight.shape)}")
        self.out_features, self.in_features = weight.shape
        *tensors, self._nested_block_size = weight.tensors()
        for name, tensor in zip(_BUFFERS, tensors, strict=True):
            self.register_buffer(name, tensor)
        self._dtype, self._block_size, self._quant_type = weight.dtype, weight.block_size, weight.quant_type
        # Frozen like the weight: train `bias` by asking for its gradient.
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        self._ready: tuple[QuantizedWeight, tuple, tuple] | None = None

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, quant_type: str = "nf4", block_size: int = 64, double_quant: bool = True
    ) -> QuantizedLinear:
        return cls(quantize_weight(linear.weight.detach(), quant_type, block_size, double_quant), linear.bias)

    @property
    def weight(self) -> QuantizedWeight:
        """The weight as the kernels take it; its tensors are this module's buffers."""
        return (self._ready or self._prepare())[0]

    def _prepare(self) -> tuple[QuantizedWeight, tuple, tuple]:
        """The weight and the operation's arguments, put together once: decoding calls the layer for every token."""
        absmax: Tensor | DoubleQuantized = self.absmax
        if self.nested_absmax is not None and self.nested_offset is not None:
            absmax = DoubleQuantized(self.absmax, self.nested_absmax, self.nested_offset, self._nested_block_size)
        shape = self.out_features, self.in_features
        weight = QuantizedWeight(self.packed, absmax, shape, self._dtype, self._block_size, self._quant_type)
        self._ready = weight, weight.tensors(), (*shape, self._block_size, self._quant_type)
        return self._ready

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in_features) in float32, float16 or bfloat16 -> (..., out_features) in the same dtype."""
        _, tensors, sizes = self._ready or self._prepare()
        return _quantized_linear(x, *tensors, in_dtype_of(x, self.bias), *sizes)

    def share_packed(self, packed: Tensor) -> None:
        """Keep the packed bytes in memory of the caller's, who has copied them there."""
        self.packed = packed
        self._ready = None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedLinear:
        """Device moves apply to the buffers, dtype changes do not: a bfloat16 absmax would be another weight."""
        before = {name: getattr(self, name) for name in _BUFFERS}
        super()._apply(fn, recurse)
        for name, tensor in before.items():
            if tensor is not None and getattr(self, name).dtype != tensor.dtype:
                setattr(self, name, tensor.to(getattr(self, name).device))
        self._ready = None
        return self

    def _load_from_state_dict(self, *args, **kwargs) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._ready = None

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, quant_type={self._quant_type}, block_size={self._block_size}, "
            f"double_quant={self.nested_absmax is not None}"
        )


def in_dtype_of(x: Tensor, other: Tensor | None) -> Tensor | None:
    """A bias, or a factor, as a product of x takes it."""
    return other if other is None or other.dtype == x.dtype else other.to(x.dtype)


def quantizable_linears(model: nn.Module, skip: Iterable[str] = ("lm_head",)) -> Iterator[tuple[str, nn.Linear]]:
    """(name, module) of every nn.Linear but those whose name's last part is in `skip`, under an adapter or not: the head stays
    dense, as in QLoRA.
    """
    skip = tuple(skip)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name.removesuffix(".base_layer").rpartition(".")[2] not in skip:
            yield name, module


def quantize_model(
    model: nn.Module,
    quant_type: str = "nf4",
    block_size: int = 64,
    double_quant: bool = True,
    skip: Iterable[str] = ("lm_head",),
) -> list[str]:
    """Replace every linear layer of a model in memory, one after another; the names of those replaced.

    The model's fingerprint is taken first, if it has none, so that it stays that of the dense model.
    """
    if getattr(model, "fingerprint", "") is None:
        model.fingerprint = dense_fingerprint(model)  # type: ignore[assignment]
    names = []
    for name, linear in list(quantizable_linears(model, skip)):
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, QuantizedLinear.from_linear(linear, quant_type, block_size, double_quant))
        names.append(name)
    return names


def held_as(model: CausalLM) -> dict[str, str]:
    """How a model's weights are held, which its fingerprint does not say: a resumed run must have them so again."""
    layers: Counter[str] = Counter()
    for layer in model.modules():
        if isinstance(layer, QuantizedLinear):
            absmax = "float32" if layer.nested_absmax is None else "8 bits"
            layers[f"{layer.weight.quant_type} in blocks of {layer.weight.block_size}, absmax {absmax}"] += 1
    dtype = str(model.model.embed_tokens.weight.dtype).removeprefix("torch.")
    return {"dtype": dtype, "in_4_bits": "; ".join(f"{count} layers {kind}" for kind, count in sorted(layers.items())) or "none"}


def bits_per_parameter(model: nn.Module) -> float:
    """Stored bits over parameters, of the quantized layers' weights alone (4.127 for NF4 with double quantization)."""
    layers = [module for module in model.modules() if isinstance(module, QuantizedLinear)]
    if not layers:
        raise ValueError("the model has no quantized layer; quantize it first")
    stored = sum(tensor.nbytes for layer in layers for name in _BUFFERS if (tensor := getattr(layer, name)) is not None)
    return 8 * stored / sum(layer.in_features * layer.out_features for layer in layers)
