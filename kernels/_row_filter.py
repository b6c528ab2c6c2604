"""A row of logits to (threshold, largest, total): p[v] = exp2((z[v] - largest) c) / total where z[v] >= threshold, c = log2(e) / T.

One pass finds the largest logit, the sum of exponentials, and the three largest of every TILE-th logit. The k-th of the largest, or
the one where their mass alone reaches top_p, is below the true threshold, and seldom by much. The few logits above it are gathered,
from the three if these are known to hold them all, else in a second pass, whose reads come from the cache; the threshold is found
among them by halving. Where more than TILE are above it (a flat row, a large top_k) the halving reads the row instead, ten times
or so, from the cache. Either way it ends at a logit of the row: results are exact but for the rounding of sums.
"""

from __future__ import annotations

from ._triton import tl, triton

LEAST = tl.constexpr(-2.9999998e38)  # the float32 above -LARGEST
LARGEST = tl.constexpr(3.0e38)  # +inf counts as this; what is not above minus this counts as -inf, as NaN does


@triton.jit
def load_clean(row_ptr, offsets, V):
    """Logits in float32 within +-LARGEST; -LARGEST for NaN, -inf and behind the row."""
    z = tl.load(row_ptr + offsets, mask=offsets < V, other=-float("inf")).to(tl.float32)
    return tl.minimum(tl.maximum(z, -LARGEST), LARGEST)


@triton.jit
def least_of(values, weights, limit, top):
    """The least of `values` (those above -LARGEST) that has less than `limit` of the weights above it."""
    high = top
    low = tl.min(tl.where(values > -LARGEST, values, top), axis=0)
    while low < high:
        middle = low + (high - low) * 0.5
        middle = tl.where(middle < high, middle, low)
        if tl.sum(tl.where(values > middle, weights, 0.0), axis=0) < limit:
            high = tl.max(tl.where(values <= middle, values, -LARGEST), axis=0)
        else:
            low = tl.min(tl.where(values > middle, values, top), axis=0)
    return low


@triton.jit
def least_in_row(row_ptr, V, c, threshold, limit, low, top, COUNT: tl.constexpr, TILE: tl.constexpr):
    """`least_of` a whole row, known not to be below `low`; weights 1 (COUNT) or exp2((z - top) c) where z >= threshold."""
    lanes = tl.arange(0, TILE)
    high = top
    while low < high:
        middle = low + (high - low) * 0.5
        middle = tl.where(middle < high, middle, low)
        above = tl.zeros((TILE,), tl.float32)
        below, next_up = tl.full((TILE,), -LARGEST, tl.float32), tl.zeros((TILE,), tl.float32) + top
        for start in range(0, V, TILE):
            z = load_clean(row_ptr, start + lanes, V)
            weight = tl.where(z > -LARGEST, 1.0, 0.0) if COUNT else tl.where(z >= threshold, tl.exp2((z - top) * c), 0.0)
            above += tl.where(z > middle, weight, 0.0)
            below = tl.maximum(below, tl.where(z <= middle, z, -LARGEST))
            next_up = tl.minimum(next_up, tl.where(z > middle, z, top))
        if tl.sum(above, axis=0) < limit:
            high = tl.max(below, axis=0)
        else:
            low = tl.min(next_up, axis=0)
    return low


@triton.jit
def mass_in_row(row_ptr, V, c, threshold, top, TILE: tl.constexpr):
    lanes = tl.arange(0, TILE)
    total = tl.zeros((TILE,), tl.float32)
    for start in range(0, V, TILE):
        z = load_clean(row_ptr, start + lanes, V)
        total += tl.where(z >= threshold, tl.exp2((z - top) * c), 0.0)
    return tl.sum(total, axis=0)


@triton.jit
def _read(row_ptr, V, c, reference, CLEAN: tl.constexpr, FILTER: tl.constexpr, TILE: tl.constexpr):
    """(sums of exp2((z - reference) c), and the three largest logits) of every TILE-th logit; the largest alone without FILTER."""
    lanes = tl.arange(0, TILE)
    totals = tl.zeros((TILE,), tl.float32)
    first = tl.full((TILE,), -LARGEST, tl.float32)
    second, third = first, first
    for start in range(0, V, TILE):
        if CLEAN:
            z = load_clean(row_ptr, start + lanes, V)
        else:
            z = tl.load(row_ptr + start + lanes, mask=start + lanes < V, other=-float("inf")).to(tl.float32)
        totals += tl.exp2((z - reference) * c)
        if FILTER:
            falls = tl.minimum(first, z)
            third = tl.maximum(third, tl.minimum(second, falls))
            second = tl.maximum(second, falls)
        first = tl.maximum(first, z)
    return totals, first, second, third


@triton.jit
def row_filter(row_ptr, V, c, top_k, top_p, gathered_ptr, FILTER: tl.constexpr, TILE: tl.constexpr):
    """(threshold, largest, total); largest is -LARGEST where no logit is finite. gathered_ptr: room of this program's own for TILE
    logits. top_k 0 and top_p 1 are off; without FILTER both are."""
    lanes = tl.arange(0, TILE)
    # Exponents are of differences to the largest logit of the first tile: nothing is rescaled as larger ones come.
    reference = tl.max(tl.load(row_ptr + lanes, mask=lanes < V, other=-float("inf")).to(tl.float32), axis=0)
    totals, first, second, third = _read(row_ptr, V, c, reference, False, FILTER, TILE)
    total = tl.sum(totals, axis=0)
    top = tl.max(first, axis=0)
    if not (total < float("inf")):  # much larger ones came, or infinities, or NaN
        reference = tl.minimum(tl.maximum(top, -LARGEST), LARGEST)
        totals, first, second, third = _read(row_ptr, V, c, reference, True, FILTER, TILE)
        total = tl.sum(totals, axis=0)
        top = tl.max(first, axis=0)
    total *= tl.exp2((reference - top) * c)
    threshold = -float("inf")
    if FILTER:
        by_count = (top_k > 0) & (top_k < V)
        if (by_count | (top_p < 1.0)) & (top > -LARGEST):
            threshold, total = _threshold(
                row_ptr, V, c, top_k, top_p, by_count, gathered_ptr, first, second, third, top, total, TILE
            )
    return threshold, top, total


@triton.jit
def _gather(values, least, count, gathered_ptr, TILE: tl.constexpr):
    """Append the values from `least` up to what is gathered; the count with them, of which TILE are kept."""
    above = (values >= least) & (values > -LARGEST)
    found = tl.sum(above.to(tl.int32), axis=0)
    if (found > 0) & (count + found <= TILE):
        place = count + tl.cumsum(above.to(tl.int32), axis=0) - 1
        tl.store(gathered_ptr + place, values.to(gathered_ptr.dtype.element_ty), mask=above)
    return count + found


@triton.jit
def _threshold(
    row_ptr, V, c, top_k, top_p, by_count, gathered_ptr, first, second, third, top, total, TILE: tl.constexpr
):  # fmt: skip
    """(threshold, the mass it keeps), given the three largest of every TILE-th logit and the row's largest and its whole mass."""
    lanes = tl.arange(0, TILE)
    k = top_k * 1.0
    # Of any subset of the logits, the k-th largest is at most the row's; so is the least that has less than top_p above it, if the
    # subset holds top_p of the mass at all.
    if by_count:
        weights = tl.where(first > -LARGEST, 1.0, 0.0)
        limit = k
    else:
        weights = tl.exp2((first - top) * c)
        limit = top_p * total
    least = tl.where(tl.sum(weights, axis=0) >= limit, least_of(first, weights, limit, top), -LARGEST)
    count = tl.zeros((), tl.int32)
    if tl.max(third, axis=0) < least:  # nothing but first and second reaches it
        count = _gather(first, least, count, gathered_ptr, TILE)
        count = _gather(second, least, count, gathered_ptr, TILE)
    else:
        for start in range(0, V, TILE):
            count = _gather(load_clean(row_ptr, start + lanes, V), least, count, gathered_ptr, TILE)
    threshold = tl.full((), -LARGEST, tl.float32)
    if count <= TILE:
        tl.debug_barrier()
        values = load_clean(gathered_ptr, lanes, count)
        weights = tl.exp2((values - top) * c)
        if by_count:
            threshold = least_of(values, tl.where(lanes < count, 1.0, 0.0), k, top)
            weights = tl.where(values >= threshold, weights, 0.0)
            total = tl.sum(weights, axis=0)
        if top_p < 1.0:
            threshold = tl.maximum(threshold, least_of(values, weights, top_p * total, top))
            total = tl.sum(tl.where(values >= threshold, weights, 0.0), axis=0)
    else:
        if by_count:
            threshold = least_in_row(row_ptr, V, c, -LARGEST, k, least, top, True, TILE)
            total = mass_in_row(row_ptr, V, c, threshold, top, TILE)
        if top_p < 1.0:
            low = tl.maximum(threshold, least)
            nucleus = least_in_row(row_ptr, V, c, threshold, top_p * total, low, top, False, TILE)
            threshold = tl.maximum(threshold, nucleus)
            total = mass_in_row(row_ptr, V, c, threshold, top, TILE)
    return threshold, total
