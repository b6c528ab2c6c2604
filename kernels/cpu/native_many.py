"""Linear layers over many rows of bfloat16 on a machine with AMX, by amx_many.c: dense or in 4 bits, with a low rank or without,
one or several that read the same x."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import native

_P, _L = ctypes.c_void_p, ctypes.c_int64
MAX_LAYERS = 4  # in many_rows.h
_LOW_RANK_ROWS = 32  # forward, fewer leave the packing of A and B unpaid
_PRODUCT_ROWS = 256  # up to so many leave the packing of W unpaid
_DEPTH, _WEIGHTS = 2048, 1 << 21


class Layer(NamedTuple):
    """`base`: the weight's tensors, nested_block_size, block_size and quant_type ("none": dense). A and B None: no low rank."""

    base: tuple
    bias: Tensor | None = None
    A: Tensor | None = None
    B: Tensor | None = None
    scaling: float = 0.0


class CLayer(ctypes.Structure):
    """many_rows_layer in many_rows.h."""

    _fields_ = [
        *((name, _P) for name in ("dense", "packed", "absmax", "nested_absmax", "nested_offset")),
        *((name, _L) for name in ("nested_block_size", "block_size", "quant_type")),
        *((name, _P) for name in ("bias", "A", "B")),
        ("factors", _L),
        *((name, _P) for name in ("y", "dA", "dB")),
        *((name, _L) for name in ("N", "r")),
        ("scaling", ctypes.c_double),
    ]


class _Args(ctypes.Structure):
    """many_rows_args in many_rows.h."""

    _fields_ = [
        *((name, _P) for name in ("x", "dropped", "dx", "low_rank", "workspace")),
        *((name, _L) for name in ("M", "K", "layers", "threads")),
        ("layer", ctypes.POINTER(CLayer)),
    ]


_LAYERS = [CLayer * n for n in range(MAX_LAYERS + 1)]  # a type made for one call costs more than the call's arguments
_library = native._library
_library.many_rows_bytes.argtypes, _library.many_rows_bytes.restype = [ctypes.POINTER(_Args), ctypes.c_int], _L
for _name in ("many_rows_forward", "many_rows_backward"):
    getattr(_library, _name).argtypes = [ctypes.POINTER(_Args)]


def takes(x: Tensor, backward: bool = False) -> bool:
    """Whether the library multiplies these rows (M, K) at all, if only by the low rank; backward it always does."""
    rows = 1 if backward else _LOW_RANK_ROWS
    return native.ISA == "amx" and x.dtype == torch.bfloat16 and x.shape[0] >= rows and x.shape[1] > 0


def faster_than_vendor(M: int, Ns: Sequence[int], K: int, backward: bool) -> bool:
    """Whether layers (N, K) that share M rows are multiplied here, or by torch's GEMM (after dequantization).

    W is packed anew in every call, which costs as much as some 100 rows do, and a panel of it must fit the second-level cache
    beside others: the deeper the sum (K of x W^T, each N of dY W), the fewer do, and the more often x comes from memory. A large
    W comes from memory itself. Measured on two cores at 1,024 rows, times over torch's GEMM of a dense W: widths of 192 to 1536
    0.55 to 1.03 (dequantize and torch: 0.8 to 1.1), 2048 x 2048 1.06 to 1.17 (0.97 to 1.15), depth 4096 1.1 to 1.8 (1.1 to 1.35).
    """
    deepest = max(Ns, default=0) if backward else K
    return M > _PRODUCT_ROWS and deepest <= _DEPTH and max(Ns, default=0) * K <= _WEIGHTS


def takes_product(x: Tensor, Ns: Sequence[int], K: int, backward: bool) -> bool:
    """Whether x W^T of these rows (or, backward, dY W of as many) is the library's."""
    return takes(x) and faster_than_vendor(len(x), Ns, K, backward)


def weight_of(base: tuple) -> tuple[list[Tensor | None], list[int]]:
    """What many_rows_layer begins with: tensors, which must live as long as the call, and their format."""
    weight, absmax, nested_absmax, nested_offset, nested_block_size, block_size, quant_type = base
    if quant_type == "none":
        return [weight.contiguous(), None, None, None, None], [0, 0, 0]
    format = [nested_block_size, block_size, native._QUANT_TYPES[quant_type]]
    return [None, weight.contiguous(), absmax.contiguous(), nested_absmax, nested_offset], format


class _Call:
    """The arguments of one call in C, and the tensors that they point into for as long as it lasts."""

    def __init__(self, x: Tensor, dropped: Tensor):
        self._alive: list[Tensor | None] = []
        self._layers: list[CLayer] = []
        self.args = _Args(self._pointer(x), self._pointer(dropped), None, None, None, *x.shape, 0, torch.get_num_threads(), None)

    def _pointer(self, tensor: Tensor | None) -> int | None:
        self._alive.append(tensor)
        return None if tensor is None else tensor.data_ptr()

    def add(self, layer: Layer, y: Tensor, dA: Tensor | None, dB: Tensor | None, with_base: bool) -> None:
        """One layer: y (M, N) is written (or added to, without its base) forward and is dY backward."""
        weight, format = weight_of(layer.base) if with_base else ([None] * 5, [0] * 3)
        A, B, r, dtype = layer.A, layer.B, 0, torch.bfloat16
        if A is not None and B is not None:
            r = len(A)
            if A.dtype == B.dtype == torch.float32:
                dtype = torch.float32
            A, B = A.to(dtype).contiguous(), B.to(dtype).contiguous()
        bias = None if layer.bias is None else layer.bias.contiguous()
        base, factors, results = ([self._pointer(t) for t in tensors] for tensors in (weight, (bias, A, B), (y, dA, dB)))
        self._layers.append(CLayer(*base, *format, *factors, native._DTYPES[dtype], *results, y.shape[1], r, layer.scaling))

    def wants(self, dx: Tensor | None, V: Tensor | None) -> None:
        self.args.dx, self.args.low_rank = self._pointer(dx), self._pointer(V)

    def run(self, function, backward: bool) -> None:
        layers = _LAYERS[len(self._layers)](*self._layers)
        self.args.layer, self.args.layers = layers, len(layers)
        self.args.workspace = self._pointer(native.kept_memory(_library.many_rows_bytes(self.args, backward)))
        native._check(function(self.args))


def forward(x: Tensor, dropped: Tensor, layers: Sequence[Layer], ys: Sequence[Tensor], with_base: bool) -> None:
    """ys (M, N) = x W^T + bias + scaling dropped A^T B^T of each layer; without the base, ys += the last term. All contiguous."""
    call = _Call(x, dropped)
    for layer, y in zip(layers, ys, strict=True):
        call.add(layer, y, None, None, with_base)
    call.run(_library.many_rows_forward, False)


def backward(
    dys: Sequence[Tensor], dropped: Tensor, layers: Sequence[Layer], dx: Tensor | None, V: Tensor | None,
    dAs: Sequence[Tensor | None], dBs: Sequence[Tensor | None], with_base: bool,
) -> None:  # fmt: skip
    """dx (M, K) = the layers' sum of dY W + V A with V = scaling dY B, or without the base dx += V A. Given V (M, sum of r), it is
    written and V A is left out. dAs and dBs (float32) where they are not None. All are contiguous."""
    call = _Call(dropped, dropped)
    for layer, dy, dA, dB in zip(layers, dys, dAs, dBs, strict=True):
        call.add(layer, dy, dA, dB, with_base)
    call.wants(dx if with_base or V is None else None, V)
    call.run(_library.many_rows_backward, True)
