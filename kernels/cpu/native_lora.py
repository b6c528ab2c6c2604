"""lora_linear of the native CPU engine.

The base product is the vendor's, or the packed weight's (native.py). The low rank is added to it by one call in C: for many rows
of bfloat16 on a machine with AMX by lora_amx.c, for few rows by multi_lora.c. Else torch's thin products.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from . import native, pytorch_lora

_P, _L = ctypes.c_void_p, ctypes.c_int64
# Fewer rows leave the packing of the factors unpaid.
_AMX_ROWS = 64
# Up to so many rows the low-rank term is one call in C instead of two products and a cast of torch's.
_FEW_ROWS = 64
_MAX_LAYERS = 4  # in lora_amx.c


class _Layer(ctypes.Structure):
    """lora_layer in lora.h."""

    _fields_ = [
        *((name, _P) for name in ("A", "B", "y", "dA", "dB")),
        *((name, _L) for name in ("N", "r")),
        ("scaling", ctypes.c_double),
    ]


class _Args(ctypes.Structure):
    """lora_args in lora.h."""

    _fields_ = [
        *((name, _P) for name in ("x", "dx", "low_rank", "workspace")),
        *((name, _L) for name in ("M", "K", "layers", "threads")),
        ("layer", ctypes.POINTER(_Layer)),
    ]


_library = native._library
_library.lora_amx_bytes.argtypes, _library.lora_amx_bytes.restype = [ctypes.POINTER(_Args), ctypes.c_int], _L
for _name in ("lora_amx_forward", "lora_amx_backward"):
    getattr(_library, _name).argtypes = [ctypes.POINTER(_Args)]
_library.lora_dropout.argtypes = [_P, ctypes.c_int, _L, ctypes.c_double, _L, _P, _L]
_library.lora_dropout.restype = None


def _dropped(x: Tensor, p: float, seed: int) -> Tensor:
    """As pytorch_lora's, with the same bits."""
    if p == 0.0 or x.dtype not in native._DTYPES:
        return pytorch_lora.dropout(x, p, seed)
    x = x.contiguous()
    out, n = torch.empty_like(x), x.numel()
    _library.lora_dropout(x.data_ptr(), native._DTYPES[x.dtype], n, p, seed, out.data_ptr(), native._threads(16 * n))
    return out


def _add_low_rank(y: Tensor, x: Tensor, A: Tensor, B: Tensor, scaling: float) -> None:
    """y += scaling x A^T B^T for few rows: the one adapter of a batch in multi_lora_add."""
    A, B = A.detach().to(x.dtype).contiguous()[None], B.detach().to(x.dtype).contiguous()[None]
    ids = torch.zeros(x.shape[0], dtype=torch.int64)
    native.multi_lora_add(y, x.contiguous(), A, B, torch.tensor([scaling]), None, ids)


def _amx_takes(x: Tensor) -> bool:
    return native.ISA == "amx" and x.dtype == torch.bfloat16 and x.shape[0] >= _AMX_ROWS and x.shape[1] > 0


class _Call:
    """The arguments of one call in C, and the tensors that they point into for as long as it lasts."""

    def __init__(self, x: Tensor):
        self._alive: list[Tensor | None] = []
        self._layers: list[_Layer] = []
        self.args = _Args(self._pointer(x), None, None, None, *x.shape, 0, torch.get_num_threads(), None)

    def _pointer(self, tensor: Tensor | None) -> int | None:
        self._alive.append(tensor)
        return None if tensor is None else tensor.data_ptr()

    def add(self, A: Tensor, B: Tensor, y: Tensor, dA: Tensor | None, dB: Tensor | None, scaling: float) -> None:
        """One layer: y (M, N) is added to forward and is dY backward."""
        A, B = A.to(torch.bfloat16).contiguous(), B.to(torch.bfloat16).contiguous()
        pointers = [self._pointer(t) for t in (A, B, y, dA, dB)]
        self._layers.append(_Layer(*pointers, y.shape[1], A.shape[0], scaling))

    def wants(self, dx: Tensor | None, V: Tensor | None) -> None:
        self.args.dx, self.args.low_rank = self._pointer(dx), self._pointer(V)

    def run(self, function, backward: bool) -> None:
        layers = (_Layer * len(self._layers))(*self._layers)
        self.args.layer, self.args.layers = layers, len(layers)
        self.args.workspace = native.kept_memory(_library.lora_amx_bytes(self.args, backward)).data_ptr()
        native._check(function(self.args))


def _forward(x: Tensor, bases: list[tuple], As, Bs, scalings, biases, dropout: float, seed: int, Ns) -> list[Tensor]:
    x, K = x.contiguous(), x.shape[1]
    ys = [pytorch_lora.base_product(native, x, base, bias, N, K) for base, bias, N in zip(bases, biases, Ns, strict=True)]
    call = _Call(_dropped(x, dropout, seed))
    for A, B, scaling, y in zip(As, Bs, scalings, ys, strict=True):
        call.add(A, B, y, None, None, scaling)
    call.run(_library.lora_amx_forward, False)
    return ys


def _rounded(gradients: Sequence[Tensor | None], factors: Sequence[Tensor]) -> list[Tensor]:
    """The gradients in their factors' dtypes; empty (0,) for None."""
    return [t.new_empty(0) if grad is None else grad.to(t.dtype) for t, grad in zip(factors, gradients, strict=True)]


def _backward(
    dys, x: Tensor, bases: list[tuple], As, Bs, scalings, dropout: float, seed: int, need_x: bool, need_A: bool, need_B: bool
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    x, dys = x.contiguous(), [dy.contiguous() for dy in dys]
    dx = pytorch_lora.base_dx(native, dys, bases, x.shape[1]) if need_x else None
    dAs = [torch.empty(A.shape) if need_A else None for A in As]
    dBs = [torch.empty(B.shape) if need_B else None for B in Bs]
    call = _Call(_dropped(x, dropout, seed))
    for A, B, scaling, dy, dA, dB in zip(As, Bs, scalings, dys, dAs, dBs, strict=True):
        call.add(A, B, dy, dA, dB, scaling)
    V = x.new_empty(x.shape[0], sum(len(A) for A in As)) if need_x and dropout else None
    call.wants(dx, V)
    call.run(_library.lora_amx_backward, True)
    if dx is None:
        dx = x.new_empty(0)
    elif V is not None:
        dx += _dropped(V @ torch.cat([A.to(x.dtype) for A in As]), dropout, seed)
    return dx, _rounded(dAs, As), _rounded(dBs, Bs)


def lora_linear(
    x, weight, absmax, nested_absmax, nested_offset, nested_block_size, lora_A, lora_B, scaling, bias, dropout, seed, N, K,
    block_size, quant_type,
) -> Tensor:  # fmt: skip
    """x (M, K), W (N, K) dense or packed ("none": dense), lora_A (r, K), lora_B (N, r), bias (N,) or None: (M, N)."""
    base = (weight, absmax, nested_absmax, nested_offset, nested_block_size, block_size, quant_type)
    if not _amx_takes(x):
        if x.shape[0] > _FEW_ROWS or x.dtype not in native._DTYPES:
            return pytorch_lora.lora_linear_on(native, x, base, lora_A, lora_B, scaling, bias, dropout, seed, N, K)
        y = pytorch_lora.base_product(native, x, base, bias, N, K)
        _add_low_rank(y, _dropped(x, dropout, seed), lora_A, lora_B, scaling)
        return y
    return _forward(x, [base], [lora_A], [lora_B], [scaling], [bias], dropout, seed, [N])[0]


def lora_linear_backward(
    dy, x, weight, absmax, nested_absmax, nested_offset, nested_block_size, lora_A, lora_B, scaling, dropout, seed, N, K,
    block_size, quant_type, need_x, need_A, need_B,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(dX (M, K), dA (r, K), dB (N, r)) of dy (M, N); empty (0,) where not needed. dA, dB in their factors' dtypes."""
    base = (weight, absmax, nested_absmax, nested_offset, nested_block_size, block_size, quant_type)
    needs = (need_x, need_A, need_B)
    if not _amx_takes(x):
        return pytorch_lora.lora_linear_backward_on(native, dy, x, base, lora_A, lora_B, scaling, dropout, seed, N, K, *needs)
    dx, (dA,), (dB,) = _backward([dy], x, [base], [lora_A], [lora_B], [scaling], dropout, seed, *needs)
    return dx, dA, dB


def lora_linear_group(x, bases, lora_As, lora_Bs, scalings, biases, dropout, seed, Ns, K) -> list[Tensor]:
    """[lora_linear(x, ...)] of layers that share x and the dropout: lists of what each takes, `bases` of the weight's tensors,
    nested_block_size, block_size and quant_type."""
    if not _amx_takes(x) or len(bases) > _MAX_LAYERS:
        layers = zip(bases, lora_As, lora_Bs, scalings, biases, Ns, strict=True)
        each = [(*b[:5], A, B, s, bias, dropout, seed, N, K, *b[5:]) for b, A, B, s, bias, N in layers]
        return [lora_linear(x, *layer) for layer in each]
    return _forward(x, bases, lora_As, lora_Bs, scalings, biases, dropout, seed, Ns)


def lora_linear_group_backward(
    dys, x, bases, lora_As, lora_Bs, scalings, dropout, seed, Ns, K, need_x, need_A, need_B
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """(dX (M, K), [dA], [dB]) of [dy (M, N)]; empty (0,) where not needed."""
    needs = (need_x, need_A, need_B)
    if not _amx_takes(x) or len(bases) > _MAX_LAYERS:
        group = pytorch_lora.lora_linear_group_backward_on
        return group(native, dys, x, bases, lora_As, lora_Bs, scalings, dropout, seed, Ns, K, *needs)
    return _backward(dys, x, bases, lora_As, lora_Bs, scalings, dropout, seed, *needs)
