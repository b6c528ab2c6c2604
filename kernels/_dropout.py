"""Dropout whose mask is a function of (seed, element): computed where it is wanted, never stored.

Element i of the dropped matrix (row-major) is kept iff word i % 4 of Philox4x32-10 (Salmon et al., SC 2011) at counter i // 4
under the key `seed` is at least threshold = floor(dropout 2^32). One counter serves four elements: about 25 integer
instructions each, against the 2 bytes (a bit, at best) that a stored mask moves. Oracle: reference/philox.py.
"""

from __future__ import annotations

from ._triton import tl, triton


@triton.jit
def kept(rows, columns0, width, seed, threshold, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BY_FOUR: tl.constexpr):
    """bool (ROWS, COLUMNS): which elements of a matrix of `width` columns stay, in its `rows` (ROWS,) and the COLUMNS columns from
    columns0 on. BY_FOUR: width and columns0 are multiples of four, so that four neighbours share a counter."""
    if BY_FOUR:
        counter = rows.to(tl.int64)[:, None] * (width // 4) + (columns0 // 4 + tl.arange(0, COLUMNS // 4))[None, :]
    else:
        i = rows.to(tl.int64)[:, None] * width + (columns0 + tl.arange(0, COLUMNS))[None, :]
        counter = i >> 2
    low = (counter & 0xFFFFFFFF).to(tl.uint32)
    high = (counter >> 32).to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(seed, low, high, low * 0, low * 0)
    at = threshold.to(tl.uint32)
    if BY_FOUR:  # the last axis of join counts fastest: words 0, 1, 2, 3
        return tl.join(tl.join(w0 >= at, w2 >= at), tl.join(w1 >= at, w3 >= at)).reshape(ROWS, COLUMNS)
    else:
        e = (i & 3).to(tl.int32)
        return tl.where(e < 2, tl.where(e == 0, w0, w1), tl.where(e == 2, w2, w3)) >= at


@triton.jit
def drop(x, keep, keep_scale):
    """x where kept, times 1 / (1 - dropout) in float32, rounded once to x's dtype; else 0."""
    return tl.where(keep, x.to(tl.float32) * keep_scale, 0.0).to(x.dtype)


def arguments(dropout: float, seed: int, width: int) -> dict[str, object]:
    """What a kernel that may drop takes: dropout 0 compiles it away."""
    return {
        "seed": seed, "threshold": int(dropout * 2**32), "keep_scale": 1.0 / (1.0 - dropout),
        "DROPOUT": 0 if dropout == 0.0 else 2 if width % 4 == 0 else 1,
    }  # fmt: skip
