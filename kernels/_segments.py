"""Rows of a batch sorted by the adapter they use, and cut into tiles of one adapter each, on the device and without a sync.

    order      the rows that have an adapter, sorted by its id, and within one id as they came (a stable sort)
    segment    a run of one id in `order`;  tile: up to BLOCK_M consecutive rows of one segment

adapter_ids  int64 (rows / rows_per_id,)   -1: no adapter. Row m has id adapter_ids[m // rows_per_id]
order        int32 (rows,)                 as many entries as there are rows with an adapter; the rest is never read
tiles        int32 (3, slots)              adapter, first place in `order`, rows; 0 rows: an empty slot

How many segments there are is known on the device alone, so later launches take a grid of as many slots as any batch can need:
sum over segments of ceil(rows / BLOCK_M) <= rows // BLOCK_M + n + 1, and never more than rows. A tile finds a slot of its own
without asking the others: its first place in `order` or, where that grid is the smaller, start // BLOCK_M + id plus its number in
the segment. An id outside [-1, n) becomes n: its rows are sorted last, and no kernel reads an adapter for them.

Least bytes: 8 rows / rows_per_id + 4 rows + 12 slots. Each program compares its rows with all others, 32 to an instruction, so the
work grows as rows^2: 2,048 rows are 0.5 million warp instructions. A step of generation does it once, not once a layer.
Oracle: reference/multi_lora_linear.py, `segments`.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ._triton import on_device_of, tl, triton
from ._variant import Variant

BLOCK = 64
FEW_ROWS = 128


def tile_rows(rows: int) -> int:
    """BLOCK_M: the smallest that tensor cores take while rows are few and adapters' bytes rule, more where x's and y's do."""
    return 16 if rows <= FEW_ROWS else 32


def count_slots(rows: int, n: int) -> int:
    return min(rows, rows // tile_rows(rows) + n + 1)


@triton.jit
def _load_ids(ids_ptr, rows, rows_per_id, M, n):
    """int32 ids of `rows`: -2 beyond M, n where the given id names no adapter."""
    given = tl.load(ids_ptr + rows // rows_per_id, mask=rows < M, other=-2)
    unknown = (given < -1) | (given >= n)
    return tl.where(rows < M, tl.where(unknown, n, given), -2).to(tl.int32)


@triton.jit(do_not_specialize=["M", "n", "rows_per_id", "slots"])
def _segment_rows_kernel(
    ids_ptr, order_ptr, tiles_ptr, M, n, rows_per_id, slots, BY_PLACE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK: tl.constexpr
):
    # One program owns BLOCK rows and counts the rows that come before each of them.
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    ids = _load_ids(ids_ptr, rows, rows_per_id, M, n)
    start = tl.zeros((BLOCK,), tl.int32)
    before = tl.zeros((BLOCK,), tl.int32)
    count = tl.zeros((BLOCK,), tl.int32)
    for first in range(0, M, BLOCK):
        others = first + tl.arange(0, BLOCK)
        other_ids = _load_ids(ids_ptr, others, rows_per_id, M, n)
        same = other_ids[None, :] == ids[:, None]
        start += tl.sum(((other_ids[None, :] < ids[:, None]) & (other_ids >= 0)[None, :]).to(tl.int32), 1)
        before += tl.sum((same & (others[None, :] < rows[:, None])).to(tl.int32), 1)
        count += tl.sum(same.to(tl.int32), 1)
    place = start + before
    tl.store(order_ptr + place, rows, mask=ids >= 0)
    slot = place if BY_PLACE else start // BLOCK_M + ids + before // BLOCK_M
    begins = (ids >= 0) & (before % BLOCK_M == 0)
    tl.store(tiles_ptr + slot, ids, mask=begins)
    tl.store(tiles_ptr + slots + slot, place, mask=begins)
    tl.store(tiles_ptr + 2 * slots + slot, tl.minimum(count - before, BLOCK_M), mask=begins)


def segment_rows_triton(adapter_ids: Tensor, n: int, rows: int) -> tuple[Tensor, Tensor]:
    """(order, tiles) of `rows` rows whose ids are adapter_ids (flattened), each for rows // adapter_ids.numel() of them."""
    slots = count_slots(rows, n)
    order = torch.empty(rows, dtype=torch.int32, device=adapter_ids.device)
    tiles = torch.zeros(3, slots, dtype=torch.int32, device=adapter_ids.device)
    if rows:
        with on_device_of(adapter_ids):
            _segment_rows_kernel[(triton.cdiv(rows, BLOCK),)](
                adapter_ids, order, tiles, rows, n, rows // adapter_ids.numel(), slots,
                BY_PLACE=slots == rows, BLOCK_M=tile_rows(rows), BLOCK=BLOCK, num_warps=4,
            )  # fmt: skip
    return order, tiles


def aot_variants() -> Iterator[Variant]:
    """Both tiles and both ways to a slot."""
    signature = {"ids_ptr": "*i64", "order_ptr": "*i32", "tiles_ptr": "*i32"}
    signature |= dict.fromkeys(("M", "n", "rows_per_id", "slots"), "i32")
    for block_m, by_place in ((16, True), (16, False), (32, False)):
        constexprs = {"BY_PLACE": by_place, "BLOCK_M": block_m, "BLOCK": BLOCK}
        yield Variant(
            f"segment_rows_{block_m}" + "_by_place" * by_place, _segment_rows_kernel,
            signature | dict.fromkeys(constexprs, "constexpr"), constexprs,
        )  # fmt: skip
