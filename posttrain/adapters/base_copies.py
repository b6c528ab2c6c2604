"""The base's own embedding and head, whole, and biases of modules that train whole, in an adapter's file.

PEFT writes them where an adapter is on one of the two, and everywhere with save_embedding_layers=True, so that a vocabulary
that was resized comes along:

    base_model.model.lm_head.base_layer.weight         under an adapter
    base_model.model.lm_head.weight                    where nothing is on it (the trained copy, if it trains whole)
    base_model.model.lm_head.original_module.weight    beside a copy that trains whole
    base_model.model.lm_head.modules_to_save.weight    that copy once more

and with prompt tuning `embed_tokens.weight` and `base_model.lm_head.weight`. With bias="all" it writes every bias that it has,
and so those of a module that trains whole twice more:

    base_model.model.<mlp>.down_proj.bias                            the trained copy's
    base_model.model.<mlp>.original_module.down_proj.bias            beside it
    base_model.model.<mlp>.modules_to_save.default.down_proj.bias    that copy's once more, under the adapter's name

They are no part of what acts here: each must be what this model or the file has already, and is then left out. PEFT puts them
into the model whatever they are.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn

from posttrain.errors import PosttrainError
from posttrain.kernels import DoubleQuantized, quantize_weight

from .peft_format import PREFIX

_COPY = re.compile(r"(?:.*\.)?(embed_tokens|lm_head)(\.base_layer|\.original_module|\.modules_to_save)?\.weight")

_BIAS = re.compile(r"(.*)\.(original_module|modules_to_save)((?:\.[^.]+)*)\.bias")


def without_base_copies(model: nn.Module, tensors: dict[str, Tensor], expected: Collection[str]) -> dict[str, Tensor]:
    """A file's tensors but the copies of the base's among them, `expected` being the keys of the adapter's own.

    PosttrainError for a copy of what this model has otherwise, and for an adapter on a head that this model ties to the embedding.
    """
    layers = _layers(model)
    kept = dict(tensors)
    for key in sorted(tensors.keys() - expected):
        match, bias = _COPY.fullmatch(key), None
        again = key.replace(".modules_to_save.", ".")
        if match and again in expected and again != key:
            same = again in tensors and torch.equal(tensors[key], tensors[again])
        elif (bias := _bias(model, key, tensors, expected)) is not None:
            same = _is_copy(tensors[key], bias)
        else:
            same = match is not None and match[1] in layers and _is_copy(tensors[key], layers[match[1]].weight)
        if same:
            del kept[key]
        elif ".lm_head." in key and is_tied(model):
            raise PosttrainError(
                f"the adapter holds {key}, and this model's head is tied to model.embed_tokens, which has no adapter for it; "
                "load it on a base with a head of its own (lm_head.weight in its files, tie_word_embeddings false)"
            )
        elif bias is not None or (match and match[1] in layers):
            raise PosttrainError(
                f"the adapter brings another {key.removeprefix(PREFIX)} than this model has, {tuple(tensors[key].shape)}: it was "
                "trained on another base, or resized the vocabulary; load it on the base that it was trained on"
            )
    return kept


def is_tied(model: nn.Module) -> bool:
    """Whether the model's head is its embedding."""
    return bool(getattr(getattr(model, "config", None), "tie_word_embeddings", False))


def _layers(model: nn.Module) -> dict[str, Any]:
    """The model's embedding and head by the last parts of their names, under whatever is on them."""
    found: dict[str, Any] = {}
    for name, module in model.named_modules():
        last = name.rpartition(".")[2]
        if last in ("embed_tokens", "lm_head"):
            found[last] = _bare(module)
    if is_tied(model) and "embed_tokens" in found:
        found["lm_head"] = found["embed_tokens"]
    return found


def _bare(layer: Any) -> Any:
    """The base's own layer under whatever is on it."""
    while (inner := getattr(layer, "base_layer", getattr(layer, "original_module", None))) is not None:
        layer = inner
    return layer


def _bias(model: nn.Module, key: str, tensors: dict[str, Tensor], expected: Collection[str]) -> Tensor | None:
    """What a bias beside that of a module that trains whole must be: the base's, or the trained one. None for another key."""
    match = _BIAS.fullmatch(key)
    if match is None:
        return None
    module, kind, layer = match.groups()
    named = re.sub(r"^\.[^.]+", "", layer) if kind == "modules_to_save" else layer
    trained = next((k for k in (f"{module}{layer}.bias", f"{module}{named}.bias") if k in expected and k in tensors), None)
    if trained is None or kind == "modules_to_save":
        return None if trained is None else tensors[trained]
    found: Any = model
    for part in trained.removeprefix(PREFIX).split("."):
        found = getattr(_bare(found), part)
    return found


def _is_copy(copy: Tensor, weight: Any) -> bool:
    """Whether a tensor is this weight up to the dtype; for one in 4 bits, whether it is what these were made of."""
    if isinstance(weight, Tensor):
        return torch.equal(copy.to(weight), weight)
    if tuple(copy.shape) != tuple(weight.shape) or not copy.is_floating_point() or not copy.isfinite().all():
        return False
    wide = copy.to(weight.packed.device, weight.dtype)
    double_quant = isinstance(weight.absmax, DoubleQuantized)
    again = quantize_weight(wide, weight.quant_type, weight.block_size, double_quant)
    pairs = zip(again.tensors()[:4], weight.tensors()[:4], strict=True)
    return all(torch.equal(one, other) for one, other in pairs if one is not None)
