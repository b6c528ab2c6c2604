"""bitsandbytes' 4-bit layout inside a Hugging Face directory.

A quantized linear layer `L` is stored as L.weight (the packed bytes) and, named after it, L.weight.absmax, L.weight.quant_map,
with double quantization L.weight.nested_absmax and L.weight.nested_quant_map, and L.weight.quant_state.bitsandbytes__nf4 (or
__fp4), JSON in a uint8 tensor. config.json has a quantization_config of quant_method "bitsandbytes".
"""

from __future__ import annotations

import json
import math
from typing import Any

import torch
from torch import Tensor

from posttrain.errors import PosttrainError
from posttrain.kernels import DoubleQuantized, QuantizedWeight
from posttrain.kernels.codebooks import CODEBOOKS, DYNAMIC_MAP

from .checkpoint import Checkpoint
from .config import parse_dtype

_STATE = ".weight.quant_state.bitsandbytes__"
_STATISTICS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")


def packed_linears(checkpoint: Checkpoint) -> dict[str, str]:
    """{linear layer: quant_type} of those the checkpoint holds in 4 bits; empty for a dense one.

    Raises PosttrainError when config.json names a quantization other than bitsandbytes' 4-bit one, or none while the tensors do.
    """
    config = checkpoint.config.get("quantization_config")
    packed = dict(name.split(_STATE, 1) for name in checkpoint.names() if _STATE in name)
    if config is None and not packed:
        return {}
    method = (config or {}).get("quant_method", "bitsandbytes" if packed else None)
    if method != "bitsandbytes" or not packed:
        bits = "8-bit" if (config or {}).get("load_in_8bit") else "no 4-bit"
        raise PosttrainError(
            f"{checkpoint.path}: config.json's quantization_config has quant_method {method!r} and {bits} layers; expected a dense "
            "checkpoint or one that bitsandbytes saved in 4 bits"
        )
    return packed


def is_statistic(name: str, packed: dict[str, str]) -> bool:
    """Whether this tensor belongs to a packed weight without being it."""
    owner, separator, rest = name.partition(".weight.")
    return bool(separator) and owner in packed and (rest in _STATISTICS or rest.startswith("quant_state."))


def read_weight(
    checkpoint: Checkpoint, linear: str, quant_type: str, packed: Tensor, device: str | torch.device
) -> QuantizedWeight:
    """A linear layer's quantized weight from its packed tensor (read already) and the statistics the checkpoint holds for it.

    Raises PosttrainError naming the layer when a statistic is missing, malformed, or does not fit the others.
    """

    def fail(what: str) -> PosttrainError:
        return PosttrainError(f"{checkpoint.path}: the 4-bit weight of {linear} {what}; save the model again")

    def statistic(name: str, dtype: torch.dtype, count: int) -> Tensor:
        try:
            tensor = checkpoint.read(f"{linear}.weight.{name}")
        except KeyError:
            raise fail(f"has no {name}") from None
        if tensor.dtype != dtype or tensor.numel() != count:
            raise fail(f"has {tensor.numel()} values of {tensor.dtype} as {name}; expected {count} of {dtype}")
        return tensor.reshape(-1).to(device)

    raw = checkpoint.read(f"{linear}{_STATE}{quant_type}")
    try:
        state = json.loads(bytes(raw.numpy()))
        shape, block_size = tuple(map(int, state["shape"])), int(state["blocksize"])
        dtype = parse_dtype(state["dtype"])
        nested_block_size, offset = state.get("nested_blocksize"), state.get("nested_offset")
    except (ValueError, KeyError, TypeError) as error:
        raise fail(f"has a malformed quant_state ({error})") from error
    codebook = CODEBOOKS.get(quant_type)
    if codebook is None or state.get("quant_type") != quant_type:
        raise fail(f"has quant_type {state.get('quant_type')!r} and is named {quant_type!r}; expected nf4 or fp4")
    # Compared as numbers: FP4's second zero is -0.0 in some writers.
    if not torch.equal(statistic("quant_map", torch.float32, 16).cpu(), codebook.cpu()):
        raise fail(f"has a quant_map other than {quant_type}'s")
    numel = math.prod(shape)
    packed = (
        packed.reshape(-1).view(torch.uint8).to(device)
    )  # quant_storage may have written the bytes as another dtype
    if packed.numel() != (numel + 1) // 2:
        raise fail(f"has {packed.numel()} packed bytes; expected {(numel + 1) // 2} for shape {list(shape)}")
    blocks = -(-numel // block_size)
    if nested_block_size is None:
        return QuantizedWeight(packed, statistic("absmax", torch.float32, blocks), shape, dtype, block_size, quant_type)
    if not torch.equal(statistic("nested_quant_map", torch.float32, 256).cpu(), DYNAMIC_MAP.cpu()):
        raise fail("has a nested_quant_map other than the dynamic one")
    absmax = DoubleQuantized(
        statistic("absmax", torch.uint8, blocks),
        statistic("nested_absmax", torch.float32, -(-blocks // nested_block_size)),
        torch.tensor(offset, dtype=torch.float32, device=device),
        nested_block_size,
    )
    return QuantizedWeight(packed, absmax, shape, dtype, block_size, quant_type)


def write_weight(linear: str, weight: QuantizedWeight) -> list[tuple[str, Tensor]]:
    """The tensors that bitsandbytes reads this weight from, the packed one first."""
    prefix = f"{linear}.weight"
    state: dict[str, Any] = {
        "quant_type": weight.quant_type,
        "blocksize": weight.block_size,
        "dtype": str(weight.dtype).removeprefix("torch."),
        "shape": list(weight.shape),
    }
    tensors = [(prefix, weight.packed.view(-1, 1)), (f"{prefix}.quant_map", CODEBOOKS[weight.quant_type])]
    if isinstance(weight.absmax, DoubleQuantized):
        state |= {
            "nested_blocksize": weight.absmax.block_size,
            "nested_dtype": "float32",
            "nested_offset": weight.absmax.offset.item(),
        }
        tensors += [
            (f"{prefix}.absmax", weight.absmax.codes),
            (f"{prefix}.nested_absmax", weight.absmax.absmax),
            (f"{prefix}.nested_quant_map", DYNAMIC_MAP),
        ]
    else:
        tensors.append((f"{prefix}.absmax", weight.absmax))
    text = torch.frombuffer(bytearray(json.dumps(state).encode()), dtype=torch.uint8)
    return [*tensors, (f"{linear}{_STATE}{weight.quant_type}", text)]


def quantization_config(weight: QuantizedWeight) -> dict[str, Any]:
    """config.json's quantization_config for a model whose layers are quantized like this weight."""
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": weight.quant_type,
        "bnb_4bit_use_double_quant": isinstance(weight.absmax, DoubleQuantized),
        "bnb_4bit_compute_dtype": str(weight.dtype).removeprefix("torch."),
        "bnb_4bit_quant_storage": "uint8",
    }
