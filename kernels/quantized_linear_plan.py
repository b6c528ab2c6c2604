"""Which kernel computes x W^T on a GPU: a roofline of each way, as one function of (M, N, K, dtype, target).

Fused kernels read 4 bits a weight but decode W again for every tile of rows; dequantizing first writes W whole, reads
it back in x's dtype, once, and then runs at the vendor GEMM's speed. With bytes over bandwidth B, warp instructions i
(of a tile of 4 or 64 rows) over issue rate I and multiply-adds over peak P, the seconds per weight are

    decode      max(0.516 / B, i_4 max(M / 4, 1) / (I / 2))            float32 sums on the ordinary cores
    gemm        max(0.516 / B, i_64 max(M / 64, 1) / I, 2 M / (P / 2))
    dequantize  (0.516 + 2 itemsize) / B + 2 M / (0.8 P)

A low-rank term beside it (`lora_linear`) adds its factors' bytes, itemsize r (N + K), to each, and to the third itemsize
2 M N more, since the vendor's GEMM reads y as its addend; the fused kernels hold the term in their sums. With r = 16 the crossings
below move up to 514, 559, 178 and 888.

The instruction counts are the emulator's (`make counters`). What I / 2, P / 2 and 0.8 P stand for is an assumption, not
a measurement: kernels that decode between their products, and a vendor's GEMM. They put the crossing at M = 461 on an
A100, 497 on an H100, 171 on a B200 (counted as an H100) and 743 on an MI300X. bitsandbytes, whose thresholds come
from such GPUs, dequantizes above M = 1536 (256 on ROCm), on a B200 earlier, and for fp32 from M = 8; ours is 9 to 33 there.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch

from ._triton import triton


class Target(NamedTuple):
    """A GPU by its data sheet."""

    bandwidth: float  # bytes/s of memory
    issue_rate: float  # warp instructions/s: SMs x 4 schedulers x clock
    flops: float  # dense flop/s of 16-bit multiply-adds
    flops_fp32: float  # of float32 ones, without tf32
    instructions_64: float = 0.24  # warp instructions per weight of the GEMM's tile of 64 rows


class Plan(NamedTuple):
    kernel: str  # "decode", "gemm" or "dequantize"
    split_k: int = 1


A100 = Target(2.04e12, 108 * 4 * 1.41e9, 312e12, 19.5e12)
H100 = Target(3.35e12, 132 * 4 * 1.75e9, 989e12, 67e12, 0.31)
B200 = Target(8.0e12, 148 * 4 * 1.85e9, 2250e12, 80e12, 0.31)
MI300X = Target(5.3e12, 304 * 4 * 2.1e9, 1307e12, 163e12)

GROUP = 32  # weights that a lane loads at once and that lie in one block: K must be a multiple
PACKED_BYTES = 0.516  # of a weight at block size 64, nested absmax
DECODE_INSTRUCTIONS = {1: 0.18, 2: 0.23, 4: 0.33}  # warp instructions per weight, by rows of x that share a decoding
GEMM_INSTRUCTIONS = {16: 0.17, 32: 0.19, 64: 0.24}  # sm_80's; the last is a target's own
LATENCY = 1e-6  # seconds from a load to its data under load: what Little's law multiplies the bandwidth by
DECODE_IN_FLIGHT, GEMM_IN_FLIGHT = 2048, {16: 8192, 32: 8192, 64: 2048}  # bytes of W that one program keeps on their way
DECODE_STEP, GEMM_STEP = 1024, 256  # the least K worth a program's while
MAX_SPLIT_K = 16
MOST_ROWS = 64 * 65_535  # tiles of rows are a grid's second axis, which has no more


def current_target() -> Target:
    """The data sheet of the GPU that kernels are launched on; an unknown one is taken for its nearest elder here."""
    target = triton.runtime.driver.active.get_current_target()
    if target.backend == "hip":
        return MI300X
    return B200 if target.arch >= 100 else H100 if target.arch >= 90 else A100


def tile_rows(instructions: dict[int, float], M: int) -> int:
    """The smallest tile that holds M rows, or the largest there is."""
    return next((rows for rows in instructions if M <= rows), max(instructions))


def _split_k(programs: int, M: int, K: int, in_flight: int, step: int, target: Target) -> int:
    """Parts of K, a power of two, that put enough bytes in flight to hide the latency at full bandwidth (Little's law),
    none shorter than `step`, and whose partial sums (written and read in float32) are no more bytes than the weight's."""
    wanted = target.bandwidth * LATENCY / in_flight
    most = min(MAX_SPLIT_K, K // step, int(PACKED_BYTES * K / (8 * M)))
    split_k = 1
    while programs * split_k < wanted and 2 * split_k <= most:
        split_k *= 2
    return split_k


@functools.lru_cache(maxsize=4096)
def plan(M: int, N: int, K: int, dtype: torch.dtype, target: Target, rank: int = 0) -> Plan:
    """The kernel of least modelled time for M rows of x against a weight (N, K) with a low-rank term of `rank` or none, and into
    how many parts it cuts K."""
    if K % GROUP or N * K >= 2**36 or M > MOST_ROWS:
        return Plan("dequantize")  # a lane's 32 weights would straddle rows; or chunk numbers would pass 31 bits; or the grid ends
    half = dtype != torch.float32
    itemsize = 2 if half else 4
    factors = itemsize * rank * (1 / N + 1 / K) if rank else 0.0  # bytes a weight
    read = (PACKED_BYTES + factors) / target.bandwidth
    rows = tile_rows(DECODE_INSTRUCTIONS, M)
    decode = max(read, DECODE_INSTRUCTIONS[rows] * max(M / rows, 1) / (target.issue_rate / 2))
    addend = 2 * itemsize * M / K if rank else 0.0
    dequantize = (PACKED_BYTES + factors + 2 * itemsize + addend) / target.bandwidth
    dequantize += 2 * M / (0.8 * (target.flops if half else target.flops_fp32))
    seconds = {"decode": decode, "dequantize": dequantize}
    if half and M > 1:
        tile = tile_rows(GEMM_INSTRUCTIONS, M)
        instructions = target.instructions_64 if tile == 64 else GEMM_INSTRUCTIONS[tile]
        issue = instructions * max(M / tile, 1) / target.issue_rate
        seconds = {"gemm": max(read, issue, 2 * M / (target.flops / 2)), "dequantize": dequantize}
    kernel = min(seconds, key=seconds.__getitem__)
    if kernel == "dequantize":
        return Plan(kernel)
    if kernel == "decode":
        programs = math.ceil(N / (4 if rows == 1 else 8)) * math.ceil(M / rows)
        return Plan(kernel, _split_k(programs, M, K, DECODE_IN_FLIGHT, DECODE_STEP, target))
    programs = math.ceil(N / 64) * math.ceil(M / tile)
    return Plan(kernel, _split_k(programs, M, K, GEMM_IN_FLIGHT[tile], GEMM_STEP, target))
