"""Rows of logits: every engine against the oracle, tails, labels, infinities, and what the compiled kernel moves."""

from __future__ import annotations

import math
import sys

import four_bit
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tolerance import assert_as_accurate

from posttrain.kernels import cpu
from posttrain.kernels.cpu import pytorch_logits
from posttrain.kernels.logit_rows import logit_rows_triton
from posttrain.reference import logit_rows as oracle

native = pytest.importorskip("posttrain.kernels.cpu.native") if cpu.describe()["engine"] == "native" else None
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
WIDTHS = (1, 2, 63, 64, 65, 2047, 2048, 2049, 5000)


def _case(N: int, V: int, dtype: torch.dtype):
    """Logits as a model gives them, the label of row 1 left out where there is one."""
    generator = torch.Generator().manual_seed(N * V)
    logits = (6 * torch.randn(N, V, generator=generator)).to(dtype)
    labels = torch.randint(V, (N,), generator=generator)
    labels[1:2] = -100
    return logits, labels


def _plain(logits, labels, gradient: bool, wide=torch.float32):
    """log_softmax in `wide` and autograd's gradient, rounded to the logits' dtype."""
    z = logits.to(wide)
    keep = labels != -100
    log_p = torch.log_softmax(z, 1)
    label = labels.where(keep, 0)[:, None]
    logprobs = log_p.gather(1, label)[:, 0].where(keep, 0)
    entropy = -(log_p.exp() * log_p.where(log_p > -torch.inf, 0)).sum(1).where(keep, 0)
    dz = (torch.zeros_like(z).scatter_(1, label, 1.0) - torch.softmax(z, 1)).where(keep[:, None], 0)
    return logprobs, entropy, dz.to(logits.dtype if wide == torch.float32 else wide) if gradient else logits


def _check(rows, N: int, V: int, dtype: torch.dtype) -> None:
    for gradient in (False, True):
        logits, labels = _case(N, V, dtype)
        given = logits.clone()
        logprobs, entropy = rows(given, labels, -100, gradient, True)
        plain, exact = _plain(logits, labels, gradient), _plain(logits, labels, gradient, torch.float64)
        for ours, theirs, right in zip((logprobs, entropy, given), plain, exact, strict=True):
            assert_as_accurate(ours, theirs, right)


def test_the_oracle():
    """Two logits ln 3 apart: p = (3/4, 1/4); and its gradient by central differences."""
    logprob, entropy, gradient = oracle.logit_row([math.log(3), 0.0], 0)
    eps = 8 * sys.float_info.epsilon
    assert logprob == pytest.approx(math.log(0.75), rel=eps)
    assert entropy == pytest.approx(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25)), rel=eps)
    assert gradient == pytest.approx([0.25, -0.25], rel=eps)
    z, h = [0.3, -1.2, 2.0, 0.7], 1e-6  # the quotient errs by h^2 and by the logits' rounding over h, about 4e-10
    for v in range(4):
        ends = [oracle.logit_row([x + s * (i == v) for i, x in enumerate(z)], 2)[0] for s in (h, -h)]
        assert (ends[0] - ends[1]) / (2 * h) == pytest.approx(oracle.logit_row(z, 2)[2][v], abs=1e-9)


@pytest.mark.parametrize("V", (1, 2, 65))
def test_float64_is_the_oracle_s(V):
    logits, labels = _case(3, V, torch.float64)
    given = logits.clone()
    logprobs, entropy = torch.ops.posttrain.logit_rows(given, labels, -100, True, True)
    for t in (0, 2):
        logprob, h, gradient = oracle.logit_row(logits[t].tolist(), int(labels[t]))
        ours = torch.cat([logprobs[t : t + 1], entropy[t : t + 1], given[t]])
        exact = torch.cat([torch.tensor([logprob, h], dtype=torch.float64), torch.from_numpy(gradient)])
        assert ((ours - exact).abs() <= 64 * torch.finfo(torch.float64).eps * (1 + abs(logprob))).all()


@pytest.mark.parametrize("engine", native.levels() if native else ["pytorch"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("V", WIDTHS)
def test_cpu(engine, dtype, V):
    if native is None:
        return _check(pytorch_logits.logit_rows, 5, V, dtype)
    before = native.ISA
    native.set_isa(engine)
    try:
        _check(torch.ops.posttrain.logit_rows, 5, V, dtype)
    finally:
        native.set_isa(before)


def test_the_engine_without_a_compiler():
    for dtype in DTYPES:
        _check(pytorch_logits.logit_rows, 21, 300, dtype)


@given(st.lists(st.floats(-(2.0**90), 2.0**90, width=32), min_size=1, max_size=80), st.data())
def test_any_logits(values, data):
    """Far apart or equal: log p is never above 0 by more than a rounding, p sums to 1, and the label's gradient is 1 - p."""
    logits = torch.tensor([values])
    label = data.draw(st.integers(0, len(values) - 1))
    given = logits.clone()
    logprobs, entropy = torch.ops.posttrain.logit_rows(given, torch.tensor([label]), -100, True, True)
    eps = torch.finfo(torch.float32).eps
    assert logprobs.item() <= len(values) * eps and entropy.item() >= -len(values) * eps
    assert abs(given.double().sum().item()) <= len(values) * eps
    assert given[0, label].item() == pytest.approx(1 - logprobs.exp().item(), abs=(2 + abs(values[label])) * eps)


def test_a_logit_of_minus_infinity_counts_nothing():
    logits, labels = _case(2, 100, torch.float32)
    masked = torch.cat([logits, torch.full((2, 7), -torch.inf)], 1)
    expected = torch.ops.posttrain.logit_rows(logits, labels, -100, True, True)
    ours = torch.ops.posttrain.logit_rows(masked, labels, -100, True, True)
    for a, b in zip(ours, expected, strict=True):
        assert torch.allclose(a, b, rtol=4 * torch.finfo(torch.float32).eps)
    assert (masked[:, 100:].abs() <= torch.finfo(torch.float32).tiny).all()


def test_nan_shows():
    logits, labels = _case(3, 70, torch.float32)
    logits[2, 5] = torch.nan
    logprobs, _ = torch.ops.posttrain.logit_rows(logits, labels, -100, False, True)
    assert logprobs.isnan().tolist() == [False, False, True]


def test_labels_outside_the_vocabulary():
    logits, labels = _case(3, 10, torch.float32)
    for wrong in (10, -1, 2**40):
        labels[2] = wrong
        with pytest.raises(ValueError, match=f"label {wrong} of row 2 is outside the vocabulary of 10"):
            torch.ops.posttrain.logit_rows(logits, labels, -100, False, True)


def test_opcheck():
    logits, labels = _case(3, 50, torch.bfloat16)
    torch.library.opcheck(torch.ops.posttrain.logit_rows, (logits, labels, -100, True, True))


@pytest.mark.interpret
@pytest.mark.parametrize("dtype", (torch.float32, torch.float16))
@pytest.mark.parametrize("V", (1, 64, 4095, 4097))
def test_interpreted(dtype, V):
    _check(logit_rows_triton, 24, V, dtype)


EMULATED = (torch.bfloat16, 8192), (torch.bfloat16, 4099), (torch.float16, 70), (torch.float32, 5000)


@pytest.mark.emulated
@pytest.mark.parametrize("arch", (80, 90))
@pytest.mark.parametrize(
    ("dtype", "V"), [(torch.bfloat16, 8192), (torch.bfloat16, 4099), (torch.float16, 70), (torch.float32, 5000)]
)
def test_emulated(arch, dtype, V):
    four_bit.activate(arch)
    _check(logit_rows_triton, 16, V, dtype)


@pytest.mark.emulated
@pytest.mark.parametrize(("gradient", "instructions"), [(False, 0.53), (True, 0.60)])
def test_emulated_work(gradient, instructions):
    """A logit is read from memory once and written once, the second read being the cache's. Warp instructions a logit stay below
    those of TRL's forward kernel, and with the gradient below those of its backward kernel alone, measured the same way."""
    from gpuemu import counters

    counters.start(80)
    N, V = 16, 32768
    logits, labels = _case(N, V, torch.bfloat16)
    with counters.record() as recorded:
        logit_rows_triton(logits, labels, -100, gradient, False)
    (work,) = recorded.launches
    assert work["dram"] <= 1.1 * 2 * N * V * (1 + gradient)
    assert work["warp_instr_nomov"] / (N * V) <= instructions
    assert work["spill"] == 0 and work["occ"]["A100"][2] >= 0.5


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("V", (1, 4097, 151_936))
def test_on_a_gpu(dtype, V):
    def rows(logits, labels, *options):
        there = logits.cuda()
        results = torch.ops.posttrain.logit_rows(there, labels.cuda(), *options)
        logits.copy_(there)
        return [t.cpu() for t in results]

    _check(rows, 5, V, dtype)
