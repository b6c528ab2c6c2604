"""Tensors as kernels read them."""

from __future__ import annotations

import math
from typing import TypeVar

import torch
from torch import Tensor

_Given = TypeVar("_Given", Tensor, Tensor | None)


_unsafe_view = torch.ops.aten._unsafe_view.default


def flattened(x: Tensor) -> Tensor:
    """(..., D) as (M, D); D may be 0."""
    return x if x.dim() == 2 else x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def rows_of(tensor: Tensor) -> Tensor:
    """(..., D), not empty, as (N, D) with the elements of a row beside each other; a copy only where no view can be that."""
    rows = tensor.reshape(-1, tensor.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def unflattened(y: Tensor, x: Tensor) -> Tensor:
    """y (rows of x, N), of the op that returns it alone, as (..., N). To autograd it is no view: callers may write into it, as into
    what F.linear returns."""
    return y if x.dim() == 2 else _unsafe_view(y, [*x.shape[:-1], y.shape[-1]])


def contiguous(tensor: _Given) -> _Given:
    """Its elements one behind the other, as kernels that take no stride read them; a copy only where they are not; None of None."""
    return tensor if tensor is None else tensor.contiguous()
