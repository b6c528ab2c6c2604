"""RMSNorm: every engine against float64, the oracle, tails and strides, and what the compiled kernel moves."""

from __future__ import annotations

import importlib
import re

import four_bit
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tolerance import assert_as_accurate

from posttrain.kernels import cpu, rms_norm
from posttrain.kernels.cpu import pytorch_rms_norm
from posttrain.kernels.rms_norm import rms_norm_backward_triton, rms_norm_triton
from posttrain.reference import rms_norm as oracle

native = importlib.import_module("posttrain.kernels.cpu.native") if cpu.describe()["engine"] == "native" else None
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
WIDTHS = (1, 63, 64, 65, 1023, 1025, 2500)
EPS = 1e-5
TRITON = rms_norm_triton, rms_norm_backward_triton
PYTORCH = pytorch_rms_norm.rms_norm, pytorch_rms_norm.rms_norm_backward
OPS = torch.ops.posttrain.rms_norm, torch.ops.posttrain.rms_norm_backward


def _case(N: int, D: int, dtype: torch.dtype):
    """(x, weight, dy), x of rows that lie apart and the weight around 1."""
    generator = torch.Generator().manual_seed(N * D)
    x = torch.randn(N, D + 5, generator=generator).to(dtype)[:, :D]
    weight = (0.5 + torch.rand(D, generator=generator)).to(dtype)
    return x, weight, torch.randn(N, D, generator=generator).to(dtype)


def _plain(x, weight, dy):
    """(y, rstd, dx, dweight) by the paper's equation and autograd, in x's dtype but for Hugging Face's float32 within."""
    x, weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    rstd = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)
    y = weight * (wide * rstd).to(x.dtype)
    y.backward(dy)
    return y.detach(), rstd.detach()[:, 0], x.grad, weight.grad


def _check(functions, N: int, D: int, dtype: torch.dtype) -> None:
    forward, backward = functions
    x, weight, dy = _case(N, D, dtype)
    y, rstd = forward(x, weight, EPS)
    dx, dweight = backward(dy, x, weight, rstd, True)
    assert [t.dtype for t in (y, rstd, dx, dweight)] == [dtype, torch.float32, dtype, dtype]
    exact = _plain(x.double(), weight.double(), dy.double())
    for ours, plain, right in zip((y, rstd, dx, dweight), _plain(x, weight, dy), exact, strict=True):
        assert_as_accurate(ours, plain, right)
    alone, nothing = backward(dy, x, weight, rstd, False)
    assert torch.equal(alone, dx) and nothing.numel() == 0


def test_the_oracle():
    """x = (3, 4), w = (1, 2): the mean square is 12.5; and its gradients by central differences."""
    y, rstd = oracle.rms_norm([[3.0, 4.0]], [1.0, 2.0], 0.0)
    assert rstd[0] == pytest.approx(12.5**-0.5) and y[0] == pytest.approx([3 / 12.5**0.5, 8 / 12.5**0.5])
    x, weight, dy = (t.double().numpy() for t in _case(2, 3, torch.float32))
    dx, dweight = oracle.rms_norm_backward(dy, x, weight, oracle.rms_norm(x, weight, EPS)[1])
    h = 1e-6
    for k in range(3):
        for i in range(2):
            ends = []
            for step in (h, -h):
                moved = x.copy()
                moved[i, k] += step
                ends.append((oracle.rms_norm(moved, weight, EPS)[0] * dy).sum())
            assert (ends[0] - ends[1]) / (2 * h) == pytest.approx(dx[i, k], abs=1e-8)
        ends = []
        for step in (h, -h):
            moved = weight.copy()
            moved[k] += step
            ends.append((oracle.rms_norm(x, moved, EPS)[0] * dy).sum())
        assert (ends[0] - ends[1]) / (2 * h) == pytest.approx(dweight[k], abs=1e-8)


@pytest.mark.parametrize("functions", (PYTORCH, OPS))
def test_float64_is_the_oracle_s(functions):
    x, weight, dy = (t.double() for t in _case(4, 65, torch.float32))
    y, rstd = functions[0](x, weight, EPS)
    exact = oracle.rms_norm(x, weight, EPS)
    expected = *exact, *oracle.rms_norm_backward(dy, x, weight, exact[1])
    both = zip((y, rstd, *functions[1](dy, x, weight, rstd, True)), expected, strict=True)
    for ours, right in both:
        right = torch.from_numpy(right)
        assert ours.shape == right.shape
        assert (ours - right).abs().max() <= 65 * torch.finfo(torch.float64).eps * right.abs().max()


@pytest.mark.parametrize("engine", native.levels() if native else ["pytorch"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("D", WIDTHS)
def test_cpu(engine, dtype, D):
    if native is None:
        return _check(PYTORCH, 40, D, dtype)
    before = native.ISA
    native.set_isa(engine)
    try:
        _check(OPS, 40, D, dtype)
    finally:
        native.set_isa(before)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_engine_without_a_compiler(dtype):
    _check(PYTORCH, 40, 300, dtype)


def test_the_same_bits_however_many_threads():
    x, weight, dy = _case(500, 320, torch.bfloat16)
    before, found = torch.get_num_threads(), []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        y, rstd = OPS[0](x, weight, EPS)
        found.append((y, rstd, *OPS[1](dy, x, weight, rstd, True)))
    torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@given(st.floats(0.01, 100), st.integers(1, 130))
def test_the_scale_of_x_does_not_matter(scale, D):
    x = torch.randn(3, D, dtype=torch.float64)
    weight = torch.rand(D, dtype=torch.float64)
    ours, same = (rms_norm(t, weight, 0.0) for t in (x * scale, x))
    assert (ours - same).abs().max() <= 8 * D * torch.finfo(torch.float64).eps * same.abs().max()


@pytest.mark.parametrize("dtype", DTYPES)
def test_strides_and_mixed_dtypes(dtype):
    """Heads of a fused projection, a gradient that is one number for all, a float32 weight, a transposed x."""
    x = torch.randn(2, 3, 8, 16).to(dtype).narrow(2, 1, 4).requires_grad_()
    weight = torch.rand(16)
    y = rms_norm(x, weight)
    assert torch.equal(y, rms_norm(x.contiguous(), weight)) and y.dtype == dtype
    (spread,) = torch.autograd.grad(y.sum(), x, retain_graph=True)
    (same,) = torch.autograd.grad(y, x, torch.ones_like(y))
    assert torch.equal(spread, same)
    turned = torch.randn(16, 5).to(dtype).t()
    assert torch.equal(rms_norm(turned, weight), rms_norm(turned.contiguous(), weight))


def test_one_row_without_a_dimension_of_rows():
    for dtype in (torch.float32, torch.float64):
        x, weight = torch.randn(7, dtype=dtype), torch.randn(7, dtype=dtype)
        results = []
        for rows in (x, x[None]):
            leaf = weight.clone().requires_grad_()
            y = rms_norm(rows, leaf, 1e-5)
            results.append((y.detach().flatten(), *torch.autograd.grad(y.sum(), leaf)))
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_extremes():
    weight = torch.ones(8)
    assert torch.equal(rms_norm(torch.zeros(3, 8), weight, EPS), torch.zeros(3, 8))
    x = torch.randn(3, 8)
    x[1, 2] = torch.nan
    assert rms_norm(x, weight).isnan().all(1).tolist() == [False, True, False]
    assert rms_norm(torch.full((3, 8), 30000.0).half(), weight.half()).eq(1).all()
    for shape in ((0, 8), (2, 0, 8), (4, 0)):
        empty, weight = torch.zeros(shape, requires_grad=True), torch.ones(shape[-1], requires_grad=True)
        y = rms_norm(empty, weight)
        y.sum().backward()
        assert y.shape == empty.grad.shape == shape and torch.equal(weight.grad, torch.zeros(shape[-1]))


def test_errors():
    x = torch.randn(2, 3, requires_grad=True)
    with pytest.raises(ValueError, match=r"x \(2, 3\), weight \(2,\); expected"):
        rms_norm(x, torch.ones(2))
    (dx,) = torch.autograd.grad(rms_norm(x, torch.ones(3)).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        dx.sum().backward()


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_opcheck_and_compile(dtype):
    x, weight, dy = _case(5, 70, dtype)
    rstd = OPS[0](x, weight, EPS)[1]
    torch.library.opcheck(OPS[0], (x.clone().requires_grad_(), weight.clone().requires_grad_(), EPS))
    for need_weight in (False, True):
        torch.library.opcheck(OPS[1], (dy, x, weight, rstd, need_weight))
    compiled = torch.compile(lambda *tensors: rms_norm(*tensors, EPS), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, weight), rms_norm(x, weight, EPS))


@pytest.mark.interpret
@pytest.mark.parametrize("dtype", (torch.float32, torch.float16))
@pytest.mark.parametrize("D", (1, 63, 64, 65, 576, 1025))
def test_interpreted(dtype, D):
    _check(TRITON, 19, D, dtype)


@pytest.mark.emulated
@pytest.mark.parametrize("arch", (80, 90))
@pytest.mark.parametrize(
    ("dtype", "D"),
    [(torch.bfloat16, 1024), (torch.bfloat16, 67), (torch.float16, 128), (torch.float32, 576), (torch.bfloat16, 8192)],
)
def test_emulated(arch, dtype, D):
    four_bit.activate(arch)
    _check(TRITON, 19, D, dtype)


@pytest.mark.emulated
@pytest.mark.parametrize("need_weight", (False, True))
def test_emulated_work(need_weight):
    """A row is read from memory once and written once."""
    from gpuemu import counters

    counters.start(80)
    N, D = 64, 4096
    x, weight, dy = (t.contiguous() for t in _case(N, D, torch.bfloat16))
    with counters.record() as recorded:
        rstd = rms_norm_triton(x, weight, EPS)[1]
        rms_norm_backward_triton(dy, x, weight, rstd, need_weight)
    forward, backward = recorded.launches
    assert forward["dram"] <= 1.1 * (2 * 2 * N * D + 2 * D + 4 * N)
    assert backward["dram"] <= 1.1 * (3 * 2 * N * D + 2 * D + 4 * N + 4 * D * (N // 8) * need_weight)
    assert forward["spill"] == backward["spill"] == 0


@pytest.mark.aot
@pytest.mark.parametrize("target", ("sm_80", "sm_90", "sm_100", "gfx942"))
def test_rows_are_read_128_bits_wide(target):
    from posttrain.kernels import _aot

    width = 64 if target == "gfx942" else 128  # a wavefront of 64 needs fewer bits a lane
    for variant in _aot.variants():
        if re.fullmatch("rms_norm_(backward_)?bf16_8192(_dweight)?", variant.name):
            found = _aot.report(variant, target)
            assert min(max(found.loads), max(found.stores)) >= width and found.spills == 0, found


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("D", (1, 577, 4096, 8193))
def test_on_a_gpu(dtype, D):
    def there(function):
        def run(*given):
            results = function(*(t.cuda() if isinstance(t, torch.Tensor) else t for t in given))
            return [t.cpu() for t in results]

        return run

    _check([there(op) for op in OPS], 40, D, dtype)
