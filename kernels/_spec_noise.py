"""The noise of verification as a function of (seed, offset, stream, index), computed where it is wanted: word index mod 4 of
Philox4x32-10 at counter (index div 4, stream, offset) under the request's seed. Oracle: reference/spec_verify.py."""

from __future__ import annotations

from ._triton import tl, triton

WEYL = tl.constexpr(-7046029254386353131)  # 0x9E3779B97F4A7C15: from one seed to those of a batch's requests


@triton.jit
def request_noise(seeds_ptr, offsets_ptr, seed, b, SEEDS: tl.constexpr, OFFSETS: tl.constexpr):
    """(seed int64, offset int64) of request b, an int64."""
    own = tl.load(seeds_ptr + b) if SEEDS else b * WEYL + seed
    offset = tl.load(offsets_ptr + b) if OFFSETS else own * 0
    return own, offset


@triton.jit
def _words(seed, offset, stream, counters):
    zero = counters.to(tl.uint32) * 0
    low, high = (offset & 0xFFFFFFFF).to(tl.uint32), ((offset >> 32) & 0xFFFFFFFF).to(tl.uint32)
    return tl.philox(seed, counters.to(tl.uint32), zero + stream, zero + low, zero + high)


@triton.jit
def uniforms(seed, offset, index):
    """u in [0, 1) of node `index` (a block): 24 bits of stream 0."""
    w0, w1, w2, w3 = _words(seed, offset, 0, index >> 2)
    e = index & 3
    word = tl.where(e < 2, tl.where(e == 0, w0, w1), tl.where(e == 2, w2, w3))
    return (word >> 8).to(tl.float32) * 5.9604644775390625e-08  # 2^-24


@triton.jit
def log2_near(x, x_minus_1):
    """log2 of a normal float32 x > 0, relative to its own size within 1.2e-6 also where x is near 1, by x - 1 as it is there.

    x = 2^n (1 + y) with 1 + y from sqrt(1/2) to sqrt(2); log2(1 + y) / y is a polynomial of least relative error. A third of the
    instructions of the library's, and the same number on every processor.
    """
    bits = x.to(tl.int32, bitcast=True)
    exponent = (bits - 0x3F3504F3) & -8388608
    y = tl.where(exponent == 0, x_minus_1, (bits - exponent).to(tl.float32, bitcast=True) - 1.0)
    series = -0.2693201303482056 + y * 0.1716243624687195
    series = 0.4806267619132996 + y * (-0.3593716621398926 + y * (0.2956995368003845 + y * series))
    series = 1.442696452140808 + y * (-0.7213636040687561 + y * series)
    return exponent.to(tl.float32) * 1.1920928955078125e-07 + y * series  # 2^-23


@triton.jit
def exponentials(seed, offset, start, stream, TILE: tl.constexpr):
    """E / ln 2, E = -log(1 - v) standard exponential, of the TILE tokens from `start` (a multiple of 4) on: the winner of the race
    has the largest weight / E. Small E are those of small v, of which all 32 bits are used."""
    w0, w1, w2, w3 = _words(seed, offset, stream, (start >> 2) + tl.arange(0, TILE // 4))
    word = tl.join(tl.join(w0, w2), tl.join(w1, w3)).reshape(TILE)
    v = tl.minimum((word.to(tl.float32) + 0.5) * 2.3283064365386963e-10, 0.9999999403953552)  # 2^-32, 1 - 2^-24
    return -log2_near(1.0 - v, -v)
