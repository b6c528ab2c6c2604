"""multi_lora_linear's low-rank term in plain PyTorch: what runs where no C compiler built the native engine.

    y[m] += scaling[i] (x[m] A[i]^T) B[i]^T,  i = adapter_ids[m] >= 0,  over the first ranks[i] of the r columns

Rows are sorted by adapter and cut into tiles of at most 16 rows of one adapter, as the GPU kernels do; a batched product takes many
tiles at once, whatever their adapters. The loop is over groups of tiles, so that the gathered adapters stay few.
"""

from __future__ import annotations

import torch
from torch import Tensor

TILE = 16
_GATHERED = 1 << 24  # elements of lora_A and lora_B copied at a time


def check_ids(adapter_ids: Tensor, n: int, ranks: Tensor | None, r: int) -> None:
    """ValueError naming the first id outside [-1, n), or the rank outside [0, r] of an adapter."""
    wrong = (adapter_ids < -1) | (adapter_ids >= n)
    if wrong.any():
        m = int(wrong.nonzero()[0])
        raise ValueError(unknown_id(m, int(adapter_ids[m]), n))
    if ranks is not None and bool(((ranks < 0) | (ranks > r)).any()):
        i = int(((ranks < 0) | (ranks > r)).nonzero()[0])
        raise ValueError(unknown_rank(i, int(ranks[i]), r))


def unknown_id(m: int, given: int, n: int) -> str:
    known = f"-1 (the base alone) to {n - 1}" if n else "-1 (the base alone), since there are no adapters"
    return f"adapter_ids[{m}] is {given}; expected {known}"


def unknown_rank(i: int, given: int, r: int) -> str:
    return f"ranks[{i}] is {given}; expected 0 to {r}, the rank that lora_A and lora_B have room for"


def _tiles(adapter_ids: Tensor, n: int) -> tuple[Tensor, Tensor, Tensor]:
    """(adapter (t,), rows (t, TILE), filled bool (t, TILE)): every row with an adapter in one place of one tile."""
    order = adapter_ids.argsort(stable=True)
    order = order[int((adapter_ids < 0).sum()) :]
    counts = torch.bincount(adapter_ids[order], minlength=n)
    tiles = (counts + TILE - 1) // TILE
    adapter = torch.arange(n).repeat_interleave(tiles)
    inside = torch.arange(len(adapter)) - (tiles.cumsum(0) - tiles)[adapter]  # the tile's number in its segment
    offset = inside[:, None] * TILE + torch.arange(TILE)
    filled = offset < counts[adapter][:, None]
    place = (counts.cumsum(0) - counts)[adapter][:, None] + offset
    return adapter, order[place.clamp(max=max(len(order) - 1, 0))] if len(order) else place, filled


def multi_lora_add(y: Tensor, x: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: Tensor, ranks, adapter_ids: Tensor) -> None:
    """Adds to y (M, N) in place. x (M, K), lora_A (n, r, K), lora_B (n, N, r) in x's dtype, scaling float32 (n,), ranks int32
    (n,) or None, adapter_ids int64 (M,). ValueError for an id or a rank out of range; y is as it was then."""
    n, r, K = lora_A.shape
    # a batched product of small matrices adds one term after another: in wider arithmetic such chains cost no accuracy
    wide = torch.float64 if x.dtype == torch.float32 else torch.float32
    check_ids(adapter_ids, n, ranks, r)
    if n == 0 or r == 0:
        return
    adapter, rows, filled = _tiles(adapter_ids, n)
    step = max(1, _GATHERED // max(r * (K + y.shape[1]), 1))
    for t in range(0, len(adapter), step):
        i, m, here = adapter[t : t + step], rows[t : t + step], filled[t : t + step]
        A, B = lora_A[i].to(wide), lora_B[i].to(wide)
        if ranks is not None:  # padding may hold anything, NaN included
            kept = torch.arange(r) < ranks[i][:, None]
            A, B = A.where(kept[:, :, None], 0.0), B.where(kept[:, None, :], 0.0)
        added = torch.bmm(torch.bmm(x[m].to(wide), A.mT), B.mT) * scaling[i][:, None, None]
        m = m[here]
        y[m] = (y[m] + added[here]).to(y.dtype)
