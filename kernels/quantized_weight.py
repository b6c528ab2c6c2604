"""A weight in 4 bits: what the kernels need to know about it, in one value; and its exchange with bitsandbytes.

packed     uint8 (ceil(n / 2),)                     two codes a byte, the first element in the high nibble
absmax     float32 (ceil(n / block_size),)          or a DoubleQuantized: uint8 codes, float32 nested absmax and offset

bitsandbytes stores a linear layer `L` as L.weight (the packed bytes as a column, in any dtype) and beside it L.weight.absmax,
L.weight.quant_map (16 code values), with double quantization L.weight.nested_absmax and L.weight.nested_quant_map (256), and
L.weight.quant_state.bitsandbytes__nf4 or __fp4: JSON in a uint8 tensor. Its loader refuses every other key.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import codebooks, nf4
from .double_quant import DoubleQuantized, double_quantize

QUANTIZE = {"nf4": nf4.quantize_nf4, "fp4": nf4.quantize_fp4}
_STATE = "quant_state.bitsandbytes__"


def _contiguous(absmax: Tensor | DoubleQuantized) -> Tensor | DoubleQuantized:
    if isinstance(absmax, DoubleQuantized):
        return absmax._replace(codes=absmax.codes.contiguous(), absmax=absmax.absmax.contiguous())
    return absmax.contiguous()


@dataclass(frozen=True, eq=False)
class QuantizedWeight:
    """packed uint8 (ceil(n/2),); absmax float32 (ceil(n/block_size),) or its double quantization; shape and dtype of the
    original; quant_type "nf4" or "fp4".

    Raises TypeError or ValueError when the tensors' dtypes, lengths or devices do not fit the shape and block sizes.
    """

    packed: Tensor
    absmax: Tensor | DoubleQuantized
    shape: tuple[int, ...]
    dtype: torch.dtype
    block_size: int = 64
    quant_type: str = "nf4"

    def __post_init__(self):
        if self.quant_type not in QUANTIZE:
            raise ValueError(f"quant_type is {self.quant_type!r}; expected one of {', '.join(QUANTIZE)}")
        if self.block_size not in nf4.BLOCK_SIZES:
            raise ValueError(f"block_size is {self.block_size!r}; it must be a power of two from 32 to 4096")
        if self.dtype not in nf4.DTYPES:
            raise TypeError(f"dtype is {self.dtype}; expected float32, float16 or bfloat16")
        if min(self.shape, default=0) < 0:
            raise ValueError(f"shape is {tuple(self.shape)}; no dimension can be negative")
        n = math.prod(self.shape)
        blocks = -(-n // self.block_size)
        self._check("packed", self.packed, torch.uint8, (n + 1) // 2)
        if isinstance(self.absmax, DoubleQuantized):
            if self.absmax.block_size < 1:
                raise ValueError(f"the nested block size is {self.absmax.block_size}; it must be positive (256 is the usual one)")
            self._check("absmax codes", self.absmax.codes, torch.uint8, blocks)
            self._check("nested absmax", self.absmax.absmax, torch.float32, -(-blocks // self.absmax.block_size))
            self._check("nested offset", self.absmax.offset, torch.float32, 1)
        else:
            self._check("absmax", self.absmax, torch.float32, blocks)
        # kernels know no strides
        object.__setattr__(self, "packed", self.packed.contiguous())
        object.__setattr__(self, "absmax", _contiguous(self.absmax))

    def _check(self, name: str, tensor: Tensor, dtype: torch.dtype, count: int) -> None:
        if tensor.dtype != dtype:
            raise TypeError(f"{name} is {tensor.dtype}; expected {dtype}")
        if tensor.numel() != count:
            raise ValueError(
                f"a weight of shape {tuple(self.shape)} at block_size {self.block_size} needs {count} values of {name}; "
                f"given {tensor.numel()}"
            )
        if tensor.device != self.packed.device:
            raise ValueError(f"{name} is on {tensor.device} and packed on {self.packed.device}; move one to the other")

    def tensors(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, int]:
        """(packed, absmax or its codes, nested_absmax, nested_offset, nested_block_size), as the ops take them."""
        if isinstance(self.absmax, DoubleQuantized):
            return (self.packed, *self.absmax)
        return self.packed, self.absmax, None, None, 256

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight in `dtype` (the original's unless given)."""
        dtype = self.dtype if dtype is None else dtype
        if dtype not in nf4.DTYPES:
            raise TypeError(f"dtype is {dtype}; expected float32, float16 or bfloat16")
        return torch.ops.posttrain.dequantize_4bit(*self.tensors(), self.shape, dtype, self.block_size, self.quant_type)

    def to_bitsandbytes(self, prefix: str = "") -> dict[str, Tensor]:
        """The tensors bitsandbytes saves for a linear layer, keyed "{prefix}weight", "{prefix}weight.absmax", ...

        packed, absmax and nested_absmax share this weight's memory. Raises ValueError when the nested block size is not
        256, the only one bitsandbytes' kernels decode.
        """
        packed, absmax, nested_absmax, nested_offset, nested_block_size = self.tensors()
        device = packed.device
        state: dict[str, Any] = {
            "quant_type": self.quant_type,
            "blocksize": self.block_size,
            "dtype": str(self.dtype).removeprefix("torch."),
            "shape": list(self.shape),
        }
        tensors = {"": packed.reshape(-1, 1), ".absmax": absmax.reshape(-1)}
        tensors[".quant_map"] = codebooks.CODEBOOKS[self.quant_type].to(device, copy=True)
        if nested_absmax is not None and nested_offset is not None:
            if nested_block_size != 256:
                raise ValueError(
                    f"the nested block size is {nested_block_size} and bitsandbytes reads 256 alone: quantize the weight again"
                )
            tensors[".nested_absmax"] = nested_absmax.reshape(-1)
            tensors[".nested_quant_map"] = codebooks.DYNAMIC_MAP.to(device, copy=True)
            state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": nested_offset.item()}
        text = json.dumps(state).encode()
        tensors[f".{_STATE}{self.quant_type}"] = torch.tensor(list(text), dtype=torch.uint8, device=device)
        return {f"{prefix}weight{name}": tensor for name, tensor in tensors.items()}

    @classmethod
    def from_bitsandbytes(cls, state_dict: Mapping[str, Tensor], prefix: str = "") -> QuantizedWeight:
        """The weight that bitsandbytes saved under "{prefix}weight", sharing the state dict's memory; other keys are left alone.

        Raises KeyError for a missing tensor; ValueError for a malformed quant_state, for code values that are not this
        library's (bitsandbytes has other 4-bit types), or for lengths that do not fit the shape.
        """
        owner = f"{prefix}weight"
        states = [key for key in state_dict if key.startswith(f"{owner}.{_STATE}")]
        if len(states) != 1:
            raise KeyError(f"{owner} has {len(states)} keys {owner}.{_STATE}*; expected one, as bitsandbytes saves a 4-bit weight")

        def get(name: str) -> Tensor:
            if owner + name not in state_dict:
                raise KeyError(f"{owner}{name} is missing beside {states[0]}: save the model again")
            return state_dict[owner + name].detach()

        try:
            state = json.loads(bytes(state_dict[states[0]].tolist()))
            quant_type, block_size = str(state["quant_type"]), int(state["blocksize"])
            shape, dtype = tuple(map(int, state["shape"])), _DTYPES[state["dtype"]]
            nested = "nested_blocksize" in state
            nested_block_size = int(state["nested_blocksize"]) if nested else 0
            offset = float(state["nested_offset"]) if nested else 0.0
            if not math.isfinite(offset):
                raise ValueError(f"nested_offset is {offset}")
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{states[0]} is malformed ({error!r}): save the model again") from error
        if quant_type not in QUANTIZE:
            raise ValueError(f"{owner} has quant_type {quant_type!r}; expected one of {', '.join(QUANTIZE)}")
        _check_map(f"{owner}.quant_map", get(".quant_map"), codebooks.CODEBOOKS[quant_type])
        packed = get("").contiguous().view(-1).view(torch.uint8)  # quant_storage: the bytes as any dtype
        codes = get(".absmax").reshape(-1)
        absmax: Tensor | DoubleQuantized = codes
        if nested:
            _check_map(f"{owner}.nested_quant_map", get(".nested_quant_map"), codebooks.DYNAMIC_MAP)
            nested_offset = torch.tensor(offset, dtype=torch.float32, device=packed.device)
            absmax = DoubleQuantized(codes, get(".nested_absmax").reshape(-1), nested_offset, nested_block_size)
        try:
            return cls(packed, absmax, shape, dtype, block_size, quant_type)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{owner}: {error}") from error


_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in nf4.DTYPES}


def _check_map(name: str, given: Tensor, expected: Tensor) -> None:
    if not torch.equal(given.float().cpu().view(-1), expected):
        raise ValueError(f"{name} holds other code values than this library's; a weight in them cannot be read")


def quantize_weight(w: Tensor, quant_type: str = "nf4", block_size: int = 64, double_quant: bool = True) -> QuantizedWeight:
    """Quantize a weight of any shape to 4 bits, its absmax to 8 when `double_quant`.

    w: float32, float16 or bfloat16. Raises as `quantize_nf4`; ValueError too for NaN or infinite values under
    `double_quant`, which has no code for their absmax.
    """
    if quant_type not in QUANTIZE:
        raise ValueError(f"quant_type is {quant_type!r}; expected one of {', '.join(QUANTIZE)}")
    packed, absmax = QUANTIZE[quant_type](w, block_size)
    return QuantizedWeight(
        packed, double_quantize(absmax) if double_quant else absmax, tuple(w.shape), w.dtype, block_size, quant_type
    )
