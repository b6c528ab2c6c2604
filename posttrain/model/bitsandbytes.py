"""bitsandbytes' 4-bit layers inside a Hugging Face directory.

How one weight is stored is `QuantizedWeight.to_bitsandbytes`'s to say: L.weight (the packed bytes) and statistics named
L.weight.absmax and so on. Here: which of a checkpoint's tensors those are, and config.json's quantization_config.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from posttrain.errors import PosttrainError
from posttrain.kernels import DoubleQuantized, QuantizedWeight

from .checkpoint import Checkpoint

_STATE = ".weight.quant_state.bitsandbytes__"


def packed_linears(checkpoint: Checkpoint) -> dict[str, list[str]]:
    """{linear layer: names of its weight's statistics} of those the checkpoint holds in 4 bits; empty for a dense one.

    Raises PosttrainError when config.json names a quantization and the tensors are not bitsandbytes' 4-bit ones.
    """
    config = checkpoint.config.get("quantization_config") or {}
    if not isinstance(config, dict):
        raise PosttrainError(f"{checkpoint.path}: config.json's quantization_config is {config!r}; expected an object")
    names = checkpoint.names()
    packed: dict[str, list[str]] = {name.split(_STATE)[0]: [] for name in names if _STATE in name}
    if config and (config.get("quant_method", "bitsandbytes") != "bitsandbytes" or not packed):
        kind = "8-bit" if config.get("load_in_8bit") else "no 4-bit"
        raise PosttrainError(
            f"{checkpoint.path}: config.json's quantization_config has quant_method {config.get('quant_method')!r} and "
            f"the tensors are {kind} ones; expected a dense checkpoint or one that bitsandbytes saved in 4 bits"
        )
    for name in names:
        owner, separator, _ = name.partition(".weight.")
        if separator and owner in packed:
            packed[owner].append(name)
    return packed


def read_weight(
    checkpoint: Checkpoint,
    linear: str,
    statistics: list[str],
    weight: Tensor,
    shape: tuple[int, ...],
    device: str | torch.device,
) -> QuantizedWeight:
    """A linear layer's quantized weight, from its packed tensor (read already) and its statistics' names.

    Raises PosttrainError naming the layer when they are malformed or the weight's shape is not `shape`.
    """
    state = {name: checkpoint.read(name).to(device) for name in statistics} | {f"{linear}.weight": weight.to(device)}
    try:
        quantized = QuantizedWeight.from_bitsandbytes(state, f"{linear}.")
    except (KeyError, ValueError) as error:
        raise PosttrainError(f"{checkpoint.path}: {error.args[0]}") from error
    if quantized.shape != shape:
        raise PosttrainError(
            f"{checkpoint.path}: {linear}.weight has shape {list(quantized.shape)} in its quant_state; config.json's "
            f"model needs {list(shape)}"
        )
    return quantized


def quantization_config(weight: QuantizedWeight, dense: Collection[str] = ("lm_head",)) -> dict[str, Any]:
    """config.json's quantization_config for a model whose layers are quantized like this weight, all but the linears `dense`.

    transformers makes every linear but the head a 4-bit one unless the names of the dense ones are there.
    """
    others = {} if set(dense) == {"lm_head"} else {"llm_int8_skip_modules": sorted(dense)}
    return others | {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": weight.quant_type,
        "bnb_4bit_use_double_quant": isinstance(weight.absmax, DoubleQuantized),
        "bnb_4bit_compute_dtype": str(weight.dtype).removeprefix("torch."),
        "bnb_4bit_quant_storage": "uint8",
    }
