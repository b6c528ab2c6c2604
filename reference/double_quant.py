"""Oracle of double quantization: absmax in 8 bits. Dettmers et al. 2023, "QLoRA", arXiv:2305.14314, section 3, "Double
Quantization" and equation 6; the 8-bit type is the dynamic map of Dettmers et al. 2021, arXiv:2110.02861, section 2.2.

Codes are compared exactly, so float32 roundings are written out as `f32(...)` (see reference/nf4.py). The mean alone is
left to the caller: its rounding depends on the order of summation, which the format does not fix.
"""

import math

import numpy as np

from .nf4 import SMALLEST_ABSMAX, f32, float32_spacing, thresholds


def dynamic_map() -> list[float]:
    """256 ascending float32: per decade 10^(i-6), i = 0..6, the means of neighbours among 2^i + 1 points from 0.1 to 1, with
    both signs; and 0 and 1. Everything is float32."""
    values = [0.0, 1.0]
    for decade in range(7):
        edges = float32_spacing(0.1, 1.0, 2**decade + 1)
        for low, high in zip(edges[:-1], edges[1:], strict=True):
            mean = f32(f32(low + high) / 2)
            fraction = f32(mean * f32(10.0 ** (decade - 6)))
            values += [fraction, -fraction]
    return sorted(values)


MAP = dynamic_map()
THRESHOLDS = thresholds(MAP)


def dequantize_one(code: int, nested_absmax: float, offset: float) -> float:
    """map[code] * nested_absmax + offset, rounded to float32 after the product and again after the sum."""
    return f32(f32(MAP[code] * nested_absmax) + offset)


def double_quantize(absmax, offset: float, block_size: int = 256) -> tuple[np.ndarray, np.ndarray]:
    """absmax float32 (n,), finite and not negative; offset: its mean in float32. Returns codes uint8 (n,), nested absmax.

    Equation 6's c_2 centred by the mean, quantized blockwise to the nearest map value; then the one departure from it:
    a code whose reconstruction is negative is raised to the smallest code whose reconstruction is not.
    """
    flat = [float(a) for a in np.asarray(absmax).reshape(-1)]
    codes, nested = [], []
    for start in range(0, len(flat), block_size):
        centred = [f32(a - offset) for a in flat[start : start + block_size]]
        nested_absmax = max(abs(c) for c in centred)
        reciprocal = f32(1 / max(nested_absmax, float(SMALLEST_ABSMAX)))
        for c in centred:
            scaled = min(max(f32(c * reciprocal), -1.0), 1.0)
            code = sum(t < scaled for t in THRESHOLDS)
            while dequantize_one(code, nested_absmax, offset) < 0:
                code += 1
            codes.append(code)
        nested.append(nested_absmax)
    return np.array(codes, np.uint8), np.array(nested, np.float32)


def double_dequantize(codes, nested_absmax, offset: float, block_size: int = 256) -> np.ndarray:
    """float32 (n,)."""
    out = np.empty(len(codes), np.float32)
    for i, code in enumerate(codes):
        out[i] = dequantize_one(int(code), float(nested_absmax[i // block_size]), offset)
    return out


def mean(absmax) -> float:
    """The mean with one rounding, to float32: what any order of summation in float32 approximates."""
    flat = [float(a) for a in np.asarray(absmax).reshape(-1)]
    return f32(math.fsum(flat) / len(flat)) if flat else 0.0
