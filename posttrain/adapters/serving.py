"""One base and many LoRA adapters at once: every request of a batch with an adapter of its own, or none.

    serving.load(model, "news", "adapters/news")          # and as many more as fit in memory
    serving.load(model, "poems", "adapters/poems")
    generate(model, prompts, 64, adapter_ids=["news", "poems", None])

A layer that some adapter changes keeps all adapters' factors in two stacks, (n, r, in) and (n, out, r), and computes the whole
batch by one `multi_lora_linear` (kernels/multi_lora_linear.py). An adapter has the same id in all layers, and in those that it
leaves alone the rank 0; ranks may differ, an adapter costs what its own rank costs. Adapters come and go, and are replaced by
newer weights under their name, while others generate, in this thread or in another: what a request under way reads is not written
to. Nothing trains here: a model either serves adapters or has some attached.

The factors are kept in the dtype that the model computes in: that is what they are multiplied in. (The one that a 4-bit weight
records is what it was quantized from.)
"""

from __future__ import annotations

import contextlib
import itertools
import os
import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from posttrain.errors import PosttrainError
from posttrain.kernels import AdapterSegments, segment_rows
from posttrain.model.fused import layers_change
from posttrain.quantized import QuantizedLinear, in_dtype_of

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

    def __reduce__(self):
        """A copy of a model computes no batch yet."""
        return Batch, ()

    def set(self, ids: Tensor | None) -> None:
        self.ids, self._sorted = ids, {}

    def select(self, rows: Tensor) -> None:
        """Keep these requests alone."""
        if self.ids is not None:
            self.set(self.ids[rows])

    @contextlib.contextmanager
    def using(self, ids: Tensor | None) -> Iterator[Batch]:
        """While open, these ids; then what was there before."""
        before = self.ids, self._sorted
        self.set(ids)
        try:
            yield self
        finally:
            self.ids, self._sorted = before

    def segments(self, num_adapters: int, rows: int) -> AdapterSegments:
        """The batch's rows sorted by adapter, each request having equally many: once for all layers."""
        key = (num_adapters, rows)
        if key not in self._sorted:
            assert self.ids is not None
            self._sorted[key] = segment_rows(self.ids, num_adapters, rows)
        return self._sorted[key]


class Stack(NamedTuple):
    """The factors of all adapters in a layer, read and replaced as one, since their sizes belong together."""

    lora_A: Tensor  # (n, r, in)
    lora_B: Tensor  # (n, out, r)
    scaling: Tensor  # float32 (n,)
    ranks: Tensor  # int32 (n,), 0 where an adapter has no update here


class MultiLoraLinear(nn.Module):
    """A frozen linear layer and the stacked factors of the adapters that are served; slot i is the adapter's of id i. `batch` says
    who uses which."""

    def __init__(self, base_layer: nn.Linear | QuantizedLinear, batch: Batch, dtype: torch.dtype):
        super().__init__()
        self.base_layer = base_layer
        self.in_features, self.out_features = base_layer.in_features, base_layer.out_features
        self.batch = batch
        weight = base_layer.weight
        like = torch.empty(0, dtype=dtype, device=weight.device if isinstance(weight, Tensor) else weight.packed.device)
        A, B = like.new_zeros(0, 0, self.in_features), like.new_zeros(0, self.out_features, 0)
        self.stack = Stack(A, B, like.new_zeros(0, dtype=torch.float32), like.new_zeros(0, dtype=torch.int32))

    def grow(self, n: int, r: int) -> None:
        """Make room for n adapters of ranks up to r, keeping what is there. The new stack takes the old one's place whole."""
        old = self.stack
        n, r = max(n, len(old.ranks)), max(-(-r // _ROOM) * _ROOM, old.lora_A.shape[1])
        if (n, r) != old.lora_A.shape[:2]:
            shapes = (n, r, self.in_features), (n, self.out_features, r), (n,), (n,)
            new = Stack(*(tensor.new_zeros(shape) for tensor, shape in zip(old, shapes, strict=True)))
            for tensor, kept in zip(new, old, strict=True):
                tensor[tuple(slice(size) for size in kept.shape)] = kept
            self.stack = new

    def put(self, i: int, lora_A: Tensor, lora_B: Tensor, scaling: float) -> None:
        """Write slot i, which no request may be using: lora_A (r, in), lora_B (out, r), r within the room there is."""
        r = lora_A.shape[0]
        self.stack.lora_A[i, :r] = lora_A
        self.stack.lora_B[i, :, :r] = lora_B
        self.stack.scaling[i], self.stack.ranks[i] = scaling, r

    def forward(self, x: Tensor) -> Tensor:
        if self.batch.ids is None:
            return self.base_layer(x)
        stack = self.stack  # once: another thread may put a larger one in its place
        ids, order, tiles, *_ = self.batch.segments(len(stack.ranks), x.numel() // self.in_features)
        base, bias = self.base_layer, in_dtype_of(x, self.base_layer.bias)
        shape = (self.out_features, self.in_features)
        weight: Any = base.weight
        tensors, form = ((weight, None, None, None, 0), (0, "none")) if isinstance(weight, Tensor) else _packed(weight)
        A, B = in_dtype_of(x, stack.lora_A), in_dtype_of(x, stack.lora_B)
        return _multi_lora_linear(x, *tensors, A, B, stack.scaling, stack.ranks, ids, order, tiles, bias, *shape, *form)

    def _apply(self, fn, recurse=True):
        """Devices apply to everything, dtypes to the factors alone."""
        super()._apply(fn, recurse)
        A, B = fn(self.stack.lora_A), fn(self.stack.lora_B)
        self.stack = Stack(A, B, self.stack.scaling.to(A.device), self.stack.ranks.to(A.device))
        self.batch.set(self.batch.ids)
        return self

    def extra_repr(self) -> str:
        return f"adapters={len(self.stack.ranks)}, rank<={self.stack.lora_A.shape[1]}"


def _packed(weight: Any) -> tuple[tuple, tuple]:
    return weight.tensors(), (weight.block_size, weight.quant_type)


class _Bare(nn.Module):
    """The model's modules as they would be without adapters: what an adapter's configuration is matched against. Made anew for
    each, since layers may be exchanged between, when the model is quantized."""

    _found: dict[str, nn.Module]

    def __init__(self, model: nn.Module):
        super().__init__()
        self.config, self.fingerprint = model.config, base_fingerprint(model)
        found = self.__dict__["_found"] = dict(model.named_modules())
        for name, module in model.named_modules():
            if isinstance(module, MultiLoraLinear):
                found[name] = module.base_layer
                found.pop(f"{name}.base_layer", None)

    def named_modules(self, *args, **kwargs):
        return iter(self._found.items())

    def get_submodule(self, target: str) -> nn.Module:
        return self._found[target]


class Served:
    """A model's served adapters: their ids by name, the layers they change, and the names and ids that requests under way use.

    An id is free once no name and no request has it. `layers_change` is held while any of this is read and changed.
    """

    def __init__(self):
        self.batch = Batch()
        self.ids: dict[str, int] = {}
        self.layers: dict[str, MultiLoraLinear] = {}
        self.in_use: Counter[tuple[str, int]] = Counter()
        self.capacity = 0

    def __getstate__(self):
        """A copy has no requests under way."""
        return {**self.__dict__, "in_use": Counter()}

    def free_id(self) -> int:
        taken = {*self.ids.values(), *(i for _, i in self.in_use)}
        return next(i for i in range(len(taken) + 1) if i not in taken)

    def id_of(self, name: str) -> int:
        if name not in self.ids:
            raise ValueError(f"no adapter named {name!r} is served; the model serves: {', '.join(self.ids) or 'none'}")
        return self.ids[name]

    @contextlib.contextmanager
    def rows(self, adapter_ids: Sequence[str | None], count: int, device: torch.device) -> Iterator[Batch]:
        """While open, request i of the batch uses the adapter adapter_ids[i], None the base alone."""
        if isinstance(adapter_ids, str) or len(adapter_ids) != count:
            raise ValueError(f"adapter_ids is {adapter_ids!r}; expected a list of {count}, a name or None for each prompt")
        with layers_change:
            used = Counter((name, self.id_of(name)) for name in adapter_ids if name is not None)
            ids = torch.tensor([-1 if name is None else self.ids[name] for name in adapter_ids], device=device)
            self.in_use += used
        try:
            with self.batch.using(ids) as batch:
                yield batch
        finally:
            with layers_change:
                self.in_use -= used


def _served(model: nn.Module) -> Served:
    served: Served | None = model.__dict__.get("served_adapters")
    if served is None:
        raise ValueError("the model serves no adapters; load one with posttrain.adapters.serving.load")
    return served


def names(model: nn.Module) -> list[str]:
    """Names of the adapters that the model serves, in the order in which they were loaded."""
    served: Served | None = model.__dict__.get("served_adapters")
    return [] if served is None else list(served.ids)


def _dtype(model: nn.Module) -> torch.dtype:
    """What the model computes in."""
    embedding: Any = model.get_submodule("model.embed_tokens")
    return embedding.weight.dtype


def _read(bare: _Bare, path: str | os.PathLike, any_base: bool, dtype: torch.dtype) -> dict[str, tuple[Tensor, Tensor, float]]:
    """{layer: (lora_A, lora_B, scaling)} of the adapter in a folder, checked against the base. PosttrainError where it is no plain
    LoRA adapter, or none of this base, or where its numbers are beyond the dtype's."""
    content, tensors, trained_on = read_adapter(path)
    config = config_from_peft(content, path)
    other = None if isinstance(config, LoraConfig) else type(config).__name__  # said first: it may not fit a bare model either
    ends = tuple(lora.KEYS[table] for table in ("lora_A", "lora_B"))
    if other is None:
        config, tensors = fitting(bare, path, config, tensors, trained_on, any_base)
        other = next((f"one with {key}" for key in tensors if not key.endswith(ends)), None)
    if other is not None:
        raise PosttrainError(
            f"the adapter in {path} is {other}, and only LoRA's factors are served side by side; attach it alone with load_adapter"
        )
    if config.takes_weight:
        raise PosttrainError(
            f"the adapter in {path} has init_lora_weights {config.init_lora_weights!r}, and not what that took from the base; "
            "load_adapter and save_adapter make a plain one of it"
        )
    layers = {key.removeprefix(PREFIX).removesuffix(f".{ends[0]}") for key in tensors if key.endswith(ends[0])}
    keys = {layer: [f"{PREFIX}{layer}.{end}" for end in ends] for layer in sorted(layers)}
    for key in itertools.chain(*keys.values()):
        largest = tensors[key].abs().max()
        tensors[key] = tensors[key].to(dtype)
        if tensors[key].isinf().any():
            raise PosttrainError(
                f"the adapter in {path} holds {largest:g} in {key}, and the model computes in {dtype}, which ends at "
                f"{torch.finfo(dtype).max:g}; load the model in bfloat16 or float32"
            )
    return {layer: (tensors[A], tensors[B], config.scaling(layer)) for layer, (A, B) in keys.items()}


@torch.inference_mode(False)
@torch.no_grad()
def _write(model: nn.Module, served: Served, i: int, factors: Mapping[str, tuple[Tensor, Tensor, float]], room: int) -> None:
    """Put an adapter into slot i, which nobody uses, of every layer; `room`: how many slots there are where i is beyond them.

    All memory is taken before anything is written, and new layers are placed last: whatever fails, what is read has not changed.
    """
    n = served.capacity if i < served.capacity else room
    layers = {}
    for name in sorted(factors.keys() | served.layers.keys()):
        base: Any = model.get_submodule(name)  # a linear layer: _read takes nothing else
        layer = served.layers.get(name) or MultiLoraLinear(base, served.batch, _dtype(model)).train(base.training)
        layer.grow(n, factors[name][0].shape[0] if name in factors else 0)
        layers[name] = layer
    served.capacity = n
    for name, layer in layers.items():
        A, B, scaling = factors.get(name) or (layer.stack.lora_A[:0, 0], layer.stack.lora_B[0, :, :0], 0.0)
        layer.put(i, A, B, scaling)
    for name in layers.keys() - served.layers.keys():
        served.layers[name] = layers[name]
        _place(model, name, layers[name])


def _place(model: nn.Module, name: str, layer: nn.Module) -> None:
    """Put the layer there, in place of the product that a generation under way may have fused it into."""
    model.set_submodule(name, layer)
    owner = model.get_submodule(name.rpartition(".")[0])
    if "fused" in owner.__dict__:
        owner.fused = None  # type: ignore[assignment]


def _give_back(model: nn.Module, served: Served) -> None:
    """Serve nothing any more: the model has its own layers."""
    for name, layer in served.layers.items():
        _place(model, name, layer.base_layer)
    model.__dict__.pop("served_adapters", None)


def load(model: nn.Module, name: str, path: str | os.PathLike, *, any_base: bool = False) -> None:
    """Serve the LoRA adapter in the folder `path` (saved here or by PEFT) under `name`, beside those that are served already.

    ValueError for a name in use or a model with attached adapters; PosttrainError where the folder holds no LoRA adapter of this
    model, one trained on another base (any_base=True takes it all the same), or numbers beyond what the model computes in.
    The model is unchanged then.
    """
    if not isinstance(name, str):
        raise TypeError(f"an adapter's name is {name!r}; expected text")
    if adapter_names(model):
        raise ValueError(f"the model has attached adapters ({', '.join(adapter_names(model))}); delete_adapter those first")
    with layers_change:
        if name in names(model):
            raise ValueError(f"an adapter named {name!r} is served already; give another name, or replace it")
        served, bare = model.__dict__.get("served_adapters") or Served(), _Bare(model)
        factors = _read(bare, path, any_base, _dtype(model))
        i = served.free_id()
        try:
            _write(model, served, i, factors, max(2 * served.capacity, 1))
        except BaseException:
            if not served.ids:
                _give_back(model, served)
            raise
        if "served_adapters" not in model.__dict__:
            object.__setattr__(model, "fingerprint", bare.fingerprint)  # of the bare base: names of tensors have changed now
            model.__dict__["served_adapters"] = served
        served.ids[name] = i


def replace(model: nn.Module, name: str, path: str | os.PathLike, *, any_base: bool = False) -> None:
    """Put the adapter in `path` in the place of the one served as `name`. Requests under way end with the weights that they began
    with. The new ones go to a free place, and the old one is free when no request has it. Raises as `load`, and the adapter
    is what it was then."""
    with layers_change:
        served = _served(model)
        served.id_of(name)
        factors = _read(_Bare(model), path, any_base, _dtype(model))
        i = served.free_id()
        _write(model, served, i, factors, i + 1)
        served.ids[name] = i


def remove(model: nn.Module, name: str) -> None:
    """Stop serving an adapter. ValueError while a generation uses it. With the last one the model gets its own layers back."""
    with layers_change:
        served = _served(model)
        served.id_of(name)
        if any(used == name for used, _ in served.in_use):
            raise ValueError(f"the adapter {name!r} is in use by a generation; remove it when that has ended")
        del served.ids[name]
        if not served.ids:
            _give_back(model, served)
