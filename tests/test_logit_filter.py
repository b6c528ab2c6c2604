"""Thresholds and normalisers of rows of logits: every engine against the oracle, and what the compiled kernel moves."""

from __future__ import annotations

import math

import four_bit
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tolerance import assert_as_accurate

from posttrain.kernels import logit_filter
from posttrain.kernels.logit_filter import logit_filter_triton
from posttrain.reference import logit_filter as oracle

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SETTINGS = ((1.0, 0, 1.0), (0.7, 5, 1.0), (1.3, 0, 0.8), (0.8, 40, 0.95), (1.0, 1, 0.5))


def test_by_hand():
    """Weights 4, 2, 2, 1, 1 of 10: top_p = 0.5 is crossed by the first 2, and its equal stays."""
    row = [math.log(w) for w in (2, 4, 1, 2, 1)]
    tau, log_total, p = oracle.filter_row(row, 1.0, 0, 0.5)
    assert tau == row[0] and p.tolist() == pytest.approx([0.25, 0.5, 0, 0.25, 0]) and log_total == pytest.approx(math.log(8))
    assert oracle.filter_row(row, 1.0, 2)[0] == row[0]  # the second largest, twice there
    assert oracle.filter_row(row, 1.0, 4)[0] == row[2] == 0
    assert oracle.filter_row(row, 0.5, 1)[2].tolist() == [0, 1, 0, 0, 0]


def _exact(logits, setting):
    rows = [oracle.filter_row(row.double().tolist(), *setting) for row in logits]
    return torch.tensor([tau for tau, _, _ in rows], dtype=torch.float64), torch.tensor(
        [log_total for _, log_total, _ in rows], dtype=torch.float64
    )


def _plain(logits, threshold, temperature):
    """The plain expression, given the threshold."""
    z = logits.float()
    return (z / temperature).masked_fill(z < threshold[:, None], -torch.inf).logsumexp(1)


def _check(filtered, V: int, dtype: torch.dtype, spread: float = 4.0) -> None:
    generator = torch.Generator().manual_seed(V)
    logits = (spread * torch.randn(3, V, generator=generator)).to(dtype)
    logits[1, : V // 3] = -torch.inf
    logits[2, V // 2 :] = torch.nan if V > 1 else 0.0
    for setting in SETTINGS:
        threshold, log_total = filtered(logits, *setting)
        expected, exact = _exact(logits, setting)
        assert torch.equal(threshold.double(), expected.double()), setting
        assert_as_accurate(log_total, _plain(logits.nan_to_num(-torch.inf), expected.float(), setting[0]), exact)


@pytest.mark.parametrize("dtype", (*DTYPES, torch.float64))
@pytest.mark.parametrize("V", (1, 2, 63, 64, 65, 1500))
def test_cpu(V, dtype):
    if dtype == torch.float64:
        logits = torch.randn(3, V, dtype=dtype)
        for setting in SETTINGS:
            for ours, right in zip(logit_filter(logits, *setting), _exact(logits, setting), strict=True):
                assert ((ours == right) | ((ours - right).abs() <= 64 * torch.finfo(dtype).eps * (1 + right.abs()))).all()
    else:
        _check(logit_filter, V, dtype)


@given(st.lists(st.integers(-6, 6), min_size=1, max_size=40), st.integers(0, 42), st.sampled_from([0.2, 0.5, 0.83, 1.0]))
def test_ties_stay_together(values, top_k, top_p):
    """What is kept is what reaches some logit of the row; it holds top_p of the mass, and without the least of it less."""
    logits = torch.tensor([values], dtype=torch.float64) / 2
    threshold, _ = logit_filter(logits, 1.0, top_k, top_p)
    weights = logits[0].exp()
    if 0 < top_k < len(values):
        weights = weights.masked_fill(logits[0] < logits[0].sort(descending=True).values[top_k - 1], 0)
    kept = (logits[0] >= threshold) & (weights > 0)
    eps = len(values) * torch.finfo(torch.float64).eps
    assert kept.any() and weights[kept].sum() >= top_p * weights.sum() * (1 - eps)
    if top_p < 1:
        assert weights[logits[0] > threshold].sum() < top_p * weights.sum() * (1 + eps)


def test_rows_without_a_finite_logit():
    threshold, log_total = logit_filter(torch.tensor([[-math.inf, math.nan], [math.inf, 0.0]]), 1.0, 1, 0.5)
    assert log_total[0] == -math.inf and threshold[1] == torch.tensor(3.0e38)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ((0.0,), "temperature is 0: the argmax"),
        ((-1.0,), "temperature is -1"),
        ((1.0, -2), "top_k is -2"),
        ((1.0, 0, 0.0), "top_p"),
    ],
)
def test_errors(setting, message):
    with pytest.raises(ValueError, match=message):
        logit_filter(torch.zeros(2, 3), *setting)
    with pytest.raises(ValueError, match=r"\(2, 0\); expected"):
        logit_filter(torch.zeros(2, 0))
    with pytest.raises(TypeError, match="int32"):
        logit_filter(torch.zeros(2, 3, dtype=torch.int32))


def test_opcheck():
    logits = torch.randn(3, 50)
    torch.library.opcheck(torch.ops.posttrain.logit_filter, (logits, 0.8, 5, 0.9, None))
    parameters = torch.tensor([[1.0, 0, 1.0], [0.5, 3, 1.0], [2.0, 0, 0.5]], dtype=torch.float64)
    torch.library.opcheck(torch.ops.posttrain.logit_filter, (logits, 1.0, 0, 1.0, parameters))
    each = torch.ops.posttrain.logit_filter(logits, 1.0, 0, 1.0, parameters)
    for i, (t, k, p) in enumerate(parameters.tolist()):
        assert all(torch.equal(a[i : i + 1], b) for a, b in zip(each, logit_filter(logits[i : i + 1], t, int(k), p), strict=True))


def _triton(logits, *setting):
    return logit_filter_triton(logits, *setting, None)


@pytest.mark.interpret
@pytest.mark.parametrize("dtype", (torch.float32, torch.float16))
@pytest.mark.parametrize("V", (1, 65, 2049))
def test_interpreted(V, dtype):
    _check(_triton, V, dtype)


@pytest.mark.emulated
@pytest.mark.parametrize("arch", (80, 90))
@pytest.mark.parametrize(("V", "dtype"), [(70, torch.float16), (5000, torch.bfloat16), (4099, torch.float32)])
def test_emulated(arch, V, dtype):
    four_bit.activate(arch)
    _check(_triton, V, dtype)


@pytest.mark.emulated
def test_emulated_flat_rows():
    """More words than a tile holds are kept: the search reads the row."""
    four_bit.activate(80)
    _check(_triton, 6000, torch.bfloat16, spread=0.25)


@pytest.mark.emulated
@pytest.mark.parametrize(("setting", "instructions"), [((1.0, 0, 1.0), 0.27), ((0.8, 50, 0.95), 0.65)])
def test_emulated_work(setting, instructions):
    """A row is read from memory once, whatever is filtered."""
    from gpuemu import counters

    counters.start(80)
    N, V = 2, 151_936
    logits = (4 * torch.randn(N, V)).bfloat16()
    with counters.record() as recorded:
        _triton(logits, *setting)
    (work,) = recorded.launches
    assert work["dram"] <= 1.01 * 2 * N * V
    assert work["warp_instr_nomov"] / (N * V) <= instructions
    assert work["spill"] == 0


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("V", (1, 4099, 20_000))
def test_on_a_gpu(dtype, V):
    _check(lambda logits, *setting: [t.cpu() for t in logit_filter(logits.cuda(), *setting)], V, dtype)
