"""How much a sum is cut up on a GPU, in the small products of a low-rank layer. Which kernel computes x W^T + the term is
`quantized_linear_plan.plan` with its `rank`.

A product with R columns reads one long matrix once and is done: it is as fast as memory if enough bytes are on their way, by
Little's law bandwidth x latency, and with few rows (or few columns) too few programs ask for them. So the sum is cut into
parts, a power of two of them, until the programs suffice or the partial sums, 4 bytes each written and read, would be more
bytes than the matrix.
"""

from __future__ import annotations

import functools

from .lora_linear_down import down_tile
from .lora_linear_grad import grad_tile
from .quantized_linear_plan import LATENCY, Target

MOST_PARTS_DOWN, MOST_PARTS_GRAD = 8, 16  # a reader of few rows adds the former itself
LEAST_K = 256  # of a part


def _parts(programs: int, in_flight: int, most: int, target: Target) -> int:
    wanted = target.bandwidth * LATENCY / in_flight
    parts = 1
    while programs * parts < wanted and 2 * parts <= most:
        parts *= 2
    return parts


@functools.lru_cache(maxsize=4096)
def down_parts(M: int, R: int, K: int, itemsize: int, dropout: bool, target: Target) -> int:
    """Into how many parts x' A^T cuts K, for x (M, K) and A (R, K)."""
    tile = down_tile(M, R, itemsize, dropout)
    programs = -(-M // tile["BLOCK_M"]) * -(-R // tile["BLOCK_R"])
    in_flight = 2 * itemsize * tile["BLOCK_K"] * (min(M, tile["BLOCK_M"]) + min(R, tile["BLOCK_R"]))  # two of three stages
    most = min(MOST_PARTS_DOWN, K // LEAST_K, itemsize * K * (M + R) // (8 * M * R))
    return _parts(programs, in_flight, most, target)


@functools.lru_cache(maxsize=4096)
def grad_parts(
    M: int, C: int, R: int, itemsize: int, dropout: bool, with_v: bool, backend_name: str, arch: int | str, target: Target
) -> int:
    """Into how many parts z^T s cuts the rows, for z (M, C) and s (M, R)."""
    tile = grad_tile(R, itemsize, dropout, with_v, backend_name, arch)
    programs = -(-C // tile["BLOCK_C"]) * -(-R // tile["BLOCK_R"])
    in_flight = itemsize * tile["BLOCK_M"] * min(C, tile["BLOCK_C"])  # a tile ahead
    most = min(MOST_PARTS_GRAD, M // tile["BLOCK_M"], itemsize * M // (8 * R))
    return _parts(programs, in_flight, most, target)
