"""The oracles themselves: numbers worked by hand, and the claim that float64 followed by float32 rounds once."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from posttrain.reference import double_quant, nf4

floats = st.floats(width=32, allow_nan=False, allow_infinity=False)


def test_a_block_by_hand():
    """absmax 4: 4 -> 1.0 (15), -4 -> -1.0 (0), 0 -> 7, 1 -> 0.25 (nearest 0.2461: 10), -2 -> -0.5 (nearest -0.525: 2)."""
    packed, absmax = nf4.quantize([4.0, -4.0, 0.0, 1.0, -2.0], 5, "nf4")
    assert absmax.tolist() == [4.0]
    assert packed.tolist() == [0xF0, 0x7A, 0x27]  # the pad is the code of 0
    values = nf4.VALUES["nf4"]
    assert nf4.dequantize(packed, absmax, 5, 5, "nf4").tolist() == [4.0, -4.0, 0.0, 4 * values[10], 4 * values[2]]


def test_fp4_by_hand():
    """absmax 12, so values in twelfths: 12 -> 0011, -8 -> 1010, 2.4 (nearest 2) -> 0110, 0 -> 0000."""
    packed, absmax = nf4.quantize([12.0, -8.0, 2.4, 0.0, -0.01, 3.5], 6, "fp4")
    assert absmax.tolist() == [12.0]
    # 3.5 lies on the midpoint of 3 and 4 (0111, 0100): the lower; -0.01 is nearest -0 (1000)
    assert packed.tolist() == [0x3A, 0x60, 0x87]


def test_blocks_run_over_rows_and_the_last_divides():
    x = np.array([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]], np.float32)
    _, absmax = nf4.quantize(x, 4, "nf4")
    assert absmax.tolist() == [4.0, 6.0]
    # where the reciprocal's rounding shows: 0.7 * (1 / 0.7) against 0.7 / 0.7
    codes, _ = nf4.quantize_block([np.float32(0.7).item()], 4, "nf4")
    assert codes == [15]


@pytest.mark.parametrize(
    ("block", "absmax", "codes"),
    [
        ([0.0, -0.0], 0.0, [7, 7]),
        ([math.nan, 5.0], math.nan, [0, 0]),
        ([math.inf, -math.inf], math.inf, [15, 0]),
        ([math.inf, 1e38], math.inf, [15, 7]),
        ([1e-40, -1e-40], None, [7, 7]),
    ],
)
@pytest.mark.parametrize("block_size", (2, 4))
def test_special_blocks(block, absmax, codes, block_size):
    block = [nf4.f32(x) for x in block]
    got_codes, got_absmax = nf4.quantize_block(block, block_size, "nf4")
    assert got_codes == codes
    assert np.array_equal(got_absmax, block[0] if absmax is None else absmax, equal_nan=True)


@given(floats, floats)
def test_float64_then_float32_rounds_once(a, b):
    """What the oracle's f32() relies on: products, quotients and sums of two float32 come out as float32 hardware gives them."""
    with np.errstate(all="ignore"):
        x, y = np.float32(a), np.float32(b)
        assert np.array_equal(nf4.f32(a * b), float(x * y))
        assert np.array_equal(nf4.f32(a + b), float(x + y))
        if b:
            assert np.array_equal(nf4.f32(a / b), float(x / y))


@given(st.lists(floats, min_size=1, max_size=20), st.sampled_from(("nf4", "fp4")))
def test_no_code_is_nearer(values, quant_type):
    """The code chosen through thresholds is an argmin of the distance, up to the rounding of the threshold itself."""
    codes, absmax = nf4.quantize_block(values, len(values), quant_type)
    if absmax < float(nf4.SMALLEST_ABSMAX):
        return
    for x, code in zip(values, codes, strict=True):
        scaled = min(max(nf4.f32(x * nf4.f32(1 / absmax)), -1.0), 1.0)
        distance = [abs(scaled - v) for v in nf4.VALUES[quant_type]]
        assert distance[code] <= min(distance) + np.spacing(np.float32(1))


def test_spacing_by_hand():
    assert nf4.float32_spacing(0.0, 1.0, 5) == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert nf4.float32_spacing(1.0, 0.5, 3) == [1.0, 0.75, 0.5]


def test_double_quantization_by_hand():
    """Mean 2: centred -1, 0, 1; nested absmax 1. The map has 1 and 0 but not -1: its least value is -0.99296874."""
    absmax = np.array([1.0, 2.0, 3.0], np.float32)
    codes, nested = double_quant.double_quantize(absmax, double_quant.mean(absmax))
    assert nested.tolist() == [1.0]
    assert codes.tolist() == [0, 127, 255]
    restored = double_quant.double_dequantize(codes, nested, 2.0)
    assert restored.tolist() == [np.float32(2.0) + np.float32(double_quant.MAP[0]), 2.0, 3.0]


def test_raised_codes_are_the_smallest_that_are_not_negative():
    """255 zeros and one huge absmax: no map value brings 0 back exactly, and the nearest falls below it."""
    absmax = np.zeros(256, np.float32)
    absmax[0] = 1000.0
    offset = double_quant.mean(absmax)
    codes, nested = double_quant.double_quantize(absmax, offset)
    restored = double_quant.double_dequantize(codes, nested, offset)
    assert (restored >= 0).all()
    assert len(set(codes[1:].tolist())) == 1
    assert double_quant.dequantize_one(int(codes[1]) - 1, float(nested[0]), offset) < 0
    nearest = min(range(256), key=lambda code: abs(offset + double_quant.MAP[code] * float(nested[0])))
    assert nearest == codes[1] - 1  # so the guard did act
