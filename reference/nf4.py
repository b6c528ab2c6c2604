"""Oracle of blockwise 4-bit quantization: NF4 and FP4. Dettmers, Pagnoni, Holtzman, Zettlemoyer 2023, "QLoRA",
arXiv:2305.14314, section 3 and appendix E; FP4 is bitsandbytes' (sign, two exponent bits, one mantissa bit).

Codes and bytes are compared exactly, so every float32 rounding of the format is written out here as `f32(...)`: float64
holds the product and the quotient of two float32 closely enough that rounding them to float32 afterwards is the same as
rounding once (53 >= 2 * 24 + 2 digits, Figueroa 1995).
"""

import math
from statistics import NormalDist

import numpy as np

SMALLEST_ABSMAX = np.float32(1e-38)
SMALLEST_RECIPROCAL = np.float32(1e-42)


def f32(value: float) -> float:
    """The nearest float32, ties to even; too large is infinite."""
    with np.errstate(over="ignore"):
        return float(np.float32(value))


def nf4_values() -> list[float]:
    """Equation 4, made asymmetric so that zero is exact (section 3, "4-bit NormalFloat"; appendix E lists the result).

    The quantile function is that of N(0, 1) at eight evenly spaced probabilities from `outermost` down to 1/2 for the
    positive half and seven for the negative half, both without 1/2 itself; zero is added once and all are divided by the
    largest. `outermost` = 1 - (1/32 + 1/30) / 2 is the mean of the two halves' own outermost probabilities, printed to seven
    digits by the paper's code. Rounding: probabilities are spaced in float32 (counted from the start for the first half of
    the points and from the end for the others), quantiles are rounded to float32 before the division.
    """
    outermost = 0.9677083
    positive = [f32(NormalDist().inv_cdf(p)) for p in float32_spacing(outermost, 0.5, 9)[:-1]]
    negative = [-f32(NormalDist().inv_cdf(p)) for p in float32_spacing(outermost, 0.5, 8)[:-1]]
    values = sorted([*negative, 0.0, *positive])
    return [f32(v / values[-1]) for v in values]


def float32_spacing(start: float, stop: float, count: int) -> list[float]:
    """`count` evenly spaced float32: the step is rounded, then each point once (a fused multiply-add)."""
    start, stop = f32(start), f32(stop)
    step = f32(f32(stop - start) / (count - 1))
    return [f32(start + step * i if i < count // 2 else stop - step * (count - 1 - i)) for i in range(count)]


def fp4_values() -> list[float]:
    """Values by bit pattern s e1 e0 m, in twelfths: 0 and 1/16 below the others (e = 0), then 8, 12, 4, 6, 2, 3.

    The pattern 1000 is +0, not -0.
    """
    magnitudes = [f32(m / 12) for m in (0, 0.0625, 8, 12, 4, 6, 2, 3)]
    return [*magnitudes, 0.0, *(-m for m in magnitudes[1:])]


VALUES = {"nf4": nf4_values(), "fp4": fp4_values()}


def thresholds(ascending: list[float]) -> list[float]:
    """Midpoints of neighbours, (v_i + v_{i+1}) / 2: the float32 sum, halved (halving is exact)."""
    return [f32(low + high) / 2 for low, high in zip(ascending[:-1], ascending[1:], strict=True)]


NF4_THRESHOLDS = thresholds(VALUES["nf4"])
FP4_PATTERNS = sorted(range(8), key=lambda code: VALUES["fp4"][code])  # rank of a magnitude -> its bit pattern
FP4_THRESHOLDS = thresholds([VALUES["fp4"][code] for code in FP4_PATTERNS])


def nearest_code(scaled: float, quant_type: str) -> int:
    """argmin_j |scaled - value_j|; a tie takes the lower code (for FP4 the smaller magnitude). NaN takes code 0.

    Decided by comparison with the float32 midpoints, as every implementation does.
    """
    if math.isnan(scaled):
        return 0
    if quant_type == "nf4":
        return sum(t < scaled for t in NF4_THRESHOLDS)
    rank = sum(t < abs(scaled) for t in FP4_THRESHOLDS)
    return FP4_PATTERNS[rank] + (8 if scaled < 0 else 0)


def quantize_block(block, block_size: int, quant_type: str) -> tuple[list[int], float]:
    """Codes and absmax of one block (equation 1: scale into [-1, 1] by the largest magnitude, then round to a value)."""
    absmax = 0.0
    for x in block:
        if math.isnan(x) or math.isnan(absmax):
            absmax = math.nan
        else:
            absmax = max(absmax, abs(x))
    codes = []
    for x in block:
        if math.isnan(absmax):
            scaled = math.nan
        elif len(block) == block_size:
            reciprocal = max(f32(1 / max(absmax, float(SMALLEST_ABSMAX))), float(SMALLEST_RECIPROCAL))
            scaled = f32(x * reciprocal)
        elif math.isinf(x):  # a short block divides, and inf / inf is taken as 1
            scaled = math.copysign(1.0, x)
        else:
            scaled = f32(x / max(absmax, float(SMALLEST_ABSMAX)))
        if not math.isnan(scaled):
            scaled = min(max(scaled, -1.0), 1.0)
        codes.append(nearest_code(scaled, quant_type))
    return codes, absmax


def quantize(x, block_size: int, quant_type: str) -> tuple[np.ndarray, np.ndarray]:
    """x of any shape, holding float32 (or narrower) numbers. Returns packed uint8 (ceil(n/2),), absmax float32 (blocks,).

    Blocks run over x flattened; the first of two codes goes to the high nibble; an odd end is padded with the code of 0.
    """
    flat = [float(v) for v in np.asarray(x).reshape(-1)]
    codes: list[int] = []
    absmax: list[float] = []
    for start in range(0, len(flat), block_size):
        block_codes, block_absmax = quantize_block(flat[start : start + block_size], block_size, quant_type)
        codes += block_codes
        absmax.append(block_absmax)
    if len(codes) % 2:
        codes.append(nearest_code(0.0, quant_type))
    packed = [codes[i] << 4 | codes[i + 1] for i in range(0, len(codes), 2)]
    return np.array(packed, np.uint8), np.array(absmax, np.float32)


def dequantize(packed, absmax, n: int, block_size: int, quant_type: str) -> np.ndarray:
    """float64 (n,): value[code] * absmax exactly (equation 2). Rounding this once to the output type gives its bytes.

    float64 holds the product of two float32 exactly, so float32 output is this rounded to float32. Narrower output is
    float32 first, then the narrow type: two roundings, which every engine makes.
    """
    out = np.empty(n, np.float64)
    for i in range(n):
        byte = int(packed[i // 2])
        code = byte >> 4 if i % 2 == 0 else byte & 15
        out[i] = VALUES[quant_type][code] * float(absmax[i // block_size])
    return out
