"""x W^T + bias and dX = dY W of the native CPU engine: few rows straight from the packed weight, tile by tile in the cache; many
rows of bfloat16 by amx_many.c on a machine with AMX; else the weight is dequantized into memory that is used again, and torch's
GEMM does the rest."""

from __future__ import annotations

import ctypes

import torch
import torch.nn.functional as F
from torch import Tensor

from . import native, native_many
from .native import _DTYPES, _QUANT_TYPES, _address, _check, _dequantize_into, _library, _threads, kept_memory
from .native_low_rank import LowRank

# Up to so many rows the product is computed from the packed weight row by row; AMX keeps up with the others for longer.
_FUSED_ROWS, _FUSED_ROWS_AMX = 64, 256
_DENSE_ROWS = 32  # two tiles of x beside two of W


def _amx_takes(dtype: torch.dtype, K: int, block_size: int) -> bool:
    """Whether the library's AMX products of few rows take this shape (in_groups_of_128 in native.h)."""
    return native.ISA == "amx" and dtype == torch.bfloat16 and K % block_size == 0 and block_size != 32


def _dequantized(
    tensors: tuple[Tensor, Tensor, Tensor | None, Tensor | None, int], shape: tuple[int, int], dtype: torch.dtype,
    block_size: int, quant_type: str,
) -> Tensor:  # fmt: skip
    """The whole weight in `dtype`, in memory that this thread uses again for its next weight: valid until then."""
    n = shape[0] * shape[1]
    size = n * dtype.itemsize
    out = kept_memory(size)[:size].view(dtype).view(shape)
    _dequantize_into(out, *tensors, block_size, quant_type)
    return out


def _check_dtypes(x: Tensor, bias: Tensor | None) -> None:
    """The library reads addresses: what lies there must be what it takes it for."""
    if x.dtype not in _DTYPES:
        raise TypeError(f"x is {x.dtype}; expected float32, float16 or bfloat16")
    if bias is not None and bias.dtype != x.dtype:
        raise TypeError(f"bias is {bias.dtype} and x is {x.dtype}; give both in one dtype")


def linear_4bit(
    x, packed, absmax, nested_absmax, nested_offset, nested_block_size, bias, N, K, block_size, quant_type,
    low: LowRank | None = None,
) -> Tensor:  # fmt: skip
    """x (M, K) times the weight (N, K) transposed, plus bias (N,) or None, in x's dtype: (M, N). `low`, for few rows, is added."""
    _check_dtypes(x, bias)
    M = x.shape[0]
    if low is None and M > (_FUSED_ROWS_AMX if _amx_takes(x.dtype, K, block_size) else _FUSED_ROWS):
        tensors = (packed, absmax, nested_absmax, nested_offset, nested_block_size)
        if native_many.takes_product(x, [N], K, False):
            x, y = x.contiguous(), x.new_empty(M, N)
            native_many.forward(x, x, [native_many.Layer((*tensors, block_size, quant_type), bias)], [y], True)
            return y
        w = _dequantized(tensors, (N, K), x.dtype, block_size, quant_type)
        return F.linear(x, w, bias)
    x, bias = x.contiguous(), None if bias is None else bias.contiguous()
    y = torch.empty(M, N, dtype=x.dtype)
    _check(
        _library.linear_4bit(
            x.data_ptr(), _DTYPES[x.dtype], M, packed.data_ptr(), absmax.data_ptr(), _address(nested_absmax),
            _address(nested_offset), nested_block_size, block_size, _QUANT_TYPES[quant_type], _address(bias), N, K,
            y.data_ptr(), _threads(N * K), None if low is None else ctypes.byref(low),
        )
    )  # fmt: skip
    return y


def linear_4bit_dx(dy, packed, absmax, nested_absmax, nested_offset, nested_block_size, N, K, block_size, quant_type) -> Tensor:
    """dy (M, N) times the weight (N, K), in dy's dtype: (M, K)."""
    _check_dtypes(dy, None)
    M = dy.shape[0]
    if M > (_FUSED_ROWS_AMX if _amx_takes(dy.dtype, K, block_size) else _FUSED_ROWS):
        tensors = (packed, absmax, nested_absmax, nested_offset, nested_block_size)
        if native_many.takes_product(dy, [N], K, True):
            dx = dy.new_empty(M, K)
            layer = native_many.Layer((*tensors, block_size, quant_type))
            native_many.backward([dy.contiguous()], dx, [layer], dx, None, [None], [None], True)
            return dx
        w = _dequantized(tensors, (N, K), dy.dtype, block_size, quant_type)
        return dy @ w
    dy = dy.contiguous()
    dx = torch.empty(M, K, dtype=dy.dtype)
    _check(
        _library.linear_4bit_dx(
            dy.data_ptr(), _DTYPES[dy.dtype], M, packed.data_ptr(), absmax.data_ptr(), _address(nested_absmax),
            _address(nested_offset), nested_block_size, block_size, _QUANT_TYPES[quant_type], N, K, dx.data_ptr(),
            _threads(N * K),
        )
    )  # fmt: skip
    return dx


def dense_linear(x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
    """F.linear of x (M, K) and a dense w (N, K). Up to 32 rows of bfloat16 go through AMX where there is one: about as fast as W
    can be read, and each row gets the same bits however many there are."""
    (M, K), N = x.shape, w.shape[0]
    if native.ISA != "amx" or x.dtype != torch.bfloat16 or not 1 <= M <= _DENSE_ROWS or N % 16 or K % 32 or not (N and K):
        return F.linear(x, w, bias)
    _check_dtypes(x, bias)
    x, w, bias = x.contiguous(), w.contiguous(), None if bias is None else bias.contiguous()
    y = torch.empty(M, N, dtype=x.dtype)
    _check(_library.dense_linear(x.data_ptr(), M, w.data_ptr(), _address(bias), N, K, y.data_ptr(), _threads(N * K)))
    return y
