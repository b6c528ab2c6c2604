"""SwiGLU: every engine against float64, the oracle, strided halves, and what the compiled kernel moves."""

from __future__ import annotations

import importlib

import four_bit
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from tolerance import assert_as_accurate

from posttrain.kernels import cpu, swiglu
from posttrain.kernels.cpu import pytorch_swiglu
from posttrain.kernels.swiglu import swiglu_backward_triton, swiglu_triton
from posttrain.reference import swiglu as oracle

native = importlib.import_module("posttrain.kernels.cpu.native") if cpu.describe()["engine"] == "native" else None
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
WIDTHS = (1, 63, 64, 65, 511, 513, 1536)
TRITON = swiglu_triton, swiglu_backward_triton
PYTORCH = pytorch_swiglu.swiglu, pytorch_swiglu.swiglu_backward
OPS = torch.ops.posttrain.swiglu, torch.ops.posttrain.swiglu_backward


def _case(N: int, D: int, dtype: torch.dtype):
    """(gate, up, dy), the first two halves of one tensor."""
    generator = torch.Generator().manual_seed(N * D)
    both = (3 * torch.randn(N, 2 * D, generator=generator)).to(dtype)
    return *both.chunk(2, -1), torch.randn(N, D, generator=generator).to(dtype)


def _plain(gate, up, dy):
    """(y, dgate, dup) by PyTorch's operations and autograd."""
    gate, up = gate.clone().requires_grad_(), up.clone().requires_grad_()
    y = F.silu(gate) * up
    y.backward(dy)
    return y.detach(), gate.grad, up.grad


def _check(functions, N: int, D: int, dtype: torch.dtype) -> None:
    gate, up, dy = _case(N, D, dtype)
    given = gate.clone(), up.clone()
    results = functions[0](gate, up), *functions[1](dy, gate, up)
    assert torch.equal(gate, given[0]) and torch.equal(up, given[1])
    exact = _plain(gate.double(), up.double(), dy.double())
    for ours, plain, right in zip(results, _plain(gate, up, dy), exact, strict=True):
        assert ours.dtype == dtype and ours.is_contiguous()
        assert_as_accurate(ours, plain, right)


def test_the_oracle():
    """sigmoid(ln 3) = 3/4; and its gradients by central differences."""
    g = torch.tensor(3.0, dtype=torch.float64).log().item()
    assert oracle.swiglu([g, -g], [2.0, 2.0]) == pytest.approx([1.5 * g, -0.5 * g])
    h = 1e-6
    for g in (-2.0, 0.0, 0.7):
        dgate, dup = oracle.swiglu_backward([1.5], [g], [-0.4])
        ends = [1.5 * oracle.swiglu([g + step], [-0.4])[0] for step in (h, -h)]
        assert (ends[0] - ends[1]) / (2 * h) == pytest.approx(dgate[0], abs=1e-9)
        ends = [1.5 * oracle.swiglu([g], [-0.4 + step])[0] for step in (h, -h)]
        assert (ends[0] - ends[1]) / (2 * h) == pytest.approx(dup[0], abs=1e-9)


@pytest.mark.parametrize("functions", (PYTORCH, OPS))
def test_float64_is_the_oracle_s(functions):
    gate, up, dy = (t.double() for t in _case(1, 65, torch.float32))
    exact = oracle.swiglu(gate[0], up[0]), *oracle.swiglu_backward(dy[0], gate[0], up[0])
    for ours, right in zip((functions[0](gate, up), *functions[1](dy, gate, up)), map(torch.from_numpy, exact), strict=True):
        assert (ours[0] - right).abs().max() <= 16 * torch.finfo(torch.float64).eps * right.abs().max()


@pytest.mark.parametrize("engine", native.levels() if native else ["pytorch"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("D", WIDTHS)
def test_cpu(engine, dtype, D):
    if native is None:
        return _check(PYTORCH, 60, D, dtype)
    before = native.ISA
    native.set_isa(engine)
    try:
        _check(OPS, 60, D, dtype)
    finally:
        native.set_isa(before)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_engine_without_a_compiler(dtype):
    _check(PYTORCH, 60, 300, dtype)


@given(st.floats(-(2.0**60), 2.0**60, width=32), st.floats(-8, 8, width=32))
def test_any_gate(gate, up):
    """silu lies between 0 and the gate where that is positive, and within 0.279 of 0 where it is negative."""
    y = swiglu(torch.tensor([gate]), torch.tensor([1.0])).item()
    assert 0 <= y <= gate if gate > 0 else -0.2785 <= y <= 0
    both = swiglu(torch.tensor([gate]), torch.tensor([up])).double().item()
    assert both == pytest.approx(y * up, rel=2 * torch.finfo(torch.float32).eps, abs=torch.finfo(torch.float32).tiny)


def test_extremes():
    gate = torch.tensor([0.0, torch.inf, -200.0, 200.0, torch.nan])
    assert swiglu(gate, torch.ones(5)).nan_to_num(-1, 7).tolist() == [0.0, 7.0, 0.0, 200.0, -1.0]
    dgate, dup = OPS[1](torch.ones(5), gate, torch.ones(5))
    assert dgate[[0, 2, 3]].tolist() == [0.5, 0.0, 1.0] and dup[[0, 2, 3]].tolist() == [0.0, 0.0, 200.0]
    for shape in ((0, 8), (2, 0)):
        empty = torch.zeros(shape, requires_grad=True)
        swiglu(empty, empty).sum().backward()
        assert empty.grad.shape == shape


def test_strides_and_a_spread_gradient():
    gate, up = (t.requires_grad_() for t in torch.randn(2, 7, 3, 5).transpose(1, 3).contiguous().unbind())
    turned = [t.transpose(0, 2) for t in (gate, up)]
    y = swiglu(*turned)
    assert torch.equal(y, swiglu(*(t.contiguous() for t in turned)))
    found = torch.autograd.grad(y.sum(), (gate, up), retain_graph=True)
    assert all(map(torch.equal, found, torch.autograd.grad(y, (gate, up), torch.ones_like(y))))


def test_errors():
    gate = torch.randn(2, 3, requires_grad=True)
    with pytest.raises(ValueError, match=r"gate \(2, 3\), up \(3,\); expected the same shape"):
        swiglu(gate, torch.ones(3))
    with pytest.raises(TypeError, match="up torch.bfloat16; cast"):
        swiglu(gate, gate.bfloat16())
    (dgate,) = torch.autograd.grad(swiglu(gate, torch.ones(2, 3)).square().sum(), gate, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        dgate.sum().backward()


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_opcheck_and_compile(dtype):
    gate, up, dy = _case(3, 70, dtype)
    torch.library.opcheck(OPS[0], (gate.clone().requires_grad_(), up.clone().requires_grad_()))
    torch.library.opcheck(OPS[1], (dy, gate, up))
    compiled = torch.compile(lambda *tensors: swiglu(*tensors), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(gate, up), swiglu(gate, up))


@pytest.mark.interpret
@pytest.mark.parametrize("dtype", (torch.float32, torch.float16))
@pytest.mark.parametrize("D", (1, 63, 64, 65, 1023, 1024, 1025, 3000))
def test_interpreted(dtype, D):
    _check(TRITON, 5, D, dtype)


@pytest.mark.emulated
@pytest.mark.parametrize("arch", (80, 90))
@pytest.mark.parametrize(
    ("dtype", "D"), [(torch.bfloat16, 1536), (torch.bfloat16, 67), (torch.float16, 1024), (torch.float32, 2064)]
)
def test_emulated(arch, dtype, D):
    four_bit.activate(arch)
    _check(TRITON, 5, D, dtype)


@pytest.mark.emulated
def test_emulated_work():
    """Every element is read once and written once."""
    from gpuemu import counters

    counters.start(80)
    N, D = 16, 4096
    gate, up, dy = _case(N, D, torch.bfloat16)
    with counters.record() as recorded:
        swiglu_triton(gate, up)
        swiglu_backward_triton(dy, gate, up)
    forward, backward = recorded.launches
    assert forward["dram"] <= 1.1 * 3 * 2 * N * D and backward["dram"] <= 1.1 * 5 * 2 * N * D
    assert forward["spill"] == backward["spill"] == 0
    assert forward["occ"]["A100"][2] >= 0.5 and backward["occ"]["A100"][2] >= 0.5


@pytest.mark.aot
@pytest.mark.parametrize("target", ("sm_80", "sm_90", "sm_100", "gfx942"))
def test_halves_are_read_128_bits_wide(target):
    from posttrain.kernels import _aot

    width = 64 if target == "gfx942" else 128  # a wavefront of 64 needs fewer bits a lane
    for variant in _aot.variants():
        if variant.name in ("swiglu_bf16", "swiglu_backward_bf16"):
            found = _aot.report(variant, target)
            assert min(max(found.loads), max(found.stores)) >= width and found.spills == 0, found


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("D", (1, 1025, 8192))
def test_on_a_gpu(dtype, D):
    def forward(gate, up):
        return OPS[0](gate.cuda(), up.cuda()).cpu()

    def backward(*given):
        return [t.cpu() for t in OPS[1](*(t.cuda() for t in given))]

    _check((forward, backward), 60, D, dtype)
