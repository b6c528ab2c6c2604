"""Models from and to Hugging Face directories, tensor by tensor: one quantized on the way is never whole in memory."""

from __future__ import annotations

import ctypes
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from posttrain.atomic import atomic_dir
from posttrain.errors import PosttrainError
from posttrain.fingerprint import METADATA_KEY, Fingerprint
from posttrain.kernels import quantize_weight
from posttrain.quantized import QuantizedLinear, quantizable_linears

from . import bitsandbytes
from .checkpoint import CHAT_TEMPLATES, TOKENIZER_FILES, Checkpoint, check_kept, copy_kept, copy_tokenizer, write_checkpoint
from .config import DTYPES, ModelConfig, parse_dtype
from .decoder import CausalLM

QUANT_TYPES = ("nf4", "fp4")
_TRIM_BYTES = 32 << 20


def load(
    path: str | os.PathLike,
    dtype: str | torch.dtype = "bf16",
    quantize: str | None = None,
    block_size: int = 64,
    double_quant: bool = True,
    device: str | torch.device = "cpu",
) -> CausalLM:
    """A model from a Hugging Face directory, dense or in bitsandbytes' 4-bit format.

    dtype: "bf16", "fp16", "fp32", or "auto" for the one config.json names.
    quantize: "nf4" or "fp4" to keep every linear layer but the head in 4 bits (each tensor is rounded to dtype, then
    quantized, as bitsandbytes does); None keeps the checkpoint's kind. The memory held is the result's and one dense
    tensor.

    Raises PosttrainError naming the file or the tensors for a directory that does not hold such a model, ValueError for
    an unknown architecture, dtype or quantization.
    """
    if quantize is not None and quantize not in QUANT_TYPES:
        raise ValueError(f"quantize is {quantize!r}; expected None or one of {', '.join(QUANT_TYPES)}")
    with Checkpoint(Path(path)) as checkpoint:
        config = ModelConfig.from_hf(checkpoint.config)
        chosen = parse_dtype(config.dtype or "bf16" if dtype == "auto" else dtype)
        _check_layers(checkpoint, config)
        with torch.device("meta"):
            model = CausalLM(config)
        packed = bitsandbytes.packed_linears(checkpoint)
        if packed and quantize is not None:
            raise ValueError(f"{path} is in 4 bits already, and is not quantized again; load it as it is, without quantize")
        _check_tensors(checkpoint, model, packed)
        statistics = {name for names in packed.values() for name in names}
        prints = Fingerprint(config)
        passed = 0
        linears = dict(quantizable_linears(model, skip=()))
        to_quantize = {owner for owner, _ in quantizable_linears(model)}
        for name in checkpoint.names():
            if _ignored(name, config) or name in statistics:
                continue
            owner, _, last = name.rpartition(".")
            tensor = checkpoint.read(name)
            passed += tensor.nbytes
            if passed > _TRIM_BYTES:
                passed = 0
                _return_freed_memory()
            prints.update(name, tensor)
            if last == "weight" and owner in packed:
                linear = linears[owner]
                shape = tuple(linear.weight.shape)
                weight = bitsandbytes.read_weight(checkpoint, owner, packed[owner], tensor, shape, device)
                _replace_linear(model, owner, QuantizedLinear(weight, linear.bias))
                continue
            tensor = tensor.to(device, chosen)
            if quantize is not None and last == "weight" and owner in to_quantize:
                weight = quantize_weight(tensor, quantize, block_size, double_quant)
                _replace_linear(model, owner, QuantizedLinear(weight, linears[owner].bias))
                continue
            module = model.get_submodule(owner)
            setattr(module, last, nn.Parameter(tensor, requires_grad=not isinstance(module, QuantizedLinear)))
            del tensor
        model.fingerprint = (packed and checkpoint.metadata.get(METADATA_KEY)) or prints.digest()
    _return_freed_memory()
    return model


def save(
    model: CausalLM, path: str | os.PathLike, max_shard_bytes: int = 5_000_000_000, tokenizer: str | os.PathLike | None = None
) -> None:
    """Write a model as a Hugging Face directory: config.json and model.safetensors, or shards and their index.

    Quantized layers are written in bitsandbytes' format, which transformers loads. The directory appears whole or not
    at all: a full disk or a kill leaves what was there before. Files that are no part of the model (the tokenizer, say)
    stay, links as links. tokenizer: a model's folder whose tokenizer and generation defaults are to go along.

    Raises ValueError for a model with adapters attached: merge them, or save them as an adapter. PosttrainError where `path` is
    a file, the current folder, or one that holds an adapter.
    """
    if max_shard_bytes < 1:
        raise ValueError(f"max_shard_bytes is {max_shard_bytes}; expected a positive number")
    path = Path(path)
    if path.exists() and not path.is_dir():
        raise PosttrainError(f"{path} is a file; give a folder to save the model in")
    check_kept(path)
    groups = list(_groups(model))
    with torch.device("meta"):
        expected = set(CausalLM(model.config).state_dict())
    extra = sorted({group[0][0] for group in groups} ^ expected)
    if extra:
        raise ValueError(f"the model is not a plain {model.config.architecture}: {_some(extra)}. Merge or save its adapters first")
    dtype = next(name for name in ("float32", "bfloat16", "float16") if DTYPES[name] == model.model.embed_tokens.weight.dtype)
    config = model.config.to_hf() | {"torch_dtype": dtype}
    metadata = {}
    layers = [module for module in model.modules() if isinstance(module, QuantizedLinear)]
    if layers:
        dense = {name for name, _ in quantizable_linears(model, skip=())}
        if model.config.tie_word_embeddings:
            dense.add("lm_head")  # transformers has one there all the same
        config["quantization_config"] = bitsandbytes.quantization_config(layers[0].weight, dense)
        if model.fingerprint is not None:
            metadata[METADATA_KEY] = model.fingerprint
    with atomic_dir(path) as folder:
        write_checkpoint(folder, config, groups, max_shard_bytes, metadata)
        if tokenizer is not None:
            copy_tokenizer(Path(tokenizer), folder)
        other = () if tokenizer is None else (*TOKENIZER_FILES, CHAT_TEMPLATES)  # of the model that was here
        if path.is_dir():
            copy_kept(path, folder, other)


def _return_freed_memory() -> None:
    """Give the freed parts of the heap back to the system. Tensors that pass through leave holes between those that stay,
    and glibc keeps the holes: without this, loading a model peaks at twice its size."""
    if sys.platform == "linux" and hasattr(_libc := ctypes.CDLL(None), "malloc_trim"):
        _libc.malloc_trim(0)


def _groups(model: CausalLM) -> Iterator[list[tuple[str, Tensor]]]:
    """The model's tensors by their names in the file; a quantized weight and then its statistics in one group."""
    for owner, module in model.named_modules():
        if isinstance(module, QuantizedLinear):
            yield list(module.weight.to_bitsandbytes(f"{owner}.").items())
            tensors: dict[str, Tensor | None] = {"bias": module.bias}
        else:
            tensors = {**module._parameters, **module._buffers}
        for last, tensor in tensors.items():
            if tensor is not None:
                yield [(f"{owner}.{last}", tensor)]


def _replace_linear(model: nn.Module, name: str, layer: QuantizedLinear) -> None:
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, layer)


def _ignored(name: str, config: ModelConfig) -> bool:
    """What older checkpoints carry and nobody needs: the rotary frequencies, and the tied head's second copy."""
    return name.endswith("rotary_emb.inv_freq") or (config.tie_word_embeddings and name == "lm_head.weight")


def _check_layers(checkpoint: Checkpoint, config: ModelConfig) -> None:
    """PosttrainError where the checkpoint has another number of layers than its configuration: before a million are built."""
    matches = (re.match(r"model\.layers\.(\d+)\.", name) for name in checkpoint.names())
    if (count := len({match[1] for match in matches if match})) != config.num_hidden_layers:
        raise PosttrainError(
            f"{checkpoint.path} does not hold the {config.architecture} that its config.json describes: num_hidden_layers is "
            f"{config.num_hidden_layers} there, and the tensors are of {count} layers; download or save both again"
        )


def _check_tensors(checkpoint: Checkpoint, model: CausalLM, packed: dict[str, list[str]]) -> None:
    """PosttrainError naming the tensors unless the checkpoint's names, shapes and dtypes are the model's."""
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    statistics = {name for names in packed.values() for name in names}
    names = {name for name in checkpoint.names() if not _ignored(name, model.config)} - statistics
    about = f"{checkpoint.path} does not hold the {model.config.architecture} that its config.json describes"
    if missing := sorted(expected.keys() - names):
        raise PosttrainError(f"{about}: it lacks {_some(missing)}")
    if extra := sorted(names - expected.keys()):
        raise PosttrainError(f"{about}: it has {_some(extra)} besides")
    dense = [name for name in sorted(names) if name.removesuffix(".weight") not in packed]
    wrong = [
        f"{name} has shape {list(shape)} and not {list(expected[name])}"
        for name in dense
        if (shape := checkpoint.entry(name).shape) != expected[name]
    ]
    wrong += [
        f"{name} has dtype {entry.dtype} and not a floating-point one"
        for name in dense
        if not (entry := checkpoint.entry(name)).dtype.is_floating_point
    ]
    if wrong:
        raise PosttrainError(f"{about}: {_some(wrong)}")


def _some(items: list[str]) -> str:
    """The first five of them, and how many more there are."""
    return ", ".join(items[:5]) + (f" and {len(items) - 5} more" if len(items) > 5 else "")
