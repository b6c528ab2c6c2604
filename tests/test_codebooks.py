"""The tables: their published values, their derivation, and the polynomial that predicts a code."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch
from torch._subclasses import FakeTensorMode

from posttrain.kernels import codebooks, nf4
from posttrain.reference import double_quant as oracle_double
from posttrain.reference import nf4 as oracle

NF4 = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
]  # fmt: skip
FP4_TWELFTHS = [0, 0.0625, 8, 12, 4, 6, 2, 3]


def test_nf4_is_the_published_table():
    """QLoRA, appendix E."""
    assert codebooks.NF4.tolist() == NF4


def test_fp4_by_hand():
    """Bit patterns 000 to 111 in twelfths of absmax, then the same with the sign bit; 1000 is +0."""
    assert codebooks.FP4[:8].tolist() == [np.float32(v / 12) for v in FP4_TWELFTHS]
    assert codebooks.FP4[9:].tolist() == [-np.float32(v / 12) for v in FP4_TWELFTHS[1:]]
    assert codebooks.FP4[8] == 0 and not codebooks.FP4[8].signbit()


def test_dynamic_map_is_bitsandbytes():
    assert hashlib.sha256(codebooks.DYNAMIC_MAP.numpy().tobytes()).hexdigest()[:16] == "e732639a65f497b4"
    assert codebooks.DYNAMIC_MAP.tolist() == sorted(codebooks.DYNAMIC_MAP.tolist())
    assert codebooks.DYNAMIC_MAP[-1] == 1 and (codebooks.DYNAMIC_MAP == 0).sum() == 1


@pytest.mark.peers
def test_tables_are_bitsandbytes():
    functional = pytest.importorskip("bitsandbytes").functional
    assert torch.equal(functional.get_4bit_type("nf4", device="cpu"), codebooks.NF4)
    assert torch.equal(functional.get_4bit_type("fp4", device="cpu"), codebooks.FP4)
    assert torch.equal(functional.create_dynamic_map().float(), codebooks.DYNAMIC_MAP)


@pytest.mark.parametrize(
    ("ours", "oracles"),
    [
        (codebooks.NF4, oracle.VALUES["nf4"]),
        (codebooks.FP4, oracle.VALUES["fp4"]),
        (codebooks.DYNAMIC_MAP, oracle_double.MAP),
        (codebooks.NF4_THRESHOLDS, oracle.NF4_THRESHOLDS),
        (codebooks.FP4_THRESHOLDS, oracle.FP4_THRESHOLDS),
        (codebooks.DYNAMIC_THRESHOLDS, oracle_double.THRESHOLDS),
        (codebooks.FP4_MAGNITUDE_CODES, oracle.FP4_PATTERNS),
    ],
)
def test_tables_equal_the_oracles(ours, oracles):
    assert ours.tolist() == oracles


def test_thresholds_split_neighbours():
    for values, thresholds in (
        (codebooks.NF4, codebooks.NF4_THRESHOLDS),
        (codebooks.FP4[:8][codebooks.FP4_MAGNITUDE_CODES], codebooks.FP4_THRESHOLDS),
        (codebooks.DYNAMIC_MAP, codebooks.DYNAMIC_THRESHOLDS),
    ):
        assert (values[:-1] < thresholds).all() and (thresholds < values[1:]).all()


def test_upper_tables_end_in_infinity():
    for name in ("NF4", "FP4", "DYNAMIC"):
        upper, thresholds = getattr(codebooks, f"{name}_UPPER"), getattr(codebooks, f"{name}_THRESHOLDS")
        assert torch.equal(upper[:-1], thresholds) and upper[-1] == torch.inf


@pytest.mark.parametrize(
    ("coefficients", "thresholds", "lowest"),
    [(nf4.NF4_PREDICT, codebooks.NF4_THRESHOLDS, -1.0), (nf4.FP4_PREDICT, codebooks.FP4_THRESHOLDS, 0.0)],
)
def test_predicted_code_is_right_or_one_below(coefficients, thresholds, lowest):
    """For every float32 s in [lowest, 1]: trunc(p(s)) is code(s) or code(s) - 1, and a valid index.

    p is a polynomial: between two thresholds t < u it stays within the range of its values at t, u and the roots of p'
    inside. So bounding those in float64, with room for float32 rounding (a hundred units at 16, far more than three
    fused operations make), covers all float32 inputs, not a sample of them.
    """
    p = np.polynomial.Polynomial(coefficients)
    turning = [r.real for r in p.deriv().roots() if abs(r.imag) == 0]
    room = 100 * np.spacing(np.float32(16))
    edges = [lowest, *thresholds.tolist(), 1.0]
    for code, (low, high) in enumerate(zip(edges[:-1], edges[1:], strict=True)):
        reached = [p(low), p(high), *(p(r) for r in turning if low < r < high)]
        assert min(reached) - room >= max(code - 1, 0)  # trunc is at least code - 1, and at least 0
        assert max(reached) + room < code + 1  # and at most code
    # the table has one entry more than there are thresholds
    assert max([p(1.0), *(p(r) for r in turning if lowest < r < 1)]) < len(thresholds) + 1


def test_a_table_on_another_device_has_none_of_the_callers_state():
    """It is kept: made within inference_mode or a mode that fakes tensors, it must serve outside too."""
    with torch.inference_mode(), FakeTensorMode():
        table = codebooks.on.__wrapped__("NF4", torch.device("meta"))
    assert not table.is_inference() and type(table) is torch.Tensor
    assert codebooks.on("NF4", torch.device("cpu")) is codebooks.NF4
