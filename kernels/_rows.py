"""A tensor's last dimension as rows."""

from __future__ import annotations

from torch import Tensor


def rows_of(tensor: Tensor) -> Tensor:
    """(..., D), not empty, as (N, D) with the elements of a row beside each other; a copy only where no view can be that."""
    rows = tensor.reshape(-1, tensor.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()
