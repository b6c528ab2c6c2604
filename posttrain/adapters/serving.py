"""One base and many LoRA adapters at once: every request of a batch with an adapter of its own, or none.

    serving.load(model, "news", "adapters/news")          # and as many more as fit in memory
    serving.load(model, "poems", "adapters/poems")
    generate(model, prompts, 64, adapter_ids=["news", "poems", None])

A layer that some adapter changes keeps all adapters' factors in two stacks, (n, r, in) and (n, out, r), and computes the whole
batch by one `multi_lora_linear` (kernels/multi_lora_linear.py). An adapter has the same id in all layers, and in those that it
leaves alone the rank 0; ranks may differ, an adapter costs what its own rank costs. Adapters come and go, and are replaced by
newer weights under their name, while others generate. Nothing trains here: a model either serves adapters or has some attached.

The factors are kept in the base's dtype: that is what they are multiplied in.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from posttrain.errors import PosttrainError
from posttrain.kernels import AdapterSegments, segment_rows
from posttrain.quantized import QuantizedLinear

from . import lora
from .interface import adapter_names, base_fingerprint, config_from_peft, fitting
from .lora_config import LoraConfig
from .peft_format import PREFIX, read_adapter

_multi_lora_linear = torch.ops.posttrain.multi_lora_linear.default
_ROOM = 8  # ranks are given room in eights: a GPU then reads 16 bytes at a time


class Batch(threading.local):
    """Which adapter each request of the batch being computed uses: int64 ids (B,), None for the base alone everywhere."""

    ids: Tensor | None = None

    def __init__(self):
        self._sorted: dict[tuple[int, int], AdapterSegments] = {}

    def set(self, ids: Tensor | None) -> None:
        self.ids, self._sorted = ids, {}

    def segments(self, num_adapters: int, rows: int) -> AdapterSegments:
        """The batch's rows sorted by adapter, each request having equally many: once for all layers."""
        key = (num_adapters, rows)
        if key not in self._sorted:
            assert self.ids is not None
            self._sorted[key] = segment_rows(self.ids, num_adapters, rows)
        return self._sorted[key]


class MultiLoraLinear(nn.Module):
    """A frozen linear layer and the stacked factors of the adapters that are served: A (n, r, in), B (n, out, r).

    Slot i belongs to the adapter of id i; ranks[i] is 0 where it has no update here. `batch` says who uses which.
    """

    lora_A: Tensor
    lora_B: Tensor
    scaling: Tensor
    ranks: Tensor

    def __init__(self, base_layer: nn.Linear | QuantizedLinear, batch: Batch):
        super().__init__()
        self.base_layer = base_layer
        self.in_features, self.out_features = base_layer.in_features, base_layer.out_features
        self.batch = batch
        weight = base_layer.weight
        device = weight.device if isinstance(weight, Tensor) else weight.packed.device
        shapes = {"lora_A": (0, 0, self.in_features), "lora_B": (0, self.out_features, 0)}
        for name, shape in shapes.items():
            self.register_buffer(name, torch.zeros(shape, dtype=weight.dtype, device=device), persistent=False)
        self.register_buffer("scaling", torch.zeros(0, device=device), persistent=False)
        self.register_buffer("ranks", torch.zeros(0, dtype=torch.int32, device=device), persistent=False)

    def grow(self, n: int, r: int) -> None:
        """Make room for n adapters of ranks up to r, keeping what is there. The new tensors take the old ones' place whole."""
        n, r = max(n, len(self.ranks)), max(-(-r // _ROOM) * _ROOM, self.lora_A.shape[1])
        if (n, r) == tuple(self.lora_A.shape[:2]):
            return
        for name, shape in {
            "lora_A": (n, r, self.in_features), "lora_B": (n, self.out_features, r), "scaling": (n,), "ranks": (n,)
        }.items():  # fmt: skip
            old = getattr(self, name)
            new = old.new_zeros(shape)
            new[tuple(slice(size) for size in old.shape)] = old
            setattr(self, name, new)

    def put(self, i: int, lora_A: Tensor, lora_B: Tensor, scaling: float) -> None:
        """Write adapter i: lora_A (r, in), lora_B (out, r), r within the room there is."""
        r = lora_A.shape[0]
        self.lora_A[i, :r] = lora_A
        self.lora_B[i, :, :r] = lora_B
        self.scaling[i], self.ranks[i] = scaling, r

    def forward(self, x: Tensor) -> Tensor:
        if self.batch.ids is None:
            return self.base_layer(x)
        n = len(self.ranks)
        ids, order, tiles, *_ = self.batch.segments(n, x.numel() // self.in_features)
        base, bias = self.base_layer, self.base_layer.bias
        shape = (self.out_features, self.in_features)
        weight: Any = base.weight
        tensors, form = ((weight, None, None, None, 0), (0, "none")) if isinstance(weight, Tensor) else _packed(weight)
        adapters = (self.lora_A, self.lora_B, self.scaling, self.ranks, ids, order, tiles)
        return _multi_lora_linear(x, *tensors, *adapters, bias, *shape, *form)

    def _apply(self, fn, recurse=True):
        """Devices apply to everything, dtypes to the factors alone."""
        scaling = self.scaling
        super()._apply(fn, recurse)
        self.scaling = scaling.to(self.scaling.device)  # float32 whatever the factors are
        self.batch.set(self.batch.ids)
        return self

    def extra_repr(self) -> str:
        return f"adapters={len(self.ranks)}, rank<={self.lora_A.shape[1]}"


def _packed(weight: Any) -> tuple[tuple, tuple]:
    return weight.tensors(), (weight.block_size, weight.quant_type)


class _Bare(nn.Module):
    """The model's modules as they were before any was replaced: what an adapter's configuration is matched against."""

    _found: dict[str, nn.Module]

    def __init__(self, model: nn.Module):
        super().__init__()
        self.config, self.fingerprint = model.config, base_fingerprint(model)
        self.__dict__["_found"] = dict(model.named_modules())

    def named_modules(self, *args, **kwargs):
        return iter(self._found.items())

    def get_submodule(self, target: str) -> nn.Module:
        return self._found[target]


class Served:
    """A model's served adapters: their ids by name, the layers they change, and which of them are in use."""

    def __init__(self, model: nn.Module):
        self.bare, self.batch = _Bare(model), Batch()
        self.ids: dict[str, int] = {}
        self.layers: dict[str, MultiLoraLinear] = {}
        self.in_use: Counter[str] = Counter()
        self.capacity = 0

    def id_of(self, name: str) -> int:
        if name not in self.ids:
            raise ValueError(f"no adapter named {name!r} is served; the model serves: {', '.join(self.ids) or 'none'}")
        return self.ids[name]

    @contextlib.contextmanager
    def rows(self, adapter_ids: Sequence[str | None], count: int, device: torch.device) -> Iterator[Batch]:
        """While open, request i of the batch uses the adapter adapter_ids[i], None the base alone."""
        if isinstance(adapter_ids, str) or len(adapter_ids) != count:
            raise ValueError(f"adapter_ids is {adapter_ids!r}; expected a list of {count}, a name or None for each prompt")
        names = [name for name in adapter_ids if name is not None]
        ids = torch.tensor([-1 if name is None else self.id_of(name) for name in adapter_ids], device=device)
        before = self.batch.ids
        self.in_use.update(names)
        self.batch.set(ids)
        try:
            yield self.batch
        finally:
            self.batch.set(before)
            self.in_use.subtract(names)


def _served(model: nn.Module) -> Served:
    served: Served | None = model.__dict__.get("served_adapters")
    if served is None:
        raise ValueError("the model serves no adapters; load one with posttrain.adapters.serving.load")
    return served


def names(model: nn.Module) -> list[str]:
    """Names of the adapters that the model serves, in the order in which they were loaded."""
    served: Served | None = model.__dict__.get("served_adapters")
    return [] if served is None else list(served.ids)


def _read(served: Served, path: str | os.PathLike, any_base: bool) -> dict[str, tuple[Tensor, Tensor, float]]:
    """{layer: (lora_A, lora_B, scaling)} of the adapter in a folder, checked against the base. PosttrainError where it is no plain
    LoRA adapter, or none of this base."""
    content, tensors, trained_on = read_adapter(path)
    config = fitting(served.bare, path, config_from_peft(content, path), tensors, trained_on, any_base)
    ends = tuple(lora.KEYS[table] for table in ("lora_A", "lora_B"))
    if not isinstance(config, LoraConfig) or (other := [key for key in tensors if not key.endswith(ends)]):
        kind = type(config).__name__ if not isinstance(config, LoraConfig) else f"one with {other[0]}"
        raise PosttrainError(
            f"the adapter in {path} is {kind}, and only LoRA's factors are served side by side; attach it alone with load_adapter"
        )
    layers = {key.removeprefix(PREFIX).removesuffix(f".{ends[0]}") for key in tensors if key.endswith(ends[0])}
    return {
        layer: (tensors[f"{PREFIX}{layer}.{ends[0]}"], tensors[f"{PREFIX}{layer}.{ends[1]}"], config.scaling(layer))
        for layer in sorted(layers)
    }


@torch.inference_mode(False)
@torch.no_grad()
def _write(model: nn.Module, served: Served, i: int, factors: Mapping[str, tuple[Tensor, Tensor, float]]) -> None:
    """Put an adapter into slot i of every layer, taking what was there away."""
    for name in factors.keys() - served.layers.keys():
        base: Any = model.get_submodule(name)  # a linear layer: _read takes nothing else
        served.layers[name] = layer = MultiLoraLinear(base, served.batch).train(model.training)
        model.set_submodule(name, layer)
    for name, layer in served.layers.items():
        A, B, scaling = factors.get(name) or (layer.lora_A[:0].flatten(0, 1), layer.lora_B.new_empty(layer.out_features, 0), 0.0)
        layer.grow(served.capacity, A.shape[0])
        layer.put(i, A, B, scaling)


def load(model: nn.Module, name: str, path: str | os.PathLike, *, any_base: bool = False) -> None:
    """Serve the LoRA adapter in the folder `path` (saved here or by PEFT) under `name`, beside those that are served already.

    ValueError for a name in use or a model with attached adapters; PosttrainError where the folder holds no LoRA adapter of this
    model, or one trained on another base (any_base=True takes it all the same). The model is unchanged then.
    """
    if adapter_names(model):
        raise ValueError(f"the model has attached adapters ({', '.join(adapter_names(model))}); delete_adapter those first")
    if name in names(model):
        raise ValueError(f"an adapter named {name!r} is served already; give another name, or replace it")
    served = model.__dict__.get("served_adapters") or Served(model)
    factors = _read(served, path, any_base)
    taken = set(served.ids.values())
    i = next(i for i in range(len(taken) + 1) if i not in taken)
    if i >= served.capacity:
        served.capacity = max(2 * served.capacity, 1)
    if "served_adapters" not in model.__dict__:
        object.__setattr__(model, "fingerprint", served.bare.fingerprint)  # of the bare base: names of tensors change now
        model.__dict__["served_adapters"] = served
    _write(model, served, i, factors)
    served.ids[name] = i


def replace(model: nn.Module, name: str, path: str | os.PathLike, *, any_base: bool = False) -> None:
    """Put the adapter in `path` in the place of the one served as `name`. Requests under way go on with the new weights from their
    next token; those of other adapters do not notice. Raises as `load`, and nothing has changed then."""
    served = _served(model)
    i = served.id_of(name)
    _write(model, served, i, _read(served, path, any_base))


def remove(model: nn.Module, name: str) -> None:
    """Stop serving an adapter. ValueError while a generation uses it. With the last one the model gets its own layers back."""
    served = _served(model)
    i = served.id_of(name)
    if served.in_use[name] > 0:
        raise ValueError(f"the adapter {name!r} is in use by a generation; remove it when that has ended")
    del served.ids[name]
    if served.ids:
        _write(model, served, i, {})
        return
    for layer_name, layer in served.layers.items():
        model.set_submodule(layer_name, layer.base_layer)
    del model.__dict__["served_adapters"]
